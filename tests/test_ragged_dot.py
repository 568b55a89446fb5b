"""fp8_ragged_dot(lhs, rhs, group_sizes, precision, preferred_element_type, group_offset): the
signature of lax.ragged_dot. With an offset, rows of rhs's groups are those of the whole product."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_model import quantized
from jax.sharding import AxisType
from numerics import calc_diff

import jax_fp8gemm as fp8
from jax_fp8gemm import fp8_ragged_dot

SIZES = jnp.array([7, 0, 9, 12, 6])
EXPLICIT, AUTO = (AxisType.Explicit,), (AxisType.Auto,)


def operands(key, g: int = 5):
    lhs, rhs = jax.random.split(key)
    x = jax.random.normal(lhs, (40, 32), jnp.bfloat16)
    return x, jax.random.normal(rhs, (g, 32, 16), jnp.bfloat16)


def test_the_signature_is_that_of_lax():
    ours, theirs = (inspect.signature(f).parameters for f in (fp8_ragged_dot, jax.lax.ragged_dot))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)


@pytest.mark.parametrize("offset, count", [(0, 2), (2, 2), (4, 1), (3, 2), (-1, 2), (9, 2)])
def test_rows_of_other_groups_are_zero_and_not_read(key, offset, count):
    x, w = operands(key)
    held = jnp.clip(offset + jnp.arange(count), 0, 4)
    first, last = (int(SIZES[: max(end, 0)].sum()) for end in (offset, offset + count))
    rows = np.arange(40)[:, None]
    own = (rows >= first) & (rows < last)
    expected = np.where(own, np.asarray(fp8_ragged_dot(x, w, SIZES)), 0)
    x = jnp.where(own, x, jnp.nan)
    for given in (jnp.array([offset]), jnp.array(offset), offset):
        y = fp8_ragged_dot(x, w[held], SIZES, group_offset=given)
        np.testing.assert_array_equal(y, expected)


def test_gradients_with_an_offset_are_those_of_its_own_rows(key):
    x, w = operands(key)

    def loss(multiply, x, w):
        return (multiply(x, w).astype(jnp.float32) ** 2).sum()

    whole = functools.partial(loss, lambda x, w: fp8_ragged_dot(x, w, SIZES, group_offset=2))
    alone = functools.partial(loss, lambda x, w: fp8_ragged_dot(x[7:28], w, SIZES[2:4]))
    got, expected = (jax.grad(run, (0, 1))(x, w[2:4]) for run in (whole, alone))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def in_fp8(a, tile) -> np.ndarray:
    """Returns what FP8 copies of matrices [g, rows, columns] stand for, in float64."""
    return np.stack([quantized(matrix, tile) for matrix in a])


def as_they_are(a, tile) -> np.ndarray:
    return a


def products(x, w, dh, cast) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients to x and w of each group in float64, from operands cast by `cast`."""
    swap = lambda a: a.swapaxes(1, 2)  # noqa: E731
    dx = cast(dh, (1, 128)) @ swap(cast(w, (128, 128)))
    return dx, cast(swap(x), (1, 128)) @ swap(cast(swap(dh), (1, 128)))


def test_gradients_behind_a_relu():
    """tokamax's test_vjp16, whose gradients differ from float32's by 4e-3: FP8's own error.

    Rounding operands changes the sign of one result in 85, and so where the slope of relu is one.
    Against float64 of the dequantized operands nothing is left but the rounding to bf16.
    """
    g, rows, k, n = 8, 16, 128, 128
    rng = np.random.default_rng(sum(b"test_vjp16"))
    x, w = (
        jnp.asarray(rng.normal(0, 0.1, shape).astype(np.float32), jnp.bfloat16)
        for shape in ((g * rows, k), (g, k, n))
    )
    sizes = jnp.full(g, rows)
    run = lambda x, w: jax.nn.relu(fp8_ragged_dot(x, w, sizes, None, jnp.float32))  # noqa: E731
    y, pull = jax.vjp(run, x, w)
    each = [np.asarray(a, np.float64) for a in (x.reshape(g, rows, k), w)]
    exact, rounded = each[0] @ each[1], in_fp8(each[0], (1, 128)) @ in_fp8(each[1], (128, 128))
    assert calc_diff(y.reshape(rounded.shape), np.maximum(rounded, 0)) < 1e-10
    dy = jax.nn.standardize(jnp.asarray(np.maximum(exact, 0), jnp.float32))
    dy = dy.astype(jnp.bfloat16).astype(jnp.float32)
    got = [a.reshape(b.shape) for a, b in zip(pull(dy.reshape(y.shape)), each, strict=True)]

    ones, ones8 = exact > 0, rounded > 0
    assert 0.01 < (ones != ones8).mean() < 0.015
    dy = np.asarray(dy, np.float64)
    expected = products(*each, dy * ones, as_they_are)
    for a, b, dequantized in zip(got, expected, products(*each, dy * ones8, in_fp8), strict=True):
        assert calc_diff(a, dequantized) < 5e-6
        assert calc_diff(a, b) > 2.9e-3
    for a, b in zip(products(*each, dy * ones, in_fp8), expected, strict=True):
        assert calc_diff(a, b) < 7e-4  # FP8 with float32's signs
    for a, b in zip(products(*each, dy * ones8, as_they_are), expected, strict=True):
        assert calc_diff(a, b) > 2.3e-3  # the signs alone


