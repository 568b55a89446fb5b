"""fp8_dot_general against jax.lax.dot_general."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numerics import calc_diff

import jax_fp8gemm as fp8

# lhs, rhs, dimension numbers
PATTERNS = {
    "dense": ((6, 20, 130), (130, 72), (((2,), (0,)), ((), ()))),
    "general_two_features": ((3, 16, 64), (64, 4, 32), (((2,), (0,)), ((), ()))),
    "axes_crossed": ((4, 48, 32), (32, 40, 4), (((2, 0), (0, 2)), ((), ()))),
    "attention_scores": ((2, 24, 3, 64), (2, 20, 3, 64), (((3,), (3,)), ((0, 2), (0, 2)))),
    "batch_of_one": ((1, 40, 64), (1, 64, 48), (((2,), (1,)), ((0,), (0,)))),
    "vector_times_matrix": ((256,), (256, 200), (((0,), (0,)), ((), ()))),
    "vectors_by_batch": ((5, 256), (5, 256), (((1,), (1,)), ((0,), (0,)))),
}


def exact(lhs, rhs, numbers):
    return jax.lax.dot_general(lhs, rhs, numbers, precision="highest")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_of_every_pattern(key, pattern):
    left, right, numbers = PATTERNS[pattern]
    keys = jax.random.split(key, 3)
    lhs, rhs = jax.random.normal(keys[0], left), jax.random.normal(keys[1], right)
    expected, exact_pull = jax.vjp(lambda *xy: exact(*xy, numbers), lhs, rhs)
    dy = jax.random.normal(keys[2], expected.shape)

    @jax.jit
    def run(lhs, rhs, dy):
        y, pull = jax.vjp(lambda *xy: fp8.fp8_dot_general(*xy, numbers), lhs, rhs)
        return y, *pull(dy)

    # As in test_matmul.py: few numbers scatter, and a gradient sums over fewer than the product.
    for got, wanted in zip(run(lhs, rhs, dy), (expected, *exact_pull(dy)), strict=True):
        assert got.shape == wanted.shape
        assert calc_diff(got, wanted) < (1.1e-3 if wanted.size > 1000 else 6e-3)


def test_a_dense_pattern_is_fp8_matmul_bit_for_bit(key):
    x, w = jax.random.normal(key, (4, 6, 96)), jax.random.normal(key, (96, 40))
    got = fp8.fp8_dot_general(x, w, (((2,), (0,)), ((), ())))
    np.testing.assert_array_equal(got, fp8.fp8_matmul(x, w))
    from_the_end = fp8.fp8_dot_general(x, w, (((-1,), (-2,)), ((), ())))
    np.testing.assert_array_equal(got, from_the_end)


@pytest.mark.parametrize("axes", [(0, None), (1, 2)])
def test_vmap(key, axes):
    numbers = (((1,), (2,)), ((2,), (1,)))
    lhs, rhs = jax.random.normal(key, (20, 64, 2)), jax.random.normal(key, (24, 2, 64))
    stacked = [
        x if axis is None else jnp.stack([x, 2 * x, 3 * x], axis)
        for x, axis in zip((lhs, rhs), axes, strict=True)
    ]
    product = lambda x, y: fp8.fp8_dot_general(x, y, numbers)  # noqa: E731
    got = jax.jit(jax.vmap(product, axes))(*stacked)
    for i in (0, 2):
        own = [
            x if axis is None else jnp.take(x, i, axis)
            for x, axis in zip(stacked, axes, strict=True)
        ]
        np.testing.assert_allclose(got[i], product(*own), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("left, right", [("bfloat16", "float32"), ("float16", "float16")])
def test_dtypes(key, left, right):
    lhs = jax.random.normal(key, (16, 64)).astype(left)
    rhs = jax.random.normal(key, (64, 24)).astype(right)
    numbers = (((1,), (0,)), ((), ()))
    y, pull = jax.vjp(lambda *xy: fp8.fp8_dot_general(*xy, numbers, "highest"), lhs, rhs)
    assert y.dtype == jnp.result_type(lhs, rhs)
    assert [d.dtype for d in pull(jnp.ones_like(y))] == [lhs.dtype, rhs.dtype]
    y = fp8.fp8_dot_general(lhs, rhs, numbers, None, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("left, right", [((0, 32), (32, 8)), ((4, 32), (32, 0))])
def test_empty_results(left, right):
    y = fp8.fp8_dot_general(jnp.ones(left), jnp.ones(right), (((1,), (0,)), ((), ())))
    assert y.shape == (left[0], right[1])
    batch = (((2,), (1,)), ((0,), (0,)))
    assert fp8.fp8_dot_general(jnp.ones((0, 4, 32)), jnp.ones((0, 32, 8)), batch).size == 0


ONES = jnp.ones((4, 32))
ERRORS = {
    "integers": (TypeError, ONES.astype(int), ONES, ((1,), (1,)), ((), ()), "bfloat16"),
    "complex": (TypeError, ONES, ONES.astype("complex64"), ((1,), (1,)), ((), ()), "bfloat16"),
    "fp8": (TypeError, ONES, ONES.astype("float8_e4m3fn"), ((1,), (1,)), ((), ()), "bf16, f16"),
    "outer": (ValueError, ONES, ONES, ((), ()), ((), ()), "nothing to contract"),
    "no_k": (ValueError, ONES[:, :0], ONES[:, :0], ((1,), (1,)), ((), ()), "nothing to contract"),
    "sizes": (ValueError, ONES, ONES, ((1,), (0,)), ((), ()), r"\(32,\) and \(4,\)"),
    "batch_sizes": (ValueError, ONES[:2], ONES, ((1,), (1,)), ((0,), (0,)), "batch dims differ"),
    "repeated": (ValueError, ONES, ONES, ((1,), (1,)), ((1,), (0,)), "lhs repeat"),
    "no_such_dim": (ValueError, ONES, ONES, ((1,), (2,)), ((), ()), "rhs repeat or do not"),
    "counts": (ValueError, ONES, ONES, ((0, 1), (0,)), ((), ()), "differ"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_have_four_parts(case):
    error, lhs, rhs, contract, batch, text = ERRORS[case]
    with pytest.raises(error, match=f"(?s)fp8_dot_general: .*{text}") as raised:
        fp8.fp8_dot_general(lhs, rhs, (contract, batch))
    assert all(part in str(raised.value) for part in ("\n  got", "\n  expected", "\n  fix"))


def test_a_result_of_integers_is_an_error():
    with pytest.raises(TypeError, match="the result cannot have this dtype"):
        fp8.fp8_dot_general(ONES, ONES, (((1,), (1,)), ((), ())), None, jnp.int32)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_out_sharding(key, axis_type, named):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType[axis_type],))
    spec = PartitionSpec("x", None)
    sharding = NamedSharding(mesh, spec)
    x, w = jax.random.normal(key, (512, 64)), jax.random.normal(key, (64, 24))

    def multiply(x, w):
        where = sharding if named else spec
        return fp8.fp8_dot_general(x, w, (((1,), (0,)), ((), ())), out_sharding=where)

    expected = fp8.fp8_matmul(x, w)
    with jax.set_mesh(mesh):
        y, dw = jax.jit(lambda x, w: (multiply(x, w), jax.grad(_energy(multiply))(w, x)))(x, w)
    assert y.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(dw, jax.grad(_energy(fp8.fp8_matmul))(w, x), rtol=1e-5, atol=1e-4)


# lhs, rhs, dimension numbers; how lhs and rhs are sharded, and the result as in lax.dot_general.
# Shards are whole blocks of 128: others are gathered, with a warning.
SHARDED = {
    "dense": (
        *((2, 256, 128), (128, 256), (((2,), (0,)), ((), ()))),
        *((None, "x"), (None, "y"), (None, "x", "y")),
    ),
    "two_features": (
        *((2, 256, 128), (128, 2, 128), (((2,), (0,)), ((), ()))),
        *((None, "x"), (None, "y"), (None, "x", "y")),
    ),
    "axes_crossed": (
        *((4, 256, 32), (32, 256, 4), (((2, 0), (0, 2)), ((), ()))),
        *((None, "x"), (None, "y"), ("x", "y")),
    ),
    "batch": (
        *((2, 128, 2, 64), (2, 128, 2, 64), (((3,), (3,)), ((0, 2), (0, 2)))),
        *(("x",), ("x",), ("x",)),
    ),
}


@pytest.mark.parametrize("pattern, wish", [*((p, True) for p in SHARDED), ("two_features", False)])
def test_sharded_operands_on_explicit_axes(key, pattern, wish):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    left_shape, right_shape, numbers, left, right, result = SHARDED[pattern]
    keys = jax.random.split(key)
    lhs, rhs = jax.random.normal(keys[0], left_shape), jax.random.normal(keys[1], right_shape)

    def run(lhs, rhs, out_sharding=None):
        def energy(lhs, rhs):
            y = fp8.fp8_dot_general(lhs, rhs, numbers, out_sharding=out_sharding)
            return (y**2).sum(), y

        grads, y = jax.grad(energy, (0, 1), has_aux=True)(lhs, rhs)
        return y, *grads

    specs = [PartitionSpec(*left), PartitionSpec(*right)]
    with jax.set_mesh(mesh):
        cut = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((lhs, rhs), specs, strict=True)
        ]
        where = PartitionSpec(*result) if wish else None
        got = jax.jit(lambda *xy: run(*xy, out_sharding=where))(*cut)
    wanted = [PartitionSpec(*result), *specs]
    for one, expected, spec in zip(got, jax.jit(run)(lhs, rhs), wanted, strict=True):
        assert one.sharding.is_equivalent_to(NamedSharding(mesh, spec), one.ndim)
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-3)


def _energy(multiply):
    return lambda w, x: (multiply(x, w) ** 2).sum()
