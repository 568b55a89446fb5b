"""Public functions on drawn arguments, against a model in numpy that shares nothing with them.

The draws are the same in every run. JAX_FP8GEMM_FUZZ=20 makes twenty times as many, other ones each
time, and prints the smallest case that fails.
"""

import os

import fuzz_model as model
import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import jax_fp8gemm as fp8

TIMES = int(os.environ.get("JAX_FP8GEMM_FUZZ", "1"))
FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
ROUNDINGS = ("pow2", "none")
TILES = {"1x128": (1, 128), "128x128": (128, 128), "row": (1, None), "tensor": (None, None)}
SCALES = [("1x128", "128x128"), ("1x128", "1x128"), ("row", "row"), ("tensor", "tensor")]
INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32)
EXTREMES = (np.nan, np.inf, -np.inf, 3e38, 1e-39, -1e-42, 0.0, -0.0)


def fuzz(examples: int):
    return hypothesis.settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# ---- what is drawn ------------------------------------------------------------------------------

# Zeros are rare: an empty dim hides all others.
SIZES = (1, 2, 3, 5, 7, 16, 31, 33, 40, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257)
sizes = st.sampled_from((*SIZES, *SIZES, 0))
depths = st.sampled_from((16, 32, 48, 112, 128, 144, 256, 272, 400, 0))
counts = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def group_sizes(draw, g: int, places: int) -> np.ndarray:
    """Sizes that fit or not: skewed, empty, all in one, negative, huge, of any integer type."""
    dtype = draw(st.sampled_from(INTEGERS))
    kind = draw(st.sampled_from(("fit", "any", "one", "none", "all")))
    rng = np.random.default_rng(draw(seeds))
    if kind == "fit":
        ends = np.sort(rng.integers(0, places + 1, g))
        found = np.diff(ends, prepend=0)
    elif kind == "any":
        found = rng.integers(-places - 1, places + 2, g)
    elif kind == "one":
        found = np.where(np.arange(g) == rng.integers(g), places, 0)
    else:
        return np.full(g, 0 if kind == "none" else np.iinfo(dtype).max, dtype)
    limits = np.iinfo(dtype)
    return np.clip(found, limits.min, limits.max).astype(dtype)


