"""What XLA runs while tokens travel: the schedule of a layer's training step, compiled for H200s.

Sizes are those of DeepSeek-V3's experts, so that XLA's estimates are too. Nothing runs here.
"""

import os
import re
import subprocess
import sys

import pytest
from test_h200_compile import TARGET, pytestmark

__all__ = ["pytestmark"]  # skips where the plugin or NVRTC is not installed

CODE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import jax_fp8gemm as fp8
target, devices = open(sys.argv[1]).read(), int(sys.argv[2])
exchange, shared = sys.argv[3], sys.argv[4] == "shared"
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology=f"1x1x{devices}"
)
mesh = Mesh(np.array(topology.devices), ("x",))
t, h, f, e = 4096 * devices, 7168, 2048, 8 * devices

def shape(spec, *dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

def kernels(spec, *lead):
    return fp8.ExpertKernels(
        wi_0=shape(spec, *lead, h, f), wi_1=shape(spec, *lead, h, f), wo=shape(spec, *lead, f, h)
    )

def loss(x, gate_kernel, kernels, shared):
    y, _ = fp8.moe(
        x, gate_kernel, kernels, top_k=8, shared=shared, expert_axis="x", token_axes="x",
        mesh=mesh, exchange=exchange,
    )
    return (y.astype(jnp.float32) ** 2).sum() / 2

arrays = shape(P("x"), t, h), shape(P(), h, e, dtype=jnp.float32), kernels(P("x"), e)
step = jax.grad(loss, (0, 1, 2, 3) if shared else (0, 1, 2))
made = jax.jit(step).lower(*arrays, kernels(P()) if shared else None).compile()
print(made.as_text())
"""
ROW = 7168 // 4 + 7168 // 128  # words of a token's FP8 numbers and scales


def schedule(devices: int, exchange: str, shared: str) -> list[str]:
    """Returns the instructions of the program in the order in which they are launched."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", CODE, str(TARGET), str(devices), exchange, shared]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is_scheduled=true" in done.stdout
    return done.stdout[done.stdout.index("ENTRY") :].splitlines()


def meanwhile(lines: list[str], array: str) -> list[list[str]]:
    """Returns our custom calls between start and done of each collective of such an array."""
    found: list[list[str]] = []
    starts = [i for i, line in enumerate(lines) if re.search(r" \S+-start\(", line)]
    for i in starts:
        if array not in lines[i].split("-start(")[0]:
            continue
        name = re.match(r"\s*(%\S+) =", lines[i])
        assert name is not None
        end = next(j for j in range(i + 1, len(lines)) if f"-done({name[1]})" in lines[j])
        calls = [re.search(r'target="jax_fp8gemm_(\w+)_v1"', line) for line in lines[i:end]]
        found.append([call[1] for call in calls if call])
    return found


@pytest.mark.parametrize(
    "devices, exchange, shared",
    [(2, "all_gather", "alone"), (2, "all_gather", "shared"), (8, "all_to_all", "shared")],
)
def test_what_lies_between_start_and_done(devices, exchange, shared):
    lines = schedule(devices, exchange, shared)
    rows = 4096 * (devices if exchange == "all_to_all" else 1)  # of what a device sends
    # x, with choices and weights, while the experts' kernels are cast.
    (casts,) = meanwhile(lines, f"u32[{rows},{ROW + 16}]")
    assert casts.count("quantize") >= 2
    # dy, beside casts of what the forward pass made, or the shared expert's GEMMs.
    (beside_dy,) = meanwhile(lines, f"u32[{rows},{ROW}]")
    assert beside_dy and (shared == "alone" or "gemm" in beside_dy)
    # y, beside the shared expert, without which nothing is left to do; dx, beside other gradients.
    beside_y, beside_dx = meanwhile(lines, f"bf16[{rows},7168]")
    assert beside_y.count("gemm") == (3 if shared == "shared" else 0)
    assert exchange == "all_to_all" or "gemm" in beside_dx
