"""The quantizer's definition: scales, saturation, zeros, NaN, range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, ROWS, TENSOR

TILES = [ROW_BLOCKS, BLOCKS, ROWS, TENSOR]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (128, 128), (129, 300), (2, 5, 200)], ids=str)
def test_error_is_that_of_e4m3(key, shape, tile, scale_rounding):
    x = jax.random.normal(key, shape)
    q = fp8.quantize(x, tile, scale_rounding=scale_rounding)
    back = fp8.dequantize(q)
    # e4m3 keeps 3 bits: half a step is 2^-4; below 2^-6 of the scale the step is constant.
    scales = jnp.max(q.scale)
    assert np.all(np.abs(back - x) <= np.abs(x) * 2.0**-4 + scales * 2.0**-10)
    assert q.has_tile(tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_pow2_scales_are_powers_of_two_that_fit(key, tile):
    x = jax.random.normal(key, (200, 300)) * jnp.exp(5 * jax.random.normal(key, (200, 1)))
    q = fp8.quantize(x, tile)
    mantissa, _ = np.frexp(np.asarray(q.scale))
    np.testing.assert_array_equal(mantissa, 0.5)
    largest = np.abs(np.asarray(q.qvalue, np.float32)).max()
    assert 224 <= largest <= 448  # one binade below the top, at least somewhere


def test_pow2_scale_is_exact_at_the_border():
    for amax, expected in [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (896.0, 2.0)]:
        q = fp8.quantize(jnp.full((1, 128), amax))
        assert q.scale[0, 0] == expected
        np.testing.assert_array_equal(fp8.dequantize(q), np.float32(q.qvalue) * expected)


def test_requantizing_along_the_other_axis_is_exact_with_pow2(key):
    x = jax.random.normal(key, (256, 256))
    once = fp8.dequantize(fp8.quantize(x))
    twice = fp8.dequantize(fp8.quantize(once.T)).T
    # Values that fall below the finer scale's subnormals may round; all others are the same.
    close = np.abs(twice - once) <= 2.0**-9 * np.max(np.abs(np.asarray(x))) / 224
    assert close.all()


def test_zero_tile_has_scale_one():
    q = fp8.quantize(jnp.zeros((2, 256)))
    np.testing.assert_array_equal(q.scale, 1.0)
    np.testing.assert_array_equal(np.asarray(q.qvalue, np.float32), 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_make_their_tile_nan_and_nothing_else(bad):
    x = jnp.ones((2, 256)).at[0, 3].set(bad)
    q = fp8.quantize(x)
    np.testing.assert_array_equal(np.isnan(q.scale), [[True, False], [False, False]])
    back = np.asarray(fp8.dequantize(q))
    assert np.isnan(back[0, :128]).all() and np.isfinite(back[0, 128:]).all()
    assert np.isfinite(back[1]).all()


@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
def test_extreme_magnitudes(scale_rounding):
    for amax in (3.2e38, 1e30, 1e-30, 1e-36):
        x = jnp.array([[amax, -amax / 3, 0.0] + [0.0] * 125], jnp.float32)
        back = np.asarray(fp8.dequantize(fp8.quantize(x, scale_rounding=scale_rounding)))
        np.testing.assert_allclose(back, x, rtol=2.0**-4)


@pytest.mark.parametrize("tile", [ROW_BLOCKS, BLOCKS], ids=str)
def test_nan_counts_wherever_it_lies(tile):
    x = jnp.ones((256, 256)).at[jnp.arange(256), jnp.arange(256)].set(jnp.nan)
    scale = np.asarray(jax.jit(fp8.quantize, static_argnums=1)(x, tile).scale)
    lines = np.arange(len(scale))
    expected = lines[:, None] * 256 // len(scale) // 128 == np.arange(2)
    np.testing.assert_array_equal(np.isnan(scale), expected)


def test_denormals_do_not_make_nan():
    back = fp8.dequantize(fp8.quantize(jnp.full((1, 128), 1e-42, jnp.float32)))
    assert np.isfinite(np.asarray(back)).all() and np.all(np.asarray(back) <= 1e-41)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_inputs_of_every_float_type_give_the_same_numbers(key, dtype):
    x = jax.random.normal(key, (8, 256)).astype(dtype)
    q, wide = fp8.quantize(x), fp8.quantize(x.astype(jnp.float32))
    np.testing.assert_array_equal(q.scale, wide.scale)
    np.testing.assert_array_equal(
        jax.lax.bitcast_convert_type(q.qvalue, jnp.uint8),
        jax.lax.bitcast_convert_type(wide.qvalue, jnp.uint8),
    )


def test_rounding_is_to_nearest_even():
    # At scale 1 the neighbours of 17 in e4m3 are 16 and 18; of 19, 18 and 20.
    x = jnp.array([[17.0, 19.0, 448.0, 450.0, 463.0] + [0.0] * 123])
    q = fp8.quantize(x.at[0, 3:5].set(448.0))
    np.testing.assert_array_equal(np.asarray(q.qvalue, np.float32)[0, :3], [16.0, 20.0, 448.0])


def test_a_scale_that_is_not_rounded_saturates_instead_of_overflowing(key):
    x = jax.random.uniform(key, (64, 128), minval=0.9, maxval=1.0)
    assert np.isfinite(np.asarray(fp8.dequantize(fp8.quantize(x, scale_rounding="none")))).all()
