"""gemm against the float64 product of its dequantized operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import random_operands
from numerics import calc_diff, product64

import jax_fp8gemm as fp8
from jax_fp8gemm._core.variants import SCALES
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools.shapes import ODD


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
def test_dense(shape, scales):
    lhs, rhs = random_operands(Problem("dense", shape.m, shape.n, shape.k, 1, scales))
    expected = product64(lhs, rhs, SCALES[scales])
    assert calc_diff(fp8.gemm(lhs, rhs, out_dtype=jnp.float32), expected) < 1e-12
    assert calc_diff(fp8.gemm(lhs, rhs), expected) < 1e-5


@pytest.mark.parametrize("scales", SCALES)
def test_batched(scales):
    lhs, rhs = random_operands(Problem("batched", 5, 130, 272, 3, scales))
    out = fp8.gemm(lhs, rhs, variant="batched", out_dtype=jnp.float32)
    assert calc_diff(out, product64(lhs, rhs, SCALES[scales])) < 1e-12


def test_init_is_added(key):
    lhs, rhs = random_operands(Problem("dense", 9, 20, 256))
    init = jax.random.normal(key, (9, 20))
    out = fp8.gemm(lhs, rhs, out_dtype=jnp.float32, init=init)
    assert calc_diff(out, product64(lhs, rhs) + np.asarray(init, np.float64)) < 1e-12


@pytest.mark.parametrize("m, n, k", [(0, 8, 128), (4, 8, 0), (0, 0, 16)])
def test_empty_products_are_zeros_or_init(m, n, k):
    lhs, rhs = fp8.quantize(jnp.ones((m, k))), fp8.quantize(jnp.ones((n, k)), (128, 128))
    np.testing.assert_array_equal(fp8.gemm(lhs, rhs), np.zeros((m, n)))
    init = jnp.full((m, n), 2.0)
    np.testing.assert_array_equal(fp8.gemm(lhs, rhs, init=init, out_dtype=jnp.float32), init)


def test_nan_in_one_row_reaches_that_row_only():
    lhs, rhs = random_operands(Problem("dense", 6, 40, 256))
    lhs = fp8.QArray(lhs.qvalue, lhs.scale.at[2, 1].set(jnp.nan))
    out = np.asarray(fp8.gemm(lhs, rhs), np.float32)
    assert np.isnan(out[2]).all() and np.isfinite(np.delete(out, 2, 0)).all()


def test_vmap_of_every_operand_and_both():
    for variant in ("dense", "batched"):
        for scales in SCALES:
            for axes in ((0, None), (None, 0), (0, 0)):
                _check_vmap(variant, scales, axes)


def _check_vmap(variant, scales, axes):
    g = 2
    problem = Problem(variant, 4, 130, 144, g, scales)
    pairs = [random_operands(problem, seed=seed) for seed in range(3)]

    def stacked(i):
        if axes[i] is None:
            return pairs[0][i]
        return jax.tree.map(lambda *x: jnp.stack(x), *(pair[i] for pair in pairs))

    run = lambda lhs, rhs: fp8.gemm(lhs, rhs, variant=variant, out_dtype=jnp.float32)  # noqa: E731
    out = jax.jit(jax.vmap(run, axes))(stacked(0), stacked(1))
    for index in range(3):
        lhs = pairs[index if axes[0] == 0 else 0][0]
        rhs = pairs[index if axes[1] == 0 else 0][1]
        assert calc_diff(out[index], product64(lhs, rhs, SCALES[scales])) < 1e-12, (variant, scales)


def test_vmap_with_init(key):
    lhs, rhs = random_operands(Problem("dense", 4, 130, 144))
    init = jax.random.normal(key, (3, 4, 130))
    run = lambda i: fp8.gemm(lhs, rhs, init=i, out_dtype=jnp.float32)  # noqa: E731
    out = jax.vmap(run)(init)
    assert calc_diff(out, product64(lhs, rhs) + np.asarray(init, np.float64)) < 1e-12
    other = jax.tree.map(lambda x: jnp.stack([x] * 3), lhs)
    out = jax.vmap(lambda a, i: fp8.gemm(a, rhs, init=i, out_dtype=jnp.float32))(other, init)
    assert calc_diff(out, product64(lhs, rhs) + np.asarray(init, np.float64)) < 1e-12


def test_transposed_and_sliced_operands_under_jit():
    lhs, rhs = random_operands(Problem("dense", 64, 64, 256, 1, "1x128_1x128"))

    @jax.jit
    def run(lhs, rhs):
        part = fp8.QArray(lhs.qvalue[8:40, :128], lhs.scale[8:40, :1])
        other = fp8.QArray(rhs.qvalue[:, :128].T.T, rhs.scale[:, :1])
        return fp8.gemm(part, other, out_dtype=jnp.float32)

    part = fp8.QArray(lhs.qvalue[8:40, :128], lhs.scale[8:40, :1])
    other = fp8.QArray(rhs.qvalue[:, :128], rhs.scale[:, :1])
    assert calc_diff(run(lhs, rhs), product64(part, other)) < 1e-12
