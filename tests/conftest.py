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
import pytest


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
