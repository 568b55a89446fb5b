"""Floats to FP8 arrays and back: quantize and its fused relatives. Each is one kernel on a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_fp8gemm._bind.meshes import automatic
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.checks import (
    as_float,
    as_groups,
    as_int32,
    check_bool,
    check_option,
    check_quantized,
    is_integer,
    renamed,
)
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, SCALE_BLOCK, TENSOR, TILES, Tile
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ScaleRounding
from jax_fp8gemm._ops.casts import (
    BothCopies,
    Matrices,
    cast_both,
    cast_rows,
    cast_transposed,
    recast,
)


@renamed(scale="scale_rounding")
def quantize(
    x: jax.Array, tile: Tile = ROW_BLOCKS, *, scale_rounding: ScaleRounding = "pow2"
) -> QArray:
    """Quantizes to FP8 with one scale for each tile of the last two dims.

    qvalue = e4m3(clip(x / scale, ±448)), scale ≈ max|tile| / 448.

    Args:
      x: bf16, f16 or f32 [..., rows, k].
      tile: rows and columns that share a scale. (1, 128) for activations and gradients, (128, 128)
        for weights, (1, None) for one scale a row, (None, None) for one scale a matrix.
      scale_rounding: "pow2" rounds scales up to powers of two. Then quantizing once more along the
        other axis is exact. "none" keeps max|tile| / 448.

    Returns:
      QArray. A tile of zeros has scale 1. A tile with NaN or Inf has scale NaN.

    Raises:
      TypeError: x is not a bf16, f16 or f32 array.
      ValueError: the tile or scale_rounding is unknown, or the rank is below 2.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2; E4M3 (arXiv 2209.05433).

    Example:
      q = quantize(jnp.ones((4, 256)))  # q.qvalue e4m3[4, 256], q.scale f32[4, 2]
    """
    op = "quantize"
    _check_tile(op, tile, TILES)
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    x = _as_matrix(op, x)
    if tile == TENSOR:  # a reduction and a cast: no kernel could do it in one pass
        return QArray(*reference.quantize(x, tile, scale_rounding))
    return cast_rows(x, tile, scale_rounding=scale_rounding)


@renamed(scale="scale_rounding")
def quantize_rows(
    x: jax.Array,
    *,
    scale_rounding: ScaleRounding = "pow2",
    group_sizes: ArrayLike | None = None,
    index: ArrayLike | None = None,
) -> QArray:
    """Quantizes rows by 1x128: the first of `quantize_both`'s copies alone.

    Args:
      x: bf16, f16 or f32 [..., m, k].
      scale_rounding: "pow2" or "none", see `quantize`.
      group_sizes: int [g], only for x [m, k]: rows past the groups are not read, and hold anything
        in the result.
      index: int [m], only for x [rows, k]: row i is x[index[i]]. Indices are clamped.

    Returns:
      QArray [..., m, k], scaled (1, 128).

    Raises:
      TypeError: x is not a float array, or group_sizes or index are not integers.
      ValueError: scale_rounding is unknown, or ranks do not fit.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    op = "quantize_rows"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    x = _as_matrix(op, x)
    rows = _check_rows(op, x, ROW_BLOCKS, group_sizes=group_sizes, index=index)
    return cast_rows(x, ROW_BLOCKS, scale_rounding=scale_rounding, **rows)


