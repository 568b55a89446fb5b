"""Finds the run-time compiler, loads the C++ extension, registers its handlers with XLA.

The only importer of the extension. Nothing here needs a GPU, a driver or a compiler: what is
missing is reported when a program for a GPU is compiled.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil

import jax

from jax_fp8gemm import _ext

TARGET = "jax_fp8gemm_gemm_v1"
QUANTIZE_TARGET = "jax_fp8gemm_quantize_v1"
PLATFORM = "CUDA"

compile = _ext.compile
cache_facts = _ext.cache_facts
nvrtc_facts = _ext.nvrtc_facts
device_facts = _ext.device_facts
variant_names = _ext.variant_names
plan = _ext.plan
deepest = _ext.deepest
cast_plan = _ext.cast_plan


def _pip_nvrtc() -> list[pathlib.Path]:
    """Returns the NVRTC libraries of pip packages, the one of JAX's own CUDA version first."""
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(root) for root in spec.submodule_search_locations] if spec else []
    found = {
        12: [root / "cuda_nvrtc/lib/libnvrtc.so.12" for root in roots],
        13: [root / "cu13/lib/libnvrtc.so.13" for root in roots],
    }
    newest_first = sorted(
        found, reverse=True, key=lambda major: (_installed(f"jax-cuda{major}-plugin"), major)
    )
    return [path for major in newest_first for path in found[major]]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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


def cache_dir() -> str:
    """Returns the folder of compiled kernels: JAX_FP8GEMM_CACHE_DIR, or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("JAX_FP8GEMM_CACHE_DIR") or os.path.join(home, "jax_fp8gemm")


def version() -> str:
    try:
        return importlib.metadata.version("jax_fp8gemm")
    except importlib.metadata.PackageNotFoundError:  # run from a folder on PYTHONPATH
        return "0"


def configure() -> None:
    """Reads the environment again; kernels already compiled stay."""
    _ext.configure(
        nvrtc=find_nvrtc(),
        cache_dir=cache_dir(),
        verbose=os.environ.get("JAX_FP8GEMM_VERBOSE") == "1",
        dump_dir=os.environ.get("JAX_FP8GEMM_DUMP", ""),
        version=version(),
    )


def register() -> None:
    """Makes the handlers known to XLA for CUDA; without a CUDA plugin this waits in a queue."""
    configure()
    for name, info in _ext.state_types().items():
        jax.ffi.register_ffi_type(name, info, platform=PLATFORM)
    for name, stages in _ext.targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=PLATFORM, api_version=1)
