"""Loads the compiled extension `jax_fp8gemm._ext`. Its only importer.

Nothing here needs a GPU, a driver or a CUDA compiler.
"""

import pathlib

from jax_fp8gemm._core.errors import message

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
    ) from error

__all__ = ["extension"]
