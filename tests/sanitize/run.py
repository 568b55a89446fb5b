"""Runs the host code under sanitizers: python tests/sanitize/run.py [FOLDER]

driver.cpp and csrc are built with AddressSanitizer and UndefinedBehaviorSanitizer, then with
ThreadSanitizer. fake_cuda.cpp takes the place of NVRTC and of the CUDA driver. Any finding ends the
program with an error.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile

import jax

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = "-std=c++20 -O0 -g -fPIC -Wall -Wextra -Werror".split()
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
JOBS = 2
BINDINGS = "bindings.cpp"  # needs Python


def run(command: list[str], **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def fake_cuda(folder: pathlib.Path, flags: list[str] = []) -> pathlib.Path:  # noqa: B006
    """Builds the fake libraries, and returns NVRTC's; libcuda.so.1 is beside it."""
    nvrtc = folder / "libnvrtc.so"
    run(["g++", *FLAGS, *flags, "-shared", "-o", str(nvrtc), str(HERE / "fake_cuda.cpp")])
    (folder / "libcuda.so.1").symlink_to(nvrtc.name)
    return nvrtc


def build(folder: pathlib.Path, sanitizer: str) -> pathlib.Path:
    """Builds driver.cpp and csrc; returns the program."""
    flags = [*FLAGS, *SANITIZERS[sanitizer]]
    include = [f"-I{CSRC}", "-isystem", jax.ffi.include_dir()]
    sources = [HERE / "driver.cpp", *sorted(CSRC.glob("*.cpp"))]
    sources = [source for source in sources if source.name != BINDINGS]
    objects = [str(folder / f"{source.stem}-{source.parent.name}.o") for source in sources]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        commands = [
            ["g++", *flags, *include, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(run, commands))
    program = folder / "driver"
    run(["g++", *flags, *objects, "-o", str(program), "-ldl", "-lpthread"])
    return program


def sanitize(folder: pathlib.Path, sanitizer: str) -> None:
    """Builds and runs; raises with what the sanitizer says."""
    nvrtc = fake_cuda(folder, SANITIZERS[sanitizer])
    program = build(folder, sanitizer)
    environment = {**os.environ, **OPTIONS, "LD_LIBRARY_PATH": str(folder)}
    run([str(program), str(nvrtc), str(folder / "cache")], env=environment, timeout=300)


def main() -> None:
    for sanitizer in SANITIZERS:
        with tempfile.TemporaryDirectory() as folder:
            sanitize(pathlib.Path(folder), sanitizer)
        print(f"{sanitizer}: nothing found")


if __name__ == "__main__":
    sys.exit(main())
