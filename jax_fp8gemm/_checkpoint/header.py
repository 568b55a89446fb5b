"""The header of a safetensors file, read with suspicion: it says where which bytes lie."""

import dataclasses
import json
import math
import pathlib
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.errors import fail

# safetensors' names of dtypes. Its front ends for numpy and flax read no FP8 (version 0.8).
DTYPES: dict[str, np.dtype] = {
    code: jnp.dtype(dtype)
    for code, dtype in {
        "F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16,
        "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": jnp.float8_e8m0fnu,
        "BOOL": jnp.bool_,
        "I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8,
        "U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8,
    }.items()
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones too
MOST_DIMS = 32  # far above any weight's; NumPy's own limit is 64
MOST_BYTES = 2**62  # of a tensor: what NumPy can address


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file.

    Attributes:
      code: safetensors' name of its dtype, which DTYPES may not have.
      begin, end: its bytes, counted from the start of the file.
    """

    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.code} [{', '.join(map(str, self.shape))}]"


def read_header(op: str, file: pathlib.Path) -> dict[str, Entry]:
    """Returns the tensors of a file by name, every one within the file and on bytes of its own."""
    if not file.is_file():
        fix = "fetch it, or choose by keep what the other files have"
        fail(
            op, f"{file} is missing.", "no such file", "a safetensors file", fix, FileNotFoundError
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            _damaged(op, file, f"{size} bytes, with a header of {length} bytes")
        header = _parse(op, file, stream.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(op, file, name, value, 8 + length) for name, value in header.items()}
    _check_bytes(op, file, entries, 8 + length, size)
    return entries


def _damaged(op: str, file: pathlib.Path, got: str) -> NoReturn:
    fix = "fetch it again; git-lfs leaves a short text in place of a file"
    fail(op, f"{file} is damaged.", got, "a whole safetensors file", fix)


def _parse(op: str, file: pathlib.Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        _damaged(op, file, f"a header that is not JSON: {str(error)[:200]}")
    if not isinstance(header, dict):
        _damaged(op, file, f"a header that is a {type(header).__name__}")
    return header


def _entry(op: str, file: pathlib.Path, name: str, value: Any, start: int) -> Entry:
    value = value if isinstance(value, dict) else {}
    code, shape, span = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(code, str)
        or not _counts(shape)
        or len(shape) > MOST_DIMS
        or not _counts(span)
        or len(span) != 2
    ):
        _damaged(op, file, f"{name} with dtype {code}, shape {shape}, data_offsets {span}"[:300])
    if math.prod(n for n in shape if n) > MOST_BYTES // 8:
        _damaged(op, file, f"{name} of shape {shape}")
    return Entry(
        file=file, code=code, shape=tuple(shape), begin=start + span[0], end=start + span[1]
    )


def _counts(value: Any) -> bool:
    """Whether it is a list of integers of 0 or more."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_bytes(
    op: str, file: pathlib.Path, entries: dict[str, Entry], start: int, size: int
) -> None:
    """Checks that tensors follow each other without gap or overlap, and have their dtype's size."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at or entry.end < at:
            _damaged(op, file, f"{name} at {entry.begin}:{entry.end}, where {at} is next")
        bits = _bits(entry.code)
        if bits is not None and 8 * (entry.end - at) != bits * math.prod(entry.shape):
            _damaged(op, file, f"{name} {entry} of {entry.end - at} bytes")
        at = entry.end
    if at != size:
        _damaged(op, file, f"{size} bytes, where its tensors need {at}")


def _bits(code: str) -> int | None:
    """Returns the bits of a number, None of a dtype that is not known."""
    if code == "F4":
        return 4
    return 8 * DTYPES[code].itemsize if code in DTYPES else None
