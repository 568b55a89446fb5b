"""MXFP4 and MXFP8 to E4M3 with scales of 128x128, exactly: powers of two move between them.

A microscaled weight has one power of two for every 32 numbers of a row. A block of 128x128 gets the
least power of two by which its largest number still fits E4M3. Its other numbers then lie lower,
down to E4M3's least. Each number is looked up, and what would be rounded is an error.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._checkpoint.sources import Index, QSource, Source, read
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import BLOCKS, SCALE_BLOCK, ceil_div, scale_shape
from jax_fp8gemm._core.qarray import FP8, FP8_MAX

GROUP = 32  # numbers that share an exponent; OCP Microscaling Formats 1.0, section 5.2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # likewise, section 5.3.3; then their negatives
BIAS, NAN = 127, 255  # of E8M0; likewise, section 5.4.1
MOST_SHIFT = 18  # 2**-9, E4M3's least, shifted by 18 is 512: beyond its largest, so none fits
NO_LIMIT = 127  # of a zero: any shift fits
LEAST_EXPONENT = -126  # of float32's normal numbers; GPUs may take smaller scales for zero

FOUR_BITS, EIGHT_BITS = 2, 1  # numbers in a byte


@dataclasses.dataclass(frozen=True)
class Tables:
    """What becomes of each byte.

    Attributes:
      shifted: [2·MOST_SHIFT + 1, 256], the byte's numbers times 2**(row − MOST_SHIFT) as E4M3.
      exact: likewise, whether these are the same numbers.
      limit: int8 [256], by which power of two at most the byte's numbers can be multiplied.
    """

    shifted: np.ndarray
    exact: np.ndarray
    limit: np.ndarray


@functools.cache
def tables(per_byte: int) -> Tables:
    codes = np.arange(256, dtype=np.uint8)
    if per_byte == FOUR_BITS:  # the first number is in the lower half of the byte
        numbers = np.array([*E2M1, *(-x for x in E2M1)], np.float32)
        numbers = numbers[np.stack([codes & 15, codes >> 4], -1)]
    else:
        numbers = codes.view(FP8).astype(np.float32)[:, None]
    shifts = np.arange(-MOST_SHIFT, MOST_SHIFT + 1)
    shifted = np.ldexp(numbers, shifts[:, None, None])  # [shifts, 256, numbers of a byte]
    with np.errstate(all="ignore"):
        as_fp8 = shifted.astype(FP8)
        same = (as_fp8.astype(np.float32) == shifted) | np.isnan(shifted)
    fits = ~(np.abs(shifted) > FP8_MAX).any(-1)
    free = ~(np.abs(numbers) > 0).any(-1)
    limit = np.where(free, NO_LIMIT, shifts[0] + fits.sum(0) - 1)
    packed = np.ascontiguousarray(as_fp8).view(f"u{per_byte}")[..., 0]
    return Tables(packed, same.all(-1), limit.astype(np.int8))


class Microscaled:
    """A weight [..., out, in] in MXFP4 or MXFP8, whose blocks are converted as they are read."""

    def __init__(self, op: str, name: str, codes: Source, exponents: Source):
        """codes: [..., out, in / numbers of a byte]; exponents: E8M0 [..., out, in / 32]."""
        self._op, self._name = op, name
        self._codes, self._exponents = codes, exponents
        self._per_byte = exponents.shape[-1] * GROUP // codes.shape[-1]
        self.shape = (*codes.shape[:-1], exponents.shape[-1] * GROUP)
        self._found: dict[tuple, np.ndarray] = {}

    def source(self) -> QSource:
        return QSource(qvalue=_Numbers(self), scale=_Scales(self))

    def scales(self, at: tuple[int, ...], columns: slice) -> np.ndarray:
        """Returns the exponents of the scales of a row of blocks.

        Args:
          at: where the row is: the dims before the last two, and the row of blocks.
          columns: of blocks.
        """
        key = (at, columns.start, columns.stop)
        if key not in self._found:
            self._found[key] = self._block_exponents(*self._read(at, columns), at, columns.start)
        return self._found[key]

    def _read(self, at: tuple[int, ...], columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns codes [rows, bytes] and exponents [rows, groups] of a row of blocks."""
        n, k = self.shape[-2:]
        rows = slice(at[-1] * SCALE_BLOCK, min(n, (at[-1] + 1) * SCALE_BLOCK))
        start, stop = columns.start * SCALE_BLOCK, min(k, columns.stop * SCALE_BLOCK)

        def part(source: Source, numbers: int) -> np.ndarray:
            lead = [slice(i, i + 1) for i in at[:-1]]
            found = read(source, (*lead, rows, slice(start // numbers, stop // numbers)))
            return found.view(np.uint8).reshape(found.shape[-2:])

        return part(self._codes, self._per_byte), part(self._exponents, GROUP)

    def _block_exponents(
        self, codes: np.ndarray, exponents: np.ndarray, at: tuple[int, ...], first: int
    ) -> np.ndarray:
        """Returns for each block the least exponent of a scale by which its numbers fit E4M3."""
        if (exponents == NAN).any():
            column = int(np.argwhere(exponents == NAN)[0, 1]) * GROUP // SCALE_BLOCK
            got, expected = f"NaN in block {[*at, first + column]}", "powers of two"
            fix = "fetch the file again, or leave it out by keep"
            fail(self._op, f"{self._name} has a scale that is no number.", got, expected, fix)
        rows, groups = exponents.shape
        limit = tables(self._per_byte).limit[codes].reshape(rows, groups, -1).min(-1)
        least = exponents.astype(np.int16) - BIAS - limit
        least = np.where(limit == NO_LIMIT, LEAST_EXPONENT, least).max(0, initial=LEAST_EXPONENT)
        per_block = SCALE_BLOCK // GROUP
        least = np.pad(least, (0, -groups % per_block), constant_values=LEAST_EXPONENT)
        return least.reshape(-1, per_block).max(-1)

    def convert(self, at: tuple[int, ...], columns: slice) -> np.ndarray:
        """Returns a row of blocks as bits of E4M3 [rows, numbers]."""
        codes, bits = self._read(at, columns)
        exponents, least = bits.astype(np.int16) - BIAS, self.scales(at, columns)
        per_block = SCALE_BLOCK // GROUP
        shift = exponents - np.repeat(least, per_block)[: exponents.shape[1]]
        row = np.clip(shift, -MOST_SHIFT, MOST_SHIFT).astype(np.int32) + MOST_SHIFT
        row = np.repeat(row, codes.shape[1] // exponents.shape[1], axis=1)
        table = tables(self._per_byte)
        entry = row * 256 + codes
        exact = table.exact.reshape(-1)[entry]
        if not exact.all():
            column = int(np.argwhere(~exact)[0, 1]) * self._per_byte // SCALE_BLOCK
            part = exponents[:, column * per_block : (column + 1) * per_block]
            self._not_exact([*at, columns.start + column], part)
        return table.shifted.reshape(-1)[entry].view(np.uint8)

    def _not_exact(self, block: list[int], exponents: np.ndarray) -> None:
        got = f"block {block} with exponents from {exponents.min()} to {exponents.max()}"
        expected = "powers of two that lie close enough: in MXFP4 at most 14 apart"
        fix = "leave it out by keep, or scale it anew from floats by quantize(w, (128, 128))"
        what = f"{self._name} is not exact in E4M3 with scales of 128x128."
        fail(self._op, what, got, expected, fix)


def _blocks(lead: Index, rows: slice) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields where a row of blocks is: in the array, and in the part."""
    for offset in np.ndindex(*(s.stop - s.start for s in (*lead, rows))):
        at = tuple(s.start + i for s, i in zip((*lead, rows), offset, strict=True))
        yield at, offset


def _around(s: slice) -> slice:
    """Returns the blocks that hold elements."""
    return slice(s.start // SCALE_BLOCK, ceil_div(s.stop, SCALE_BLOCK))


@dataclasses.dataclass(frozen=True, eq=False)
class _Numbers:
    weight: Microscaled
    dtype = jnp.dtype(FP8)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def fill(self, index: Index, out: np.ndarray) -> None:
        *lead, rows, columns = index
        if not out.size:
            return
        around = _around(columns)
        start = columns.start - around.start * SCALE_BLOCK
        for at, offset in _blocks(tuple(lead), _around(rows)):
            numbers = self.weight.convert(at, around)
            top = at[-1] * SCALE_BLOCK
            low, high = max(rows.start, top), min(rows.stop, top + SCALE_BLOCK)
            part = numbers[low - top : high - top, start : start + out.shape[-1]]
            out[offset[:-1]][low - rows.start : high - rows.start] = part


@dataclasses.dataclass(frozen=True, eq=False)
class _Scales:
    weight: Microscaled
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return scale_shape(self.weight.shape, BLOCKS)

    def fill(self, index: Index, out: np.ndarray) -> None:
        *lead, rows, columns = index
        for at, offset in _blocks(tuple(lead), rows):
            least = self.weight.scales(at, columns)
            out[offset] = np.ldexp(np.float32(1), least).view(np.uint32)
