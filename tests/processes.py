"""Runs programs in processes of their own, which find the package and the tests."""

import os
import pathlib
import socket
import subprocess
import sys

LIMIT = 200  # seconds
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest.py does


def start(code: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **QUICK, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of_two(code: str, **environment: str) -> list[float]:
    """Returns what both of two processes print as "losses ...".

    Args:
      code: a program whose arguments are the address at which the two meet, and its number.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [start(code, [address, str(index)], **environment) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for process, (out, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
        found.append(next(line for line in out.splitlines() if line.startswith("losses")))
    assert found[0] == found[1]
    return [float(value) for value in found[0].split()[1:]]
