"""A mixture-of-experts layer over four devices, compiled for H200s on a machine without one."""

import os
import pathlib
import subprocess
import sys

import pytest
from test_h200_compile import TARGET, compiled, pytestmark

__all__ = ["pytestmark"]  # skips where the plugin or NVRTC is not installed

CODE = """
import functools, sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import jax_fp8gemm as fp8
from collectives import collectives
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x4")
mesh = Mesh(np.array(topology.devices), ("x",))

def shape(spec, *dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

split, tokens = P("x"), int(sys.argv[3])
layer = functools.partial(fp8.moe, top_k=4, expert_axis="x", exchange=sys.argv[2])
run = jax.shard_map(
    lambda *args: layer(*args)[0], mesh=mesh,
    in_specs=(split, P(), split), out_specs=split,
)
def step(dy, *args):
    y, pull = jax.vjp(run, *args)
    return y, pull(dy)

kernels = fp8.ExpertKernels(
    wi_0=shape(split, 16, 1024, 512), wi_1=shape(split, 16, 1024, 512),
    wo=shape(split, 16, 512, 1024),
)
made = jax.jit(step).lower(
    shape(split, tokens, 1024), shape(split, tokens, 1024), shape(P(), 1024, 16, dtype=jnp.float32),
    kernels,
).compile()
text = made.as_text()
for target in ("gemm", "quantize"):
    print(target, text.count(f'custom_call_target="jax_fp8gemm_{target}_v1"'))
travels = [array for _, arrays in collectives(text) for array in arrays]
print("sent", ("u8", (tokens, 1024)) in travels)
print("back", any(dtype == "bf16" for dtype, _ in travels))
"""


# Tokens, and quantizing kernels: x, gate and up, down, SwiGLU's input and its result; dy, and dy
# turned; x turned, SwiGLU's gradient. With few rows for each expert the GEMMs cast the weights.
@pytest.mark.parametrize("tokens, casts", [(4096, 9), (1024, 7)])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_layer_over_four_devices_compiles_for_an_h200(exchange, tokens, casts, tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
        "JAX_FP8GEMM_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    command = [sys.executable, "-c", CODE, str(TARGET), exchange, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two GEMMs and their five gradients.
    expected = f"gemm 7 quantize {casts} sent True back True"
    assert done.stdout.split() == expected.split(), done.stdout


MEMORY = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import jax_fp8gemm as fp8
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
at = NamedSharding(Mesh(np.array(topology.devices), ("x",)), P())

def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

def step(x, expert_index, gate_weights, kernels):
    def layer(x, kernels):
        return fp8.expert_ffn(x, expert_index, gate_weights, kernels)
    y, pull = jax.vjp(layer, x, kernels)
    return y, pull(y)

kernels = fp8.ExpertKernels(
    wi_0=shape(32, 7168, 2048), wi_1=shape(32, 7168, 2048), wo=shape(32, 2048, 7168)
)
made = jax.jit(step).lower(
    shape(1024, 7168), shape(1024, 8, dtype=jnp.int32), shape(1024, 8, dtype=jnp.float32), kernels,
).compile()
print(made.memory_analysis().temp_size_in_bytes)
"""


def test_a_layer_with_many_experts_needs_little_beside_their_gradients(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
        "JAX_FP8GEMM_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", MEMORY, str(TARGET)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # While the last ones are made, x and what SwiGLU sends back to gate and up are there, turned,
    # with every group from a multiple of 128 on: FP8 [h + 2 f, 8192 rows + 32 · 127].
    turned = (7168 + 2 * 2048) * (8192 + 32 * 127)
    assert int(done.stdout) < 1.2 * turned


ROUTER = """
import re, sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from jax_fp8gemm._moe.gate import gate_logits
from jax_fp8gemm._moe.routing import permutation_of, route
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
at = NamedSharding(Mesh(np.array(topology.devices), ("x",)), P())

def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

def step(x, kernel, d):
    def router(x, kernel):
        routing = route(gate_logits(x, kernel), 8)
        permutation = permutation_of(routing.expert_index, 128)
        return (routing.gate_weights, routing.aux_loss), (permutation, permutation.inverse())
    (weights, aux_loss), pull, order = jax.vjp(router, x, kernel, has_aux=True)
    return weights, aux_loss, order, pull((d, jnp.float32(1)))

for name, x in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
    made = jax.jit(step).lower(shape(24576, 1536, dtype=x), shape(1536, 128), shape(24576, 8))
    text = made.compile().as_text()
    products = re.findall(r"^.* dot\\((%[^ ,]+), (%[^ ,)]+)\\)", text, re.M)
    dtype_of = dict(re.findall(r"(%[^ ]+) = (\\w+)\\[", text))
    print(name, *[f"{dtype_of[a]}x{dtype_of[b]}" for a, b in products])
    sorts = re.findall(r" sort\\(|cub_sort", text)
    rows = r"\\[196608\\]\\{0\\}"
    keys = re.findall(rf"u8{rows}, s32{rows}\\) (?:sort|custom-call)", text)
    print(f"{name}-sorts", len(sorts), len(keys))
    print(f"{name}-scatters", text.count(" scatter("))
"""


def test_the_router_uses_tensor_cores_and_sorts_once(tmp_path):
    """Products of bf16 alone: of a bf16 x two for the logits, one for dx and two for the kernel's
    gradient. The one sort has keys of a byte; top-k has none."""
    printed, _ = compiled(ROUTER, tmp_path)
    assert printed["bf16"] == ["bf16xbf16"] * 5
    # Parts of x: 1 and 3 GEMMs for the logits, as many for the kernel's gradient, one for dx.
    assert printed["f32"] == ["bf16xbf16"] * 9
    assert printed["bf16-sorts"] == printed["f32-sorts"] == ["1", "1"]
    # The inverse order, and the gradient of the weights' choice.
    assert printed["bf16-scatters"] == ["2"]
