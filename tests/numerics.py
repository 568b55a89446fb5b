"""How results are judged: against float64, never against another low-precision kernel."""

import jax
import numpy as np

from jax_fp8gemm import reference


def calc_diff(x, y) -> float:
    """Returns 1 − 2·Σxy / Σ(x² + y²) in float64, computed without cancellation."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total = np.sum(x * x + y * y)
    return float(np.sum((x - y) ** 2) / total) if total else 0.0


def dequantized64(q, tile=None) -> np.ndarray:
    """Returns a QArray's numbers in float64, where the product with the scale is exact."""
    tile = tile or q.tile
    ones = jax.numpy.ones_like(q.scale)
    values = np.asarray(reference.dequantize(q.qvalue, ones, tile), np.float64)
    scales = np.asarray(
        reference.dequantize(jax.numpy.ones_like(q.qvalue), q.scale, tile), np.float64
    )
    return values * scales


def product64(lhs, rhs, tiles=(None, None)) -> np.ndarray:
    """Returns the product of the dequantised operands in float64: what kernels are judged by."""
    left, right = dequantized64(lhs, tiles[0]), dequantized64(rhs, tiles[1])
    return left @ np.swapaxes(right, -1, -2)
