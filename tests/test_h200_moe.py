"""A mixture-of-experts layer over four devices, compiled for H200s on a machine without one.

The programs share the tests' cache of kernels.
"""

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
row = (1024 + 4 * 1024 // 128) // 4 + 2 * 4  # words: FP8, scales, four choices and their weights
print("sent", ("u32", (tokens, row)) in travels)
print("back", any(dtype == "bf16" for dtype, _ in travels))
"""


# Tokens, and quantizing kernels: x, gate and up, down, SwiGLU's input and its result; dy, and dy
# turned; x turned, SwiGLU's gradient. With few rows for each expert the GEMMs cast the weights.
@pytest.mark.parametrize("tokens, casts", [(4096, 9), (1024, 7)])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_layer_over_four_devices_compiles_for_an_h200(exchange, tokens, casts):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    command = [sys.executable, "-c", CODE, str(TARGET), exchange, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two GEMMs and their five gradients.
    expected = f"gemm 7 quantize {casts} sent True back True"
    assert done.stdout.split() == expected.split(), done.stdout


PLAIN = """
import sys, jax, jax.numpy as jnp, math
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import jax_fp8gemm as fp8
from collectives import collectives
target = open(sys.argv[1]).read()
sizes = tuple(map(int, sys.argv[2].split("x")))
split, factor, exchange = sys.argv[3], float(sys.argv[4]) or None, sys.argv[5]
capacity = float(sys.argv[6]) or None
e = max(16, sizes[1])
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology=f"1x1x{math.prod(sizes)}"
)
mesh = Mesh(np.array(topology.devices).reshape(sizes), ("data", "expert", "model"))

def shape(spec, *dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

def loss(x, gate_kernel, kernels):
    y, routing = fp8.moe(
        x, gate_kernel, kernels, top_k=4, expert_axis="expert", token_axes=("data", "expert"),
        tensor_axis="model" if split == "tensor" else None, mesh=mesh,
        device_capacity_factor=factor, exchange=exchange, capacity_factor=capacity,
    )
    return (y.astype(jnp.float32) ** 2).mean() + routing.aux_loss, routing.dropped

up, down = P("expert", None, "model"), P("expert", "model", None)
if split == "fsdp":
    up, down = P("expert", "data", None), P("expert", None, "data")
kernels = fp8.ExpertKernels(
    wi_0=shape(up, e, 1024, 512), wi_1=shape(up, e, 1024, 512), wo=shape(down, e, 512, 1024)
)
arrays = (
    shape(P(("data", "expert")), 8192, 1024), shape(P(), 1024, e, dtype=jnp.float32), kernels
)
at = jax.tree.map(lambda x: x.sharding, arrays)
step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), out_shardings=(at, None))
made = step.lower(*arrays).compile()
for kind, arrays in collectives(made.as_text()):
    print(kind, *(f"{dtype}{list(shape)}".replace(" ", "") for dtype, shape in arrays))