def floats(rng, shape, dtype, extremes: bool = False) -> np.ndarray:
    """Numbers of many sizes; ties between FP8 numbers; zeros; or also EXTREMES."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 6, shape)
    ties = (rng.integers(8, 16, shape) + 0.5) * 2.0 ** rng.integers(-3, 3, shape)
    x = np.where(rng.random(shape) < 0.2, ties, x)
    x = np.where(rng.random(shape) < 0.1, 0.0, x)
    if extremes:
        some = rng.random(shape) < 2 / max(np.prod(shape), 4)
        x = np.where(some, rng.choice(EXTREMES, shape), x)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def qarray(rng, shape, tile) -> tuple[fp8.QArray, np.ndarray]:
    """Any finite FP8 numbers under any scales, and what they stand for in float64."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
    q = codes.view(model.E4M3)
    *lead, rows, columns = shape
    counts = (-(-rows // tile[0]) if tile[0] else 1, -(-columns // tile[1]) if tile[1] else 1)
    scale = (rng.uniform(0.5, 2, (*lead, *counts)) * 2.0 ** rng.integers(-9, 9)).astype(np.float32)
    real = q.astype(np.float64) * model.spread(scale.astype(np.float64), tile, shape)
    return fp8.QArray(jnp.asarray(q), jnp.asarray(scale)), real


# ---- GEMMs --------------------------------------------------------------------------------------

DIMS = {
    "dense": ("mk", "nk", "mn"), "batched": ("gmk", "gnk", "gmn"), "ragged": ("mk", "gnk", "mn"),
    "contiguous": ("mk", "gnk", "mn"), "masked": ("gmk", "gnk", "gmn"),
    "ragged_contracting": ("mk", "nk", "gmn"),
}  # fmt: skip


def groups_of_rows(rng, g: int, m: int) -> np.ndarray:
    """The group of each row: one for each 128 rows, padding at its end."""
    found = np.full(m, -1, np.int32)
    for start in range(0, m, 128):
        found[start : start + rng.integers(0, 129)] = rng.integers(g)
    return found


@fuzz(100)
@hypothesis.given(
    variant=st.sampled_from(list(DIMS)), m=sizes, n=sizes, k=depths, g=counts,
    scales=st.sampled_from(SCALES), f32=st.booleans(), init=st.booleans(), seed=seeds,
    data=st.data(),
)  # fmt: skip
def test_gemm(variant, m, n, k, g, scales, f32, init, seed, data):
    if variant == "ragged_contracting" and scales == SCALES[0]:
        scales = SCALES[1]
    rng, dims = np.random.default_rng(seed), {"m": m, "n": n, "k": k, "g": g}
    shapes = [tuple(dims[letter] for letter in letters) for letters in DIMS[variant]]
    made = [qarray(rng, shape, TILES[tile]) for shape, tile in zip(shapes[:2], scales, strict=True)]
    groups, given = None, {"variant": variant, "out_dtype": jnp.float32 if f32 else jnp.bfloat16}
    if variant == "contiguous":
        groups = given["groups"] = groups_of_rows(rng, g, m)
    elif variant not in ("dense", "batched"):
        groups = data.draw(group_sizes(g, k if variant == "ragged_contracting" else m))
        given["group_sizes"] = groups
    want, magnitudes, defined = model.gemm(variant, made[0][1], made[1][1], groups)
    if init and f32:
        start = rng.normal(size=shapes[2]).astype(np.float32)
        given["init"] = jnp.asarray(start)
        want, magnitudes = want + start, magnitudes + np.abs(start)
    got = fp8.gemm(made[0][0], made[1][0], **given)
    model.check_close(got, want, magnitudes, k, defined)


# ---- casts --------------------------------------------------------------------------------------


@fuzz(40)
@hypothesis.given(
    m=sizes, k=sizes, tile=st.sampled_from(list(TILES)), rounding=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from(list(FLOATS)), extremes=st.booleans(), seed=seeds,
)  # fmt: skip
def test_quantize(m, k, tile, rounding, dtype, extremes, seed):
    x = floats(np.random.default_rng(seed), (m, k), FLOATS[dtype], extremes)
    q = fp8.quantize(jnp.asarray(x), TILES[tile], scale_rounding=rounding)
    model.check_copy(q, x, TILES[tile], rounding)
    real = np.asarray(q.qvalue).astype(np.float64)
    real *= model.spread(np.asarray(q.scale, np.float64), TILES[tile], x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(np.asarray(fp8.dequantize(q)), real.astype(np.float32))


@fuzz(40)
@hypothesis.given(
    m=sizes, k=sizes, g=st.integers(0, 4), gathers=st.booleans(),
    kind=st.sampled_from(("rows", "transposed", "both", "requantize")),
    rounding=st.sampled_from(ROUNDINGS), dtype=st.sampled_from(list(FLOATS)), seed=seeds,
    data=st.data(),
)  # fmt: skip
def test_casts_by_groups_and_through_an_index(m, k, g, gathers, kind, rounding, dtype, seed, data):
    rng, given = np.random.default_rng(seed), {"scale_rounding": rounding}
    gathers = gathers and kind != "transposed"
    x = floats(rng, (m // 2 + 1 if gathers else m, k), FLOATS[dtype])
    operand, sizes = jnp.asarray(x), None
    if kind == "requantize":
        operand = fp8.quantize(operand, scale_rounding=rounding)
        each = model.spread(np.asarray(operand.scale), (1, 128), x.shape)
        x = np.asarray(operand.qvalue).astype(np.float32) * each
    if gathers:
        given["index"] = rng.integers(-3, len(x) + 3, m)
        x = x[np.clip(given["index"], 0, len(x) - 1)]
    if g:
        sizes = given["group_sizes"] = data.draw(group_sizes(g, m))
    used = m if sizes is None else model.ranges(sizes, m)[-1][1]
    functions = {"rows": fp8.quantize_rows, "transposed": fp8.quantize_transposed,
                 "both": fp8.quantize_both, "requantize": fp8.requantize}  # fmt: skip
    got = functions[kind](operand, **given)
    copies = list(got) if kind == "both" else [got]
    if kind in ("rows", "both"):
        model.check_copy(copies.pop(0), x, (1, 128), rounding, used)
    if copies:
        model.check_copy(copies[0], model.lines(x, sizes).T, (1, 128), rounding)


@fuzz(15)
@hypothesis.given(m=sizes, f=sizes, rounding=st.sampled_from(ROUNDINGS), seed=seeds)
def test_swiglu(m, f, rounding, seed):
    """Within a step of FP8: the sigmoid is not exact."""
    rng = np.random.default_rng(seed)
    h = (3 * rng.normal(size=(m, 2 * f))).astype(FLOATS["bf16"])
    weight = rng.normal(size=m).astype(np.float32)
    both = fp8.swiglu_quantize_both(jnp.asarray(h), jnp.asarray(weight), scale_rounding=rounding)
    gate, up = np.split(h.astype(np.float64), 2, 1)
    y = weight[:, None] * gate / (1 + np.exp(-gate)) * up
    for q, want in ((both.rows, y), (both.transposed, model.lines(y).T)):
        each = model.spread(np.asarray(q.scale, np.float64), (1, 128), want.shape)
        error = np.abs(np.asarray(q.qvalue).astype(np.float64) * each - want)
        assert (error <= 1.01 * np.maximum(2.0**-4 * np.abs(want), 2.0**-10 * each)).all()
        want_scale = model.scales(want, (1, 128), rounding)
        np.testing.assert_allclose(np.log2(q.scale), np.log2(want_scale), atol=1.001)


# ---- matmuls ------------------------------------------------------------------------------------


@fuzz(16)
@hypothesis.given(
    lead=st.sampled_from(((), (2,), (3, 128))), m=sizes, n=sizes, k=sizes,
    rounding=st.sampled_from(ROUNDINGS), residuals=st.sampled_from(("fp8_t", "fp8", "input")),
    dtype=st.sampled_from(list(FLOATS)), seed=seeds,
)  # fmt: skip
def test_matmul_and_its_gradients(lead, m, n, k, rounding, residuals, dtype, seed):
    rng = np.random.default_rng(seed)
    rows = lead if lead == (3, 128) else (*lead, m)
    x, w, dy = (
        (rng.normal(size=shape)).astype(FLOATS[dtype]) for shape in ((*rows, k), (k, n), (*rows, n))
    )
    options = {"scale_rounding": rounding, "residuals": residuals}
    y, pull = jax.vjp(lambda x, w: fp8.fp8_matmul(x, w, **options), jnp.asarray(x), jnp.asarray(w))
    flat = int(np.prod(rows))
    wants = model.gradients(x.reshape(flat, k), w, dy.reshape(flat, n), rounding, residuals)
    for got, (want, *room) in zip((y, *pull(jnp.asarray(dy))), wants, strict=True):
        model.check_close(np.asarray(got).reshape(want.shape), want, *slack(room, rounding))


def slack(room: list, rounding: str) -> tuple[np.ndarray, int]:
    """Returns the bound of check_close. Without powers of two a tie may fall to either side."""
    magnitudes, depth = room
    return magnitudes, depth if rounding == "pow2" else depth + 2**18


@fuzz(14)
@hypothesis.given(
    m=sizes, n=sizes, k=sizes, g=counts, rounding=st.sampled_from(ROUNDINGS),
    residuals=st.sampled_from(("fp8_t", "fp8", "input")), dtype=st.sampled_from(("bf16", "f32")),
    casting=st.sampled_from((None, False, True)), seed=seeds, data=st.data(),
)  # fmt: skip
def test_ragged_dot_and_its_gradients(m, n, k, g, rounding, residuals, dtype, casting, seed, data):
    rng, sizes = np.random.default_rng(seed), data.draw(group_sizes(g, m))
    if casting:  # what it asks for
        n, k, rounding, dtype = -(-n // 16) * 16, -(-k // 16) * 16, "pow2", "bf16"
    shapes = ((m, k), (g, k, n), (m, n))
    x, w, dy = (rng.normal(size=shape).astype(FLOATS[dtype]) for shape in shapes)
    x[model.ranges(sizes, m)[-1][1] :] = np.nan  # these rows are not read
    options = {"scale_rounding": rounding, "residuals": residuals, "cast_in_gemm": casting}
    y, pull = jax.vjp(
        lambda x, w: fp8.fp8_ragged_dot(x, w, sizes, **options), jnp.asarray(x), jnp.asarray(w)
    )
    wants = model.gradients(x, w, dy, rounding, residuals, sizes)
    for got, (want, *room) in zip((y, *pull(jnp.asarray(dy))), wants, strict=True):
        model.check_close(got, want, *slack(room, rounding))


# ---- experts ------------------------------------------------------------------------------------


@fuzz(10)
@hypothesis.given(
    t=st.integers(0, 40), e=st.integers(1, 9), top_k=st.integers(1, 9), biased=st.booleans(),
    score=st.sampled_from(("softmax", "sigmoid")), seed=seeds,
)  # fmt: skip
def test_route(t, e, top_k, biased, score, seed):
    rng, top_k = np.random.default_rng(seed), min(top_k, e)
    logits = rng.normal(size=(t, e)).astype(np.float32)
    bias = rng.normal(size=e).astype(np.float32) if biased else None
    given = None if bias is None else jnp.asarray(bias)
    got = fp8.route(jnp.asarray(logits), top_k, score_function=score, bias=given)
    scores, index, weights = model.chosen(logits, top_k, score, bias)
    np.testing.assert_allclose(np.asarray(got.scores), scores, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(got.expert_index), index)
    np.testing.assert_allclose(np.asarray(got.gate_weights), weights, rtol=1e-5)


@fuzz(12)
@hypothesis.given(
    t=st.integers(0, 30), top_k=st.integers(1, 4), e=st.integers(0, 6), h=st.integers(1, 9),
    seed=seeds,
)  # fmt: skip
def test_permute_and_back(t, top_k, e, h, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (t, h)).astype(np.float32)
    index = rng.integers(-1, e + 2, (t, top_k))
    rows, permutation = fp8.permute(jnp.asarray(x), jnp.asarray(index), e)
    pairs = [(expert, t, j) for (t, j), expert in np.ndenumerate(index) if 0 <= expert < e]
    pairs.sort()  # by expert, then by token
    want = np.zeros((t * top_k, h), np.float32)
    want[: len(pairs)] = x[[token for _, token, _ in pairs]]
    np.testing.assert_array_equal(np.asarray(rows), want)
    sizes = np.bincount([expert for expert, _, _ in pairs], minlength=max(e, 1))[:e]
    np.testing.assert_array_equal(np.asarray(permutation.group_sizes), sizes)
    kept = ((index >= 0) & (index < e)).sum(1, keepdims=True)
    back = fp8.unpermute(rows, permutation, top_k)
    np.testing.assert_array_equal(np.asarray(back), x * kept)


@fuzz(8)
@hypothesis.given(
    t=st.integers(0, 20), top_k=st.integers(1, 3), e=st.integers(1, 4), routes=st.booleans(),
    h=st.sampled_from((16, 128, 144, 7)), f=st.sampled_from((128, 256)),
    capacity=st.none() | st.integers(1, 9), seed=seeds,
)  # fmt: skip
def test_experts(t, top_k, e, routes, h, f, capacity, seed):
    """Experts that are named, some of which do not exist; or the whole layer with its router."""
    rng, kernels = np.random.default_rng(seed), []
    x = rng.normal(size=(t, h)).astype(FLOATS["bf16"])
    for shape in ((e, h, f), (e, h, f), (e, f, h)):
        kernels.append((rng.normal(size=shape) * shape[1] ** -0.5).astype(FLOATS["bf16"]))
    named = dict(zip(("wi_0", "wi_1", "wo"), map(jnp.asarray, kernels), strict=True))
    given = fp8.ExpertKernels(**named)
    if routes:
        gate = rng.normal(size=(h, e)).astype(np.float32)
        top_k, capacity = min(top_k, e), None
        got, _ = fp8.moe(jnp.asarray(x), jnp.asarray(gate), given, top_k=top_k)
        _, index, weights = model.chosen(x.astype(np.float64) @ gate, top_k, "softmax")
    else:
        index = rng.integers(-1, e + 1, (t, top_k))
        weights = rng.random((t, top_k)).astype(np.float32)
        rows = jnp.asarray(x), jnp.asarray(index), jnp.asarray(weights)
        got = fp8.expert_ffn(*rows, given, capacity=capacity)
    want = model.experts(x, index, weights, *kernels, capacity=capacity)
    assert model.calc_diff(got, want) < 1e-4
