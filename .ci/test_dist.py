"""Installs what is in dist/ in fresh environments and runs .ci/smoke.py in each.

The wheels are installed with nothing on PATH, so without a compiler. One serves CUDA 12 and 13: in
each environment the NVRTC of one of them compiles a kernel. The sdist is built by the compiler of
this machine.

python .ci/test_dist.py python3.11 python3.12 python3.13
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
DIST = ROOT / "dist"
WORK = ROOT / ".make/installed"
OLDEST = "jax[cpu]==0.10.2"
NEWEST = "jax[cpu]"
NVRTC = {"12": "nvidia-cuda-nvrtc-cu12", "13": "nvidia-cuda-nvrtc"}


def run(*command: object, **environment: str) -> None:
    print("+", *command, flush=True)
    # From an empty folder: the one of the checkout would hide the installed package.
    subprocess.run(
        [str(part) for part in command], check=True, cwd=WORK, env=os.environ | environment
    )


def test(
    name: str, python: str, package: object, jax: str, cuda: str, *options: str, path: str
) -> None:
    """Installs a package beside a version of jax, and runs the smoke script."""
    folder = WORK / name
    run(python, "-m", "venv", folder)
    python = folder / "bin/python"
    pip = (python, "-m", "pip", "install", "--quiet")
    run(*pip, package, jax, NVRTC[cuda], "--find-links", DIST, *options, PATH=path)
    cache = str(folder / "cache")
    run(python, ROOT / ".ci/smoke.py", cuda, PATH="", JAX_FP8GEMM_CACHE_DIR=cache)


def check_names() -> None:
    """Checks for which Pythons and systems the wheels are."""
    pattern = r"jax_fp8gemm-[^-]+-(cp\d+-\w+)-manylinux_2_(\d+)_x86_64\.whl"
    found = [re.fullmatch(pattern, wheel.name) for wheel in sorted(DIST.glob("*.whl"))]
    tags = [(match[1], int(match[2]) <= 28) for match in found if match]  # glibc 2.28 suffices
    assert tags == [("cp311-cp311", True), ("cp312-abi3", True)], list(DIST.iterdir())


def main(oldest: str, middle: str, newest: str) -> None:
    check_names()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (sdist,) = DIST.glob("*.tar.gz")
    version = sdist.name.removeprefix("jax_fp8gemm-").removesuffix(".tar.gz")
    wheel = f"jax_fp8gemm=={version}"
    for name, python, jax, cuda in (
        ("wheel-oldest", oldest, OLDEST, "12"),
        ("wheel-middle", middle, NEWEST, "13"),
        ("wheel-newest", newest, NEWEST, "12"),
    ):
        test(name, python, wheel, jax, cuda, "--only-binary", ":all:", path="")
    # Without pip's cache, which may have a wheel of an earlier sdist of this name.
    path = os.environ["PATH"]
    test("sdist", newest, sdist, NEWEST, "13", "--no-cache-dir", path=path)


if __name__ == "__main__":
    main(*sys.argv[1:])
