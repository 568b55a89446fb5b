"""Finds the run-time compiler and registers the extension's handlers with XLA.

Nothing here needs a GPU, a driver or a compiler. What is missing is reported when a program for a
GPU is compiled.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil

import jax

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.extension import OLDEST_JAX, extension, too_old
from jax_fp8gemm._core.folders import cache_folder
from jax_fp8gemm._core.version import __version__

TARGET = "jax_fp8gemm_gemm_v1"
QUANTIZE_TARGET = "jax_fp8gemm_quantize_v1"
PLATFORM = "CUDA"

compile = extension.compile
cache_facts = extension.cache_facts
nvrtc_facts = extension.nvrtc_facts
device_facts = extension.device_facts
variant_names = extension.variant_names


def _pip_nvrtc() -> list[pathlib.Path]:
    """Returns the NVRTC libraries of pip packages, the one of JAX's own CUDA version first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(root) for root in (spec and spec.submodule_search_locations) or []]
    found = {
        12: [root / "cuda_nvrtc/lib/libnvrtc.so.12" for root in roots],
        13: [root / "cu13/lib/libnvrtc.so.13" for root in roots],
    }
    newest_first = sorted(
        found, reverse=True, key=lambda major: (bool(_installed(_plugin(major))), major)
    )
    return [path for major in newest_first for path in found[major]]


def _plugin(major: int) -> str:
    """Returns the name of the package that brings XLA for this version of CUDA."""
    return f"jax-cuda{major}-plugin"


def _installed(package: str) -> str:
    """Returns the version of a package, or "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _toolkit_nvrtc() -> list[pathlib.Path]:
    """Returns the NVRTC libraries beside an nvcc on PATH."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return []
    root = pathlib.Path(nvcc).resolve().parent.parent
    folders = [root / "lib64", root / "targets/x86_64-linux/lib"]
    return [path for folder in folders for path in sorted(folder.glob("libnvrtc.so.1[0-9]"))]


def find_nvrtc() -> str:
    """Returns the path of NVRTC, or "": JAX_FP8GEMM_NVRTC, then pip packages, then a toolkit."""
    chosen = os.environ.get("JAX_FP8GEMM_NVRTC")
    if chosen:
        return chosen
    found = (path for path in [*_pip_nvrtc(), *_toolkit_nvrtc()] if path.exists())
    return str(next(found, ""))


def configure() -> None:
    """Reads the environment again; kernels already compiled stay."""
    cache = cache_folder()
    extension.configure(
        nvrtc=find_nvrtc(),
        cache_dir=cache.path,
        cache_warning=cache.warning,
        verbose=os.environ.get("JAX_FP8GEMM_VERBOSE") == "1",
        dump_dir=os.path.expanduser(os.environ.get("JAX_FP8GEMM_DUMP", "")),
        version=__version__,
    )


@functools.cache
def check_plugin() -> None:
    """Checks, when a program for CUDA is first lowered, that XLA took the handlers.

    XLA does not tell. A plugin older than the handlers' FFI headers drops them in silence. Without
    any plugin a program can still be exported.

    Raises:
      RuntimeError: no installed CUDA plugin is new enough.
    """
    versions = {major: _installed(_plugin(major)) for major in (12, 13)}
    old = {major: version for major, version in versions.items() if version}
    if old and all(map(too_old, old.values())):
        got = ", ".join(f"{_plugin(major)} {version}" for major, version in old.items())
        expected = f"version {OLDEST_JAX} or newer"
        fix = f'pip install --upgrade "jax[cuda{max(old)}]"'
        what = "JAX's CUDA plugin is too old to take the kernels."
        fail("jax_fp8gemm", what, got, expected, fix, RuntimeError)


def register() -> None:
    """Makes the handlers known to XLA for CUDA; without a CUDA plugin this waits in a queue."""
    configure()
    for name, info in extension.state_types().items():
        jax.ffi.register_ffi_type(name, info, platform=PLATFORM)
    for name, stages in extension.targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=PLATFORM, api_version=1)
