"""The record of GPU tests: several runs of the same sources add up."""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TESTS = "def test_one(): pass\n\ndef test_two(): pass\n\ndef test_three(): pass\n"


def run(folder: pathlib.Path, *options: str) -> tuple[str, dict]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options, "gpu"]
    environment = {
        **os.environ,
        "JAX_FP8GEMM_RECORD": str(folder / "record.json"),
        "JAX_FP8GEMM_RESUME": str(folder / "ended.txt"),
        "JAX_FP8GEMM_COMMIT": "abc",
        "PYTHONPATH": f"{HERE}:{HERE / 'gpu'}",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    environment.pop("JAX_FP8GEMM_TEST_GPU", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "record.json").read_text())


def test_a_second_run_leaves_out_what_ended(tmp_path):
    """Without a GPU every test is skipped, which counts as an end."""
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/conftest.py").write_text((HERE / "gpu/conftest.py").read_text())
    (tmp_path / "gpu/test_three.py").write_text(TESTS)
    _, first = run(tmp_path, "-k", "one")
    assert first == {"commit": "abc", "passed": 0, "failed": 0, "skipped": 1}
    with (tmp_path / "ended.txt").open("a") as file:
        file.write("passed gpu/test_three.py::test_two\nfailed gpu/test_three.py::test_three\n")
    text, second = run(tmp_path)
    assert second == {"commit": "abc", "passed": 1, "failed": 0, "skipped": 2}
    assert "2 deselected" in text
