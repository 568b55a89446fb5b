"""Sharded programs and several processes: side by side, and one after the other."""

import numpy as np
from processes import LIMIT, losses_of_two, start
from test_examples import load

CODE = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
from test_examples import load
print("losses", *load("06_sharded").main(steps=3, width=512, hidden=512))
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
