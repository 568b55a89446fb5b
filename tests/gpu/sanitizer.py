"""Runs a program of kernels under NVIDIA's compute-sanitizer."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

SECONDS = 300


def sanitize(tool: str, code: str, kernels: str | None) -> str:
    """Returns the sanitizer's report; skips where there is no sanitizer.

    Args:
      code: a Python program that prints "finished" at its end.
      kernels: part of the names of kernels to look at, of which an error fails the test; None: all
        kernels, and the caller reads the report.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if not sanitizer:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    options = ["--print-limit", "0"]
    if kernels:
        options = ["--kernel-name", f"kernel_substring={kernels}", "--error-exitcode", "9"]
    process = subprocess.Popen(
        [sanitizer, "--tool", tool, *options, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        report, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:  # with the program that it started, which would keep the GPU
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and "finished" in report, report[-2000:] + errors[-500:]
    return report
