"""Loads the compiled extension `jax_fp8gemm._ext`, once JAX is new enough. Its only importer.

Nothing here needs a GPU, a driver or a CUDA compiler.
"""

import pathlib
import re

import jax
import jaxlib.version

from jax_fp8gemm._core.errors import fail, message

# The extension is built with the FFI headers of this jaxlib. Older ones drop its handlers in
# silence; newer ones take them.
OLDEST_JAX = "0.10.2"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def too_old(version: str) -> bool:
    """Returns whether a version of jax, jaxlib or a CUDA plugin is older than OLDEST_JAX."""
    return _numbers(version) < _numbers(OLDEST_JAX)


def check_jax() -> None:
    """Raises an ImportError if jax or jaxlib is too old."""
    jaxlib_version = jaxlib.version.__version__
    if too_old(jax.__version__) or too_old(jaxlib_version):
        got = f"jax {jax.__version__}, jaxlib {jaxlib_version}"
        fix = f'pip install --upgrade "jax>={OLDEST_JAX}", or jax[cuda12] or jax[cuda13] for a GPU'
        expected = f"jax and jaxlib {OLDEST_JAX} or newer"
        fail("jax_fp8gemm", "JAX is too old.", got, expected, fix, ImportError)


check_jax()

try:
    import jax_fp8gemm._ext as extension
except ImportError as error:
    folder = pathlib.Path(__file__).parents[2]
    raise ImportError(
        message(
            "jax_fp8gemm",
            "the compiled extension is missing.",
            got=f"the package in {folder}, without _ext ({error})",
            expected="an installed package: the extension is built when it is installed",
            fix="in a checkout run pip install -e . (a plain pip install . is hidden by the "
            "checkout's own folder: leave that folder then)",
        )
    ) from None

__all__ = ["OLDEST_JAX", "extension", "too_old"]
