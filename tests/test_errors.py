"""What a user reads when an argument is wrong: golden texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._select.problem import GemmConfig

F32 = jnp.float32


def q(*shape, tile=(1, 128)):
    return fp8.quantize(jnp.ones(shape), tile)


def raised(error, function, *args, **kwargs) -> str:
    with pytest.raises(error) as info:
        function(*args, **kwargs)
    return str(info.value)


def test_k_differs_in_fp8_matmul():
    x, w = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((384, 512), jnp.bfloat16)
    assert raised(ValueError, fp8.fp8_matmul, x, w) == (
        "fp8_matmul: dim k differs between x and w.\n"
        "  got       x bf16[256, 512], w bf16[384, 512]\n"
        "  expected  w [512, n]\n"
        "  fix      if w is stored [n, k], pass w.T"
    )


def test_k_differs_in_gemm():
    assert raised(ValueError, fp8.gemm, q(4, 256), q(8, 128, tile=(128, 128))) == (
        "gemm: dim k differs between lhs and rhs.\n"
        "  got       lhs e4m3[4, 256], rhs e4m3[8, 128]\n"
        "  expected  rhs [..., n, 256]\n"
        "  fix      both operands have k last; if rhs is stored [k, n], quantize its transpose"
    )


def test_k_no_multiple_of_16():
    assert raised(ValueError, fp8.gemm, q(4, 100), q(8, 100, tile=(128, 128))) == (
        "gemm: dim k is not a multiple of 16.\n"
        "  got       lhs e4m3[4, 100], rhs e4m3[8, 100]\n"
        "  expected  k % 16 == 0\n"
        "  fix      pad k to 112 with zeros, as fp8_matmul does"
    )


def test_wrong_rank():
    assert raised(ValueError, fp8.gemm, q(4, 128), q(2, 8, 128)) == (
        "gemm: rhs has the wrong rank.\n"
        "  got       rhs e4m3[2, 8, 128], scale f32[2, 8, 1]\n"
        "  expected  rhs [n, k]\n"
        "  fix      reshape rhs to rhs [n, k]"
    )


def test_scale_of_the_wrong_shape():
    lhs = fp8.QArray(q(4, 256).qvalue, jnp.ones((3, 2)))
    assert raised(ValueError, fp8.gemm, lhs, q(8, 256, tile=(128, 128))) == (
        "gemm: the scales have shapes that no kernel takes.\n"
        "  got       lhs [4, 256] with scale [3, 2], rhs [8, 256] with scale [1, 2]\n"
        "  expected  [4, 2] and [1, 2] or [4, 2] and [8, 2] or [4, 1] and [8, 1] or "
        "[1, 1] and [1, 1]\n"
        "  fix      quantize(lhs) with tile (1, 128), quantize(rhs, (128, 128))"
    )
    assert "fits no tile" in raised(ValueError, lambda: lhs.tile)


@pytest.mark.parametrize(
    "error, call, first_line",
    [
        (TypeError, lambda: fp8.gemm(jnp.ones((4, 128)), q(8, 128)), "lhs is not quantized."),
        (
            TypeError,
            lambda: fp8.gemm(fp8.QArray(jnp.ones((4, 128)), jnp.ones((4, 1))), q(8, 128)),
            "lhs has the wrong dtype.",
        ),
        (
            TypeError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), out_dtype=jnp.int8),
            "unknown out_dtype.",
        ),
        (
            TypeError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), init=jnp.ones((4, 8))),
            "init needs float32.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), init=jnp.ones((8, 4)), out_dtype=F32),
            "init has the wrong shape.",
        ),
        (ValueError, lambda: fp8.gemm(q(4, 128), q(8, 128), variant="sparse"), "unknown variant."),
        (
            ValueError,
            lambda: fp8.gemm(q(2, 4, 128), q(3, 8, 128), variant="batched"),
            "dim g differs between lhs and rhs.",
        ),
        (TypeError, lambda: fp8.quantize(jnp.ones((4, 128), jnp.int32)), "x has the wrong dtype."),
        (ValueError, lambda: fp8.quantize(jnp.ones((4, 128)), (64, 64)), "unknown tile."),
        (ValueError, lambda: fp8.quantize(jnp.ones((4, 128)), scale="log"), "unknown scale."),
        (ValueError, lambda: fp8.quantize(jnp.ones(128)), "x is no matrix."),
        (
            ValueError,
            lambda: fp8.quantize_transposed(jnp.ones((4, 128)), (1, None)),
            "no transposed copy in this tile.",
        ),
        (
            TypeError,
            lambda: fp8.swiglu_quantize(jnp.ones((4, 256)), jnp.ones(4)),
            "h has the wrong dtype.",
        ),
        (TypeError, lambda: fp8.swiglu_quantize(q(4, 256), jnp.ones(4)), "h is no array of floats"),
        (TypeError, lambda: fp8.requantize(jnp.ones((4, 256))), "q is not quantized."),
        (
            TypeError,
            lambda: fp8.swiglu_backward(jnp.ones((4, 256)), jnp.ones((4, 128)), jnp.ones(4)),
            "h is not quantized.",
        ),
        (
            ValueError,
            lambda: fp8.swiglu_quantize(
                jnp.ones((4, 256), jnp.bfloat16), jnp.ones(4), group_sizes=jnp.ones((2, 1), int)
            ),
            "group_sizes and index are for rows of tokens.",
        ),
        (ValueError, lambda: fp8.gemm(q(4, 128), q(8, 128), num_sms=-5), "num_sms is below 1."),
        (
            ValueError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), expected_rows=0),
            "expected_rows is below 1.",
        ),
        (
            TypeError,
            lambda: fp8.fp8_matmul(
                jnp.ones((4, 8)), jnp.ones((8, 8)), preferred_element_type=jnp.int8
            ),
            "no such result.",
        ),
        (
            TypeError,
            lambda: fp8.fp8_matmul(jnp.ones((4, 8), jnp.int32), jnp.ones((8, 8))),
            "x has the wrong dtype.",
        ),
        (
            ValueError,
            lambda: fp8.fp8_matmul(jnp.ones((4, 8)), jnp.ones((2, 8, 8))),
            "w or x has the wrong rank.",
        ),
    ],
)
def test_every_error_has_four_parts(error, call, first_line):
    text = raised(error, call)
    lines = text.split("\n")
    assert first_line in lines[0]
    for line, part in zip(lines[1:], ("got", "expected", "fix"), strict=True):
        assert line.startswith(f"  {part:10}")


GROUPS_OF_TWO = (q(8, 128), q(2, 16, 128, tile=(128, 128)))


def ragged(sizes, variant="ragged"):
    return lambda: fp8.gemm(*GROUPS_OF_TWO, sizes, variant=variant)


@pytest.mark.parametrize(
    "error, call, words",
    [
        (ValueError, ragged(None), "ragged needs group_sizes."),
        (ValueError, ragged(jnp.ones(3, jnp.int32)), "group_sizes do not fit the operands."),
        (ValueError, ragged(jnp.ones((2, 1), jnp.int32)), "group_sizes do not fit the operands."),
        (TypeError, ragged(jnp.ones(2)), "group_sizes must be integers."),
        (ValueError, ragged(jnp.ones(7, jnp.int32), "contiguous"), "do not fit the operands."),
        (
            ValueError,
            lambda: fp8.gemm(q(8, 128), q(8, 128), jnp.ones(2, jnp.int32)),
            "dense takes no group_sizes.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(q(8, 128), q(8, 128), jnp.ones(2, jnp.int32), variant="ragged"),
            "rhs has the wrong rank.",
        ),
        (
            ValueError,
            lambda: fp8.fp8_ragged_dot(jnp.ones((8, 4)), jnp.ones((4, 4)), jnp.ones(2, int)),
            "wrong ranks.",
        ),
        (
            ValueError,
            lambda: fp8.fp8_ragged_dot(jnp.ones((8, 4)), jnp.ones((2, 5, 4)), jnp.ones(2, int)),
            "dim k differs between lhs and rhs.",
        ),
        (
            ValueError,
            lambda: fp8.fp8_ragged_dot(jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.ones(3, int)),
            "the number of groups differs.",
        ),
        (
            TypeError,
            lambda: fp8.fp8_ragged_dot(jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.ones(2)),
            "group_sizes must be integers.",
        ),
        (
            TypeError,
            lambda: fp8.quantize_rows(jnp.ones((8, 4)), group_sizes=jnp.ones(2)),
            "group_sizes must be integers.",
        ),
        (
            TypeError,
            lambda: fp8.quantize_both(jnp.ones((8, 4)), index=jnp.ones(2)),
            "index must be integers.",
        ),
        *(
            (
                ValueError,
                lambda call=call: call(group_sizes=jnp.ones(2, int)),
                "group_sizes and index are for rows of tokens.",
            )
            for call in (
                functools.partial(fp8.quantize_rows, jnp.ones((2, 8, 4))),
                functools.partial(fp8.quantize_transposed, jnp.ones((2, 8, 4))),
                functools.partial(fp8.quantize_both, jnp.ones((8, 4)), (128, 128)),
                functools.partial(fp8.requantize, q(2, 8, 128)),
            )
        ),
    ],
)
def test_bad_groups_are_named(error, call, words):
    text = raised(error, call)
    assert words in text.split("\n")[0]
    assert [line[2:10].strip() for line in text.split("\n")[1:]] == ["got", "expected", "fix"]


@pytest.mark.parametrize(
    "rows, got",
    [
        ([0] * 100 + [1] * 156, "rows 0 to 127 of groups [0, 1]"),
        ([0] * 128 + [-1] * 28 + [1] * 100, "rows 128 to 255 of groups [1]"),
    ],
)
def test_misaligned_map_of_rows_is_named_where_it_is_known(rows, got):
    lhs, rhs = q(256, 128), q(2, 16, 128, tile=(128, 128))
    rows = np.array(rows)
    assert got in raised(ValueError, lambda: fp8.gemm(lhs, rhs, rows, variant="contiguous"))
    fp8.gemm(lhs, rhs, jnp.asarray(rows), variant="contiguous")  # on the device: trusted


def test_block_scales_are_no_scales_of_a_product_cut_along_k():
    lhs, rhs = q(8, 256), q(256, 256, tile=(128, 128))
    sizes = jnp.array([128, 128])
    text = raised(ValueError, lambda: fp8.gemm(lhs, rhs, sizes, variant="ragged_contracting"))
    assert "the scales have shapes that no kernel takes." in text


def test_illegal_config_is_an_error_when_lowering():
    config = GemmConfig("persistent", 256, 256, 9)
    run = jax.jit(lambda a, b: fp8.gemm(a, b, config=config))
    traced = run.trace(q(4, 128), q(8, 128))
    text = raised(ValueError, traced.lower, lowering_platforms=("cuda",))
    assert "the config cannot run this product" in text and "shared memory" in text


def test_what_is_no_array_is_named():
    x, w = jnp.ones((4, 256)), q(8, 256, tile=(128, 128))
    text = raised(TypeError, fp8.fp8_matmul, x, w)
    assert text == (
        "fp8_matmul: w is no array of floats.\n"
        "  got       QArray\n"
        "  expected  a bf16, f16 or f32 array\n"
        "  fix      convert it by jnp.asarray, or an FP8 weight by prepare_weight"
    )
    assert "got       list" in raised(TypeError, fp8.quantize, [[1.0] * 128])


def test_second_derivative_is_a_clear_error(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    first = jax.grad(lambda x: (fp8.fp8_matmul(x, w) ** 2).sum())
    first(x)
    text = raised(NotImplementedError, jax.grad(lambda x: first(x).sum()), x)
    assert "FP8 numbers have no derivative" in text
