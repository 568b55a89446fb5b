"""tokamax's implementation: called through tokamax, it is fp8_ragged_dot, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import pytest
from adapters import equal, load, normal

import jax_fp8gemm as fp8


def test_tokamax_calls_fp8(key):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    import tokamax

    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 11])

    def product(x, w, **kw):
        return tokamax.ragged_dot(x, w, sizes, implementation=[adapter], **kw)

    equal(product(x, w), fp8.fp8_ragged_dot(x, w, sizes))
    bf16 = {"preferred_element_type": jnp.bfloat16}
    equal(product(x, w, **bf16), fp8.fp8_ragged_dot(x, w, sizes, **bf16))
    expected = jax.nn.silu(fp8.fp8_ragged_dot(x, w, sizes)).astype(jnp.bfloat16)
    equal(product(x, w, activation=jax.nn.silu, **bf16), expected)
    equal(*(
        jax.jit(jax.grad(lambda x, w, f=f: (f(x, w) ** 2).sum(), (0, 1)))(x, w)
        for f in (product, lambda x, w: fp8.fp8_ragged_dot(x, w, sizes))
    ))  # fmt: skip


def test_tokamax_goes_on_where_fp8_stops(key, monkeypatch):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    import qwix
    import tokamax

    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 17])
    q = qwix.quantize(w, jnp.int8, channelwise_axes=(0, 2))
    with pytest.raises(NotImplementedError, match="quantizes floats itself"):
        tokamax.ragged_dot(x, q, sizes, implementation=[adapter])
    monkeypatch.setattr("sys.argv", ["tokamax"])  # its own implementations parse it
    chosen = tokamax.ragged_dot(x, q, sizes, implementation=[adapter, "xla"])
    equal(chosen, tokamax.ragged_dot(x, q, sizes, implementation="xla"))


@pytest.mark.parametrize("held", [slice(0, 2), slice(1, 3)])
def test_tokamax_groups_from_an_offset(key, held):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 11])
    call = functools.partial(
        adapter,
        x,
        w[held],
        group_sizes=sizes,
        ragged_dot_dimension_numbers=general(([1], [1]), [0]),
        group_offset=jnp.array([held.start]),
    )
    expected = fp8.fp8_ragged_dot(x, w[held], sizes, group_offset=held.start)
    equal(call(zero_initialize=True), expected)
    with pytest.raises(NotImplementedError, match="no fuse_gateup_activation"):
        call(fuse_gateup_activation="silu")
    with pytest.raises(NotImplementedError, match="FP8 has one precision"):
        call(precision=jax.lax.Precision.HIGHEST)


def general(contracting, group) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )


def test_tokamax_transposed_matrices(key):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    from tokamax import RaggedDotGroupSizes

    x, w = normal(key, 24, 64), normal(key, 3, 48, 64)
    sizes = RaggedDotGroupSizes(jnp.array([7, 0, 11]), 24)
    y = adapter(
        x, w, group_sizes=sizes, ragged_dot_dimension_numbers=general(([1], [2]), [0])
    )  # fmt: skip
    equal(y, fp8.fp8_ragged_dot(x, w.swapaxes(1, 2), sizes.value))
    with pytest.raises(NotImplementedError, match="groups of rows alone"):
        adapter(x, x, group_sizes=sizes, ragged_dot_dimension_numbers=general(([0], [0]), []))
