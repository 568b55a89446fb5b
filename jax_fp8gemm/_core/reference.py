"""What every operation means, in plain jnp. The kernels are tested against this.

It is also what runs on other platforms than CUDA.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.groups import group_ends, group_of_row, group_of_step, place_by_groups
from jax_fp8gemm._core.layout import (
    ROW_BLOCKS,
    SCALE_BLOCK,
    Tile,
    scale_from_kernel,
    scale_shape,
    scale_to_kernel,
)
from jax_fp8gemm._core.qarray import FP8, FP8_MAX
from jax_fp8gemm._core.types import ScaleRounding, VariantName
from jax_fp8gemm._core.variants import VARIANTS

EXPONENT_MASK = 0x7F800000  # of a float32
MAGNITUDE_MASK = 0x7FFFFFFF  # likewise, without the sign
SHARED_SPREAD = 10  # powers of two; as kSharedSpread of plan.cuh
SMALLEST_NORMAL = 2.0**-126  # float32; scales stay normal, since GPUs and XLA may flush others


def _tiled(x: jax.Array, tile: Tile) -> tuple[jax.Array, tuple[int, ...]]:
    """Pads the last two dims to whole tiles and splits each: [..., tiles, rows, tiles, columns]."""
    *lead, rows, columns = x.shape
    tile_rows = max(rows, 1) if tile[0] is None else tile[0]
    tile_columns = max(columns, 1) if tile[1] is None else tile[1]
    *_, scale_rows, scale_columns = scale_shape(x.shape, tile)
    pad_rows, pad_columns = scale_rows * tile_rows - rows, scale_columns * tile_columns - columns
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, pad_rows), (0, pad_columns)])
    return padded.reshape(*lead, scale_rows, tile_rows, scale_columns, tile_columns), x.shape


def _untiled(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    *lead, a, rows, b, columns = x.shape
    return x.reshape(*lead, a * rows, b * columns)[..., : shape[-2], : shape[-1]]


def scale_of(amax: jax.Array, rounding: ScaleRounding) -> jax.Array:
    """Returns the scale that brings values up to `amax` within ±448.

    "none": amax · (1/448), a product since XLA makes one of a division by a constant. "pow2":
    the smallest power of two that is not below amax / 448, found by bits, never by log2. An
    all-zero tile has scale 1; a tile with NaN or Inf has scale NaN.

    Args:
      amax: f32, the largest magnitude of a tile, ≥ 0, NaN or Inf.
    """
    if rounding == "pow2":
        # 448 = 1.75 · 2^8: one binade up where the mantissa is above 1.75.
        bits = jax.lax.bitcast_convert_type(amax, jnp.int32) + 0x1FFFFF
        power = (bits & EXPONENT_MASK) - (8 << 23)
        scale = jax.lax.bitcast_convert_type(jnp.maximum(power, 1 << 23), jnp.float32)
    else:
        scale = jnp.maximum(amax * np.float32(1 / FP8_MAX), SMALLEST_NORMAL)
    return jnp.where(amax == 0, 1.0, jnp.where(jnp.isfinite(amax), scale, jnp.nan))


def share_scales(amax: jax.Array, scale: jax.Array) -> jax.Array:
    """Gives the 128 rows of each block one scale, their largest, where their own lie close.

    They do where the largest is at most 2^SHARED_SPREAD times the smallest. Rows of zeros do not
    count, and take the common scale. A block with NaN or Inf keeps the scales of its rows.

    Args:
      amax: f32 [..., rows, steps], of tiles of 1x128; scales are powers of two.
      scale: likewise.
    """
    rows = scale.shape[-2]
    pad = [(0, 0)] * (scale.ndim - 2) + [(0, -rows % SCALE_BLOCK), (0, 0)]
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    counts = amax != 0  # NaN counts

    def in_blocks(x, fill):
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(*x.shape[:-2], -1, SCALE_BLOCK, x.shape[-1])

    most = in_blocks(jnp.where(counts, bits, 0), 0).max(-2, keepdims=True)
    least = in_blocks(jnp.where(counts, bits, EXPONENT_MASK), EXPONENT_MASK).min(-2, keepdims=True)
    close = (most - least <= SHARED_SPREAD << 23) & (most < EXPONENT_MASK) & (most > 0)
    found = jnp.where(close, most, in_blocks(bits, 0))
    found = found.reshape(*scale.shape[:-2], -1, scale.shape[-1])[..., :rows, :]
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of |x| as int32, whose largest is that of the numbers.

    A maximum of floats loses NaN on CPUs. Among bit patterns NaN is above every number.

    Args:
      x: f32.
    """
    return jax.lax.bitcast_convert_type(x, jnp.int32) & MAGNITUDE_MASK


