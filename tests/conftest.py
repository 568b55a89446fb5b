"""Eight virtual CPU devices, no GPU plugin unless asked for, and a kernel cache of its own."""

import importlib.metadata
import os
import tempfile

GPU = os.environ.get("JAX_FP8GEMM_TEST_GPU") == "1"
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin may be there without a driver
    # Most of the time of the tests was XLA's: each program is compiled once, and run on few values.
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    # Programs of tests hold their operands, and XLA would multiply these itself, slowly.
    flags += " --xla_disable_hlo_passes=constant_folding"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # others do not know it, and stop
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ.setdefault(
    "JAX_FP8GEMM_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jax_fp8gemm_test_cache")
)

import jax
import pytest

if not GPU:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def optimised():
    """XLA's usual optimisation: for bits that are compared between programs of different shape."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
