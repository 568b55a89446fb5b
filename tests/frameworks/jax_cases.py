"""lax.ragged_dot's documented meaning, and Flax's linear layers, in FP8 beside the plain ones.

jax_own_cases.py and flax_cases.py run the tests of these projects. These cases add gradients.
"""

import functools

import common
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from jax_fp8gemm import fp8_dot_general, fp8_ragged_dot


def close(actual, expected) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
    common.close(actual, expected)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)


# ---- lax.ragged_dot -----------------------------------------------------------------------------

SIZES = {
    "even": [8, 8, 8], "odd": [5, 17, 2], "empty": [0, 24, 0], "first": [24, 0, 0],
    "short": [3, 4, 5], "none": [0, 0, 0],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SIZES)
def test_groups(name, dtype):
    x, w, sizes = normal(24, 64, dtype=dtype), normal(3, 64, 48, dtype=dtype), SIZES[name]
    args = x, w, jnp.array(sizes)
    close(fp8_ragged_dot(*args), jax.lax.ragged_dot(*args))


@pytest.mark.parametrize("integer", [jnp.int8, jnp.int32, jnp.uint8, jnp.uint32])
def test_types_of_group_sizes(integer):
    args = normal(24, 64), normal(3, 64, 48), jnp.array([5, 17, 2], integer)
    close(fp8_ragged_dot(*args), jax.lax.ragged_dot(*args))


@pytest.mark.parametrize("lhs", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rhs", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("out", [jnp.bfloat16, jnp.float32])
def test_preferred_element_type(lhs, rhs, out):
    x, w, sizes = normal(24, 64, dtype=lhs), normal(3, 64, 48, dtype=rhs), jnp.array([5, 17, 2])
    expected = jax.lax.ragged_dot(x.astype("f4"), w.astype("f4"), sizes).astype(out)
    close(fp8_ragged_dot(x, w, sizes, preferred_element_type=out), expected)


@pytest.mark.parametrize("name", SIZES)
def test_gradients(name):
    sizes = jnp.array(SIZES[name])

    def gradients(dot):
        loss = lambda x, w: (dot(x, w, sizes) * normal(24, 48)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(normal(24, 64), normal(3, 64, 48))

    close(gradients(fp8_ragged_dot), gradients(jax.lax.ragged_dot))


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (0, 0, None), (None, 0, None)])
def test_vmap(axes):
    x, w, sizes = normal(2, 24, 64), normal(2, 3, 64, 48), jnp.array([[5, 17, 2], [1, 2, 3]])
    args = [a if axis == 0 else a[0] for a, axis in zip((x, w, sizes), axes, strict=True)]
    each = [[a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)] for i in (0, 1)]
    expected = jnp.stack([jax.lax.ragged_dot(*one) for one in each])  # lax has no vmap of some axes
    close(jax.jit(jax.vmap(fp8_ragged_dot, axes))(*args), expected)


REFUSED = {
    "highest precision": ({"precision": "highest"}, {}),
    "precision of float32": ({"precision": jax.lax.DotAlgorithmPreset.F32_F32_F32}, {}),
    "integers": ({}, {"dtype": jnp.int32}),
    "float8 operands": ({}, {"dtype": jnp.float8_e4m3fn}),
    "a result of integers": ({"preferred_element_type": jnp.int32}, {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    how, made = REFUSED[name]
    x, w = normal(24, 64, **made), normal(3, 64, 48, **made)
    with pytest.raises((NotImplementedError, TypeError)) as error:
        fp8_ragged_dot(x, w, jnp.array([5, 17, 2]), **how)
    pytest.skip(f"refused: {name}: {str(error.value).splitlines()[0]}")


# ---- flax ---------------------------------------------------------------------------------------

LAYERS = {
    "Linear": (lambda **kw: nnx.Linear(64, 48, rngs=nnx.Rngs(0), **kw), (2, 12, 64)),
    "Linear in bf16": (
        lambda **kw: nnx.Linear(64, 48, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **kw), (12, 64)
    ),
    "LinearGeneral": (
        lambda **kw: nnx.LinearGeneral((4, 16), (3, 8), axis=(-2, -1), rngs=nnx.Rngs(0), **kw),
        (2, 12, 4, 16),
    ),
    "LinearGeneral with a batch": (
        lambda **kw: nnx.LinearGeneral(64, 48, batch_axis={0: 2}, rngs=nnx.Rngs(0), **kw),
        (2, 12, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_nnx(name):
    make, shape = LAYERS[name]
    x = normal(*shape)
    layers = make(dot_general=fp8_dot_general), make()
    close(*(layer(x) for layer in layers))
    grad = nnx.grad(lambda layer: (layer(x) ** 2).sum())
    close(*(jax.tree.leaves(nnx.to_pure_dict(grad(layer))) for layer in layers))


@pytest.mark.parametrize("name", ["Dense", "DenseGeneral"])
def test_linen(name):
    make = {
        "Dense": functools.partial(linen.Dense, 48),
        "DenseGeneral": functools.partial(linen.DenseGeneral, (3, 8), axis=(-1,)),
    }[name]
    x, plain = normal(2, 12, 64), make()
    params = plain.init(jax.random.key(0), x)
    close(make(dot_general=fp8_dot_general).apply(params, x), plain.apply(params, x))
