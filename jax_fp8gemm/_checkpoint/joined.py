"""Gate and up in FP8 as the one tensor of a file: side by side, or in turns."""

import dataclasses
from typing import NoReturn

import jax
import numpy as np

from jax_fp8gemm._checkpoint.arrays import BlockExponents
from jax_fp8gemm._checkpoint.microscaled import GROUP, Microscaled
from jax_fp8gemm._checkpoint.sources import Index, Source, bits_of, read
from jax_fp8gemm._checkpoint.writer import on_host
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """An array in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def fill(self, index: Index, out: np.ndarray) -> None:
        out[...] = self.array[index].view(bits_of(self.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """Two arrays of one shape, whose rows are one after the other, or take turns."""

    parts: tuple[Source, Source]
    in_turns: bool

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.parts[0].shape
        return (*lead, 2 * rows, columns)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def fill(self, index: Index, out: np.ndarray) -> None:
        *lead, rows, columns = index
        for i, part in enumerate(self.parts):
            n = part.shape[-2]
            if self.in_turns:  # row r of the part is 2r + i
                own = slice((rows.start - i + 1) // 2, (rows.stop - i + 1) // 2)
                to = slice(2 * own.start + i - rows.start, None, 2)
            else:
                own = slice(*(min(max(at - n * i, 0), n) for at in (rows.start, rows.stop)))
                first = max(n * i - rows.start, 0)
                to = slice(first, first + own.stop - own.start)
            if own.stop > own.start:
                part.fill((*lead, own, columns), out[..., to, :])


def join_fp8(op: str, name: str, parts: list[QArray], *, in_turns: bool) -> QArray:
    """Returns two weights [..., n, k] with scales of 128x128 as one [..., 2n, k], exactly.

    Halves of whole blocks keep their scales. Otherwise a new block has rows of several old ones. It
    then gets the least scale that its numbers fit, as when `load_parameters` takes it apart, so
    that what was read is written, and what was written is read.

    Raises:
      ValueError: shapes differ; scales are no powers of two, or E4M3 lacks a number that moved.
    """
    first, second = parts
    if first.shape != second.shape:
        got = ", ".join(describe("part", part.qvalue) for part in parts)
        fix = "pass gate and up of one shape"
        fail(op, f"the parts of {name} differ.", got, "two weights of one shape", fix)
    held = [jax.tree.map(lambda x: on_host(op, name, x), part) for part in parts]
    if not in_turns and first.shape[-2] % SCALE_BLOCK == 0:
        return jax.tree.map(lambda *x: np.concatenate(x, axis=-2), *held)

    def refuse(reason: str) -> NoReturn:
        got = f"two of {describe('', first.qvalue).strip()}, {reason}"
        expected = "scales that are powers of two, of a width that is a multiple of 32, or floats"
        fix = "pass the float weights, which are quantized together"
        fail(op, f"{name} cannot be joined from FP8.", got, expected, fix)

    if first.shape[-1] % GROUP:
        refuse(f"whose width is no multiple of {GROUP}")
    numbers = [_Held(part.qvalue) for part in held]
    shape = (*first.shape[:-1], first.shape[-1] // GROUP)
    exponents = [BlockExponents(_Held(part.scale), shape, refuse) for part in held]
    joined = Microscaled(
        op,
        name,
        _Pair(parts=(numbers[0], numbers[1]), in_turns=in_turns),
        _Pair(parts=(exponents[0], exponents[1]), in_turns=in_turns),
        expected="the same scale of gate and up, or numbers with room to move",
        fix="pass the float weights, which are quantized together",
    ).source()
    return QArray(read(joined.qvalue), read(joined.scale))  # type: ignore[arg-type]
