"""What the public functions mean, a second time: numpy in float64, nothing of jax_fp8gemm.

Sizes are clamped by plain loops, FP8 comes from ml_dtypes, sums are float64.
"""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
SMALLEST_NORMAL = 2.0**-126  # float32
LARGEST = 448.0  # e4m3
TIES = 2.0**-21  # by how much a float32 division may be off, in relation to a quotient


# ---- FP8 ----------------------------------------------------------------------------------------


def spread(scale: np.ndarray, tile, shape) -> np.ndarray:
    """Returns the scale of every element of [..., rows, columns]."""
    rows, columns = shape[-2:]
    scale = np.repeat(scale, tile[0] or max(rows, 1), -2)[..., :rows, :]
    return np.repeat(scale, tile[1] or max(columns, 1), -1)[..., :columns]


def scales(x: np.ndarray, tile, rounding: str) -> np.ndarray:
    """Returns the scales of [rows, columns]: largest / 448, or the power of two from there up."""
    rows, columns = x.shape
    high, wide = tile[0] or max(rows, 1), tile[1] or max(columns, 1)
    shape = (-(-rows // high) if tile[0] else 1, -(-columns // wide) if tile[1] else 1)
    found = np.ones(shape, np.float32)
    for i, j in np.ndindex(shape):
        block = x[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
        largest = float(np.max(np.abs(block), initial=0.0))
        if not np.isfinite(largest):
            found[i, j] = np.nan
        elif largest and rounding == "pow2":
            power = int(np.ceil(np.log2(largest / LARGEST) - 1e-3))
            while 2.0**power * LARGEST < largest:
                power += 1
            found[i, j] = max(2.0**power, SMALLEST_NORMAL)
        elif largest:
            product = np.float32(largest) * np.float32(1 / LARGEST)
            found[i, j] = max(product, np.float32(SMALLEST_NORMAL))
    return found


def rounded(x: np.ndarray) -> np.ndarray:
    """Returns the FP8 numbers next to x, in float64."""
    with np.errstate(invalid="ignore"):
        return np.clip(x, -LARGEST, LARGEST).astype(np.float32).astype(E4M3).astype(np.float64)


def quantized(x: np.ndarray, tile=(1, 128), rounding: str = "pow2") -> np.ndarray:
    """Returns the numbers that an FP8 copy of [rows, columns] stands for, in float64."""
    x = x.astype(np.float64)
    each = spread(scales(x, tile, rounding).astype(np.float64), tile, x.shape)
    with np.errstate(invalid="ignore"):
        return rounded(x / each) * each


def check_copy(q, x: np.ndarray, tile, rounding: str, rows=None) -> None:
    """Asserts that a QArray is the cast of x [rows, columns], up to ties of a division.

    rows: as many have a meaning. Denormals may count as zeros, as they do for XLA on a CPU.
    """
    x = x.astype(np.float64)
    scale, got_scale = scales(x, tile, rounding), np.asarray(q.scale)
    got = np.asarray(q.qvalue).astype(np.float64)
    assert got_scale.shape == scale.shape and got.shape == x.shape
    without = scales(np.where(np.abs(x) < SMALLEST_NORMAL, 0, x), tile, rounding)
    scale = np.where(got_scale == without, without, scale)
    each = spread(scale.astype(np.float64), tile, x.shape)
    near = TIES if rounding == "none" else 0
    with np.errstate(invalid="ignore"):
        low, high = (rounded(x / each * factor) for factor in (1 - near, 1 + near))
    same = (got == low) | (got == high) | (np.isnan(got) & np.isnan(low))
    same |= (np.abs(x) < SMALLEST_NORMAL) & (got == 0)
    rows = len(x) if rows is None else rows
    used = slice(rows if tile[0] == 1 else None)
    np.testing.assert_array_equal(got_scale[used], scale[used])
    assert same[:rows].all(), np.argwhere(~same[:rows])[:5]


# ---- groups -------------------------------------------------------------------------------------


def ranges(sizes, places: int) -> list[tuple[int, int]]:
    """Returns where groups end to end begin and end: negative is nothing, the rest is cut off."""
    found, start = [], 0
    for size in sizes:
        end = min(start + max(int(size), 0), places)
        found.append((start, end))
        start = end
    return found


def placed(x: np.ndarray, sizes) -> np.ndarray:
    """Returns rows with each group at a multiple of 128, zeros between."""
    m, g = len(x), len(sizes)
    out = np.zeros(((m + min(g, m) * 127) // 128 * 128, x.shape[1]), x.dtype)
    start = 0
    for begin, end in ranges(sizes, m):
        out[start : start + end - begin] = x[begin:end]
        start += -(-(end - begin) // 128) * 128
    return out


def lines(x: np.ndarray, sizes=None) -> np.ndarray:
    """Returns the rows whose transpose the copy along tokens is."""
    return np.pad(x, [(0, -len(x) % 128), (0, 0)]) if sizes is None else placed(x, sizes)


# ---- GEMMs --------------------------------------------------------------------------------------


def gemm(variant: str, lhs, rhs, groups=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the product of float64 operands, the sum of its terms' magnitudes, what is defined.

    The magnitudes bound what a sum in float32 may be off by.
    """
    both = [_gemm(variant, *pair, groups) for pair in ((lhs, rhs), (np.abs(lhs), np.abs(rhs)))]
    return both[0][0], both[1][0], both[0][1]


def _gemm(variant: str, lhs, rhs, groups) -> tuple[np.ndarray, np.ndarray]:
    n = rhs.shape[-2]
    if variant in ("dense", "batched"):
        out = lhs @ np.swapaxes(rhs, -1, -2)
        return out, np.ones(out.shape, bool)
    if variant == "masked":
        out, defined = np.zeros((*lhs.shape[:2], n)), np.zeros((*lhs.shape[:2], n), bool)
        for i, size in enumerate(groups):
            own = slice(0, min(max(int(size), 0), lhs.shape[1]))
            out[i, own], defined[i, own] = lhs[i, own] @ rhs[i].T, True
        return out, defined
    if variant == "ragged_contracting":
        steps = -(-lhs.shape[1] // 128)
        needed = [-(-min(max(int(size), 0), 128 * steps) // 128) for size in groups]
        own = [slice(128 * start, 128 * end) for start, end in ranges(needed, steps)]
        out = np.zeros((len(groups), len(lhs), n))
        for i, part in enumerate(own):
            out[i] = lhs[:, part] @ rhs[:, part].T
        return out, np.ones(out.shape, bool)
    out = np.zeros((len(lhs), n))
    if variant == "ragged":
        for i, (start, end) in enumerate(ranges(groups, len(lhs))):
            out[start:end] = lhs[start:end] @ rhs[i].T
    else:  # contiguous
        for row in np.flatnonzero(np.asarray(groups) >= 0):
            out[row] = rhs[groups[row]] @ lhs[row]
    return out, np.ones(out.shape, bool)


STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of a rounding, at most


def check_close(got, want: np.ndarray, magnitudes: np.ndarray, depth: int, defined=None) -> None:
    """Asserts that `got` is `want` rounded to its dtype, off by float32 sums of `depth` terms."""
    got = np.asarray(got)
    assert got.shape == want.shape
    step = STEP[got.dtype.name]
    room = 1.01 * step * np.abs(want) + (depth + 8) * 2.0**-24 * magnitudes + 1e-37
    if got.dtype.name == "float16":
        room = room + 2.0**-25  # of its denormals
    wrong = ~(np.abs(got.astype(np.float64) - want) <= room)
    wrong &= True if defined is None else defined
    assert not wrong.any(), np.argwhere(wrong)[:5]


# ---- matmuls with their gradients ---------------------------------------------------------------


def block_copy(w: np.ndarray, rounding: str) -> np.ndarray:
    """Returns what weights [..., rows, columns], scaled 128x128, stand for."""
    found = np.zeros(w.shape)
    for lead in np.ndindex(w.shape[:-2]):
        found[lead] = quantized(w[lead], (128, 128), rounding)
    return found


def gradients(x, w, dy, rounding: str, residuals: str, sizes=None) -> list[tuple]:
    """Returns (result, magnitudes, depth) of y, dx and dw of x [m, k] · w [k, n] or [g, k, n].

    Rows past the groups are not read.
    """
    if sizes is not None:
        end = ranges(sizes, len(x))[-1][1]
        x, dy = (np.where(np.arange(len(a))[:, None] < end, a, 0) for a in (x, dy))
    xq, dyq = quantized(x, (1, 128), rounding), quantized(dy, (1, 128), rounding)
    wq = block_copy(w, rounding)
    kept = xq.astype(np.float32) if residuals == "fp8" else x
    xt, dyt = (quantized(lines(a, sizes).T, (1, 128), rounding) for a in (kept, dy))
    if sizes is None:
        parts = [("dense", xq, wq.T), ("dense", dyq, wq), ("dense", xt, dyt)]
        given = [None] * 3
    else:
        own = [end - start for start, end in ranges(sizes, len(x))]
        parts = [("ragged", xq, np.swapaxes(wq, 1, 2)), ("ragged", dyq, wq)]
        parts, given = [*parts, ("ragged_contracting", xt, dyt)], [sizes, sizes, own]
    found = []
    for (variant, lhs, rhs), groups in zip(parts, given, strict=True):
        want, magnitudes, _ = gemm(variant, lhs, rhs, groups)
        found.append((want, magnitudes, lhs.shape[1]))
    return found


# ---- experts ------------------------------------------------------------------------------------


def chosen(logits: np.ndarray, top_k: int, score: str, bias=None) -> tuple[np.ndarray, ...]:
    """Returns scores, the experts of each token, best first, and their normalized weights."""
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True, initial=-1e30))
    scores = powers / powers.sum(1, keepdims=True)
    if score == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    steered = scores if bias is None else scores + bias
    index = np.argsort(-steered, 1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, index, 1)
    return scores, index, weights / weights.sum(1, keepdims=True)


def experts(x, index, weights, wi_0, wi_1, wo, *, capacity: int | None) -> np.ndarray:
    """Returns what the experts say of each token, in the steps of the library: FP8, bf16 between.

    wi_0, wi_1 [e, h, f], wo [e, f, h]. An expert outside of 0..e-1 says nothing, and none says more
    than `capacity` things.
    """
    xq, out = quantized(x), np.zeros(x.shape)
    up = [block_copy(w, "pow2") for w in (wi_0, wi_1)]
    down, said = block_copy(wo, "pow2"), np.zeros(len(wo), int)
    for t, j in np.ndindex(index.shape):
        e = index[t, j]
        if 0 <= e < len(wo) and (capacity is None or said[e] < capacity):
            said[e] += 1
            gate, value = (to_bf16(xq[t] @ w[e]) for w in up)
            a = weights[t, j] * gate / (1 + np.exp(-gate)) * value
            out[t] += to_bf16(quantized(a[None])[0] @ down[e])
    return out


def to_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def calc_diff(got, want) -> float:
    """Returns 1 - 2·Σxy / Σ(x² + y²) in float64."""
    got = np.asarray(got).astype(np.float64)
    total = float(np.sum(got**2 + want**2))
    return float(np.sum((got - want) ** 2)) / total if total else 0.0
