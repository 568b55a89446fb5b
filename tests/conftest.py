"""Eight virtual CPU devices, no GPU plugin unless asked for, and a kernel cache of its own."""

import os
import tempfile

GPU = os.environ.get("JAX_FP8GEMM_TEST_GPU") == "1"
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin may be there without a driver
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
os.environ.setdefault(
    "JAX_FP8GEMM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jax_fp8gemm_test_cache")
)

import jax
import numpy as np
import pytest

from jax_fp8gemm import reference


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


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
    return np.einsum("...mk,...nk->...mn", left, right)
