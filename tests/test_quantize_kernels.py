"""The quantising kernels, run on the CPU by tests/emulation: bit for bit the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from shapes import GROUPS

from jax_fp8gemm import _native, reference
from jax_fp8gemm.qarray import BLOCKS, ROW_BLOCKS
from jax_fp8gemm.quantize_primitive import QuantizeStatic, _reference

pytestmark = pytest.mark.skipif(
    "error" in _native.nvrtc_facts(),
    reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulation")


# ---- Operands ------------------------------------------------------------------------------------

ODD = (np.nan, np.inf, -np.inf, 3e38, -3.3e38)


def values(rng, shape, dtype, special: bool) -> np.ndarray:
    """Numbers of many sizes, ties, zeros of both signs; where special also NaN, Inf, extremes."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-20, 10, shape)
    x *= 2.0 ** rng.integers(-12, 12, (*shape[:-1], 1))
    ties = rng.integers(8, 16, shape) + 0.5  # between two numbers of e4m3
    x = np.where(rng.random(shape) < 0.2, ties * 2.0 ** rng.integers(-4, 4, shape), x)
    x = np.where(rng.random(shape) < 0.05, -0.0, x)
    x[..., : shape[-2] // 3, : min(shape[-1], 128)] *= rng.random() < 0.5  # a tile of zeros
    if special:
        some = rng.random(shape) < 3 / (shape[-1] * shape[-2])
        x = np.where(some, rng.choice(ODD, shape), x)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def operands(rng, static, shape, dtype, sizes=(), special=False) -> list[np.ndarray]:
    """What a kernel takes to quantise x [b, m, k], poison in rows past the groups."""
    b, m, k = shape
    end = int(reference.group_ends(jnp.array(sizes, jnp.int32), m)[-1]) if static.grouped else m
    x_rows = m // 2 + 1 if static.gather else m
    wide = static.source in ("swiglu", "swiglu_backward")
    x = values(rng, (b, x_rows, k * (1 + wide)), dtype, special)
    index = rng.integers(-3, x_rows + 3, m).astype(np.int32)
    if not static.gather:
        x[:, end:] = np.nan
    found = [x]
    if static.pair:
        found = [np.ascontiguousarray(half) for half in np.split(x, 2, axis=2)]
    if static.source in ("fp8", "swiglu_backward"):
        q, scale = reference.quantize(jnp.asarray(x, jnp.float32), ROW_BLOCKS, static.scale)
        scale = np.array(reference.scale_to_kernel(scale, ROW_BLOCKS))
        scale[:, :, x_rows:] = np.nan  # the padding
        found = [np.array(q), scale]
    if static.gather:
        found.append(index)
    if static.source == "swiglu_backward":
        found.append(np.where(np.arange(m)[:, None] < end, values(rng, (b, m, k), BF16, special),
                              BF16(np.nan)))  # fmt: skip
    if wide:
        weight = rng.normal(size=m).astype(np.float32)
        weight[end:] = np.nan
        found.append(weight)
    if static.grouped:
        found.append(np.array(sizes, np.int32))
    return found


# ---- Comparing -----------------------------------------------------------------------------------

right_results = jax.jit(_reference, static_argnames="static")


def bits(x) -> np.ndarray:
    """Bit patterns, with one NaN."""
    x = np.asarray(x)
    if x.dtype == np.float32:
        return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))
    return np.where(x.view(np.uint8) == 0xFF, np.uint8(0x7F), x.view(np.uint8))


def raw(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32 if x.dtype == np.float32 else np.uint8)


