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
        "  got       x bf16[256, 512] (m=256, k=512), w bf16[384, 512] (k=384, n=512)\n"
        "  expected  w [512, n]\n"
        "  fix       if w is stored [n, k], pass w.T"
    )


def test_k_differs_in_gemm():
    assert raised(ValueError, fp8.gemm, q(4, 256), q(8, 128, tile=(128, 128))) == (
        "gemm: dim k differs between lhs and rhs.\n"
        "  got       lhs e4m3[4, 256], rhs e4m3[8, 128]\n"
        "  expected  rhs [..., n, 256]\n"
        "  fix       both operands have k last; if rhs is stored [k, n], quantize its transpose"
    )


def test_k_no_multiple_of_16():
    assert raised(ValueError, fp8.gemm, q(4, 100), q(8, 100, tile=(128, 128))) == (
        "gemm: dim k is not a multiple of 16.\n"
        "  got       lhs e4m3[4, 100], rhs e4m3[8, 100]\n"
        "  expected  k % 16 == 0\n"
        "  fix       pad k to 112 with zeros, as fp8_matmul does"
    )


def test_wrong_rank():
    assert raised(ValueError, fp8.gemm, q(4, 128), q(2, 8, 128)) == (
        "gemm: rhs has the wrong rank.\n"
        "  got       rhs e4m3[2, 8, 128], scale f32[2, 8, 1]\n"
        "  expected  rhs [n, k]\n"
        "  fix       reshape rhs to rhs [n, k]"
    )


