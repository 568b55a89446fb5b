"""GPU tests: skipped, with the reason, where no Hopper GPU is; recorded on request."""

import json
import os
import pathlib

import pytest
from xla_options import FLAGS

from jax_fp8gemm._bind import native

if os.environ.get("JAX_FP8GEMM_TEST_GPU") == "1":
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

SLOWEST = ("sanitizer", "test_batch_invariant_gpu", "past_two_to_the_31", "test_devices_gpu")


def hopper() -> str | None:
    """Returns why these tests cannot run, or None."""
    facts = native.device_facts()
    if os.environ.get("JAX_FP8GEMM_TEST_GPU") != "1":
        return "set JAX_FP8GEMM_TEST_GPU=1 to run on the GPU"
    if "error" in facts or not facts["devices"]:
        return "no NVIDIA GPU or driver"
    capability = facts["devices"][0]["compute_capability"]
    return None if capability == "9.0" else f"compute capability {capability}, not 9.0"


def spread(slow: list, rest: list, workers: int) -> list:
    """Returns tests in an order of which each process first gets its share of the slow ones.

    pytest-xdist begins with a quarter of all tests, as many neighbours to each process.
    """
    each, order = max((len(slow) + len(rest)) // workers // 4, 2), []
    for worker in range(workers):
        own = slow[worker::workers]
        quick = max(each - len(own), 0)
        order += [*own, *rest[:quick]]
        rest = rest[quick:]
    return order + rest


def pytest_collection_modifyitems(config, items) -> None:
    reason = hopper()
    here = pathlib.Path(__file__).parent
    own = [item for item in items if here in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
    ended = [item for item in own if item.nodeid in ENDED]
    own = [item for item in own if item.nodeid not in ENDED]
    config.hook.pytest_deselected(items=ended)
    slow = [item for item in own if any(name in item.nodeid for name in SLOWEST)]
    quick = [item for item in own if item not in slow]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = [item for item in items if here not in item.path.parents]
    items[:] = spread(slow, quick, workers) + others


def ended_before() -> dict[str, str]:
    """Returns what earlier runs found, by test: see RESUME. A failed test runs again."""
    lines = RESUME.read_text().splitlines() if RESUME and RESUME.exists() else []
    found = dict(reversed(line.split(" ", 1)) for line in lines)
    return {name: outcome for name, outcome in found.items() if outcome != "failed"}


# A file in which runs of the same sources note each test that ended, and leave out those that did.
RESUME = (
    pathlib.Path(os.environ["JAX_FP8GEMM_RESUME"]) if "JAX_FP8GEMM_RESUME" in os.environ else None
)
ENDED = ended_before()
COUNTS = {name: list(ENDED.values()).count(name) for name in ("passed", "failed", "skipped")}


def pytest_runtest_logreport(report) -> None:
    """Counts what ended, and writes it down at once: a run may be stopped at any time."""
    if report.when == "call" or report.outcome != "passed":
        COUNTS[report.outcome] += 1
        record(interrupted=True)
        if RESUME and "PYTEST_XDIST_WORKER" not in os.environ:
            with RESUME.open("a") as file:
                file.write(f"{report.outcome} {report.nodeid}\n")


def pytest_sessionfinish(exitstatus) -> None:
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        record()


def record(**more: bool) -> None:
    """Writes the counts to JAX_FP8GEMM_RECORD, with the commit in JAX_FP8GEMM_COMMIT."""
    path = os.environ.get("JAX_FP8GEMM_RECORD")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker knows its own tests only
        made = {"commit": os.environ.get("JAX_FP8GEMM_COMMIT", ""), **COUNTS, **more}
        pathlib.Path(path).write_text(json.dumps(made) + "\n")
