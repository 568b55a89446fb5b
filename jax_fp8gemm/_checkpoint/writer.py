"""Arrays to safetensors files: whole or not at all."""

import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_fp8gemm._checkpoint.header import CODES, DTYPES
from jax_fp8gemm._checkpoint.pairs import SCALE, SCALE_CODES, Format
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, ROWS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray


def flatten(
    op: str, tensors: Mapping[str, Any], formats: Mapping[str, Format]
) -> dict[str, np.ndarray]:
    """Returns what a file has, by name: of a QArray its numbers and scales.

    Raises:
      ValueError: a name taken twice, scales that no layout has, a value that its format changes.
    """
    flat: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        for part, array in _parts(op, name, value, formats.get(name, Format())):
            if part in flat:
                got, fix = f"{part} twice", "drop one of them, or give it another scale_name"
                fail(op, f"{part} is taken.", got, "every name once", fix)
            flat[part] = array
    return flat


def _parts(op: str, name: str, value: Any, form: Format) -> Iterator[tuple[str, np.ndarray]]:
    if not isinstance(value, QArray):
        array = on_host(op, name, value)
        if array.dtype == FP8:
            fix = "pass the QArray: quantize(w, (128, 128))"
            fail(op, f"{name} has no scales.", describe(name, array), "a QArray", fix)
        yield name, array if form.code is None else _narrow(op, name, array, form.code)
        return
    numbers, scale = on_host(op, name, value.qvalue), on_host(op, f"{name}'s scale", value.scale)
    got = f"{describe(name, numbers)}, {describe('scales', scale)}"
    if numbers.dtype != FP8 or scale.dtype != np.float32:
        expected, fix = "e4m3 numbers and f32 scales", "make it with quantize(w, (128, 128))"
        fail(op, f"{name} is no FP8 weight.", got, expected, fix, TypeError)
    shapes = [list(scale_shape(numbers.shape, tile)) for tile in (BLOCKS, ROWS)]
    if numbers.ndim < 2 or list(scale.shape) not in shapes:
        expected = f"scales f32{shapes[0]} or, for each row, f32{shapes[1]}"
        fix = "quantize(w, (128, 128)) gives such scales"
        fail(op, f"{name} has scales of the wrong shape.", got, expected, fix)
    if form.scale_code not in SCALE_CODES:
        expected, fix = ", ".join(SCALE_CODES), "choose a scale_code of these"
        fail(op, f"{name} has an unknown format.", str(form), expected, fix)
    yield name, numbers
    yield form.scale_name or name + SCALE, _narrow(op, f"{name}'s scale", scale, form.scale_code)


def _narrow(op: str, name: str, array: np.ndarray, code: str) -> np.ndarray:
    """Returns the array in the dtype of its file, which must have every value."""
    if code not in DTYPES:
        expected, fix = f"one of {', '.join(DTYPES)}", "choose a code of these"
        fail(op, f"{name} has an unknown format.", code, expected, fix)
    with np.errstate(all="ignore"):
        narrow = array.astype(DTYPES[code])
        same = np.array_equal(narrow.astype(array.dtype), array, equal_nan=True)
    if not same:
        fix = "save it in its own dtype, by a Format with another code"
        if code == "F8_E8M0":
            fix = 'quantize with scale_rounding="pow2", or choose scale_code="F32"'
        got, expected = describe(name, array), f"values that {code} has"
        fail(op, f"{name} would change in {code}.", got, expected, fix)
    return narrow


def on_host(op: str, name: str, value: Any) -> np.ndarray:
    """Returns an array of this process that a file can hold, contiguous."""
    if not isinstance(value, jax.Array | np.ndarray):
        got, fix = type(value).__name__, "of a PreparedWeight pass .forward, of a tree its leaves"
        fail(op, f"{name} is no array.", got, "an array or a QArray", fix, TypeError)
    if value.dtype not in CODES:
        expected, fix = f"one of {', '.join(DTYPES)}", "cast it"
        what = f"{name} has a dtype that the format lacks."
        fail(op, what, describe(name, value), expected, fix, TypeError)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        got = f"{describe(name, value)} of several processes"
        fix = "jax.experimental.multihost_utils.process_allgather(x, tiled=True)"
        fail(op, f"{name} is not in this process.", got, "all its parts here", fix)
    return np.ascontiguousarray(value).reshape(value.shape)  # which makes [] to [1]


def check_folder(op: str, folder: pathlib.Path) -> None:
    if not folder.is_dir():
        fix = "make it, or choose another"
        fail(op, "no such folder.", str(folder), "a folder", fix, FileNotFoundError)


def write_tensors(path: pathlib.Path, flat: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file in place of what stands there."""
    from safetensors.numpy import save_file

    temporary = _beside(path)
    try:
        # Hugging Face's loaders ask for a format; "pt" says that names and shapes are PyTorch's.
        save_file(flat, temporary, metadata={"format": "pt"})
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file in place of what stands there."""
    temporary = _beside(path)
    try:
        temporary.write_text(text)
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _rename(temporary: pathlib.Path, path: pathlib.Path) -> None:
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
