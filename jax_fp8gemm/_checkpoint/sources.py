"""Arrays that are not read yet: each fills the part of itself that is asked for.

Values travel as unsigned integers of their size, which NumPy copies faster than FP8 or bf16.
"""

import dataclasses
import math
import mmap
from collections.abc import Callable
from typing import Protocol

import numpy as np

from jax_fp8gemm._checkpoint.header import DTYPES, Entry
from jax_fp8gemm._core.errors import fail

Index = tuple[slice, ...]  # of plain numbers, one slice for each dim
TURNED = 32  # rows at a time, whose cache lines stay: measured 2.8 times as fast as all at once
ALIGNMENT = 64  # bytes: XLA's CPU client then takes NumPy's memory as it is, without a copy


class Source(Protocol):
    """An array in a file.

    Attributes:
      shape, dtype: of the array.
      fill: writes the part at an index to an array of unsigned integers of the part's shape.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def fill(self, index: Index, out: np.ndarray) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QSource:
    """A QArray in a file."""

    qvalue: Source
    scale: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape


AnySource = Source | QSource


def bits_of(dtype: np.dtype) -> np.dtype:
    """Returns unsigned integers of the same size."""
    return np.dtype(f"u{dtype.itemsize}")


def read(source: Source, index: Index | None = None) -> np.ndarray:
    """Returns the part at `index`, or all, in memory of its own."""
    index = whole(source.shape) if index is None else index
    shape = tuple(len(range(s.start, s.stop, s.step or 1)) for s in index)
    out = _aligned(shape, bits_of(source.dtype))
    source.fill(index, out)
    return out.view(source.dtype)


def whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, n) for n in shape)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


# ---- arrays -------------------------------------------------------------------------------------


class Mapped:
    """The bytes of files, memory-mapped once each, when the first of them is asked for."""

    def __init__(self, op: str):
        self._op = op
        self._files: dict[str, np.ndarray] = {}

    def bytes_of(self, entry: Entry) -> np.ndarray:
        name = str(entry.file)
        if name not in self._files:
            with open(name, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._files[name] = np.frombuffer(mapped, np.uint8)
        found = self._files[name]
        if entry.end > len(found):
            got, expected = f"{len(found)} bytes", f"{entry.end} or more"
            fix = "write to another folder while this one is read"
            fail(self._op, f"{name} was cut off since it was opened.", got, expected, fix)
        return found[entry.begin : entry.end]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A tensor of a file, as it is."""

    entry: Entry
    files: Mapped

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.entry.code]

    def fill(self, index: Index, out: np.ndarray) -> None:
        if out.size:
            stored = self.files.bytes_of(self.entry).view(bits_of(self.dtype))
            out[...] = stored.reshape(self.shape)[index]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Converted:
    """The values of a small array in another dtype, which holds each of them."""

    source: Source
    dtype: np.dtype
    convert: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def fill(self, index: Index, out: np.ndarray) -> None:
        values = self.convert(read(self.source, index))
        out[...] = np.ascontiguousarray(values, self.dtype).view(out.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Some rows of each matrix of an array, or columns: axis is −2 or −1."""

    source: Source
    rows: slice
    axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.source.shape)
        shape[self.axis] = len(range(self.rows.start, self.rows.stop, self.rows.step))
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def fill(self, index: Index, out: np.ndarray) -> None:
        inner, part = list(index), index[self.axis]
        first, step = self.rows.start, self.rows.step
        inner[self.axis] = slice(first + part.start * step, first + part.stop * step, step)
        self.source.fill(tuple(inner), out)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stacked:
    """Arrays of one shape, as one with a further dim before theirs."""

    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.sources[0].dtype

    def fill(self, index: Index, out: np.ndarray) -> None:
        for i, source in enumerate(self.sources[index[0]]):
            source.fill(index[1:], out[i])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Transposed:
    """An array with its last two dims swapped."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.source.shape
        return (*lead, columns, rows)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def fill(self, index: Index, out: np.ndarray) -> None:
        *lead, rows, columns = index
        for start in range(columns.start, columns.stop, TURNED):
            part = slice(start, min(start + TURNED, columns.stop))
            to = out[..., start - columns.start : part.stop - columns.start]
            self.source.fill((*lead, part, rows), to.swapaxes(-1, -2))
