"""MXFP4 and MXFP8 to E4M3 with scales of 128x128, exactly: powers of two move between them.

A microscaled weight has one power of two for every 32 numbers of a row. A block of 128x128 gets the
least power of two by which its largest number still fits E4M3. Its other numbers then lie lower,
down to E4M3's least. Each byte is looked up, and what would be rounded is an error.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._checkpoint.sources import Index, QSource, Source, read
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import BLOCKS, SCALE_BLOCK, ceil_div, scale_shape
from jax_fp8gemm._core.qarray import FP8

GROUP = 32  # numbers that share an exponent; OCP Microscaling Formats 1.0, section 5.2
GROUPS = SCALE_BLOCK // GROUP  # of a row of a block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # likewise, section 5.3.3; then their negatives
BIAS, NAN = 127, 255  # of E8M0; likewise, section 5.4.1
MOST_SHIFT = 18  # 2**-9, E4M3's least, shifted by 18 is 512: beyond its largest, so none fits
NO_LIMIT = 2**14  # of zeros: any shift fits; far above exponents, and int16 holds their sums
LEAST_EXPONENT = -126  # of float32's normal numbers; GPUs may take smaller scales for zero
OF_ZEROS = -NO_LIMIT // 2  # a block has zeros alone where the exponent that it needs is lower

THREADS = min(8, os.cpu_count() or 1)  # NumPy's loops run side by side; each needs some 3 MB
BYTES_AT_ONCE = 2**17  # to look up: fewer of them, and the calls themselves take the time

CLOSE = "powers of two that lie close enough: in MXFP4 at most 14 apart"
LEAVE = "leave it out by keep, or scale it anew from floats by quantize(w, (128, 128))"

FOUR_BITS = 2  # numbers in a byte


def _each(byte: int) -> np.uint64:
    """Returns a word of eight such bytes."""
    return np.uint64(byte * 0x0101010101010101)


# 4 and 6 are 110 and 111, beside a sign; 2 and 3 are 100 and 101.
ONE, FOUR_OR_SIX, BUT_SIGNS = np.uint64(1), _each(0x44), _each(0x77)
# By the bits that any of several E2M1 has: of "4 or 6", then their own three.
MOST_BY_BITS = np.array([NO_LIMIT, 9, 8, 8, 7, 7, 7, 7, *[6] * 8], np.int16)


@dataclasses.dataclass(frozen=True)
class Tables:
    """What becomes of each byte when its numbers are multiplied by a power of two, the shift.

    Attributes:
      shifted: [2·MOST_SHIFT + 1, 256], the numbers times 2**(row − MOST_SHIFT) as E4M3.
      least, most: int16 [256], the shifts between which that is exact.
      safe: a shift from which on up to `most` it is exact for each byte.
    """

    shifted: np.ndarray
    least: np.ndarray
    most: np.ndarray
    safe: int


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
        in_fp8 = shifted.astype(FP8)
        same = (in_fp8.astype(np.float32) == shifted) | np.isnan(shifted)
    exact = same.all(-1)  # from one shift to another, without gaps; always for zeros
    free = ~(np.abs(numbers) > 0).any(-1)
    least = shifts[0] + exact.argmax(0)
    most = np.where(free, NO_LIMIT, least + exact.sum(0) - 1)
    packed = np.ascontiguousarray(in_fp8).view(f"u{per_byte}")[..., 0]
    safe = int(least[exact.sum(0) < len(shifts)].max())
    return Tables(packed, least.astype(np.int16), most.astype(np.int16), safe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """A row of blocks.

    Attributes:
      codes: uint8 [rows · groups, bytes of a group].
      exponents: int16 [rows, groups].
      most: int16 [rows, groups], up to which shift a group's numbers fit.
    """

    codes: np.ndarray
    exponents: np.ndarray
    most: np.ndarray


def _most_shifts(codes: np.ndarray) -> np.ndarray:
    """Returns up to which shift all numbers of each group fit E4M3; of zeros NO_LIMIT.

    Args:
      codes: uint8 [groups, bytes], contiguous.

    Returns:
      int16 [groups].
    """
    per_byte = GROUP // codes.shape[-1]
    if per_byte != FOUR_BITS:
        most = tables(per_byte).most
        return most.take(np.ascontiguousarray(codes.T)).min(0)
    words = codes.view(np.uint64)  # 16 numbers each
    large = words << ONE
    large &= words
    large = (large[:, 0] | large[:, 1]) & FOUR_OR_SIX
    found = (words[:, 0] | words[:, 1]) & BUT_SIGNS
    found |= large << ONE
    for width in (32, 16, 8, 4):
        found |= found >> np.uint64(width)
    return MOST_BY_BITS.take((found & np.uint64(15)).astype(np.intp))


def _shift(codes: np.ndarray, shifts: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes numbers times 2**shift as bits of E4M3.

    Args:
      codes: uint8 [groups, bytes].
      shifts: int16 [groups], none above what fits; any of zeros.
      out: uint8 [groups, 32], contiguous.

    Returns:
      The groups of which that is not exact.
    """
    groups, length = codes.shape
    table = tables(GROUP // length)
    rows = (shifts.clip(-MOST_SHIFT, MOST_SHIFT) + MOST_SHIFT).astype(np.uint16)
    numbers, count = table.shifted.reshape(-1), BYTES_AT_ONCE // length
    for start in range(0, groups, count):
        here = slice(start, start + count)
        entries = np.repeat(rows[here] * 256, length)
        entries += codes[here].reshape(-1)
        to = out[here].reshape(-1).view(numbers.dtype)
        # "raise" would check, and copy once more.
        numbers.take(entries.astype(np.intp), out=to, mode="clip")
    low = np.flatnonzero(shifts < table.safe)
    least = table.least.take(np.ascontiguousarray(codes[low].T)).max(0, initial=-MOST_SHIFT)
    return low[shifts[low].clip(-MOST_SHIFT) < least]


class Microscaled:
    """A weight [..., out, in] in MXFP4 or MXFP8, whose blocks are converted as they are read."""

    def __init__(
        self,
        op: str,
        name: str,
        codes: Source,
        exponents: Source,
        *,
        expected: str = CLOSE,
        fix: str = LEAVE,
    ):
        """codes: [..., out, in / numbers of a byte]; exponents: E8M0 [..., out, in / 32].

        expected, fix: of exponents of a block, in the error that says that it is not exact.
        """
        self._op, self._name, self._expected, self._fix = op, name, expected, fix
        self._codes, self._exponents = codes, exponents
        k = exponents.shape[-1] * GROUP
        self._per_byte = 1 if codes.shape[-1] == k else FOUR_BITS
        self.shape = (*codes.shape[:-1], k)
        self._found: dict[tuple, np.ndarray] = {}

    def source(self) -> QSource:
        return QSource(qvalue=_Numbers(self), scale=_Scales(self))

    def scales(self, at: tuple[int, ...], columns: slice) -> np.ndarray:
        """Returns the exponents of the scales of a row of blocks.

        Args:
          at: where the row is: the dims before the last two, and the row of blocks.
          columns: of blocks.
        """
        found = self._found.get((at, columns.start, columns.stop))
        return self._scales(self._read(at, columns), at, columns) if found is None else found

    def _scales(self, strip: Strip, at: tuple[int, ...], columns: slice) -> np.ndarray:
        """Takes for each block the least power of two by which its numbers fit E4M3; 1 of zeros."""
        needed = (strip.exponents - strip.most).max(0, initial=-NO_LIMIT)
        filled = np.full((columns.stop - columns.start) * GROUPS, -NO_LIMIT, np.int16)
        filled[: len(needed)] = needed
        scales = filled.reshape(-1, GROUPS).max(-1)
        scales = np.where(scales < OF_ZEROS, 0, np.maximum(scales, LEAST_EXPONENT))
        self._found[at, columns.start, columns.stop] = scales
        return scales

    def _read(self, at: tuple[int, ...], columns: slice) -> Strip:
        n, k = self.shape[-2:]
        rows = slice(at[-1] * SCALE_BLOCK, min(n, (at[-1] + 1) * SCALE_BLOCK))
        start, stop = columns.start * SCALE_BLOCK, min(k, columns.stop * SCALE_BLOCK)

        def part(source: Source, numbers: int) -> np.ndarray:
            lead = [slice(i, i + 1) for i in at[:-1]]
            found = read(source, (*lead, rows, slice(start // numbers, stop // numbers)))
            return found.view(np.uint8).reshape(found.shape[-2:])

        bits = part(self._exponents, GROUP)
        self._check_numbers(bits, at, columns.start)
        codes = part(self._codes, self._per_byte).reshape(-1, GROUP // self._per_byte)
        return Strip(
            codes=codes,
            exponents=bits.astype(np.int16) - BIAS,
            most=_most_shifts(codes).reshape(bits.shape),
        )

    def convert(self, at: tuple[int, ...], columns: slice, out: np.ndarray | None) -> np.ndarray:
        """Returns a row of blocks as bits of E4M3 [rows, numbers]; out: where to, if anywhere."""
        strip = self._read(at, columns)
        scales = self._scales(strip, at, columns)
        rows, groups = strip.exponents.shape
        shifts = strip.exponents - np.repeat(scales, GROUPS)[:groups]
        if out is None:
            out = np.empty((rows, groups * GROUP), np.uint8)
        wrong = _shift(strip.codes, shifts.reshape(-1), out.reshape(-1, GROUP))
        if wrong.size:
            column = int(wrong[0] % groups) // GROUPS
            part = strip.exponents[:, column * GROUPS : (column + 1) * GROUPS]
            self._not_exact([*at, columns.start + column], part)
        return out

    def _check_numbers(self, bits: np.ndarray, at: tuple[int, ...], first: int) -> None:
        if bits.size and bits.max() == NAN:
            column = first + int(np.argwhere(bits == NAN)[0, 1]) // GROUPS
            got, expected = f"NaN in block {[*at, column]}", "powers of two"
            fix = "fetch the file again, or leave it out by keep"
            fail(self._op, f"{self._name} has a scale that is no number.", got, expected, fix)

    def _not_exact(self, block: list[int], exponents: np.ndarray) -> None:
        got = f"block {block} with exponents from {exponents.min()} to {exponents.max()}"
        what = f"{self._name} is not exact in E4M3 with scales of 128x128."
        fail(self._op, what, got, self._expected, self._fix)


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
        around, (n, k) = _around(columns), self.shape[-2:]
        start = columns.start - around.start * SCALE_BLOCK

        def fill_row(at: tuple[int, ...], offset: tuple[int, ...]) -> None:
            top = at[-1] * SCALE_BLOCK
            low, high = max(rows.start, top), min(rows.stop, top + SCALE_BLOCK)
            part = out[offset[:-1]][low - rows.start : high - rows.start]
            if part.shape == (min(SCALE_BLOCK, n - top), k) and part.flags.c_contiguous:
                self.weight.convert(at, around, part)
                return
            numbers = self.weight.convert(at, around, None)
            part[...] = numbers[low - top : high - top, start : start + out.shape[-1]]

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill_row, *zip(*_blocks(tuple(lead), _around(rows)), strict=True)))


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