def test_scale_of_the_wrong_shape():
    lhs = fp8.QArray(q(4, 256).qvalue, jnp.ones((3, 2)))
    assert raised(ValueError, fp8.gemm, lhs, q(8, 256, tile=(128, 128))) == (
        "gemm: the scales have shapes that no kernel takes.\n"
        "  got       lhs [4, 256] with scale [3, 2], rhs [8, 256] with scale [1, 2]\n"
        "  expected  [4, 2] and [1, 2] or [4, 2] and [8, 2] or [4, 1] and [8, 1] or "
        "[1, 1] and [1, 1]\n"
        "  fix       quantize(lhs) with tile (1, 128), quantize(rhs, (128, 128))"
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
            "out_dtype is unknown.",
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
        (
            ValueError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), variant="sparse"),
            "variant is unknown.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(q(2, 4, 128), q(3, 8, 128), variant="batched"),
            "dim g differs between lhs and rhs.",
        ),
        (TypeError, lambda: fp8.quantize(jnp.ones((4, 128), jnp.int32)), "x has the wrong dtype."),
        (ValueError, lambda: fp8.quantize(jnp.ones((4, 128)), (64, 64)), "tile is unknown."),
        (
            ValueError,
            lambda: fp8.quantize(jnp.ones((4, 128)), scale_rounding="log"),
            "scale_rounding is unknown.",
        ),
        (ValueError, lambda: fp8.quantize(jnp.ones(128)), "x is not a matrix."),
        (
            ValueError,
            lambda: fp8.quantize_transposed(jnp.ones((4, 128)), (1, None)),
            "tile is unknown.",
        ),
        (
            TypeError,
            lambda: fp8.swiglu_quantize(jnp.ones((4, 256)), jnp.ones(4)),
            "h has the wrong dtype.",
        ),
        (TypeError, lambda: fp8.swiglu_quantize(q(4, 256), jnp.ones(4)), "h is not an array."),
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
            "group_sizes has the wrong rank.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), num_sms=-5),
            "num_sms is not a positive integer.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(q(4, 128), q(8, 128), expected_rows=0),
            "expected_rows is not a positive integer.",
        ),
        (
            TypeError,
            lambda: fp8.fp8_matmul(
                jnp.ones((4, 8)), jnp.ones((8, 8)), preferred_element_type=jnp.int8
            ),
            "the result cannot have this dtype.",
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
        (ValueError, ragged(jnp.ones(3, jnp.int32)), "group_sizes does not fit the operands."),
        (ValueError, ragged(jnp.ones((2, 1), jnp.int32)), "group_sizes does not fit the operands."),
        (TypeError, ragged(jnp.ones(2)), "group_sizes must be integers."),
        (
            ValueError,
            lambda: fp8.gemm(*GROUPS_OF_TWO, groups=jnp.ones(7, int), variant="contiguous"),
            "groups does not fit the operands.",
        ),
        (ValueError, ragged(jnp.ones(8, jnp.int32), "contiguous"), "takes no group_sizes."),
        (
            ValueError,
            lambda: fp8.gemm(*GROUPS_OF_TWO, groups=jnp.ones(2, int), variant="ragged"),
            "ragged takes no groups.",
        ),
        (
            ValueError,
            lambda: fp8.gemm(*GROUPS_OF_TWO, variant="contiguous"),
            "contiguous needs groups.",
        ),
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
            "an operand has the wrong rank.",
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
                "group_sizes need rows of tokens.",
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
    assert got in raised(ValueError, lambda: fp8.gemm(lhs, rhs, groups=rows, variant="contiguous"))
    fp8.gemm(lhs, rhs, groups=jnp.asarray(rows), variant="contiguous")  # on the device: trusted


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
    assert "the config cannot run this GEMM" in text and "shared memory" in text


def test_what_is_no_array_is_named():
    x, w = jnp.ones((4, 256)), q(8, 256, tile=(128, 128))
    text = raised(TypeError, fp8.fp8_matmul, x, w)
    assert text == (
        "fp8_matmul: w is not an array.\n"
        "  got       QArray\n"
        "  expected  a bf16, f16 or f32 array\n"
        "  fix       for an FP8 weight, use prepare_weight(w)"
    )
    assert "got       list" in raised(TypeError, fp8.quantize, [[1.0] * 128])


X, W, MANY = jnp.ones((8, 128)), jnp.ones((128, 8)), jnp.ones((2, 128, 8))
SIZES = jnp.ones(2, int)
KERNELS = fp8.ExpertKernels(
    wi_0=jnp.ones((2, 128, 8)), wi_1=jnp.ones((2, 128, 8)), wo=jnp.ones((2, 8, 128))
)
FFN = X, jnp.zeros((8, 1), int), jnp.ones((8, 1)), KERNELS
OPTIONS = {
    "quantize": (fp8.quantize, (X,), ("scale_rounding",)),
    "quantize_rows": (fp8.quantize_rows, (X,), ("scale_rounding",)),
    "quantize_transposed": (fp8.quantize_transposed, (X,), ("scale_rounding",)),
    "quantize_both": (fp8.quantize_both, (X,), ("scale_rounding",)),
    "requantize": (fp8.requantize, (q(8, 128),), ("scale_rounding",)),
    "prepare_weight": (fp8.prepare_weight, (W,), ("scale_rounding",)),
    "fp8_matmul": (fp8.fp8_matmul, (X, W), ("scale_rounding", "residuals")),
    "fp8_ragged_dot": (fp8.fp8_ragged_dot, (X, MANY, SIZES), ("scale_rounding", "residuals")),
    "prepare_experts": (fp8.prepare_experts, (KERNELS,), ("scale_rounding",)),
    "expert_ffn": (fp8.expert_ffn, FFN, ("scale_rounding",)),
    "route": (fp8.route, (X, 1), ("score_function",)),
    "moe": (
        functools.partial(fp8.moe, top_k=1),
        (X, jnp.ones((128, 2)), KERNELS),
        ("scale_rounding", "score_function", "exchange", "wire"),
    ),
    "gemm": (fp8.gemm, (q(8, 128), q(8, 128)), ("variant",)),
}


@pytest.mark.parametrize("op", OPTIONS)
def test_options_are_checked_under_the_name_that_was_called(op):
    function, arguments, options = OPTIONS[op]
    for option in options:
        for value in ("x", None, 2.0, ["pow2"]):
            text = raised(ValueError, function, *arguments, **{option: value})
            assert text.startswith(f"{op}: {option} is unknown.\n  got       {option}={value!r}\n")


@pytest.mark.parametrize(
    "op",
    "quantize_transposed quantize_both requantize fp8_matmul fp8_ragged_dot expert_ffn moe".split(),
)
def test_shared_columns_is_a_bool(op):
    function, arguments, _ = OPTIONS[op]
    for value in ("x", None, 1):
        text = raised(TypeError, function, *arguments, shared_columns=value)
        assert text.startswith(f"{op}: shared_columns is not a bool.\n")


def test_columns_of_square_tiles_share_already():
    text = raised(ValueError, fp8.quantize_both, W, (128, 128), shared_columns=True)
    assert text.startswith("quantize_both: columns of this tile already share scales.")


@pytest.mark.parametrize(
    "function, former, today",
    [
        (functools.partial(fp8.quantize, X), {"scale": "pow2"}, "scale_rounding"),
        (functools.partial(fp8.fp8_matmul, X, W), {"scale": "pow2"}, "scale_rounding"),
        (functools.partial(fp8.route, X, 1), {"scale": 2.5}, "routed_scaling_factor"),
        (functools.partial(fp8.route, X, 1), {"score": "sigmoid"}, "score_function"),
        (functools.partial(fp8.moe, X, W), {"scale": "pow2"}, "scale_rounding (of FP8 numbers)"),
        (functools.partial(fp8.moe, X, W), {"wi_0": MANY}, "kernels=ExpertKernels"),
        (functools.partial(fp8.expert_ffn, X), {"experts": SIZES}, "expert_index"),
        (functools.partial(fp8.expert_ffn, X), {"weights": SIZES}, "gate_weights"),
        (functools.partial(fp8.permute, X), {"experts": SIZES}, "expert_index"),
    ],
)
def test_a_former_name_of_an_argument_is_answered_with_todays(function, former, today):
    text = raised(TypeError, function, **former)
    (name,) = former
    assert f"there is no argument {name!r}." in text and f"fix       pass {today}" in text


def test_what_a_gemm_cannot_cast_is_named():
    text = raised(ValueError, fp8.fp8_ragged_dot, X, MANY, SIZES, cast_in_gemm=True)
    assert text.startswith("fp8_ragged_dot: the GEMM cannot cast this rhs.")
    half = [a.astype(jnp.bfloat16) for a in (X, jnp.ones((2, 128, 9)))]
    text = raised(ValueError, fp8.fp8_ragged_dot, *half, SIZES, cast_in_gemm=True)
    assert "their dims are not multiples of 16" in text
    text = raised(ValueError, fp8.expert_ffn, *FFN, cast_in_gemm=True)
    assert text.startswith("expert_ffn: ") and "they are not bf16" in text
    prepared = fp8.prepare_experts(KERNELS)
    text = raised(ValueError, fp8.expert_ffn, *FFN[:3], prepared, cast_in_gemm=True)
    assert "prepared kernels" in text


def test_second_derivative_is_a_clear_error(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    first = jax.grad(lambda x: (fp8.fp8_matmul(x, w) ** 2).sum())
    first(x)
    text = raised(NotImplementedError, jax.grad(lambda x: first(x).sum()), x)
    assert "FP8 numbers have no derivative" in text
