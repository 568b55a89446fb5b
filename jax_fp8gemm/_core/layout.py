"""Scale tiles: which elements share a scale, and how scales lie in memory.

The 128s of this library are three, and only by chance the same number.
"""

import jax
import jax.numpy as jnp

SCALE_BLOCK = 128  # rows or columns of a scale tile; DeepSeek-V3 (arXiv 2412.19437), section 3.3.2
K_STEP = 128  # of k that the tensor core sums before the promotion to float32; likewise
TOKEN_MULTIPLE = 128  # groups of a transposed copy begin at multiples of it: one step of k each
K_MULTIPLE = 16  # bytes: what the copy engine (TMA) wants of a row of FP8 numbers
SCALE_MULTIPLE = 4  # float32 scales: likewise
MOST_COUNT = 2**31 - 2**11  # rows of all matrices, and columns: csrc/kernels/plan.cuh, kMostCount

Tile = tuple[int | None, int | None]

# rows × columns of a matrix that share one scale; None is "all of them".
ROW_BLOCKS: Tile = (1, SCALE_BLOCK)
BLOCKS: Tile = (SCALE_BLOCK, SCALE_BLOCK)
ROWS: Tile = (1, None)
TENSOR: Tile = (None, None)
TILES = (ROW_BLOCKS, BLOCKS, ROWS, TENSOR)

# Their names in attributes of custom calls.
TILE_NAMES = {ROW_BLOCKS: "1x128", BLOCKS: "128x128", ROWS: "1xk", TENSOR: "tensor"}


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up.

    Args:
      a: a count.
      b: a positive integer.
    """
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


def scale_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Returns the shape of the scales of an array of `shape`, tiled in its last two dims."""
    *lead, rows, columns = shape
    tile_rows, tile_columns = tile
    return (
        *lead,
        1 if tile_rows is None else -(-rows // tile_rows),
        1 if tile_columns is None else -(-columns // tile_columns),
    )


def scale_to_kernel(scale: jax.Array, tile: Tile) -> jax.Array:
    """Lays scales out as the kernel copies them, padded with zeros to whole 16 bytes.

    (1, 128), (1, None): [..., rows, steps] -> [..., steps, rows↑4]. (128, 128): the last dim ↑4.
    (None, None): [..., 1, 4].
    """
    if tile in (ROW_BLOCKS, ROWS):
        scale = jnp.swapaxes(scale, -1, -2)
    pad = -scale.shape[-1] % SCALE_MULTIPLE
    return jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, pad)])


def scale_from_kernel(scale: jax.Array, shape: tuple[int, ...], tile: Tile) -> jax.Array:
    """Undoes scale_to_kernel for an operand of `shape`."""
    rows, columns = scale_shape(shape, tile)[-2:]
    if tile in (ROW_BLOCKS, ROWS):
        return jnp.swapaxes(scale[..., :columns, :rows], -1, -2)
    return scale[..., :rows, :columns]


def scale_shape_in_kernel(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """Returns the shape that scale_to_kernel gives the scales of an array of `shape`."""
    *lead, rows, columns = scale_shape(shape, tile)
    if tile in (ROW_BLOCKS, ROWS):
        rows, columns = columns, rows
    return (*lead, rows, round_up(columns, SCALE_MULTIPLE))
