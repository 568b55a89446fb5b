"""The table of GEMM variants: one row each, and what follows from a row.

The C++ enum `Variant` (csrc/kernels/params.cuh) has the same names in the same order.
"""

import dataclasses
import string

from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, ROWS, TENSOR, Tile
from jax_fp8gemm._core.types import ScalesName, VariantName


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: the dims of the operands as letters.

    Attributes:
      groups: the dim that the group operand cuts up or covers: "m", "k", or None without one.
      group_operand: the dim of the group operand, an int32 vector: "g" for sizes, "m" for the
        group of each row, None without one.
    """

    name: VariantName
    lhs: str
    rhs: str
    out: str
    groups: str | None
    group_operand: str | None

    def with_ranks(self, lhs: int, rhs: int) -> "Variant":
        """Returns the row for operands of these ranks; only `dense` has others than its own.

        Each dim of rhs but the first is contracted; lhs has these last, and any before them.
        """
        if self.name != "dense" or rhs < 2 or lhs < rhs or lhs + rhs > len(string.ascii_uppercase):
            return self
        names = iter(string.ascii_uppercase)
        lead = "".join(next(names) for _ in range(lhs - rhs)) + "m"
        contracted = "".join(next(names) for _ in range(rhs - 2)) + "k"
        return dataclasses.replace(
            self, lhs=lead + contracted, rhs="n" + contracted, out=lead + "n"
        )

    def sizes(self, lhs: tuple[int, ...], rhs: tuple[int, ...], group_count: int | None) -> dict:
        """Returns the size of every letter; group_count: the length of the group operand."""
        sizes = dict(zip(self.rhs, rhs, strict=True)) | dict(zip(self.lhs, lhs, strict=True))
        return {self.group_operand: group_count, **sizes} if group_count is not None else sizes

    def out_shape(
        self, lhs: tuple[int, ...], rhs: tuple[int, ...], group_count: int | None = None
    ) -> tuple[int, ...]:
        sizes = self.sizes(lhs, rhs, group_count)
        return tuple(sizes[letter] for letter in self.out)


VARIANTS = {
    row.name: row
    for row in (
        Variant("dense", "mk", "nk", "mn", None, None),
        Variant("batched", "gmk", "gnk", "gmn", None, None),
        Variant("ragged", "mk", "gnk", "mn", "m", "g"),
        Variant("contiguous", "mk", "gnk", "mn", "m", "m"),
        Variant("masked", "gmk", "gnk", "gmn", "m", "g"),
        Variant("ragged_contracting", "mk", "nk", "gmn", "k", "g"),
    )
}


# Which tiles of scales the two operands have. Names as in the benchmarks: lhs_rhs.
SCALES: dict[ScalesName, tuple[Tile, Tile]] = {
    "1x128_128x128": (ROW_BLOCKS, BLOCKS),
    "1x128_1x128": (ROW_BLOCKS, ROW_BLOCKS),
    "row_row": (ROWS, ROWS),
    "tensor_tensor": (TENSOR, TENSOR),
}
