"""cast_statistics: what a cast did to the numbers, for those who watch a training run."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_fp8gemm._bind.meshes import automatic
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.checks import as_float, as_groups, check_bool, check_quantized
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.groups import group_ends, grouped_tokens, place_by_groups
from jax_fp8gemm._core.layout import ROW_BLOCKS, SCALE_BLOCK, Tile, round_up
from jax_fp8gemm._core.qarray import QArray

SATURATES = 464.0  # halfway from FP8_MAX to 480, which would be the next number of E4M3
OP = "cast_statistics"


class CastStatistics(NamedTuple):
    """Counts of a cast, int32 scalars. Those of several casts can be added up.

    Attributes:
      values: FP8 numbers in all.
      overflows: numbers of x that were too large for their scale, and became ±448. A scale made of
        a tile's own maximum has none. None without x.
      underflows: numbers of x that were not zero, and became zero. None without x.
      tiles: scale tiles in all.
      zero_tiles: tiles of zeros.
      nonfinite_tiles: tiles with a NaN, or with a scale of NaN or Inf.
      blocks: blocks of 128 rows and 128 columns of q that are not all zeros. None where q is not
        scaled (1, 128).
      shared_blocks: those among them whose rows have one scale in common. None likewise.
    """

    values: jax.Array
    overflows: jax.Array | None
    underflows: jax.Array | None
    tiles: jax.Array
    zero_tiles: jax.Array
    nonfinite_tiles: jax.Array
    blocks: jax.Array | None
    shared_blocks: jax.Array | None


def cast_statistics(
    q: QArray,
    x: jax.Array | None = None,
    *,
    transposed: bool = False,
    group_sizes: ArrayLike | None = None,
) -> CastStatistics:
    """Counts what a cast clipped, flushed to zero or lost, and which blocks share a scale.

    Args:
      q: QArray [..., m, k], what a cast of x returned; [..., k, tokens] if it is transposed.
      x: bf16, f16 or f32 [..., m, k], what was cast; default: not known, and some counts are None.
      transposed: whether q is the transposed copy. Then `shared_blocks` are 128 columns of x in 128
        tokens, which a GEMM for the gradient to a weight multiplies faster. See `quantize_both`.
      group_sizes: int [g], as the cast of x [m, k] had it. Rows past the groups count as zeros.

    Returns:
      CastStatistics. Zeros that fill up a transposed copy are counted in its values and tiles.

    Raises:
      TypeError: q is not a QArray, x is not a float array, or group_sizes are not integers.
      ValueError: x and q do not fit, or q has 2^31 numbers or more.

    Source: E4M3 (arXiv 2209.05433).

    Example:
      rows, transposed = quantize_both(dy, shared_columns=True)
      found = cast_statistics(transposed, dy, transposed=True)
      common = found.shared_blocks / found.blocks
    """
    check_quantized(OP, "q", q)
    check_bool(OP, "transposed", transposed)
    tile = q.tile
    groups = None if group_sizes is None else as_groups(OP, "group_sizes", group_sizes)
    if x is not None:
        x = as_float(OP, "x", x)
        _check_x(q, x, transposed, groups)
    if groups is not None and (q.ndim != 2 or tile != ROW_BLOCKS):
        got, fix = f"{describe('q', q.qvalue)}, tile={tile}", "leave group_sizes out"
        fail(OP, "group_sizes need rows of tokens.", got, "q of rank 2, scaled (1, 128)", fix)
    if q.qvalue.size > np.iinfo(np.int32).max:
        got, fix = describe("q", q.qvalue), "pass parts of q, and add up in floats"
        fail(OP, "q has too many numbers to count.", got, "less than 2^31 numbers", fix)

    def run(qvalue, scale, x, groups):
        # Counts are replicated on Explicit axes. The first result does but name the mesh.
        return qvalue, _count(qvalue, scale, x, groups, tile=tile, transposed=bool(transposed))

    return automatic(run, q.qvalue, None)(q.qvalue, q.scale, x, groups)[1]


@functools.partial(jax.jit, static_argnames=("tile", "transposed"))
def _count(qvalue, scale, x, groups, *, tile: Tile, transposed: bool) -> CastStatistics:
    if transposed and x is not None:
        x = _turned(x, qvalue.shape[-1], groups)
    if groups is not None and not transposed:
        inside = (jnp.arange(qvalue.shape[0]) < group_ends(groups, qvalue.shape[0])[-1])[:, None]
        qvalue, scale = jnp.where(inside, qvalue, 0), jnp.where(inside, scale, 1)
        x = None if x is None else jnp.where(inside, x, 0)
    values = qvalue.astype(jnp.float32)
    some, lost = _any(values != 0, tile), _any(jnp.isnan(values), tile) | ~jnp.isfinite(scale)
    overflows = underflows = blocks = shared = None
    if x is not None:
        x = jnp.abs(x.astype(jnp.float32))
        largest = reference.dequantize(jnp.full_like(values, SATURATES), scale, tile)
        overflows, underflows = _sum(x > largest), _sum((x != 0) & (values == 0))
    if tile == ROW_BLOCKS:
        used = _any(some, (SCALE_BLOCK, 1))
        blocks, shared = _sum(used), _sum(used & ~_any(scale != _first(scale), (SCALE_BLOCK, 1)))
    return CastStatistics(
        values=jnp.int32(values.size),
        overflows=overflows,
        underflows=underflows,
        tiles=jnp.int32(scale.size),
        zero_tiles=_sum(~some),
        nonfinite_tiles=_sum(lost),
        blocks=blocks,
        shared_blocks=shared,
    )


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.int32)


def _any(x: jax.Array, tile: Tile) -> jax.Array:
    """Returns whether x, bool, is true anywhere in each tile of its last two dims."""
    *lead, m, k = x.shape
    rows, columns = (max(size, 1) if n is None else n for n, size in zip(tile, (m, k), strict=True))
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -m % rows), (0, -k % columns)])
    tiles = x.reshape(*lead, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
    return tiles.any((-3, -1))


def _first(scale: jax.Array) -> jax.Array:
    """Returns, for each row's scales, those of the first row of its block of 128."""
    return jnp.repeat(scale[..., ::SCALE_BLOCK, :], SCALE_BLOCK, -2)[..., : scale.shape[-2], :]


def _turned(x: jax.Array, tokens: int, groups: jax.Array | None) -> jax.Array:
    """Returns x [..., m, k] as a transposed copy has it: [..., k, tokens]."""
    if groups is not None:
        x = place_by_groups(x, groups)
    pad = [(0, 0)] * (x.ndim - 2) + [(0, tokens - x.shape[-2]), (0, 0)]
    return jnp.swapaxes(jnp.pad(x, pad), -1, -2)


def _check_x(q: QArray, x: jax.Array, transposed: bool, groups: jax.Array | None) -> None:
    fits = x.ndim == q.ndim
    if fits and transposed:
        *lead, m, k = x.shape
        most = round_up(m, SCALE_BLOCK) if groups is None else grouped_tokens(m, groups.shape[0])
        fits = q.shape in ((*lead, k, m), (*lead, k, most))
    elif fits:
        fits = q.shape == x.shape
    if not fits:
        got = f"{describe('q', q.qvalue)}, {describe('x', x)}, transposed={transposed}"
        expected = "q [..., k, tokens] of x [..., m, k]" if transposed else "q and x of one shape"
        fix = "pass what was cast: x[index] for a gather, two matrices as one"
        fail(OP, "q is not a cast of x.", got, expected, fix)