@renamed(scale="scale_rounding")
def quantize_transposed(
    x: jax.Array,
    tile: Tile = ROW_BLOCKS,
    *,
    scale_rounding: ScaleRounding = "pow2",
    group_sizes: ArrayLike | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
) -> QArray:
    """Quantizes the transpose: the second of `quantize_both`'s copies alone.

    Args:
      x: see `quantize_both`.
      tile: see `quantize_both`.
      scale_rounding: see `quantize_both`.
      group_sizes: see `quantize_both`.
      shared_columns: see `quantize_both`.
      token_dims: see `quantize_both`.

    Returns:
      QArray [..., k, tokens].

    Raises:
      TypeError: x is not a float array, or group_sizes are not integers.
      ValueError: the tile or scale_rounding is unknown, or ranks do not fit.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    op = "quantize_transposed"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    x = _as_matrix(op, x)
    _check_tokens(op, x, tile, token_dims)
    _check_shared_columns(op, shared_columns, tile)
    rows = _check_rows(op, x, tile, group_sizes=group_sizes)
    return cast_transposed(
        x,
        tile,
        scale_rounding=scale_rounding,
        shared_columns=shared_columns,
        token_dims=int(token_dims),
        **rows,
    )


@renamed(scale="scale_rounding")
def quantize_both(
    x: Matrices,
    tile: Tile = ROW_BLOCKS,
    *,
    scale_rounding: ScaleRounding = "pow2",
    group_sizes: ArrayLike | None = None,
    index: ArrayLike | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
) -> BothCopies:
    """Quantizes x and its transpose in one pass: what forward and backward GEMMs contract over.

    Args:
      x: bf16, f16 or f32 [..., m, k]. Or two of these that lie side by side along k, each with a
        multiple of 128 columns.
      tile: (1, 128): each copy is scaled along its own rows, so the transposed one along tokens. It
        is filled with zeros to a multiple of 128 tokens. (128, 128): the copies are exact
        transposes of each other.
      scale_rounding: "pow2" or "none", see `quantize`.
      group_sizes: int [g], only for x [m, k] and (1, 128). In the transposed copy every group of
        rows begins at a multiple of 128 tokens, with zeros between. Rows past the groups are not
        read, and hold anything in the first copy.
      index: int [m], only for x [rows, k]: row i is x[index[i]]. Indices are clamped.
      shared_columns: gives each block of 128 columns one scale in the transposed copy, where the
        columns' own scales lie within a factor of 1024. As rhs of the gradient to a weight it
        multiplies faster where columns share in every step of 128 tokens (docs/numerics.md). Needs
        1x128, and changes nothing without "pow2".
      token_dims: how many dims before k are tokens. With two, x [..., s, m, k] has the transposed
        copy [..., k, s, m]. Then m is a multiple of 128, and the tile is (1, 128).

    Returns:
      BothCopies: rows, a QArray [..., m, k], and transposed, a QArray [..., k, tokens]. There are m
      tokens with (128, 128), m rounded up to a multiple of 128 with (1, 128), and with group_sizes
      (m + min(g, m) · 127) // 128 · 128.

    Raises:
      TypeError: x is not a float array, or group_sizes or index are not integers.
      ValueError: the tile or scale_rounding is unknown, or ranks or the two matrices do not fit.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      rows, transposed = quantize_both(jnp.ones((300, 512)))  # [300, 512] and [512, 384]
    """
    op = "quantize_both"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    matrices = tuple(_as_matrix(op, one) for one in (x if isinstance(x, tuple) else (x,)))
    if isinstance(x, tuple):
        _check_pair(op, matrices)
    _check_tokens(op, matrices[0], tile, token_dims)
    _check_shared_columns(op, shared_columns, tile)
    rows = _check_rows(op, matrices[0], tile, group_sizes=group_sizes, index=index)
    operand = matrices[0] if len(matrices) == 1 else (matrices[0], matrices[1])
    return cast_both(
        operand,
        tile,
        scale_rounding=scale_rounding,
        shared_columns=shared_columns,
        token_dims=int(token_dims),
        **rows,
    )


@renamed(scale="scale_rounding")
def requantize(
    q: QArray,
    *,
    scale_rounding: ScaleRounding = "pow2",
    group_sizes: ArrayLike | None = None,
    index: ArrayLike | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
) -> QArray:
    """Returns the transposed copy of FP8 rows, scaled 1x128 along tokens.

    Exact where both scales are powers of two, but for what falls below the finer scale's numbers.

    Args:
      q: QArray [..., m, k], scaled (1, 128).
      scale_rounding: see `quantize_both`.
      group_sizes: see `quantize_both`.
      index: see `quantize_both`.
      shared_columns: see `quantize_both`.
      token_dims: see `quantize_both`.

    Returns:
      QArray [..., k, tokens], as `quantize_both`'s transposed copy.

    Raises:
      TypeError: q is not a QArray, or group_sizes or index are not integers.
      ValueError: q has other scales, scale_rounding is unknown, or ranks do not fit.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    op = "requantize"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    check_quantized(op, "q", q)
    if not q.has_tile(ROW_BLOCKS):
        got = f"{describe('q', q.qvalue)}, {describe('scale', q.scale)}"
        fix = "quantize(x) with tile (1, 128)"
        fail(op, "q is not scaled by 1x128.", got, "scale [..., m, k/128]", fix)
    _check_tokens(op, q.qvalue, ROW_BLOCKS, token_dims)
    _check_shared_columns(op, shared_columns, ROW_BLOCKS)
    rows = _check_rows(op, q.qvalue, ROW_BLOCKS, group_sizes=group_sizes, index=index)
    return recast(
        q,
        scale_rounding=scale_rounding,
        shared_columns=shared_columns,
        token_dims=int(token_dims),
        **rows,
    )


