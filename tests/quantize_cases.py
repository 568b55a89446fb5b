"""What the quantizing kernels take and what is right, in numpy: for the emulation and for a GPU."""

import ml_dtypes
import numpy as np
from numerics import clamped

from jax_fp8gemm._bind.quantize_op import CastSpec
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, ROWS
from jax_fp8gemm._core.reference import SHARED_SPREAD

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
E4M3 = ml_dtypes.float8_e4m3fn

# ---- What is right, in numpy ---------------------------------------------------------------------
# Not reference.copies: XLA on a CPU takes denormals for zeros, and compiles every shape anew.
# test_numpy_and_the_reference_agree compares the two.


def shared(scale, largest) -> np.ndarray:
    """reference.share_scales of [b, rows, steps], block by block."""
    found = scale.copy()
    b, rows, steps = scale.shape
    for at in np.ndindex(b, -(-rows // 128), steps):
        block = at[0], slice(128 * at[1], 128 * at[1] + 128), at[2]
        own = scale[block][largest[block] != 0].astype(np.float64)
        if own.size and np.all(np.isfinite(own)) and own.max() / own.min() <= 2.0**SHARED_SPREAD:
            found[block] = own.max()
    return found


def quantized(x, tile, scale_rounding, share=False) -> tuple[np.ndarray, np.ndarray]:
    """reference.quantize of [b, rows, columns]."""
    b, rows, columns = x.shape
    tile = tile[0], tile[1] or columns
    padded = np.pad(x, [(0, 0), (0, -rows % tile[0]), (0, -columns % tile[1])])
    tiles = padded.reshape(b, -(-rows // tile[0]), tile[0], -(-columns // tile[1]), tile[1])
    largest = np.abs(tiles).max((2, 4), initial=0)
    scale = largest * np.float32(1 / 448)
    if scale_rounding == "pow2":
        mantissa, exponent = np.frexp(largest.astype(np.float64) / 448)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    scale = np.where(largest == 0, np.float32(1), np.maximum(scale, np.float32(2.0**-126)))
    scale[~np.isfinite(largest)] = np.nan
    scale = shared(scale, largest) if share else scale
    with np.errstate(invalid="ignore"):
        values = np.clip(tiles * (1 / scale)[:, :, None, :, None], -448, 448).astype(E4M3)
    return values.reshape(padded.shape)[:, :rows, :columns], scale


def spread(scale, tile, shape) -> np.ndarray:
    """The scale of every element."""
    return scale.repeat(tile[0], -2).repeat(tile[1], -1)[..., : shape[-2], : shape[-1]]


def swiglu_parts(h, named) -> dict[str, np.ndarray]:
    """By name of the result what SwiGLU and its backward pass give, float64 [b, m, f or 2f]."""
    gate, up = np.split(h.astype(np.float64), 2, axis=-1)
    sigmoid, weight = 1 / (1 + np.exp(-gate)), named["row_weight"][:, None].astype(np.float64)
    y = gate * sigmoid * up
    if "gradient" not in named:
        return {"rows": weight * y, "transposed": weight * y}
    dy = named["gradient"].astype(np.float64)
    d_gate = weight * dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = weight * dy * gate * sigmoid
    both = np.concatenate([d_gate, d_up], -1)
    return {"rows": both, "transposed": d_gate, "up_transposed": d_up, "activation": weight * y}


def sources(spec, named) -> dict[str, np.ndarray]:
    """By name of the copy what is quantized, rows not yet placed by groups."""
    x = np.concatenate([named[n] for n in ("x", "beside") if n in named], -1).astype(np.float32)
    if "x_scale" in named:
        scale = named["x_scale"].swapaxes(1, 2)[:, : x.shape[1]]
        with np.errstate(over="ignore"):  # 448 · scale may be more than the largest float
            x = x * spread(scale, ROW_BLOCKS, x.shape)
    if spec.gather:
        x = x[:, np.clip(named["index"], 0, x.shape[1] - 1)]
    if "row_weight" in named:
        return swiglu_parts(x, named)
    return {"rows": x, "transposed": x}


def parts(spec, operands) -> list[tuple[int, int]]:
    """Where groups of rows begin and end; all rows are one without groups."""
    _, m, _, _ = spec.sizes(operands)
    return clamped(operands[-1], m) if spec.grouped else [(0, m)]


def expected(spec, operands) -> dict[str, np.ndarray]:
    """Values that each copy quantizes, as far as a kernel writes it."""
    found, groups = {}, parts(spec, operands)
    for name, x in sources(spec, spec.named(operands)).items():
        multiple = 128 if spec.tile == ROW_BLOCKS else 1
        lines = [
            np.pad(x[:, start:end], [(0, 0), (0, -(end - start) % multiple), (0, 0)])
            for start, end in groups
        ]
        found[name] = np.concatenate(lines, 1).swapaxes(1, 2)
        if name == "rows":
            found[name] = x[:, : groups[-1][1]]
    return {name: found[name] for name in found if getattr(spec, name, True)}


# ---- Operands ------------------------------------------------------------------------------------

EXTREMES = (np.nan, np.inf, -np.inf, 3e38, -3.3e38)


def values(rng, shape, dtype, extremes: bool) -> np.ndarray:
    """Numbers of many sizes, ties, zeros of both signs, a tile of zeros; or also EXTREMES."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-20, 10, shape)
    x *= 2.0 ** rng.integers(-12, 12, (*shape[:-1], 1))
    ties = rng.integers(8, 16, shape) + 0.5  # between two numbers of e4m3
    x = np.where(rng.random(shape) < 0.2, ties * 2.0 ** rng.integers(-4, 4, shape), x)
    x = np.where(rng.random(shape) < 0.05, -0.0, x)
    x[:, : shape[1] // 3, :128] *= 0
    if extremes:
        some = rng.random(shape) < 3 / (shape[1] * shape[2])
        x = np.where(some, rng.choice(EXTREMES, shape), x)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def operands(seed, spec, shape, dtype, sizes=(), extremes=False) -> list[np.ndarray]:
    """What a kernel takes to quantize x [b, m, k], poison in rows past the groups."""
    rng = np.random.default_rng(seed)
    b, m, k = shape
    end = clamped(sizes, m)[-1][1] if spec.grouped else m
    x_rows = m // 2 + 1 if spec.gather else m
    if "swiglu" in spec.source:  # where the sigmoid bends
        width = 2 * k if spec.source == "swiglu" else k
        x = (3 * rng.normal(size=(b, x_rows, width))).astype(dtype)
    else:
        x = values(rng, (b, x_rows, k), dtype, extremes)
    named = {"x": x}
    if spec.pair:
        named = {
            n: x[:, :, i * k // 2 :][:, :, : k // 2].copy() for i, n in enumerate(("x", "beside"))
        }
    if "x_scale" in spec.names:
        named["x"], scale = quantized(x.astype(np.float32), ROW_BLOCKS, spec.scale_rounding)
        padding = [(0, 0), (0, 0), (0, -x_rows % 4)]
        named["x_scale"] = np.pad(scale.swapaxes(1, 2), padding, constant_values=np.nan)
    if spec.gather:
        named["index"] = rng.integers(-3, x_rows + 3, m).astype(np.int32)
    elif spec.grouped:
        named["x"][:, end:] = np.nan
    named["gradient"] = rng.normal(size=(b, m, k // 2)).astype(BF16)
    named["gradient"][:, end:] = np.nan
    named["row_weight"] = rng.normal(size=m).astype(np.float32)
    named["row_weight"][end:] = np.nan
    named["group_sizes"] = np.array(sizes, np.int32)
    return [named[name] for name in spec.names]


# ---- Running and comparing -----------------------------------------------------------------------


def bits(x) -> np.ndarray:
    """Bit patterns, with one NaN."""
    if x.dtype == np.float32:
        return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))
    return np.where(x.view(np.uint8) == 0xFF, np.uint8(0x7F), x.view(np.uint8))


def raw(x) -> np.ndarray:
    return x.view(np.uint32 if x.dtype == np.float32 else np.uint8)


def written(spec, operands, results) -> tuple[dict, np.ndarray]:
    """Returns by name what a kernel writes, and the bytes of all else that is no padding.

    Of a copy: values and scales, these by rows of the copy.
    """
    found, others, results = {}, [], dict(results)

    def cut(x, shape) -> np.ndarray:
        inside = tuple(slice(0, size) for size in shape)
        outside = np.ones(x.shape, bool)
        outside[inside] = False
        others.append(x[outside].view(np.uint8))
        return x[inside]

    for name, right in expected(spec, operands).items():
        q, scale = results.pop(name), results.pop(name + "_scale")
        b, rows, columns = right.shape
        if spec.tile != BLOCKS:
            scale = scale.swapaxes(1, 2)[:, : q.shape[1]]
            scale = cut(scale, (b, rows, -(-columns // (spec.tile[1] or columns))))
        else:
            scale = scale[:, :, : -(-columns // 128)]
        found[name] = cut(q, right.shape), scale
    end = parts(spec, operands)[-1][1]
    rest = {name: cut(x, (len(x), end)) for name, x in results.items()}
    return found | rest, np.concatenate(others)


def shares(spec, name) -> bool:
    """Whether columns of this copy may share scales: those of gradients."""
    return spec.shares and name in ("transposed", "up_transposed")


def compare(spec, operands, found) -> None:
    """Bit for bit."""
    for name, right in expected(spec, operands).items():
        values, scales = quantized(right, spec.tile, spec.scale_rounding, shares(spec, name))
        np.testing.assert_array_equal(bits(found[name][1]), bits(scales), f"scales of {name}")
        np.testing.assert_array_equal(bits(found[name][0]), bits(values), name)


def place(q) -> np.ndarray:
    """Numbers the values of e4m3 in order."""
    bits = q.view(np.uint8).astype(int)
    return np.where(bits < 128, bits, 128 - bits)


def compare_swiglu(spec, operands, found) -> np.ndarray:
    """Values a step from float64's at most, scales a factor of two; returns which are the same."""
    same = []
    for name, right in expected(spec, operands).items():
        rounding = spec.scale_rounding
        values, scales = quantized(right.astype(F32), ROW_BLOCKS, rounding, shares(spec, name))
        q, own = found[name]
        assert np.all((own <= 2 * scales) & (scales <= 2 * own)), f"scales of {name}"
        nearest = np.clip(right / spread(own, ROW_BLOCKS, q.shape), -448, 448).astype(E4M3)
        assert np.abs(place(q) - place(nearest)).max(initial=0) <= 1, name
        same.append((raw(q) == raw(values)).ravel())
    if "row_weight_gradient" in found:
        weights = weight_gradient(spec, operands)
        close = dict(rtol=1e-4, atol=1e-4 * np.abs(weights).max(initial=0))
        np.testing.assert_allclose(found["row_weight_gradient"], weights, **close)
    return np.concatenate(same)


def weight_gradient(spec, operands) -> np.ndarray:
    """The gradient to the row weights in parts [f/128, m], as far as rows are in groups."""
    named = spec.named(operands)
    named["row_weight"] = np.ones_like(named["row_weight"])
    products = named["gradient"][0].astype(np.float64) * sources(spec, named)["activation"][0]
    end = parts(spec, operands)[-1][1]
    return products.reshape(len(products), -1, 128).sum(-1).T[:, :end]


# ---- Specifications and their cases --------------------------------------------------------------


def floats(tile=ROW_BLOCKS, scale_rounding="pow2", copies="both", **rest) -> CastSpec:
    flags = {"rows": copies != "transposed", "transposed": copies != "rows"}
    return CastSpec(tile=tile, scale_rounding=scale_rounding, **flags, **rest)


def fp8(**rest) -> CastSpec:
    return CastSpec(source="fp8", rows=False, transposed=True, **rest)


def swiglu(**rest) -> CastSpec:
    return CastSpec(source="swiglu", **rest)


def backward(**rest) -> CastSpec:
    return CastSpec(source="swiglu_backward", transposed=True, **rest)


DENSE = {
    "rows_bf16": (floats(copies="rows"), BF16),
    "rows_f32_scale": (floats(scale_rounding="none", copies="rows"), F32),
    "transposed_f16": (floats(copies="transposed"), F16),
    "both_bf16_f32_scale": (floats(scale_rounding="none"), BF16),
    "both_f32": (floats(), F32),
    "blocks_bf16": (floats(BLOCKS, copies="rows"), BF16),
    "blocks_both_bf16": (floats(BLOCKS), BF16),
    "blocks_both_f16_f32_scale": (floats(BLOCKS, "none"), F16),
    "blocks_transposed_f32_f32_scale": (floats(BLOCKS, "none", "transposed"), F32),
    "whole_rows_bf16": (floats(ROWS, copies="rows"), BF16),
    "whole_rows_f32_scale": (floats(ROWS, "none", "rows"), F32),
    "pair_bf16": (floats(pair=True), BF16),
    "blocks_pair_f32": (floats(BLOCKS, pair=True), F32),
    "both_bf16_shared": (floats(shared_columns=True), BF16),
    "transposed_f32_shared": (floats(copies="transposed", shared_columns=True), F32),
    "pair_bf16_shared": (floats(pair=True, shared_columns=True), BF16),
    "fp8_shared": (fp8(shared_columns=True), BF16),
    "fp8": (fp8(), BF16),
    "fp8_f32_scale": (fp8(scale_rounding="none"), BF16),
}
# One row, less than a tile, odd everything, two tiles and a bit, whole tiles, sixteens.
SHAPES = [(1, 1, 16), (3, 7, 130), (2, 129, 77), (1, 200, 264), (1, 256, 128), (2, 144, 8)]
PAIRS = [(2, 129, 256), (1, 144, 512)]
LONG_ROWS = [(1, 1, 16), (3, 7, 130), (2, 3, 4400)]


def dense_cases(spec, dtype, extremes: bool):
    for shape in PAIRS if spec.pair else LONG_ROWS if spec.tile == ROWS else SHAPES:
        yield operands(shape, spec, shape, dtype, extremes=extremes)


GROUPED = {
    "both_bf16": (floats(grouped=True), BF16),
    "both_gather_f16": (floats(grouped=True, gather=True), F16),
    "rows": (floats(copies="rows", grouped=True), BF16),
    "rows_gather": (floats(copies="rows", grouped=True, gather=True), BF16),
    "transposed_f32": (floats(copies="transposed", grouped=True), F32),
    "fp8": (fp8(grouped=True), BF16),
    "fp8_gather": (fp8(grouped=True, gather=True), BF16),
    "both_gather_bf16_shared": (floats(grouped=True, gather=True, shared_columns=True), BF16),
    "fp8_shared": (fp8(grouped=True, shared_columns=True), BF16),
}


def grouped_cases(spec, dtype, places):
    for i, groups in enumerate(places):
        yield operands(i, spec, (1, groups.m, (136, 77, 64)[i % 3]), dtype, groups.sizes)


SWIGLU = {
    "rows_bf16": (swiglu(), BF16),
    "both_f16_f32_scale": (swiglu(scale_rounding="none", transposed=True), F16),
    "both_grouped_bf16": (swiglu(transposed=True, grouped=True), BF16),
    "backward": (backward(grouped=True), BF16),
    "backward_f32_scale": (backward(scale_rounding="none"), BF16),
    "backward_shared": (backward(grouped=True, shared_columns=True), BF16),
}


SIXTY = tuple(i * 7 % 5 for i in range(60))  # more groups than a warp has lanes


def swiglu_cases(spec, dtype):
    few = (30, 0, 65, 2)
    cases = [((1, 1, 16), few), ((1, 129, 77), few), ((1, 100, 256), few)]
    if spec.source == "swiglu_backward":
        cases = [((1, 1, 256), few), ((1, 140, 512), few)]
        # Some tiles for each CTA: five, and sixteen.
        cases += [((1, 260, 1280), few), ((1, 130, 256), SIXTY)]
    for shape, sizes in cases:
        yield operands(shape, spec, shape, dtype, sizes)
