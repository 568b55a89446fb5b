"""Where compiled kernels and tuned configs are kept between processes."""

import os
import tempfile
from typing import NamedTuple

from jax_fp8gemm._core.errors import message


class CacheFolder(NamedTuple):
    """Where compiled kernels are kept. An empty path: nowhere. An empty warning: as asked for."""

    path: str
    warning: str


def cache_folder() -> CacheFolder:
    """Returns JAX_FP8GEMM_CACHE_DIR, or a folder in the user's cache; else one in the temporary
    folder, with a warning. The extension checks who may write to it before it reads anything."""
    name, path, parent = _chosen_cache()
    if os.path.isabs(path) and os.path.isdir(parent):
        return CacheFolder(path, "")
    fallback = _temporary_cache()
    warning = message(
        "jax_fp8gemm",
        f"kernels are not cached where {name} says.",
        got=f"{name} {path!r}",
        expected="an absolute path"
        if parent == "/"
        else "an absolute path in a folder that exists",
        fix="set JAX_FP8GEMM_CACHE_DIR to an absolute path; until then kernels are kept "
        + (f"in {fallback}" if fallback else "in memory alone"),
    )
    return CacheFolder(fallback, warning)


def _chosen_cache() -> tuple[str, str, str]:
    """Returns a variable, the folder that it means, and a folder above that which must exist."""
    for name, *below in (("JAX_FP8GEMM_CACHE_DIR",), ("XDG_CACHE_HOME", "jax_fp8gemm")):
        if chosen := os.environ.get(name):
            return name, os.path.join(os.path.expanduser(chosen), *below), "/"
    home = os.path.expanduser("~")
    return "HOME", os.path.join(home, ".cache", "jax_fp8gemm"), home


def _temporary_cache() -> str:
    """Returns a name of the user's own in the temporary folder, or "" where there is none."""
    try:
        return os.path.join(tempfile.gettempdir(), f"jax_fp8gemm-{os.geteuid()}")
    except FileNotFoundError:
        return ""
