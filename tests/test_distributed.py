"""Sharded programs and several processes: side by side, and one after the other."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import LIMIT, losses_of_two, start
from test_examples import load

import jax_fp8gemm as fp8

CODE = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
from test_examples import load
print("losses", *load("06_sharded").main(steps=3, width=512, hidden=512))
"""
EXPERTS = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
from test_distributed import experts
print("losses", *experts())
"""
CACHED = """
import sys, jax, jax.numpy as jnp, jax_fp8gemm as fp8
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
w = jax.device_put(jnp.arange(512.0 * 128).reshape(512, 128) % 7.3, NamedSharding(mesh, P("data")))
for how in sys.argv[2:]:
    found = []
    step = jax.jit(jax.grad(lambda w: (fp8.fp8_matmul(w.T, w, scale_rounding=how) ** 2).sum()))
    lowered = step.lower(w)
    jax.monitoring.register_event_listener(lambda name, found=found, **_: found.append(name))
    made = lowered.compile()
    print(how, sum(name.endswith("cache_hits") for name in found), float(made(w).sum()))
"""
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def experts(steps: int = 3) -> list[float]:
    """Trains one mixture of experts over data, experts and tensors; returns its losses."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"), axis_types=(AxisType.Auto,) * 3)
    up, down = P("expert", None, "model"), P("expert", "model", None)
    shapes = (((64, 128), P(("data", "expert"))), ((128, 8), P()))
    shapes += (((8, 128, 256), up), ((8, 128, 256), up), ((8, 256, 128), down))
    arrays = []
    for i, (shape, spec) in enumerate(shapes):
        whole = jax.random.normal(jax.random.key(i), shape) / shape[-2] ** 0.5
        at = NamedSharding(mesh, spec)
        whole = np.asarray(whole)
        arrays.append(jax.make_array_from_callback(shape, at, whole.__getitem__))
    x, gate_kernel, *matrices = arrays

    @jax.jit
    def step(x, gate_kernel, matrices):
        def loss(matrices):
            kernels = fp8.ExpertKernels(**dict(zip(("wi_0", "wi_1", "wo"), matrices, strict=True)))
            options = {"top_k": 2, "expert_axis": "expert", "tensor_axis": "model"}
            y, routing = fp8.moe(x, gate_kernel, kernels, **options, exchange="all_to_all")
            return ((y - x) ** 2).mean() + 0.01 * routing.aux_loss

        value, gradients = jax.value_and_grad(loss)(matrices)
        return value, [w - 10 * g for w, g in zip(matrices, gradients, strict=True)]

    losses = []
    for _ in range(steps):
        value, matrices = step(x, gate_kernel, matrices)
        losses.append(float(value))
    return losses


def test_experts_over_two_processes_match_one():
    found = losses_of_two(EXPERTS, **FOUR)
    expected = experts()
    assert expected[2] < expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_two_processes_match_one():
    found = losses_of_two(CODE, **FOUR)
    expected = load("06_sharded").main(steps=3, width=512, hidden=512)
    assert expected[2] < expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_second_process_finds_a_sharded_program_in_the_persistent_cache(tmp_path):
    printed = []
    for roundings in (["pow2"], ["pow2", "none"]):
        process = start(CACHED, [str(tmp_path), *roundings], **FOUR)
        out, error = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, error[-3000:]
        printed += [line.split() for line in out.splitlines()]
    assert [line[:2] for line in printed] == [["pow2", "0"], ["pow2", "1"], ["none", "0"]]
    assert printed[0][2] == printed[1][2] != printed[2][2]
