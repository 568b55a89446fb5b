"""Two processes with four devices each give what one process with eight gives."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from test_examples import load

CODE = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60)
assert len(jax.local_devices()) == 4 and len(jax.devices()) == 8
from test_examples import load
print("losses", *load("06_sharded").main(steps=3, width=512, hidden=512))
"""
LIMIT = 150  # seconds


def run(arguments: list[str]) -> subprocess.Popen:
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_match_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [run([address, str(index)]) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
        line = next(line for line in out.splitlines() if line.startswith("losses"))
        found.append([float(value) for value in line.split()[1:]])
    expected = load("06_sharded").main(steps=3, width=512, hidden=512)
    assert found[0] == found[1] and expected[2] < expected[0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
