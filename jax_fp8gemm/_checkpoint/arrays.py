"""The array that a weight of a checkpoint is, ready to be read: all of it, or some rows."""

import dataclasses
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from jax_fp8gemm._checkpoint.microscaled import BIAS, GROUP, GROUPS, NAN, Microscaled
from jax_fp8gemm._checkpoint.pairs import LONG_CODES, Weight
from jax_fp8gemm._checkpoint.sources import (
    AnySource,
    Converted,
    Index,
    Mapped,
    QSource,
    Rows,
    Source,
    Stored,
    read,
)
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import SCALE_BLOCK


def source_of(op: str, files: Mapped, weight: Weight, rows: slice | None = None) -> AnySource:
    """Returns the array of a weight.

    Args:
      rows: of it, with a step; None: all.

    Raises:
      ValueError: the rows split a block that shares a scale, and do not fit into other blocks
        exactly. Of scales that are not powers of two only reading says so.
    """
    if weight.scale is None:
        return _plain(op, weight, _rows(Stored(entry=weight.numbers, files=files), rows))
    if weight.kind == "microscaled":
        return _microscaled(op, files, weight, rows)
    numbers = Stored(entry=weight.numbers, files=files)
    scale = Converted(
        source=Stored(entry=weight.scale, files=files),
        dtype=np.dtype(np.float32),
        convert=lambda values: values.astype(np.float32),
    )
    scale_rows = rows
    if rows is not None and scale.shape[-2] != numbers.shape[-2]:  # 128x128
        bounds = rows.start, rows.stop
        if rows.step != 1 or any(n % SCALE_BLOCK and n != numbers.shape[-2] for n in bounds):
            return _from_other_blocks(op, weight, numbers, scale, rows)
        scale_rows = slice(rows.start // SCALE_BLOCK, -(-rows.stop // SCALE_BLOCK), 1)
    return QSource(qvalue=_rows(numbers, rows), scale=_rows(scale, scale_rows))


def _rows(source: Source, rows: slice | None) -> Source:
    return source if rows is None else Rows(source=source, rows=rows)


def _from_other_blocks(
    op: str, weight: Weight, numbers: Source, scale: Source, rows: slice
) -> QSource:
    """Returns rows of several blocks, as gate and up that alternate, as one array with blocks anew.

    Powers of two move between numbers and scales, as those of a microscaled weight do.
    """

    def refuse(reason: str) -> NoReturn:
        got = f"{weight.name} {weight.numbers}, rows {rows.start}:{rows.stop}:{rows.step}, {reason}"
        expected = f"scales that are powers of two, or halves of a multiple of {SCALE_BLOCK} rows"
        fix = "take a checkpoint in floats, in MXFP4 or with a scale per row; or load it whole"
        fail(op, f"{weight.name} cannot be split within its scales.", got, expected, fix)

    if numbers.shape[-1] % GROUP:
        refuse(f"whose width is no multiple of {GROUP}")
    exponents = BlockExponents(scale, (*numbers.shape[:-1], numbers.shape[-1] // GROUP), refuse)
    moved = Microscaled(
        op,
        weight.name,
        _rows(numbers, rows),
        _rows(exponents, rows),
        expected="the same scale for all rows of a new block, or numbers with room to move",
    )
    return moved.source()


@dataclasses.dataclass(frozen=True, eq=False)
class BlockExponents:
    """Scales of 128x128 as a microscaled weight has them: E8M0 for each row and 32 numbers."""

    scale: Source
    shape: tuple[int, ...]
    refuse: Callable[[str], NoReturn]
    dtype = np.dtype(np.uint8)

    def fill(self, index: Index, out: np.ndarray) -> None:
        *lead, rows, groups = index
        row, column = (
            np.arange(s.start, s.stop, s.step) // n
            for s, n in ((rows, SCALE_BLOCK), (groups, GROUPS))
        )
        if not out.size:
            return
        around = (slice(at[0], at[-1] + 1) for at in (row, column))
        scales = read(self.scale, (*lead, *around))
        mantissa, exponent = np.frexp(scales)
        bits = exponent + (BIAS - 1)  # a power of two has the mantissa 0.5
        wrong = (mantissa != 0.5) | (bits < 0) | (bits >= NAN)
        if wrong.any():
            self.refuse(f"with a scale of {scales[wrong][0]}")
        out[...] = bits[..., row - row[0], :][..., column - column[0]]


def _plain(op: str, weight: Weight, source: Source) -> Source:
    if weight.format is None:
        return source
    assert weight.format.code in LONG_CODES
    narrow = np.dtype(np.int32 if weight.format.code == "I64" else np.uint32)
    limits = np.iinfo(narrow)

    def convert(values: np.ndarray) -> np.ndarray:
        if values.size and not limits.min <= values.min() <= values.max() <= limits.max:
            got = f"{weight.name} {weight.numbers} from {values.min()} to {values.max()}"
            expected = f"{limits.min} to {limits.max}"
            fix = "set jax_enable_x64, or leave it out by keep"
            what = f"{weight.name} needs 64 bits."
            fail(op, what, got, expected, fix, TypeError)
        return values.astype(narrow)

    return Converted(source=source, dtype=narrow, convert=convert)


def _microscaled(op: str, files: Mapped, weight: Weight, rows: slice | None) -> QSource:
    assert weight.scale is not None
    numbers, scale = weight.numbers, weight.scale
    k = weight.shape[-1]
    if numbers.code != "F8_E4M3":  # whose bytes hold two numbers, in gpt-oss's grouped by 32
        shape = (*weight.shape[:-1], k // 2)
        numbers = dataclasses.replace(numbers, code="U8", shape=shape)
    assert scale.shape[-1] * GROUP == k
    codes, exponents = (Stored(entry=entry, files=files) for entry in (numbers, scale))
    return Microscaled(op, weight.name, _rows(codes, rows), _rows(exponents, rows)).source()