def dequantize(q: QArray, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the numbers of an FP8 array: qvalue · scale, multiplied in float32.

    Args:
      q: QArray [..., rows, k], with any scale tile.
      dtype: of the result.

    Returns:
      dtype [..., rows, k].

    Raises:
      TypeError: q is not a QArray.
      ValueError: its scales fit no tile.
    """
    check_quantized("dequantize", "q", q)
    tile = q.tile

    def run(qvalue, scale):
        return reference.dequantize(qvalue, scale, tile).astype(dtype)

    return automatic(run, q.qvalue)(q.qvalue, q.scale)


# ---- checks -------------------------------------------------------------------------------------


def _check_tile(op: str, tile: Tile, tiles: tuple[Tile, ...]) -> None:
    if tile not in tiles:
        expected = " or ".join(map(str, tiles))
        fail(op, "tile is unknown.", f"tile={tile}", expected, "choose a tile of these")


def _as_matrix(op: str, x: Any) -> jax.Array:
    x = as_float(op, "x", x)
    if x.ndim < 2:
        fail(op, "x is not a matrix.", describe("x", x), "rank 2 or more", "pass x[None, :]")
    return x


def _check_pair(op: str, x: tuple[jax.Array, ...]) -> None:
    if len(x) != 2:
        fix = "pass two, or concatenate them"
        fail(op, "x is neither a matrix nor two.", f"{len(x)} matrices", "one or two", fix)
    left, right = x
    if left.shape != right.shape or left.dtype != right.dtype or left.shape[-1] % SCALE_BLOCK:
        got = ", ".join(describe("x", one) for one in x)
        expected = "equal shapes and dtypes, a multiple of 128 columns"
        fail(op, "the two matrices cannot lie side by side.", got, expected, "concatenate them")


def _check_tokens(op: str, x: jax.Array, tile: Tile, token_dims: int) -> None:
    """Checks what a transposed copy asks of x."""
    _check_tile(op, tile, (ROW_BLOCKS, BLOCKS))
    fits = is_integer(token_dims) and 1 <= token_dims < x.ndim
    if not fits or (token_dims > 1 and (tile != ROW_BLOCKS or x.shape[-2] % SCALE_BLOCK)):
        got = f"{describe('x', x)}, tile={tile}, token_dims={token_dims!r}"
        expected = "1 or more dims before k; tile (1, 128) and x [..., m, k] with m a multiple of "
        expected += "128 where there are two or more"
        fail(op, "token_dims does not fit x.", got, expected, "merge the dims of tokens by reshape")


def _check_shared_columns(op: str, shared_columns: Any, tile: Tile) -> None:
    check_bool(op, "shared_columns", shared_columns)
    if shared_columns and tile != ROW_BLOCKS:
        got, fix = f"shared_columns=True, tile={tile}", "leave shared_columns out"
        fail(op, "columns of this tile already share scales.", got, "tile (1, 128)", fix)


def _check_rows(op: str, x: jax.Array, tile: Tile, **operands: ArrayLike | None) -> dict[str, Any]:
    """Returns group_sizes and index as int32, as far as they are given."""
    doors = {"group_sizes": as_groups, "index": as_int32}
    given = {name: doors[name](op, name, one) for name, one in operands.items() if one is not None}
    if given and (x.ndim != 2 or tile == BLOCKS or any(one.ndim != 1 for one in given.values())):
        named = [describe(name, one) for name, one in given.items()]
        got = ", ".join([describe("x", x), f"tile={tile}", *named])
        fix = "leave the tile at (1, 128); for more dims use jax.vmap"
        expected = "x [m, k], tile (1, 128), " + " and ".join(f"{name} of rank 1" for name in given)
        fail(op, f"{' and '.join(given)} need rows of tokens.", got, expected, fix)
    if "index" in given and not x.shape[0] and given["index"].shape[0]:
        got = f"{describe('x', x)}, {describe('index', given['index'])}"
        fail(op, "index points into no rows.", got, "x of 1 row or more", "leave index empty too")
    return given
