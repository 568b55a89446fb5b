"""What runs the kernels under compute-sanitizer, without a GPU: a script plays the tool.

On a Hopper GPU: make sanitize-gpu.
"""

import importlib
import json
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent
CLEAN = "launches 7\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"
UNINITIALIZED = """
========= Uninitialized __global__ memory read of size 4 bytes
=========     at {kernel}+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========
"""


@pytest.fixture
def sanitizers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "gpu"))
    yield importlib.import_module("sanitizers")
    for name in ("sanitizers", "sanitized"):
        sys.modules.pop(name, None)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Returns a function that puts a compute-sanitizer on PATH which runs a line of shell."""

    def plays(line: str) -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{line}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return plays


@pytest.mark.parametrize(
    "tool, report, count",
    [
        ("memcheck", CLEAN, 0),
        ("synccheck", CLEAN.replace("0 errors", "1 error"), 1),
        ("memcheck", "launches 7", None),
        ("racecheck", CLEAN_RACES, 0),
        ("racecheck", RACE, 3),
        ("initcheck", UNINITIALIZED.format(kernel="fp8_gemm_a") + CLEAN, 1),
        ("initcheck", UNINITIALIZED.format(kernel="loop_copy_fusion") + CLEAN, 0),
        ("initcheck", UNINITIALIZED.format(kernel="copy") * 2
         + UNINITIALIZED.format(kernel="fp8_quantize_b") * 2 + CLEAN, 2),
    ],
)  # fmt: skip
def test_findings_are_counted(sanitizers, tool, report, count):
    assert sanitizers.findings(tool, report) == count


def test_every_tool_runs_every_family(sanitizers, play, tmp_path, monkeypatch, capsys):
    report = (CLEAN + CLEAN_RACES).replace("\n", "\\n")
    play(f'printf "{report}"')
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["sanitizers.py", "--record", str(path)])
    assert sanitizers.main() == 0
    stored = json.loads(path.read_text())
    pairs = {(run["tool"], run["program"]) for run in stored["runs"]}
    assert len(pairs) == len(sanitizers.TOOLS) * len(sanitizers.FAMILIES) == len(stored["runs"])
    assert all(run["launches"] == 7 and run["ended"] == "finished" for run in stored["runs"])
    assert stored["digest"] == sanitizers.digest()
    assert f"{7 * len(pairs)} launches, 0 with findings" in capsys.readouterr().out


def test_a_finding_and_a_crash_fail(sanitizers, play, tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    options = ["--tools", "memcheck", "--programs", "casts", "--record", str(path)]
    monkeypatch.setattr(sys, "argv", ["sanitizers.py", *options])
    printed = {
        "finished": CLEAN.replace("0 errors", "2 errors"),
        "status 0, no result": "launches 7\n",
    }
    for ended, report in printed.items():
        play(f'printf "{report}"'.replace("\n", "\\n"))
        assert sanitizers.main() == 1
        (run,) = json.loads(path.read_text())["runs"]
        assert run["ended"] == ended and run["findings"] == (2 if ended == "finished" else 0)


def test_a_program_that_does_not_end_is_killed(sanitizers, play):
    play("echo launches 7; sleep 60")
    outcome, report = sanitizers.run("memcheck", "casts", seconds=1)
    assert outcome.ended == "not after 1 seconds" and "launches 7" in report
    assert outcome.seconds < 30


def test_the_families_have_every_form(sanitizers):
    sanitized = importlib.import_module("sanitized")
    assert tuple(sanitized.FAMILIES) == sanitizers.FAMILIES
    made = {name: make() for name, make in sanitized.FAMILIES.items()}
    gemms = [*made["persistent"], *made["few_rows"], *made["grouped"]]
    assert {gemm.variant for gemm in gemms} == {"dense", *sanitized.GROUPED}
    for name in ("persistent", "few_rows", "grouped"):
        forms = {(gemm.out, gemm.init) for gemm in made[name]}
        assert forms >= {("bf16", False), ("f32", True)}, name
    assert {gemm.scales for gemm in made["persistent"]} == {form[0] for form in sanitized.FORMS}
    configs = {*sanitized.PERSISTENT, *sanitized.ANY_GROUPS, *sanitized.FEW_ROWS}
    assert {gemm.config for gemm in gemms} == configs
    assert {gemm.config.multicast for gemm in gemms} == {"none", "lhs", "rhs"}
    assert {gemm.config.split_k for gemm in made["few_rows"]} == {1, 2, 4}
    casting = {(gemm.variant, gemm.rhs, gemm.pair) for gemm in made["casting"]}
    assert len(casting) == 2 * 2 * 2
    casts = {(cast.kind, cast.tile) for cast in made["casts"]}
    assert {kind for kind, _ in casts} == {
        "quantize", "rows", "transposed", "both", "requantize",
    }  # fmt: skip
    assert {tile for _, tile in casts} == {"1x128", "128x128", "row"}
    assert {cast.dtype for cast in made["casts"]} == {"bf16", "f16", "f32"}
    assert {one.backward for one in made["swiglu"]} == {False, True}


def test_a_family_runs(sanitizers):
    """On a CPU no kernel of the library is launched."""
    sanitized = importlib.import_module("sanitized")
    for apart in (False, True):
        assert sanitized.run(sanitized.swiglus()[:2], apart) == 0


def test_settled_operands_come_from_casts(sanitizers):
    sanitized = importlib.import_module("sanitized")
    checks = sanitized.settled([c for make in sanitized.FAMILIES.values() for c in make()])
    gemms = [check for check in checks if isinstance(check, sanitized.Gemm)]
    assert all(check.m % 4 == 0 for check in checks)
    assert all(gemm.cast and gemm.k % 512 == 0 for gemm in gemms)
    for gemm in gemms:
        if gemm.config:
            fields = ("variant", "m", "n", "k", "g", "scales", "out")
            sizes = {name: getattr(gemm, name) for name in fields}
            problem = sanitized.Problem(**sizes, accumulate=gemm.init)
            assert sanitized.why_illegal(problem, gemm.config) is None