print("temporaries", made.memory_analysis().temp_size_in_bytes)
"""


# Of 8192 tokens over data and experts. A token's row has words of x or dy in FP8, with scales; x
# has its four choices and their weights beside it. An all-gather has its operands first.
TRAVELS = {
    ("1x2x1", "tensor"): [
        "all-gather u32[4096,272] u32[8192,272]",  # x
        "all-gather u32[4096,264] u32[8192,264]",  # dy
        "reduce-scatter bf16[4096,1024]",  # y
        "reduce-scatter bf16[4096,1024]",  # dx
        "reduce-scatter f32[4096,4]",  # to the gate weights
        "all-reduce f32[1024,16]",  # to the router
        "all-reduce f32[16]",  # the losses
        "all-reduce s32[]",  # how many rows had no room
    ],
    ("2x2x2", "tensor"): [
        "all-gather u32[2048,272] u32[4096,272]",
        "all-gather u32[2048,264] u32[4096,264]",
        "reduce-scatter bf16[2048,1024]",
        "reduce-scatter bf16[2048,1024]",
        "reduce-scatter f32[2048,4]",
        "all-reduce bf16[2048,1024]",  # y, dx and gate weights, over the tensor axis
        "all-reduce bf16[2048,1024]",
        "all-reduce f32[2048,4]",
        "all-reduce bf16[6291456]",  # to the kernels of a device, over the data axis
        "all-reduce f32[1024,16]",
        "all-reduce f32[16]",
        "all-reduce s32[]",
    ],
}


def collectives_of(
    sizes: str, split: str, factor: float, exchange: str = "all_gather", capacity: float = 0
) -> tuple[list[str], int]:
    """Returns the collectives of a step, and the bytes of its temporaries."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
    }
    command = [sys.executable, "-c", PLAIN, str(TARGET), sizes, split]
    command += [str(factor), exchange, str(capacity)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *travels, memory = done.stdout.splitlines()
    return sorted(travels), int(memory.split()[1])


@pytest.mark.parametrize("sizes, split", TRAVELS)
def test_a_layer_that_divides_itself_compiles_for_h200s(sizes, split):
    """Under plain jax.jit no weight is gathered, and each token travels as one row."""
    assert collectives_of(sizes, split, 1.5)[0] == sorted(TRAVELS[sizes, split])


X, DY = 272, 264  # words of a token's row
EXCHANGES = [
    # Devices, exchange, capacity_factor, rows that a device sends or gets in all.
    (8, "all_gather", 0, 8192),
    (8, "all_to_all", 0, 8192),
    (64, "all_gather", 0, 8192),
    (64, "all_to_all", 2, 1024),  # 64 times 16: twice the even share of 128 tokens' choices
]


@pytest.mark.parametrize("devices, exchange, capacity, rows", EXCHANGES)
def test_an_exchange_over_many_h200s_has_these_collectives(devices, exchange, capacity, rows):
    """As many of them as on two, whatever the number of devices; and their bytes."""
    travels, _ = collectives_of(f"1x{devices}x1", "experts", 1.5, exchange, capacity)
    own, e = 8192 // devices, max(16, devices)
    if exchange == "all_gather":
        expected = [
            f"all-gather u32[{own},{X}] u32[{rows},{X}]",
            f"all-gather u32[{own},{DY}] u32[{rows},{DY}]",
            f"reduce-scatter bf16[{own},1024]",
            f"reduce-scatter bf16[{own},1024]",
            f"reduce-scatter f32[{own},4]",
        ]
    else:
        kinds = [f"u32[{rows},{X}]", f"u32[{rows},{DY}]", f"f32[{rows},4]"]
        kinds += [f"bf16[{rows},1024]"] * 2
        expected = [f"all-to-all {array}" for array in kinds]
    expected += [f"all-reduce f32[1024,{e}]", f"all-reduce f32[{e}]", "all-reduce s32[]"]
    assert travels == sorted(expected)


def test_fsdp_of_experts_gathers_fp8_and_scatters_gradients():
    travels, _ = collectives_of("2x2x1", "fsdp", 1.5)
    weights = [line for line in travels if "8,1024," in line or "8,512," in line]
    assert weights and all("f8e4m3fn" in line for line in weights if "all-gather" in line)
    assert any(line.startswith("reduce-scatter bf16[8,") for line in weights)


def test_a_bound_on_rows_bounds_memory():
    """Of eight devices: 6144 rows on each instead of 32768, beside tokens and weights."""
    _, bounded = collectives_of("1x8x1", "tensor", 1.5)
    _, whole = collectives_of("1x8x1", "tensor", 0)
    assert bounded < 0.45 * whole


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


def test_a_layer_with_many_experts_needs_little_beside_their_gradients():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "",
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
from jax_fp8gemm._moe.order import permutation_of
from jax_fp8gemm._moe.routing import route
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


def test_the_router_uses_tensor_cores_and_sorts_once():
    """Products of bf16 alone: of a bf16 x two for the logits, one for dx and two for the kernel's
    gradient. The one sort has keys of a byte; top-k has none."""
    printed, _ = compiled(ROUTER)
    assert printed["bf16"] == ["bf16xbf16"] * 5
    # Parts of x: 1 and 3 GEMMs for the logits, as many for the kernel's gradient, one for dx.
    assert printed["f32"] == ["bf16xbf16"] * 9
    assert printed["bf16-sorts"] == printed["f32-sorts"] == ["1", "1"]
    # The inverse order, and the gradient of the weights' choice.
    assert printed["bf16-scatters"] == ["2"]
