"""Checks of arguments: what passes, what does not, and what the user reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._core import checks, types
from jax_fp8gemm._core.layout import scale_shape
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._core.variants import SCALES, VARIANTS
from jax_fp8gemm._ops.gemm import _scales

Q = fp8.QArray(np.zeros((2, 128), FP8), np.ones((2, 1), np.float32))


def raised(error, function, *args, **kwargs) -> str:
    with pytest.raises(error) as info:
        function(*args, **kwargs)
    lines = str(info.value).split("\n")
    assert [line[2:10].strip() for line in lines[1:]] == ["got", "expected", "fix"]
    return str(info.value)


def test_a_former_name_is_answered_with_the_new_one():
    @checks.renamed(scale="scale_rounding", experts="expert_index")
    def run(x, scale_rounding="pow2"):
        return x, scale_rounding

    assert run(1) == (1, "pow2") and run(1, scale_rounding="none") == (1, "none")
    text = raised(TypeError, run, 1, scale="float32")
    assert text.startswith("run: there is no argument 'scale'.")
    assert "got       scale='float32'" in text and "pass scale_rounding" in text
    assert "'experts'" in raised(TypeError, run, 1, experts=3)


def test_an_option_is_one_of_its_words():
    checks.check_option("op", "wire", "fp8", types.Wire)
    text = raised(ValueError, checks.check_option, "op", "wire", "f32", types.Wire)
    assert "wire='f32'" in text and 'expected  "fp8" or "bf16"' in text
    for value in (None, 3, ["fp8"]):
        raised(ValueError, checks.check_option, "op", "wire", value, types.Wire)


def test_floats_are_arrays_of_three_dtypes():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        x = jnp.asarray(np.ones(2, dtype))
        assert checks.as_float("op", "x", x) is x
    for host in (np.ones(2), np.float32(1)):  # float64 is float32 as everywhere in JAX
        x = checks.as_float("op", "x", host)
        assert isinstance(x, jax.Array) and x.dtype == jnp.float32 and x.shape == host.shape
    ints = jnp.asarray(np.ones(2, np.int32))
    assert "has the wrong dtype" in raised(TypeError, checks.as_float, "op", "x", ints)
    assert checks.HALVES == (jnp.bfloat16, jnp.float16)


def test_what_is_not_an_array_is_named_with_what_makes_it_one():
    for value in ([1.0], 1.0, None, Q):
        text = raised(TypeError, checks.as_float, "op", "w", value)
        assert "w is not an array" in text and f"got       {type(value).__name__}\n" in text
        fix = "for an FP8 weight, use prepare_weight(w)" if value is Q else "call jnp.asarray(w)"
        assert text.endswith(f"fix       {fix}")
    again = raised(TypeError, checks.as_float, "prepare_weight", "w", Q)  # which was called
    assert again.endswith("fix       call jnp.asarray(w)")


def test_arrays_in_host_memory_are_named():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.device_put(np.ones(2, np.float32), device)
    checks.check_memory("op", "x", x)
    host = jax.device_put(x, device.with_memory_kind("pinned_host"))
    for check in (checks.check_memory, checks.as_float):
        text = raised(ValueError, check, "op", "x", host)
        assert "x is not on the device." in text and "got       x f32[2] in host memory" in text
    values, scale = (jax.device_put(y, device) for y in (Q.qvalue, Q.scale))
    away = device.with_memory_kind("pinned_host")
    checks.check_quantized("op", "q", fp8.QArray(values, scale))
    for q, name in (
        (fp8.QArray(jax.device_put(values, away), scale), "q"),
        (fp8.QArray(values, jax.device_put(scale, away)), "q's scale"),
    ):
        assert f"op: {name} is not on" in raised(ValueError, checks.check_quantized, "op", "q", q)


def test_a_switch_is_a_bool():
    for value in (True, False, np.bool_(True)):
        checks.check_bool("op", "cast", value)
    checks.check_bool("op", "cast", None, or_none=True)
    checks.check_bool("op", "cast", False, or_none=True)
    for value in (1, "yes", None):
        text = raised(TypeError, checks.check_bool, "op", "cast", value)
        assert f"cast={value!r}" in text and "expected  True or False\n" in text
    text = raised(TypeError, checks.check_bool, "op", "cast", 0, or_none=True)
    assert "expected  True, False or None\n" in text


def test_counts_are_integers_of_one_or_more():
    for count in (None, 1, 7, np.int64(3), np.uint8(1)):
        checks.check_positive("op", "num_sms", count)
    for count in (0, -1, 1.0, True, "1", np.float32(2), jnp.int32(1)):
        text = raised(ValueError, checks.check_positive, "op", "num_sms", count)
        assert f"num_sms={count!r}" in text
    assert checks.is_integer(3) and not checks.is_integer(False) and not checks.is_integer(None)


def test_what_is_not_quantized_is_named():
    checks.check_quantized("op", "q", Q)
    floats = np.ones((2, 128), np.float32)
    text = raised(TypeError, checks.check_quantized, "op", "q", floats)
    assert "q is not quantized." in text and "got       q f32[2, 128]" in text
    assert "quantize(q)" in text


def test_an_fp8_array_has_numbers_of_e4m3_and_scales_of_f32_and_as_many_dims():
    def check(qvalue, scale) -> str:
        return raised((TypeError, ValueError), checks.check_quantized, "op", "q",
                      fp8.QArray(qvalue, scale))  # fmt: skip

    for qvalue, scale in (
        (np.zeros((2, 128), np.float32), Q.scale),
        (Q.qvalue, np.ones((2, 1), np.float16)),
        (Q.qvalue, 1.0),
        (None, Q.scale),
    ):
        assert "q has the wrong dtype." in check(qvalue, scale)
    for qvalue, scale in (
        (Q.qvalue[0], Q.scale[0]),
        (Q.qvalue, Q.scale[0]),
        (Q.qvalue, Q.scale[None]),
        (Q.qvalue[None], Q.scale),
    ):
        assert "q has the wrong rank." in check(qvalue, scale)
    checks.check_quantized("op", "q", fp8.QArray(Q.qvalue[None], Q.scale[None]))


def test_integers_are_arrays_of_integers():
    checks.check_integers("op", "index", np.ones(2, np.uint8))
    for value in (np.ones(2), [1, 2], np.ones(2, bool)):
        assert "index must be integers." in raised(
            TypeError, checks.check_integers, "op", "index", value
        )
    for value, got in (
        ([0.5], "index float64[1]"),
        (np.ones(2), "index float64[2]"),
        ([True], "index bool[1]"),
        (None, "index NoneType"),  # as the user knows it
        ([None], "index list"),
    ):
        text = raised(TypeError, checks.as_int32, "op", "index", value)
        assert f"got       {got}\n  expected  integers\n" in text


def test_the_nearest_int32_of_each():
    def check(values, expected) -> None:
        found = checks.as_int32("op", "index", values)
        assert isinstance(found, jax.Array) and found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)

    unsigned = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    wide = np.array([-(2**40), -(2**31), -1, 2**31 - 1, 2**40])
    clipped = [-(2**31), -(2**31), -1, 2**31 - 1, 2**31 - 1]
    check(unsigned, [0, 2**31 - 1, 2**31 - 1, 2**31 - 1])
    check(jnp.asarray(unsigned), [0, 2**31 - 1, 2**31 - 1, 2**31 - 1])
    check(wide, clipped)
    check(wide.tolist(), clipped)
    for dtype in (np.int8, np.uint8, np.int16, np.int32):
        small = np.array([-1, 5]).astype(dtype)
        check(small, small)
    check([], np.zeros(0))
    check(7, 7)
    with jax.enable_x64(True):
        check(jnp.asarray(wide), clipped)


def test_sizes_of_groups_are_of_one_group_or_more():
    np.testing.assert_array_equal(checks.as_groups("op", "sizes", [2**40]), [2**31 - 1])
    for value in (3, [[1, 2]]):
        text = raised(ValueError, checks.as_groups, "op", "sizes", value)
        assert "sizes has the wrong rank." in text and "sizes [g]" in text
    assert "there are no groups." in raised(ValueError, checks.as_groups, "op", "sizes", [])


# ---- What public functions refuse ---------------------------------------------------------------


@pytest.mark.parametrize("token_dims", [0, 3, -1, 1.0, True, None, "1"])
def test_token_dims_are_dims_before_k(token_dims):
    x = jnp.ones((2, 128, 256), jnp.bfloat16)
    for function in (fp8.quantize_both, fp8.quantize_transposed):
        text = raised(ValueError, function, x, token_dims=token_dims)
        assert "token_dims does not fit x." in text and f"token_dims={token_dims!r}" in text
    raised(ValueError, fp8.requantize, fp8.quantize(x), token_dims=token_dims)


def test_several_dims_of_tokens_end_in_whole_blocks():
    x = jnp.ones((2, 128, 256), jnp.bfloat16)
    assert fp8.quantize_transposed(x, token_dims=2).shape == (256, 2, 128)
    assert fp8.quantize_transposed(x, token_dims=np.int32(1)).shape == (2, 256, 128)
    assert fp8.quantize_transposed(x[:, :127], token_dims=1).shape == (2, 256, 128)
    text = raised(ValueError, fp8.quantize_transposed, x[:, :127], token_dims=2)
    assert "x [..., m, k] with m a multiple of 128 where there are two or more" in text
    raised(ValueError, fp8.quantize_transposed, x, (128, 128), token_dims=2)
    assert fp8.quantize_transposed(x, (128, 128)).shape == (2, 256, 128)


def test_a_transposed_copy_has_blocks_along_both_dims():
    """Along tokens a scale for each row of x would be one for each number."""
    for tile in ((1, None), (None, None)):
        for function in (fp8.quantize_both, fp8.quantize_transposed):
            assert "tile is unknown." in raised(ValueError, function, jnp.ones((4, 128)), tile)


def ones(*shape: int, tile: tuple) -> fp8.QArray:
    return fp8.QArray(np.ones(shape, FP8), np.ones(scale_shape(shape, tile), np.float32))


def scales_of(lhs: fp8.QArray, rhs: fp8.QArray, variant: str = "dense") -> str:
    return _scales(lhs, rhs, VARIANTS[variant].with_ranks(lhs.ndim, rhs.ndim))


@pytest.mark.parametrize("scales", SCALES)
def test_scales_are_named_by_their_shapes(scales):
    left, right = SCALES[scales]
    assert scales_of(ones(200, 256, tile=left), ones(300, 256, tile=right)) == scales
    three = ones(3, 200, 256, tile=left), ones(3, 300, 256, tile=right)
    assert scales_of(*three, "batched") == scales
    contracting = ones(200, 256, tile=left), ones(300, 256, tile=right), "ragged_contracting"
    if right == (128, 128):  # a block of scales would belong to several groups
        assert "no kernel takes" in raised(ValueError, scales_of, *contracting)
    else:
        assert scales_of(*contracting) == scales


def test_of_scales_that_fit_small_arrays_the_first_is_taken():
    lhs, rhs = ones(1, 128, tile=(1, 128)), ones(1, 128, tile=(128, 128))
    assert scales_of(lhs, rhs) == "1x128_128x128"
    assert scales_of(lhs, rhs, "ragged_contracting") == "1x128_1x128"


def test_both_scales_must_fit_one_kernel():
    lhs, rhs = ones(200, 256, tile=(1, 128)), ones(300, 256, tile=(None, None))
    text = raised(ValueError, scales_of, lhs, rhs)
    assert text.startswith("gemm: the scales have shapes that no kernel takes.")
    assert "got       lhs [200, 256] with scale [200, 2], rhs [300, 256] with scale [1, 1]" in text
    assert "expected  [200, 2] and [3, 2] or [200, 2] and [300, 2] or [200, 1] and" in text
    raised(ValueError, scales_of, ones(200, 256, tile=(None, None)), ones(300, 256, tile=(1, 128)))


def test_a_scale_for_each_matrix_is_not_one_for_the_whole_lhs():
    """[2, m, k] has two scales of matrices; a dense GEMM takes one of all its rows."""
    rhs = ones(48, 256, tile=(None, None))
    for shape in ((2, 32, 256), (1, 32, 256), (2, 3, 32, 256)):
        lhs = ones(*shape, tile=(None, None))
        for call in (scales_of, fp8.gemm):
            assert "the scales have shapes that no kernel takes." in raised(
                ValueError, call, lhs, rhs
            )
        for name in ("1x128_128x128", "row_row"):
            left, right = SCALES[name]
            assert scales_of(ones(*shape, tile=left), ones(48, 256, tile=right)) == name
