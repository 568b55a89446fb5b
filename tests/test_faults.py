"""Small inputs that gave wrong values, or errors from deep inside: what is right for each kind."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm import nnx as fp8_nnx
from jax_fp8gemm._core.checks import as_int32

# ---- integers -----------------------------------------------------------------------------------

TYPES = ("int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64")


def kernels(e: int, h: int, f: int) -> fp8.ExpertKernels:
    keys = jax.random.split(jax.random.key(7), 3)
    wi = [jax.random.normal(key, (e, h, f)) * h**-0.5 for key in keys[:2]]
    return fp8.ExpertKernels(
        wi_0=wi[0], wi_1=wi[1], wo=jax.random.normal(keys[2], (e, f, h)) * f**-0.5
    )


def takes_integers(m: int) -> dict:
    """Returns functions of group sizes [2], of experts [m, 1] or of an index [m]; gradients too."""
    x = jax.random.normal(jax.random.key(0), (m, 16), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (2, 16, 8), jnp.bfloat16)
    q, many = fp8.quantize(x), fp8.quantize(jnp.swapaxes(w, 1, 2), (128, 128))
    part = kernels(2, 16, 8)
    h = jnp.concatenate([x] * 16, 1)
    gates = jnp.ones((m, 1), jnp.float32)

    def loss(sizes, w):
        return (fp8.fp8_ragged_dot(x, w, sizes).astype(jnp.float32) ** 2).sum()

    def ffn_loss(experts, kernels):
        return (fp8.expert_ffn(x, experts, gates, kernels).astype(jnp.float32) ** 2).sum()

    return {
        "sizes": {
            "fp8_ragged_dot": lambda s: fp8.fp8_ragged_dot(x, w, s),
            "its gradient": lambda s: jax.grad(loss, 1)(s, w),
            "gemm": lambda s: fp8.gemm(q, many, s, variant="ragged"),
            "gemm along k": lambda s: fp8.gemm(
                fp8.quantize_transposed(x), fp8.quantize_transposed(x), s,
                variant="ragged_contracting",
            ),
            "quantize_rows": lambda s: fp8.dequantize(fp8.quantize_rows(x, group_sizes=s))[:20],
            "quantize_both": lambda s: fp8.quantize_both(x, group_sizes=s).transposed,
            "quantize_transposed": lambda s: fp8.quantize_transposed(x, group_sizes=s),
            "requantize": lambda s: fp8.requantize(q, group_sizes=s),
            "swiglu_quantize_both": lambda s: fp8.swiglu_quantize_both(
                h, jnp.ones(m, jnp.float32), group_sizes=s
            ).transposed,
        },
        "experts": {
            "permute": lambda i: fp8.permute(x, i, 2)[0],
            "expert_ffn": lambda i: fp8.expert_ffn(x, i, gates, part),
            "its gradient": lambda i: jax.tree.leaves(jax.grad(ffn_loss, 1)(i, part)),
        },
        "index": {
            "quantize_rows": lambda i: fp8.quantize_rows(x, index=i),
            "quantize_both": lambda i: fp8.quantize_both(x, index=i).transposed,
            "requantize": lambda i: fp8.requantize(q, index=i),
        },
    }  # fmt: skip


def same(got, want) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", TYPES)
def test_integers_of_any_type_mean_the_same(dtype, x64):
    m = 256  # above the largest int8, and of uint8
    calls = takes_integers(m)
    given = {
        "sizes": np.array([100, 20]),
        "experts": np.arange(m)[:, None] % 2,
        "index": np.arange(m) % 100,
    }
    with jax.enable_x64(x64):
        for kind, values in given.items():
            for call in map(jax.jit, calls[kind].values()):
                narrow, typed = values.astype(np.int32), values.astype(dtype)
                if x64 or "64" not in dtype:
                    same(call(jnp.asarray(typed)), call(narrow))
    # NumPy's wide integers reach the door only outside of jit.
    if "64" in dtype:
        door = functools.partial(as_int32, "f", "i")
        for values in given.values():
            same(door(values.astype(dtype)), values.astype(np.int32))


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), 2**62])
def test_upper_bits_of_wide_integers_count(value, x64):
    far = 2**31 - 1 if value > 0 else -(2**31)
    with jax.enable_x64(x64):
        assert as_int32("f", "i", np.array([value, 5])).tolist() == [far, 5]
        assert as_int32("f", "i", [value, 5]).tolist() == [far, 5]
        if x64:
            assert as_int32("f", "i", jnp.array([value, 5])).tolist() == [far, 5]
        x, w = jnp.ones((32, 16), jnp.float32), jnp.ones((2, 16, 8), jnp.float32)
        rows = fp8.fp8_ragged_dot(x, w, np.array([value, 5]))
        filled = (rows != 0).all(axis=1)  # the first group has all rows, or none
        assert filled.tolist() == [value > 0 or i < 5 for i in range(32)]
        assert not fp8.permute(x, np.full((32, 1), value), 2)[1].group_sizes.any()


def test_what_is_no_integer_is_named():
    x, w = jnp.ones((8, 16)), jnp.ones((2, 16, 8))
    for bad in (None, jnp.ones(2), np.ones(2), [1.0, 2.0], "ab", np.array([True, False])):
        with pytest.raises(TypeError, match="fp8_ragged_dot: group_sizes must be integers"):
            fp8.fp8_ragged_dot(x, w, bad)
        with pytest.raises(TypeError, match="permute: expert_index must be integers"):
            fp8.permute(x, bad, 2)
    fp8.fp8_ragged_dot(x, w, [3, 5])


# ---- FP8 arrays ---------------------------------------------------------------------------------

BLOCKS = fp8.quantize(jnp.ones((256, 256)), (128, 128))
ROWS = fp8.quantize(jnp.ones((256, 256)))


def wrong(q: fp8.QArray) -> list[fp8.QArray]:
    return [
        fp8.QArray(q.qvalue.astype(jnp.float8_e5m2), q.scale),
        fp8.QArray(q.qvalue.astype(jnp.bfloat16), q.scale),
        fp8.QArray(jax.lax.bitcast_convert_type(q.qvalue, jnp.uint8), q.scale),
        fp8.QArray(q.qvalue, q.scale.astype(jnp.bfloat16)),
    ]


@pytest.mark.parametrize(
    "name, call, q",
    [
        ("prepare_weight", fp8.prepare_weight, BLOCKS),
        ("Fp8Linear.from_quantized", fp8_nnx.Fp8Linear.from_quantized, BLOCKS),
        ("gemm", lambda q: fp8.gemm(q, BLOCKS), ROWS),
        ("gemm", lambda q: fp8.gemm(ROWS, q), BLOCKS),
        ("requantize", fp8.requantize, ROWS),
        ("dequantize", fp8.dequantize, ROWS),
        (
            "swiglu_backward",
            lambda q: fp8.swiglu_backward(q, jnp.ones((256, 128)), jnp.ones(256)),
            ROWS,
        ),
    ],
)
def test_other_numbers_than_e4m3_are_refused_at_every_door(name, call, q):
    for bad in wrong(q):
        with pytest.raises(TypeError, match=f"(?s)^{name}: .* has the wrong dtype.*e4m3 numbers"):
            call(bad)
    array = [] if call is fp8.prepare_weight else [jnp.ones((256, 256))]  # which it casts
    for bad in (None, 3, [1, 2], *array):
        with pytest.raises(TypeError, match=f"^{name}: "):
            call(bad)


def test_arrays_in_host_memory_are_refused():
    at = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    x, w = jnp.ones((8, 128)), jnp.ones((128, 8))
    host = jax.device_put(x, at)
    q = fp8.quantize(x)
    for call in (
        lambda: fp8.fp8_matmul(host, w),
        lambda: fp8.fp8_matmul(x, jax.device_put(w, at)),
        lambda: fp8.quantize(host),
        lambda: fp8.gemm(fp8.QArray(jax.device_put(q.qvalue, at), q.scale), q),
        lambda: fp8.gemm(fp8.QArray(q.qvalue, jax.device_put(q.scale, at)), q),
    ):
        with pytest.raises(ValueError, match="is not on the device"):
            call()


def test_float64_of_numpy_is_float32_as_everywhere_in_jax():
    x, w = np.ones((8, 128)), np.ones((128, 8))
    assert fp8.fp8_matmul(x, w).dtype == jnp.float32
    assert fp8.quantize(x).shape == (8, 128)
    assert fp8.fp8_ragged_dot(x, w[None], np.array([8])).dtype == jnp.float32
    with jax.enable_x64(True), pytest.raises(TypeError, match="x has the wrong dtype"):
        fp8.fp8_matmul(x, w)


def test_containers_compare_by_identity():
    assert ROWS == ROWS and ROWS != BLOCKS and len({ROWS, BLOCKS}) == 2
    weight = fp8.prepare_weight(jnp.ones((128, 128)))
    assert weight == weight and weight != fp8.prepare_weight(jnp.ones((128, 128)))


# ---- nothing to do ------------------------------------------------------------------------------

EMPTY = {
    "matmul, no rows": (lambda: fp8.fp8_matmul(jnp.ones((0, 16)), jnp.ones((16, 8))), (0, 8)),
    "matmul, no k": (lambda: fp8.fp8_matmul(jnp.ones((4, 0)), jnp.ones((0, 8))), (4, 8)),
    "matmul, no columns": (lambda: fp8.fp8_matmul(jnp.ones((4, 16)), jnp.ones((16, 0))), (4, 0)),
    "matmul, no batch": (
        lambda: fp8.fp8_matmul(jnp.ones((0, 4, 16)), jnp.ones((16, 8))),
        (0, 4, 8),
    ),
    "ragged, no rows": (
        lambda: fp8.fp8_ragged_dot(jnp.ones((0, 16)), jnp.ones((2, 16, 8)), [0, 0]),
        (0, 8),
    ),
    "ragged, no k": (
        lambda: fp8.fp8_ragged_dot(jnp.ones((4, 0)), jnp.ones((2, 0, 8)), [2, 2]),
        (4, 8),
    ),
    "ragged, no columns": (
        lambda: fp8.fp8_ragged_dot(jnp.ones((4, 16)), jnp.ones((2, 16, 0)), [2, 2]),
        (4, 0),
    ),
    "ragged, no groups": (
        lambda: fp8.fp8_ragged_dot(jnp.ones((4, 16)), jnp.ones((0, 16, 8)), []),
        (4, 8),
    ),
    "dot_general, no rows": (
        lambda: fp8.fp8_dot_general(jnp.ones((0, 16)), jnp.ones((16, 8)), (((1,), (0,)), ((), ()))),
        (0, 8),
    ),
    "expert_ffn, no tokens": (
        lambda: fp8.expert_ffn(
            jnp.ones((0, 16)), jnp.ones((0, 2), int), jnp.ones((0, 2)), kernels(2, 16, 8)
        ),
        (0, 16),
    ),
    "expert_ffn, no choices": (
        lambda: fp8.expert_ffn(
            jnp.ones((4, 16)), jnp.ones((4, 0), int), jnp.ones((4, 0)), kernels(2, 16, 8)
        ),
        (4, 16),
    ),
    "moe, no tokens": (
        lambda: fp8.moe(jnp.ones((0, 16)), jnp.ones((16, 2)), kernels(2, 16, 8), top_k=1)[0],
        (0, 16),
    ),
    "permute, no tokens": (
        lambda: fp8.permute(jnp.ones((0, 4)), jnp.ones((0, 2), int), 3)[0],
        (0, 4),
    ),
    "permute, no experts": (
        lambda: fp8.permute(jnp.ones((3, 4)), jnp.zeros((3, 1), int), 0)[0],
        (3, 4),
    ),
    "quantize, no rows": (lambda: fp8.quantize(jnp.ones((0, 16))).qvalue, (0, 16)),
    "quantize, no columns": (lambda: fp8.quantize(jnp.ones((4, 0))).qvalue, (4, 0)),
    "quantize_both, no rows": (
        lambda: fp8.quantize_both(jnp.ones((0, 16))).transposed.qvalue,
        (16, 0),
    ),
    "gather, no rows": (
        lambda: fp8.quantize_rows(jnp.ones((0, 16)), index=np.zeros(0, int)).qvalue,
        (0, 16),
    ),
    "swiglu, no rows": (
        lambda: fp8.swiglu_quantize(jnp.ones((0, 16), jnp.bfloat16), jnp.ones(0)).qvalue,
        (0, 8),
    ),
    "gemm, no rows": (
        lambda: fp8.gemm(fp8.quantize(jnp.ones((0, 16))), fp8.quantize(jnp.ones((8, 16)))),
        (0, 8),
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_things_give_zeros_of_the_right_shape(name):
    call, shape = EMPTY[name]
    for run in (call, jax.jit(call)):
        out = run()
        assert out.shape == shape and not np.asarray(out, np.float32).any()


@pytest.mark.parametrize(
    "call",
    [
        lambda: fp8.quantize_rows(jnp.ones((300, 128)), group_sizes=np.zeros(0, int)),
        lambda: fp8.quantize_both(jnp.ones((300, 128)), group_sizes=jnp.zeros(0, int)),
        lambda: fp8.quantize_transposed(jnp.ones((300, 128)), group_sizes=[]),
        lambda: fp8.requantize(ROWS, group_sizes=[]),
        lambda: fp8.swiglu_quantize(jnp.ones((8, 16), jnp.bfloat16), jnp.ones(8), group_sizes=[]),
        lambda: fp8.swiglu_backward(ROWS, jnp.ones((256, 128)), jnp.ones(256), []),
        lambda: fp8.quantize_both(jnp.ones((0, 128)), index=np.zeros(200, int)),
        lambda: fp8.quantize_rows(jnp.ones((0, 128)), index=np.zeros(200, int)),
        lambda: fp8.requantize(fp8.quantize(jnp.ones((0, 128))), index=np.zeros(2, int)),
        lambda: fp8.expert_ffn(
            jnp.ones((4, 16)), jnp.zeros((4, 1), int), jnp.ones((4, 1)), kernels(0, 16, 8)
        ),
        lambda: fp8.moe(jnp.ones((4, 16)), jnp.ones((16, 0)), kernels(0, 16, 8), top_k=1),
        lambda: fp8.route(jnp.ones((4, 0)), 1),
        lambda: fp8.route(jnp.ones((4, 3)), 0),
        lambda: fp8.expert_ffn(
            jnp.ones((4, 16)),
            jnp.zeros((4, 1), int),
            jnp.ones((4, 1)),
            kernels(2, 16, 8),
            capacity=0,
        ),
    ],
)
def test_empty_things_without_a_meaning_are_errors_of_four_parts(call):
    with pytest.raises(ValueError, match=r"(?s)^\w+: .*\n  got .*\n  expected .*\n  fix "):
        call()


def test_more_rows_than_kernels_count_are_refused_before_they_run():
    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype)

    most = 2**31 - 2**11
    for rows, fits in ((most, True), (most + 1, False), (2**31 - 1, False), (2**33, False)):
        for call, operands in (
            (fp8.quantize, (shape(rows, 16),)),
            (lambda x: fp8.quantize(x), (shape(2, rows // 2 + (not fits), 16),)),
            (fp8.fp8_matmul, (shape(rows, 16), shape(16, 16))),
        ):
            traced = jax.jit(call).trace(*operands)
            if fits:
                traced.lower(lowering_platforms=("cuda",))
            else:
                with pytest.raises(ValueError, match="there are too many rows or columns"):
                    traced.lower(lowering_platforms=("cuda",))


# ---- options ------------------------------------------------------------------------------------

X, W, MANY, SIZES = jnp.ones((8, 128)), jnp.ones((128, 8)), jnp.ones((2, 128, 8)), [3, 5]
LAYER = functools.partial(fp8.moe, X, jnp.ones((128, 2)), kernels(2, 128, 8))


@pytest.mark.parametrize(
    "error, call, words",
    [
        (ValueError, lambda: fp8.route(X, 2.0), "route: top_k is 2.0"),
        (ValueError, lambda: LAYER(top_k=2.0), "moe: top_k is 2.0"),
        (ValueError, lambda: fp8.route(X, True), "route: top_k is True"),
        (ValueError, lambda: jax.jit(fp8.route)(X, 2), "route: top_k is "),
        (TypeError, lambda: fp8.route(X, 2, normalize="x"), "route: normalize is not a bool"),
        (TypeError, lambda: LAYER(top_k=1, normalize="x"), "moe: normalize is not a bool"),
        (TypeError, lambda: LAYER(top_k=1, cast_in_gemm="x"), "moe: cast_in_gemm is not a bool"),
        (ValueError, lambda: LAYER(top_k=1, capacity_factor="1"), "moe: capacity_factor"),
        (ValueError, lambda: LAYER(top_k=1, capacity_factor=float("nan")), "moe: capacity_factor"),
        (
            ValueError,
            lambda: fp8.unpermute(*fp8.permute(X, jnp.zeros((8, 1), int), 2), 1.0),
            "unpermute: rows do not fit",
        ),
        (ValueError, lambda: fp8.permute(X, jnp.zeros((8, 1), int), 2.0), "permute: num_experts"),
        (
            TypeError,
            lambda: fp8.gemm(fp8.quantize(X), fp8.quantize(X), out_dtype="bf16"),
            "gemm: out_dtype is unknown",
        ),
        (
            TypeError,
            lambda: fp8.gemm(fp8.quantize(X), fp8.quantize(X), config={}),
            "gemm: config is not a GemmConfig",
        ),
        (
            ValueError,
            lambda: fp8.gemm(fp8.quantize(X), fp8.quantize(X), num_sms=2.5),
            "gemm: num_sms is not a positive integer",
        ),
        (ValueError, lambda: fp8.fp8_matmul(X, W, residuals="x"), "fp8_matmul: residuals"),
        (TypeError, lambda: fp8.prepare_weight([1, 2]), "prepare_weight: w is not an array"),
        (TypeError, lambda: fp8.fp8_matmul([1.0], W), "fp8_matmul: x is not an array"),
        (TypeError, lambda: fp8.moe(X, W, (W, W, W), top_k=1), "moe: kernels is not an Expert"),
    ],
)
def test_wrong_options_are_named_under_the_function_that_was_called(error, call, words):
    with pytest.raises(error) as info:
        call()
    text = str(info.value)
    assert text.startswith(words), text
    assert [line[2:10].strip() for line in text.split("\n")[1:]] == ["got", "expected", "fix"]
    assert "<class" not in text


# ---- JAX's own modes ----------------------------------------------------------------------------


def every_function() -> dict:
    """Returns a call of each public function that computes."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 256), jnp.bfloat16)
    w = jax.random.normal(key, (256, 128), jnp.float32) / 16
    many = jax.random.normal(key, (2, 256, 128), jnp.float32) / 16
    sizes, part = jnp.array([100, 120]), kernels(2, 256, 128)
    lhs, rhs = fp8.quantize(x), fp8.quantize(w.T, (128, 128))
    stack = fp8.quantize(jnp.swapaxes(many, 1, 2), (128, 128))
    lhs3 = fp8.quantize(jnp.stack([x, x]))
    weight = jnp.ones(256, jnp.float32)
    index = jnp.arange(300) % 256
    gate = jax.random.normal(key, (256, 2))

    def grad(f, *arguments):
        return jax.grad(lambda *a: (jax.tree.leaves(f(*a))[0].astype(jnp.float32) ** 2).sum())(
            *arguments
        )

    return {
        "quantize": lambda: fp8.quantize(x),
        "quantize none": lambda: fp8.quantize(x, scale_rounding="none"),
        "quantize tensor": lambda: fp8.quantize(x, (None, None)),
        "quantize_both": lambda: fp8.quantize_both(x, index=index),
        "quantize groups": lambda: fp8.quantize_both(x, group_sizes=sizes).transposed,
        "requantize": lambda: fp8.requantize(lhs),
        "dequantize": lambda: fp8.dequantize(lhs),
        "swiglu_quantize": lambda: fp8.swiglu_quantize(x, weight),
        "swiglu_backward": lambda: fp8.swiglu_backward(lhs, x[:, :128], weight),
        "gemm dense": lambda: fp8.gemm(lhs, rhs),
        "gemm ragged": lambda: fp8.gemm(lhs, stack, sizes, variant="ragged"),
        "gemm contiguous": lambda: fp8.gemm(
            lhs, stack, groups=jnp.repeat(jnp.arange(2), 128), variant="contiguous"
        ),
        "gemm masked": lambda: fp8.gemm(lhs3, stack, sizes, variant="masked"),
        "gemm contracting": lambda: fp8.gemm(lhs, lhs, sizes, variant="ragged_contracting"),
        "fp8_matmul": lambda: grad(fp8.fp8_matmul, x, w),
        "fp8_matmul input": lambda: grad(
            functools.partial(fp8.fp8_matmul, residuals="input"), x, w
        ),
        "fp8_ragged_dot": lambda: grad(lambda x, w: fp8.fp8_ragged_dot(x, w, sizes), x, many),
        "fp8_dot_general": lambda: fp8.fp8_dot_general(x, w, (((1,), (0,)), ((), ()))),
        "prepare_weight": lambda: fp8.fp8_matmul(x, fp8.prepare_weight(w)),
        "route": lambda: fp8.route(x @ gate.astype(x.dtype), 1, bias=jnp.ones(2, jnp.float32)),
        "permute": lambda: fp8.permute(x, jnp.zeros((256, 1), int), 2),
        "moe": lambda: grad(
            lambda x, k: fp8.moe(x, gate, k, top_k=1, bias=jnp.ones(2, jnp.float32)), x, part
        ),
        "moe capacity": lambda: grad(
            lambda x, k: fp8.moe(x, gate, k, top_k=2, capacity_factor=1.0), x, part
        ),
        "moe sigmoid shared": lambda: fp8.moe(
            x,
            gate,
            part,
            top_k=2,
            score_function="sigmoid",
            shared=fp8.ExpertKernels(wi_0=w, wi_1=w, wo=w.T),
        ),
        "vmap": lambda: jax.vmap(fp8.fp8_matmul)(jnp.stack([x, x]), many),
    }


def several(*modes):
    """Returns a context in which several of JAX's modes hold at once."""
    stack = contextlib.ExitStack()
    for mode in modes:
        stack.enter_context(mode)
    return stack


MODES = {
    "strict": lambda: several(
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.transfer_guard("disallow"),
    ),
    "leak check": lambda: jax.checking_leaks(),
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": lambda: jax.disable_jit(),
}
UNJITTED = ("quantize_both", "fp8_matmul", "fp8_ragged_dot", "route", "gemm masked")


@pytest.mark.parametrize("mode", MODES)
def test_every_function_works_in_every_mode_of_jax(mode):
    calls = every_function()
    with MODES[mode]():
        for name, call in calls.items():
            if mode == "disable_jit" and name not in UNJITTED:
                continue
            try:
                jax.block_until_ready(jax.jit(call)())
            except Exception as error:
                raise AssertionError(f"{name} under {mode}") from error