def to_fp8(scaled: jax.Array) -> jax.Array:
    """Returns e4m3 numbers of f32 ones, ±448 for those above; NaN stays."""
    # NOTE: astype(float8_e4m3fn) does not saturate, so clip first; clip keeps NaN.
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)


def quantize(
    x: jax.Array, tile: Tile, rounding: ScaleRounding, *, shared: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (qvalue, scale): qvalue = e4m3(clip(x · (1/scale), ±448)), in float32.

    A product, since XLA may make one of the division anyway; with powers of two both are exact.

    Args:
      shared: rows of a block of 128 share a scale where share_scales() lets them.
    """
    tiles, shape = _tiled(x.astype(jnp.float32), tile)
    bits = jnp.max(magnitude_bits(tiles), axis=(-3, -1))
    amax = jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = scale_of(amax, rounding)
    scale = share_scales(amax, scale) if shared else scale
    return _untiled(to_fp8(tiles * (1 / scale)[..., :, None, :, None]), shape), scale


def dequantize(qvalue: jax.Array, scale: jax.Array, tile: Tile) -> jax.Array:
    """Returns qvalue · scale in float32."""
    tiles, shape = _tiled(qvalue.astype(jnp.float32), tile)
    return _untiled(tiles * scale[..., :, None, :, None], shape)


Product = Callable[[jax.Array, jax.Array], jax.Array]
ROWS_AT_A_TIME = 64  # where rows are not to depend on others: XLA chooses its sums by their number


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.einsum("...mk,...nk->...mn", lhs, rhs, precision=jax.lax.Precision.HIGHEST)


def _product_by_rows(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """As _product, by as many products of 64 rows as there are."""
    *lead, m, k = lhs.shape
    padded = jnp.pad(lhs, [*[(0, 0)] * len(lead), (0, -m % ROWS_AT_A_TIME), (0, 0)])
    parts = jnp.moveaxis(padded.reshape(*lead, -1, ROWS_AT_A_TIME, k), -3, 0)
    out = jnp.moveaxis(jax.lax.map(lambda part: _product(part, rhs), parts), 0, -3)
    return out.reshape(*lead, padded.shape[-2], -1)[..., :m, :]


def copies(
    x: jax.Array,
    tile: Tile,
    rounding: ScaleRounding,
    *,
    rows: bool,
    transposed: bool,
    group_sizes: jax.Array | None = None,
    shared_columns: bool = False,
) -> list[jax.Array]:
    """Returns (qvalue, scale) of x [b, m, k] as it lies, then of its transposed copy; as asked for.

    The transposed copy is [b, k, m] where tiles are 128x128, else [b, k, m↑128] with zeros; with
    group_sizes (b = 1) its tokens are placed by groups, and rows past the groups count as zeros.
    Scales are in the kernel's layout. shared_columns: see CastSpec.
    """
    lines = x
    if group_sizes is not None:
        inside = jnp.arange(x.shape[1]) < group_ends(group_sizes, x.shape[1])[-1]
        x = jnp.where(inside[:, None], x, 0)
        lines = place_by_groups(x[0], group_sizes)[None]
    elif tile == ROW_BLOCKS:
        lines = jnp.pad(x, [(0, 0), (0, -x.shape[1] % SCALE_BLOCK), (0, 0)])
    pairs = [quantize(x, tile, rounding)] if rows else []
    if transposed:
        columns = jnp.swapaxes(lines, 1, 2)
        pairs.append(quantize(columns, tile, rounding, shared=shared_columns))
    return [part for q, scale in pairs for part in (q, scale_to_kernel(scale, tile))]


def swiglu(h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns gate, up, sigmoid(gate), silu(gate) · up of h [..., 2f], gate beside up; float32."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    sigmoid = jax.nn.sigmoid(gate)
    return gate, up, sigmoid, gate * sigmoid * up


def swiglu_gradients(
    h: jax.Array, gradient: jax.Array, row_weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what follows from the gradient to row_weight · silu(gate) · up.

    Args:
      h: f32 [m, 2f]. gradient: [m, f]. row_weight: f32 [m].

    Returns:
      The gradient to h [m, 2f]; row_weight · silu(gate) · up [m, f]; for each block of 128 of f
      its part of the gradient to row_weight [f/128, m].
    """
    gate, up, sigmoid, product = swiglu(h)
    gradient, weight = gradient.astype(jnp.float32), row_weight[:, None]
    weighted = weight * gradient
    d_up = weighted * gate * sigmoid
    d_gate = weighted * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    parts = (gradient * product).reshape(h.shape[0], -1, SCALE_BLOCK).sum(-1).T
    return jnp.concatenate([d_gate, d_up], -1), weight * product, parts


def _ragged(product: Product, lhs, rhs, rows):
    """Row i times rhs[rows[i]]; zeros where there is no such group."""

    def one_group(out, group):
        index, matrix = group
        return jnp.where((rows == index)[:, None], product(lhs, matrix), out), None

    # Like lhs: inside a shard_map the zeros vary over its axes, as the scan's results do.
    out = jnp.zeros_like(lhs, shape=(lhs.shape[0], rhs.shape[1]))
    return jax.lax.scan(one_group, out, (jnp.arange(rhs.shape[0]), rhs))[0]


def _ragged_contracting(product: Product, lhs, rhs, group_sizes):
    columns = jnp.repeat(group_of_step(group_sizes, -(-lhs.shape[1] // SCALE_BLOCK)), SCALE_BLOCK)
    columns = columns[: lhs.shape[1]]

    def one_group(index):
        own = columns == index
        return product(jnp.where(own, lhs, 0), jnp.where(own, rhs, 0))

    return jax.lax.map(one_group, jnp.arange(group_sizes.shape[0]))


def _masked(product: Product, lhs, rhs, group_sizes):
    rows = jnp.arange(lhs.shape[1])[None, :, None] < group_sizes[:, None, None]
    return jnp.where(rows, product(lhs, rhs), 0)


def _plain(product: Product, lhs, rhs):
    return product(lhs, rhs)


def _contiguous(product: Product, lhs, rhs, rows):
    return _ragged(product, lhs, rhs, jnp.minimum(rows, rhs.shape[0] - 1))


def _by_sizes(product: Product, lhs, rhs, sizes):
    return _ragged(product, lhs, rhs, group_of_row(sizes, lhs.shape[0]))


PRODUCTS: dict[VariantName, Callable[..., jax.Array]] = {
    "dense": _plain,
    "batched": _plain,
    "ragged": _by_sizes,
    "contiguous": _contiguous,
    "masked": _masked,
    "ragged_contracting": _ragged_contracting,
}


def gemm(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    *rest: jax.Array,
    variant: VariantName,
    tiles: tuple[Tile, Tile],
    dtype: jnp.dtype,
    batch_invariant: bool = False,
) -> jax.Array:
    """out[..., m, n] = Σ_k lhs[..., m, k] · rhs[..., n, k], both times their scales, in float32.

    The kernel sums 128 of k in the tensor core, then times the scales in float32; that order is
    not part of the meaning. Scales are in the kernel's layout. `rest`: the group operand, where
    the variant has one, then init, where there is one. batch_invariant: no row's bits depend on
    how many rows there are.
    """
    lhs = dequantize(lhs, scale_from_kernel(lhs_scale, lhs.shape, tiles[0]), tiles[0])
    rhs = dequantize(rhs, scale_from_kernel(rhs_scale, rhs.shape, tiles[1]), tiles[1])
    groups = 0 if VARIANTS[variant].group_operand is None else 1
    multiply = _product_by_rows if batch_invariant else _product
    product = PRODUCTS[variant](multiply, lhs, rhs, *rest[:groups])
    init = rest[groups:]
    return (product + init[0] if init else product).astype(dtype)


def spoil_rest(out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns the result of a ragged GEMM that leaves rows past the groups as they are: NaN here.

    A kernel leaves there what was in memory, so that nothing may depend on it.
    """
    inside = jnp.arange(out.shape[0]) < group_ends(group_sizes, out.shape[0])[-1]
    return jnp.where(inside[:, None], out, jnp.nan)
