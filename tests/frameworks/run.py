"""Runs the adapters and the tests of other libraries, and stores how many passed or were refused.

    make frameworks
    python tests/frameworks/run.py MaxText  # from its environment: the suites of that name alone

The environment is of Python 3.12, with the newest packages. Results: tests/data/frameworks.json.
A suite that could not run, or was not asked for, keeps what is stored of it.
"""

import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "tests/data/frameworks.json"
PACKAGES = "jax jaxlib flax qwix tokamax maxtext gemma".split()
ADAPTERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_adapter*.py"))
SUITES = {
    "adapters for qwix, tokamax and MaxText": ADAPTERS,
    "our cases of lax.ragged_dot and of Flax's layers": ["tests/frameworks/jax_cases.py"],
    "JAX's tests of ragged_dot": ["tests/frameworks/jax_own_cases.py"],
    "Flax's tests of linear layers": ["tests/frameworks/flax_cases.py"],
    "tokamax's RaggedDotTestBase": ["tests/frameworks/tokamax_cases.py"],
    "MaxText's models": ["tests/frameworks/maxtext_cases.py"],
    "MaxText's ring of experts": ["tests/frameworks/maxtext_ring_cases.py"],
    "Gemma in qwix": ["tests/frameworks/gemma_cases.py"],
}
# How the reason of a skipped case begins. Reasons of other kinds are "left out".
KINDS = {"refused": "refused: ", "beyond FP8's error": "beyond FP8's error: "}


def run(paths: list[str]) -> dict:
    """Runs files of tests; what was skipped is counted by kind and reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        how = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", f"--junitxml={report}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "pytest", *how, *paths]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    counts: dict = {"passed": 0, "failed": []}
    kept = [found for case in cases for found in case.iter("property")]
    if kept:
        counts["losses"] = {found.get("name"): json.loads(found.get("value")) for found in kept}
    skipped = {kind: collections.Counter() for kind in (*KINDS, "left out")}
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(case.get("name"))
        elif (found := case.find("skipped")) is not None:
            kind, reason = kind_of(found.get("message", ""))
            skipped[kind][reason] += 1
        else:
            counts["passed"] += 1
    return counts | {kind: dict(sorted(reasons.items())) for kind, reasons in skipped.items()}


def kind_of(message: str) -> tuple[str, str]:
    message = re.sub(r"<class '(.*)'>", r"\1", (message.splitlines() or [""])[0])
    for kind, start in KINDS.items():
        if start in message:
            return kind, message.partition(start)[2]
    return "left out", re.sub(r"^.*left out: ", "", message)


def conditions(suite: str) -> dict:
    """When, of which commit, and with which packages; for JAX's tests also their commit."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if "JAX's" in suite and os.environ.get("JAX_TESTS"):
        versions["its tests"] = f"commit {commit_of(os.environ['JAX_TESTS'])}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "commit": commit_of(ROOT), "versions": versions}


def commit_of(folder) -> str:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    run = subprocess.run(command, cwd=folder, text=True, check=False, capture_output=True)
    return run.stdout.strip() or "unknown"


def main() -> int:
    asked = [name for name in SUITES if any(part in name for part in sys.argv[1:] or [""])]
    failed = False
    for name in asked:
        when, counts = conditions(name), run(SUITES[name])
        failed |= bool(counts["failed"])
        if not counts["passed"] and not counts["failed"]:
            print(f"{name}: nothing ran, so what is stored stays: {counts}")
            continue
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        stored[name] = when | counts
        kept = {name: stored[name] for name in SUITES if name in stored}
        RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(RESULTS.read_text())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
