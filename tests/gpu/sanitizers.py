"""Runs every family of kernels under every tool of compute-sanitizer, and stores what was found.

python tests/gpu/sanitizers.py --record benchmarks/results/nvidia-h200-sanitizers.json

Exits with 1 if a tool has a finding in a kernel of the library, or if a program does not end.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(1, str(HERE.parent))

from soak.record import digest  # noqa: E402

FAMILIES = ("persistent", "few_rows", "grouped", "casting", "casts", "swiglu")
TOOLS = ("racecheck", "initcheck", "memcheck", "synccheck")  # the slowest first
SECONDS = 180  # of one program
JOBS = 8
KERNELS = "fp8_"  # part of the names of all kernels of the library
ENVIRONMENT = {
    # Each array has an allocation of its own: in a pool of XLA's what lies past its end is another
    # array, and what was freed has been written to.
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Kernels are launched one by one.
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a tool said of a program.

    Attributes:
      launches: of the library's kernels, that the tool looked at.
      findings: in these.
      ended: "finished", or why not.
    """

    tool: str
    program: str
    launches: int
    findings: int
    seconds: float
    ended: str


def command(tool: str, family: str) -> list[str]:
    """Returns the command line. initcheck must see who writes, so it looks at all kernels."""
    found = ["compute-sanitizer", "--tool", tool, "--print-limit", "0"]
    if tool != "initcheck":
        found += ["--kernel-name", f"kernel_substring={KERNELS}"]
    found += [sys.executable, str(HERE / "sanitized.py"), family]
    return found if tool == "initcheck" else [*found, "--apart"]


def findings(tool: str, report: str) -> int | None:
    """Returns how many findings the library's kernels have; None if there is no summary.

    XLA's own kernels read what lies past the groups when they copy a whole result: not ours.
    """
    if tool == "racecheck":
        found = re.search(
            r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+)", report
        )
        return int(found[1]) + int(found[2]) if found else None
    found = re.search(r"ERROR SUMMARY: (\d+) error", report)
    if tool != "initcheck" or not found:
        return int(found[1]) if found else None
    ours = re.findall(rf"Uninitialized.*\n.*{KERNELS}(?:.*\n)*?=========\s*\n", report)
    return len(ours)


def run(tool: str, family: str, seconds: float = SECONDS) -> tuple[Outcome, str]:
    """Returns the outcome, and what was printed."""
    start = time.monotonic()
    process = subprocess.Popen(
        command(tool, family),
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ended = "finished"
    try:
        report = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the program, which would keep the GPU
        report, ended = process.communicate()[0], f"not after {seconds:g} seconds"
    launched = re.search(r"^launches (\d+)$", report, re.MULTILINE)
    found = findings(tool, report)
    if ended == "finished" and (process.returncode or not launched or found is None):
        ended = f"status {process.returncode}, no result"
    took = round(time.monotonic() - start, 1)
    counted = int(launched[1]) if launched else 0
    return Outcome(tool, family, counted, found or 0, took, ended), report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", help="the file to write")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--programs", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--jobs", type=int, default=JOBS)
    args = parser.parse_args()
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
        return 1
    start, outcomes = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, tool, name) for tool in args.tools for name in args.programs]
        for job in concurrent.futures.as_completed(jobs):
            outcome, report = job.result()
            outcomes.append(outcome)
            show(outcome, report, len(outcomes), len(jobs), time.monotonic() - start)
            if args.record:  # now, since we may be stopped
                store(pathlib.Path(args.record), outcomes, time.monotonic() - start)
    bad = [one for one in outcomes if one.findings or one.ended != "finished"]
    launched = sum(one.launches for one in outcomes)
    print(f"{len(outcomes)} programs, {launched} launches, {len(bad)} with findings or without end")
    return 1 if bad else 0


def show(outcome: Outcome, report: str, done: int, of: int, seconds: float) -> None:
    print(
        f"[{seconds:5.1f} s] {done}/{of} {outcome.tool} {outcome.program}: {outcome.launches} "
        f"launches, {outcome.findings} findings, {outcome.ended} in {outcome.seconds} s",
        flush=True,
    )
    if outcome.findings or outcome.ended != "finished":
        print(report[:1500], "...", report[-1500:], flush=True)


def store(path: pathlib.Path, outcomes: list[Outcome], seconds: float) -> None:
    runs = sorted((dataclasses.asdict(one) for one in outcomes), key=lambda one: list(one.values()))
    about = {
        "commit": os.environ.get("JAX_FP8GEMM_COMMIT", ""),
        "digest": digest(),
        "date": str(datetime.date.today()),
        "device": device(),
        "seconds": round(seconds, 1),
    }
    lines = ",\n".join(json.dumps(one) for one in runs)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(about)[:-1] + ', "runs": [\n' + lines + "\n]}\n")
    os.replace(temporary, path)


def device() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