def test_a_prepared_weight_and_a_batch_of_offsets(key):
    x, w = operands(key)
    prepared = fp8.prepare_weight(w[:1])
    each = jax.vmap(lambda i, one: fp8_ragged_dot(x, one[None], SIZES, group_offset=i))
    np.testing.assert_array_equal(each(jnp.arange(5), w).sum(0), fp8_ragged_dot(x, w, SIZES))
    first = fp8_ragged_dot(x, prepared, SIZES, group_offset=0)
    np.testing.assert_array_equal(first, each(jnp.arange(1), w[:1])[0])


def test_devices_that_hold_two_experts_each(key):
    """MaxText's ring of experts: every device has all rows, and group_offset says whose are its."""
    x, w = operands(key, 8)
    sizes = jnp.array([3, 4, 0, 6, 7, 9, 2, 5])
    mesh = jax.make_mesh((4,), ("e",), axis_types=AUTO)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("e"), jax.P()), out_specs=jax.P()
    )
    def ring(x, w, sizes):
        first = 2 * jax.lax.axis_index("e")
        return jax.lax.psum(fp8_ragged_dot(x, w, sizes, group_offset=first), "e")

    np.testing.assert_array_equal(ring(x, w, sizes), fp8_ragged_dot(x, w, sizes))


@pytest.mark.parametrize("kinds", [EXPLICIT, AUTO])
def test_out_sharding(key, kinds):
    x, w = operands(key)
    expected = fp8_ragged_dot(x, w[1:], SIZES, group_offset=1)
    mesh = jax.make_mesh((4,), ("x",), axis_types=kinds)
    at = jax.NamedSharding(mesh, jax.P(None, "x"))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x", None)))
        w = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
        run = jax.jit(
            lambda at: fp8_ragged_dot(x, w[1:], SIZES, group_offset=1, out_sharding=at),
            static_argnums=0,
        )
        for asked in (at, at.spec):
            y = run(asked)
            assert y.sharding.is_equivalent_to(at, 2)
            np.testing.assert_array_equal(y, expected)


def test_precision(key):
    x, w = operands(key)
    y = fp8_ragged_dot(x, w, SIZES)
    f8 = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
    for same in ("default", jax.lax.Precision.DEFAULT, (None, "default"), f8):
        np.testing.assert_array_equal(fp8_ragged_dot(x, w, SIZES, same), y)
    for more in ("highest", jax.lax.Precision.HIGH, jax.lax.DotAlgorithmPreset.F32_F32_F32):
        with pytest.raises(NotImplementedError, match=r"FP8 has one precision(.|\n)*lax\.ragged"):
            fp8_ragged_dot(x, w, SIZES, more)


def test_an_offset_that_does_not_fit(key):
    x, w = operands(key)
    for group_offset, sizes in ((jnp.array([0, 1]), SIZES), (0, SIZES[:4])):
        with pytest.raises(ValueError, match="fp8_ragged_dot: group_offset does not fit"):
            fp8_ragged_dot(x, w, sizes, group_offset=group_offset)
    with pytest.raises(TypeError, match="group_offset must be integers"):
        fp8_ragged_dot(x, w, SIZES, group_offset=1.5)
