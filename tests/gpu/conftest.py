"""GPU tests: skipped, with the reason, where no Hopper GPU is; recorded on request."""

import json
import os
import pathlib

import pytest

from jax_fp8gemm._bind import native


def hopper() -> str | None:
    """Returns why these tests cannot run, or None."""
    facts = native.device_facts()
    if os.environ.get("JAX_FP8GEMM_TEST_GPU") != "1":
        return "set JAX_FP8GEMM_TEST_GPU=1 to run on the GPU"
    if "error" in facts or not facts["devices"]:
        return "no NVIDIA GPU or driver"
    capability = facts["devices"][0]["compute_capability"]
    return None if capability == "9.0" else f"compute capability {capability}, not 9.0"


def pytest_collection_modifyitems(items) -> None:
    reason = hopper()
    here = pathlib.Path(__file__).parent
    items.sort(key=lambda item: "sanitizer" not in item.name)  # the slowest first
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Writes the counts to JAX_FP8GEMM_RECORD, with the commit in JAX_FP8GEMM_COMMIT."""
    path = os.environ.get("JAX_FP8GEMM_RECORD")
    if path and not hasattr(config, "workerinput"):  # one of pytest-xdist's knows its tests only
        counts = {
            name: len(terminalreporter.stats.get(name, []))
            for name in ("passed", "failed", "skipped")
        }
        record = {"commit": os.environ.get("JAX_FP8GEMM_COMMIT", ""), **counts}
        pathlib.Path(path).write_text(json.dumps(record) + "\n")
