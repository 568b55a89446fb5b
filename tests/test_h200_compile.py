"""Whole jitted programs compiled for an H200 on a machine without one: kernels included."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from jax_fp8gemm._bind import native

PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda12"
)
pytestmark = [
    pytest.mark.skipif(not PLUGIN, reason="pip install jax-cuda12-plugin jax-cuda12-pjrt"),
    pytest.mark.skipif("error" in native.nvrtc_facts(), reason="NVRTC is not installed"),
]
TARGET = pathlib.Path(__file__).parent / "data/h200_target_config.txtpb"

CODE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import jax_fp8gemm as fp8
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
mesh = Mesh(np.array(topology.devices).reshape(1), ("x",))
at = NamedSharding(mesh, PartitionSpec())

def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

def step(w, experts, x, sizes):
    def loss(w, experts):
        y = jnp.tanh(fp8.fp8_matmul(x, w))
        return fp8.fp8_ragged_dot(y, experts, sizes).astype(jnp.float32).sum()
    return jax.grad(loss, (0, 1))(w, experts)

made = jax.jit(step).lower(
    shape(512, 640), shape(4, 640, 384), shape(1024, 512), shape(4, dtype=jnp.int32)
).compile()
text = made.as_text()
print("calls", text.count('custom_call_target="jax_fp8gemm_gemm_v1"'))
print("gathers", text.count("all-gather"))
kernels = [line for line in text.splitlines() if 'custom_call_target="jax_fp8gemm_' in line]
print("latencies", *(line.count("latency_metadata=") for line in kernels))
"""


SHARDED = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from collectives import count, gathered
from test_examples import load
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x8")
mesh = Mesh(np.array(topology.devices).reshape(4, 2), ("data", "model"))

def shape(dims, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

params = {"up": shape((1024, 2048), "data", "model"), "down": shape((2048, 1024), "model", "data")}
tokens = shape((3072, 1024), "data")
text = load("06_sharded").step.lower(params, tokens, tokens).compile().as_text()
print("gemms", text.count('custom_call_target="jax_fp8gemm_gemm_v1"'))
print("quantizers", text.count('custom_call_target="jax_fp8gemm_quantize_v1"'))
print("kinds", *sorted(count(text)))
print("gathered", *sorted({f"{dtype}:{np.prod(dims)}" for dtype, dims in gathered(text)}))
"""


def compiled(code: str, **cache: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines that the program prints, by their first word, and its log of kernels."""
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
        "JAX_FP8GEMM_VERBOSE": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        **cache,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(TARGET)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0]: line[1:] for line in lines}, done.stderr


def test_a_training_step_compiles_for_an_h200(tmp_path):
    printed, log = compiled(CODE, JAX_FP8GEMM_CACHE_DIR=str(tmp_path))
    # fp8_matmul: y and dw (x has no gradient); fp8_ragged_dot: both gradients (a sum needs no y).
    assert (printed["calls"], printed["gathers"]) == (["4"], ["0"])
    # XLA's scheduler knows how long each takes: these, and their casts.
    assert printed["latencies"] == ["1"] * 9
    assert "from nvrtc" in log and len(list(tmp_path.glob("*.kernel"))) >= 3


def test_a_sharded_step_compiles_for_eight_h200s():
    printed, log = compiled(SHARDED)
    # Two forward, two for gradients to weights, one to h.
    assert (printed["gemms"], printed["quantizers"]) == (["5"], ["6"])
    assert printed["kinds"] == ["all-gather", "all-reduce", "reduce-scatter"]
    # FP8 copies of weights, 1024x1024 for each of two columns of devices, and their 8x8 scales.
    assert printed["gathered"] == ["f32:64", "f8e4m3fn:1048576"]
    assert re.search("from (nvrtc|disk)", log)
