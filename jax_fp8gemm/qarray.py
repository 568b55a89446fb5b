"""QArray: FP8 numbers and the scales that give them their size."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp

from jax_fp8gemm.errors import message

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn
BLOCK = 128  # rows or columns that share a scale; also how deep the tensor core may sum

Tile = tuple[int | None, int | None]

# rows × columns of a matrix that share one scale; None is "all of them".
ROW_BLOCKS: Tile = (1, BLOCK)
BLOCKS: Tile = (BLOCK, BLOCK)
ROWS: Tile = (1, None)
TENSOR: Tile = (None, None)
TILES = (ROW_BLOCKS, BLOCKS, ROWS, TENSOR)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def scale_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Returns the shape of the scales of an array of `shape`, tiled in its last two dims."""

    def count(size: int, step: int | None) -> int:
        return 1 if step is None else ceil_div(size, step)

    *lead, rows, columns = shape
    return (*lead, count(rows, tile[0]), count(columns, tile[1]))


def exportable(cls: type) -> type:
    """Registers a dataclass of arrays as a pytree, which exported programs may take and return."""
    cls = jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_fp8gemm.{cls.__name__}",
        serialize_auxdata=lambda nothing: b"",
        deserialize_auxdata=lambda nothing: (),
    )
    return cls


@exportable
@dataclasses.dataclass(frozen=True)
class QArray:
    """An array in FP8 with scales: real[i, j] = qvalue[i, j] · scale[i // rows, j // columns].

    Attributes:
      qvalue: float8_e4m3fn [..., rows, k].
      scale: float32 [..., scale rows, scale columns], one per tile of the last two dims. A tile
        is (1, 128), (128, 128), (1, k) or the whole matrix; it follows from the two shapes.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
    """

    qvalue: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    def has_tile(self, tile: Tile) -> bool:
        """Whether the shapes fit `tile`. More than one can fit a small array; all mean the same."""
        return tuple(self.scale.shape) == scale_shape(self.shape, tile)

    @property
    def tile(self) -> Tile:
        """The first of (1, 128), (128, 128), (1, None), (None, None) that fits the shapes."""
        for tile in TILES:
            if self.has_tile(tile):
                return tile
        raise ValueError(
            message(
                "QArray",
                "the shape of scale fits no tile of qvalue.",
                got=f"qvalue {list(self.shape)}, scale {list(self.scale.shape)}",
                expected="scale "
                + " or ".join(str(list(scale_shape(self.shape, t))) for t in TILES),
                mend="make it with jax_fp8gemm.quantize, or transpose the scales",
            )
        )