def limits(static, operands) -> dict[str, int]:
    """How many rows, and tokens of the transposed copy, a kernel writes."""
    _, m, _, tokens = static.sizes(operands)
    if not static.grouped:
        return {"rows": m, "transposed": tokens}
    ends = np.asarray(reference.group_ends(jnp.asarray(operands[-1]), m))
    own = np.diff(ends, prepend=0)
    return {"rows": int(ends[-1]), "transposed": int((-(-own // 128) * 128).sum())}


def logical(static, results) -> dict[str, np.ndarray]:
    """Results by name, scales by rows."""
    found = {}
    for name in ("rows", "transposed"):
        if name in results:
            q, scale = np.asarray(results[name]), np.asarray(results[name + "_scale"])
            found[name] = q
            scale = reference.scale_from_kernel(scale, q.shape, static.tile)
            found[name + "_scale"] = np.asarray(scale)
    return found


def compare(static, operands, got, right) -> dict[str, np.ndarray]:
    """What a kernel writes has the reference's bits; returns what it leaves alone."""
    right, rest = logical(static, right), {}
    for name, x in logical(static, got).items():
        limit = limits(static, operands)[name.removesuffix("_scale")]
        axis = 1 if name.startswith("rows") else 2
        by_blocks = static.tile == BLOCKS and "scale" in name
        per = 128 if name == "transposed_scale" or by_blocks else 1
        written, rest[name] = np.split(raw(x), [-(-limit // per)], axis)
        expected = np.split(bits(right[name]), [-(-limit // per)], axis)[0]
        np.testing.assert_array_equal(written, expected, name)
    return rest


def reference_of(static, operands) -> dict[str, np.ndarray]:
    found = right_results(*operands, static=static)
    return dict(zip(emulate.result_names(static), found, strict=True))


def check(folder, static, operands) -> None:
    """Both orders of threads give the reference's bits, and leave alone what is not theirs."""
    library = emulate.build(static, operands, folder)
    first = emulate.run(library, static, operands, False)
    for name, x in emulate.run(library, static, operands, True).items():
        np.testing.assert_array_equal(raw(x), raw(first[name]), f"{name}: order of threads")
    rest = compare(static, operands, first, reference_of(static, operands))
    for name, x in rest.items():
        assert not np.any(~x), f"{name}: written past the groups"


# ---- Tests ---------------------------------------------------------------------------------------

FLOAT = functools.partial(QuantizeStatic, "float")
FP8 = functools.partial(QuantizeStatic, "fp8", rows=False, transposed=True)
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32

SPECS = {
    "rows_bf16": (FLOAT(), BF16),
    "rows_f32_scale": (FLOAT(scale="float32"), F32),
    "transposed_f16": (FLOAT(rows=False, transposed=True), F16),
    "both_bf16_f32_scale": (FLOAT(scale="float32", transposed=True), BF16),
    "both_f32": (FLOAT(transposed=True), F32),
    "blocks_bf16": (FLOAT(BLOCKS), BF16),
    "blocks_both_bf16": (FLOAT(BLOCKS, transposed=True), BF16),
    "blocks_both_f16_f32_scale": (FLOAT(BLOCKS, "float32", transposed=True), F16),
    "blocks_transposed_f32_f32_scale": (FLOAT(BLOCKS, "float32", False, True), F32),
    "pair": (FLOAT(transposed=True, pair=True), BF16),
    "blocks_pair": (FLOAT(BLOCKS, transposed=True, pair=True), F32),
    "fp8": (FP8(), BF16),
    "fp8_f32_scale": (FP8(scale="float32"), BF16),
}
# One element's worth of everything; less than a tile; odd everything; tiles of 128 and 16 bytes.
SHAPES = [(1, 1, 16), (3, 7, 130), (2, 129, 77), (1, 200, 264), (1, 256, 128), (2, 144, 8)]


@pytest.mark.parametrize("special", [False, True], ids=["finite", "nan_inf"])
@pytest.mark.parametrize("spec", SPECS)
def test_dense(folder, spec, special):
    static, dtype = SPECS[spec]
    for shape in SHAPES if not static.pair else [(2, 129, 256), (1, 144, 512)]:
        rng = np.random.default_rng(shape)
        check(folder, static, operands(rng, static, shape, dtype, special=special))


GROUPED_SPECS = {
    "both_bf16": (FLOAT(transposed=True, grouped=True), BF16),
    "both_gather_f16": (FLOAT(transposed=True, grouped=True, gather=True), F16),
    "rows": (FLOAT(grouped=True), BF16),
    "rows_gather": (FLOAT(grouped=True, gather=True), BF16),
    "transposed_f32": (FLOAT(rows=False, transposed=True, grouped=True), F32),
    "fp8": (FP8(grouped=True), BF16),
    "fp8_gather": (FP8(grouped=True, gather=True), BF16),
}


def grouped_operands(static, dtype, index: int) -> list[np.ndarray]:
    groups, k = GROUPS[index], (136, 77, 200)[index % 3]
    rng = np.random.default_rng(index)
    return operands(rng, static, (1, groups.m, k), dtype, groups.sizes)


@pytest.mark.parametrize("spec", GROUPED_SPECS)
def test_grouped(folder, spec):
    static, dtype = GROUPED_SPECS[spec]
    for i, groups in enumerate(GROUPS):
        if not groups.m or (groups.name == "many_groups" and spec != "rows_gather"):
            continue  # no call; too slow for all
        rng = np.random.default_rng(i)
        k = (136, 77, 200)[i % 3]
        check(folder, static, operands(rng, static, (1, groups.m, k), dtype, groups.sizes))


# ---- SwiGLU: exp differs by units in the last place, so bits may ---------------------------------


def near(got, right, name: str) -> None:
    """Scales within a factor of two, and as good as all bytes equal; none but a step away."""
    q, scale = (np.asarray(got[name + part]) for part in ("", "_scale"))
    q_right, scale_right = (np.asarray(right[name + part]) for part in ("", "_scale"))
    ratio = scale / scale_right
    same = np.isclose(ratio, 1, rtol=1e-5)
    assert np.all((ratio >= 0.5) & (ratio <= 2)) and np.mean(same) > 0.98, name
    assert np.mean(q.view(np.uint8) == q_right.view(np.uint8)) > 0.98, name
    found, exact = (
        np.asarray(reference.dequantize(jnp.asarray(a), jnp.asarray(b), ROW_BLOCKS), np.float64)
        for a, b in ((q, scale), (q_right, scale_right))
    )
    step = np.maximum(np.abs(exact) * 2.0**-3, np.abs(exact).max() * 2.0**-9)
    assert np.all(np.abs(found - exact) <= 1.01 * step), name


SWIGLU = {
    "rows": QuantizeStatic("swiglu", grouped=True),
    "both": QuantizeStatic("swiglu", transposed=True, scale="float32"),
    "backward": QuantizeStatic("swiglu_backward", transposed=True, grouped=True),
    "backward_whole": QuantizeStatic("swiglu_backward", transposed=True, scale="float32"),
}


SWIGLU_SIZES = [(60, 0, 80, 3), (200,), (0, 1, 128, 71)]


def swiglu_operands(static, index: int) -> list[np.ndarray]:
    backward, rng = static.source == "swiglu_backward", np.random.default_rng(index)
    shape = (1, 200, 256 if backward else 200)
    given = operands(rng, static, shape, BF16, SWIGLU_SIZES[index])
    if backward:
        given[0] = reference_rows(rng, given)
    return given


@pytest.mark.parametrize("spec", SWIGLU)
def test_swiglu(folder, spec):
    static = SWIGLU[spec]
    for i in range(len(SWIGLU_SIZES)):
        given = swiglu_operands(static, i)
        library = emulate.build(static, given, folder)
        first = emulate.run(library, static, given, False)
        for name, x in emulate.run(library, static, given, True).items():
            np.testing.assert_array_equal(raw(x), raw(first[name]), f"{name}: order of threads")
        compare_swiglu(static, given, first, reference_of(static, given))


def reference_rows(rng, given) -> np.ndarray:
    """Gate and up of about 1, as a layer has them; what values() draws makes e^gate overflow."""
    q, scale = reference.quantize(jnp.asarray(rng.normal(size=given[0].shape)), ROW_BLOCKS, "pow2")
    end = ~np.isnan(np.asarray(given[3]))
    given[1][...] = np.where(end, np.asarray(reference.scale_to_kernel(scale, ROW_BLOCKS)), np.nan)
    return np.array(q)


def compare_swiglu(static, given, got, right) -> None:
    limit = limits(static, given)

    def cut(results) -> dict[str, np.ndarray]:
        found = {}
        for name in got:
            if name.endswith("_scale") or name == "row_weight_gradient":
                continue
            q = np.asarray(results[name])
            scale = np.asarray(results[name + "_scale"])
            scale = np.asarray(reference.scale_from_kernel(scale, q.shape, ROW_BLOCKS))
            rows = name == "rows"
            found[name] = q[:, : limit["rows"]] if rows else q[:, :, : limit["transposed"]]
            end = limit["rows"] if rows else limit["transposed"] // 128
            found[name + "_scale"] = scale[:, :end] if rows else scale[:, :, :end]
        return found

    ours, exact = cut(got), cut(right)
    for name in ours:
        if not name.endswith("_scale"):
            near(ours, exact, name)
    if "row_weight_gradient" in got:
        parts = (r["row_weight_gradient"][:, : limit["rows"]] for r in (got, right))
        np.testing.assert_allclose(*parts, rtol=1e-4, atol=1e-5)


# ---- What NVRTC makes of them --------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
def test_kernels_have_no_spills(aligned):
    listed = [*SPECS.values(), *GROUPED_SPECS.values(), *((s, BF16) for s in SWIGLU.values())]
    for static, dtype in listed:
        m = k = 512 if aligned or static.source == "swiglu_backward" else 509
        made = _native.compile(emulate.specification(static, dtype, m, k))
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores", made["log"]), static
