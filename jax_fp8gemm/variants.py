"""The table of GEMM variants: one row each, and what follows from a row.

The C++ enum `Variant` (csrc/kernels/params.cuh) has the same names in the same order.
"""

import dataclasses

from jax_fp8gemm.qarray import BLOCKS, ROW_BLOCKS, ROWS, TENSOR, Tile


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: the dims of the operands as letters, and the row that a vmap of both leads to."""

    name: str
    lhs: str
    rhs: str
    out: str
    vmap: str | None
    known_as: str

    def out_shape(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...]:
        sizes = dict(zip(self.rhs, rhs, strict=True)) | dict(zip(self.lhs, lhs, strict=True))
        return tuple(sizes[letter] for letter in self.out)


VARIANTS = {
    row.name: row
    for row in (
        Variant("dense", "mk", "nk", "mn", "batched", "DeepGEMM normal"),
        Variant("batched", "gmk", "gnk", "gmn", None, "batched"),
    )
}

# Which tiles of scales the two operands have. Names as in the benchmarks: lhs_rhs.
SCALES: dict[str, tuple[Tile, Tile]] = {
    "1x128_128x128": (ROW_BLOCKS, BLOCKS),
    "1x128_1x128": (ROW_BLOCKS, ROW_BLOCKS),
    "row_row": (ROWS, ROWS),
    "tensor_tensor": (TENSOR, TENSOR),
}
