"""Runs the adapters and the tests of other libraries, and stores how many passed or were refused.

    make frameworks

It makes an environment of Python 3.12 with the newest packages. Results: tests/data/frameworks.json
"""

import collections
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
PACKAGES = "jax jaxlib flax qwix tokamax maxtext".split()
SUITES = {
    "adapters": "tests/test_adapters.py",
    "lax.ragged_dot and flax layers": "tests/frameworks/jax_cases.py",
    "tokamax RaggedDotTestBase": "tests/frameworks/tokamax_cases.py",
    "MaxText trains": "tests/frameworks/maxtext_cases.py",
}


def run(path: str) -> dict:
    """Runs one file of tests; what was skipped as refused is counted by its reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        how = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", f"--junitxml={report}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "pytest", *how, path]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed, refused, left_out = [], collections.Counter(), collections.Counter()
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name"))
        elif (skipped := case.find("skipped")) is not None:
            reason = skipped.get("message", "").splitlines()[0]
            kind = refused if "refused" in reason else left_out
            kind[re.sub(r"^.*refused: |^.*left out: ", "", reason)] += 1
    passed = len(cases) - len(failed) - refused.total() - left_out.total()
    return {
        "passed": passed, "failed": failed, "refused": dict(refused), "left out": dict(left_out),
    }  # fmt: skip


def main() -> int:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    ran = {name: run(SUITES[name]) for name in sys.argv[1:] or SUITES}
    stored = json.loads(RESULTS.read_text())["suites"] if RESULTS.exists() else {}
    suites = {name: ran.get(name, stored.get(name)) for name in SUITES}
    RESULTS.write_text(json.dumps({"versions": versions, "suites": suites}, indent=1) + "\n")
    print(RESULTS.read_text())
    return int(any(suite and suite["failed"] for suite in suites.values()))


if __name__ == "__main__":
    sys.exit(main())
