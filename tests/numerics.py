"""How results are judged: against float64, never against another low-precision kernel."""

import numpy as np


def calc_diff(x, y) -> float:
    """Returns 1 − 2·Σxy / Σ(x² + y²) in float64, computed without cancellation."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total = np.sum(x * x + y * y)
    return float(np.sum((x - y) ** 2) / total) if total else 0.0


def dequantized64(q, tile=None) -> np.ndarray:
    """Returns a QArray's numbers in float64, where the product with the scale is exact.

    In numpy: JAX would compile its operations once more for every shape.
    """
    scale = np.asarray(q.scale, np.float64)
    for axis, size, own in zip((-2, -1), q.shape[-2:], tile or q.tile, strict=True):
        if own is not None:
            scale = np.repeat(scale, own, axis).take(range(size), axis)
    return np.asarray(q.qvalue).astype(np.float64) * scale


def product64(lhs, rhs, tiles=(None, None)) -> np.ndarray:
    """Returns the product of the dequantized operands in float64: what kernels are judged by."""
    left, right = dequantized64(lhs, tiles[0]), dequantized64(rhs, tiles[1])
    return left @ np.swapaxes(right, -1, -2)


def clamped(sizes, m: int) -> list[tuple[int, int]]:
    """Returns where each group begins and ends, by the plain loop."""
    ranges, start = [], 0
    for size in np.asarray(sizes).tolist():
        end = min(start + max(size, 0), m)
        ranges.append((start, end))
        start = end
    return ranges


def by_name(variant: str, operand) -> dict:
    """Returns the group operand as the keyword argument of gemm that takes it."""
    return {"groups" if variant == "contiguous" else "group_sizes": operand}


def exact(variant: str, lhs, rhs, groups=None, tiles=(None, None)) -> np.ndarray:
    """Returns the product of any variant in float64 by a loop over groups; NaN where undefined."""
    if groups is None:
        return product64(lhs, rhs, tiles)
    left, right = dequantized64(lhs, tiles[0]), dequantized64(rhs, tiles[1])
    groups, m, n = np.asarray(groups), left.shape[-2], right.shape[-2]
    if variant == "ragged":
        out = np.zeros((m, n))
        for index, (start, end) in enumerate(clamped(groups, m)):
            out[start:end] = left[start:end] @ right[index].T
    elif variant == "contiguous":
        out = np.zeros((m, n))
        for row in np.flatnonzero(groups >= 0):
            out[row] = right[groups[row]] @ left[row]
    elif variant == "masked":
        out = np.full((len(groups), m, n), np.nan)
        for index, size in enumerate(groups):
            own = slice(0, max(int(size), 0))
            out[index, own] = left[index, own] @ right[index].T
    else:
        out = np.zeros((len(groups), m, n))
        steps = -(-left.shape[1] // 128)
        needed = [-(-min(int(size), 128 * steps) // 128) for size in groups]
        for index, (start, end) in enumerate(clamped(needed, steps)):
            own = slice(128 * start, 128 * end)
            out[index] = left[:, own] @ right[:, own].T
    return out
