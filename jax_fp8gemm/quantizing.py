"""Floats to FP8 arrays and back: quantize and its fused relatives. Each is one kernel on a GPU."""

import jax
import jax.numpy as jnp

from jax_fp8gemm import reference
from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.kernel_level import as_int32, check_quantised
from jax_fp8gemm.meshes import automatic
from jax_fp8gemm.qarray import BLOCK, BLOCKS, ROW_BLOCKS, TENSOR, TILES, QArray, Tile
from jax_fp8gemm.quantize_primitive import QuantizeStatic, call

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
HALVES = (jnp.bfloat16, jnp.float16)

Matrices = jax.Array | tuple[jax.Array, jax.Array]


def check_float(op: str, name: str, x: jax.Array) -> None:
    if not hasattr(x, "dtype"):
        mend = "convert it by jnp.asarray, or an FP8 weight by prepare_weight"
        got, expected = type(x).__name__, "a bf16, f16 or f32 array"
        fail(op, f"{name} is no array of floats.", got, expected, mend, TypeError)
    if x.dtype not in FLOATS:
        what, mend = f"{name} has the wrong dtype.", f"cast {name} to bfloat16"
        fail(op, what, describe(name, x), "bf16, f16 or f32", mend, TypeError)


def _check_scale(op: str, scale: str) -> None:
    if scale not in ("pow2", "float32"):
        fail(op, "unknown scale.", f"scale {scale!r}", '"pow2" or "float32"', "choose one")


def _check_matrix(op: str, x: jax.Array) -> None:
    check_float(op, "x", x)
    if x.ndim < 2:
        fail(op, "x is no matrix.", describe("x", x), "rank 2 or more", "pass x[None, :]")


def _check_copies(op: str, x: jax.Array, tile: Tile, token_dims: int, **groups) -> None:
    """Checks what the copies along tokens want of x; groups: group_sizes and index, or None."""
    if tile not in (ROW_BLOCKS, BLOCKS):
        expected = f"{ROW_BLOCKS} or {BLOCKS}"
        fail(op, "no transposed copy in this tile.", f"tile {tile}", expected, "choose one of them")
    given = {name: jnp.asarray(one) for name, one in groups.items() if one is not None}
    if given and (x.ndim != 2 or tile == BLOCKS or any(one.ndim != 1 for one in given.values())):
        named = [describe(name, one) for name, one in given.items()]
        got = ", ".join([describe("x", x), f"tile {tile}", *named])
        expected = "x [m, k], tile (1, 128), each of rank 1"
        mend = "leave the tile at (1, 128); for more dims use jax.vmap"
        fail(op, "group_sizes and index are for rows of tokens.", got, expected, mend)
    fits = 1 <= token_dims < x.ndim
    if not fits or (token_dims > 1 and (tile != ROW_BLOCKS or x.shape[-2] % BLOCK)):
        got = f"{describe('x', x)}, tile {tile}, token_dims {token_dims}"
        expected = "tile (1, 128) and x [..., m, k], m a multiple of 128, where token_dims > 1"
        fail(op, "token_dims do not fit.", got, expected, "merge the dims of tokens with reshape")


def quantize(x: jax.Array, tile: Tile = ROW_BLOCKS, *, scale: str = "pow2") -> QArray:
    """Quantises to FP8 with one scale for each tile of the last two dims.

    qvalue = e4m3(clip(x · (1/scale), ±448)), scale ≈ max|tile| / 448.

    Args:
      x: bf16, f16 or f32 [..., rows, k].
      tile: (1, 128) for activations and gradients, (128, 128) for weights, (1, None) per row,
        (None, None) per matrix.
      scale: "pow2" rounds scales up to powers of two, which makes quantising once more along the
        other axis exact; "float32" keeps max|tile| / 448.

    Returns:
      QArray. A tile of zeros has scale 1; a tile with NaN or Inf has scale NaN.

    Raises:
      TypeError: x is not of a float type. ValueError: an unknown tile or scale, or rank below 2.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2; E4M3 (arXiv 2209.05433).
    """
    if tile not in TILES:
        fail("quantize", "unknown tile.", f"tile {tile}", f"one of {TILES}", "choose one of these")
    _check_scale("quantize", scale)
    _check_matrix("quantize", x)
    if tile == TENSOR:  # a reduction and a cast: no kernel could do it in one pass
        return QArray(*reference.quantize(x, tile, scale))
    return _copies(QuantizeStatic(tile=tile, scale=scale), x)[0]


def quantize_rows(
    x: jax.Array,
    *,
    scale: str = "pow2",
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
) -> QArray:
    """Returns the first of `quantize_both`'s copies alone, scaled 1x128."""
    _check_scale("quantize_rows", scale)
    _check_matrix("quantize_rows", x)
    _check_copies("quantize_rows", x, ROW_BLOCKS, 1, group_sizes=group_sizes, index=index)
    static = QuantizeStatic(scale=scale, **_tokens(group_sizes, index))
    present = _present("quantize_rows", index=index, group_sizes=group_sizes)
    return _copies(static, x, *present)[0]


def quantize_transposed(
    x: jax.Array,
    tile: Tile = ROW_BLOCKS,
    *,
    scale: str = "pow2",
    group_sizes: jax.Array | None = None,
    token_dims: int = 1,
) -> QArray:
    """Returns the second of `quantize_both`'s copies alone."""
    op = "quantize_transposed"
    _check_scale(op, scale)
    _check_matrix(op, x)
    _check_copies(op, x, tile, token_dims, group_sizes=group_sizes)
    static = QuantizeStatic(
        "float", tile, scale, False, True, group_sizes is not None, token_dims=token_dims
    )
    return _copies(static, x, *_present(op, group_sizes=group_sizes))[0]


def quantize_both(
    x: Matrices,
    tile: Tile = ROW_BLOCKS,
    *,
    scale: str = "pow2",
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
    token_dims: int = 1,
) -> tuple[QArray, QArray]:
    """Quantises x and its transposed copy in one pass: both are what products contract over.

    Args:
      x: bf16, f16 or f32 [..., m, k], or two of these that lie side by side along k, each with a
        multiple of 128 columns.
      tile: (1, 128): either copy is scaled along its own rows, so the transposed one along tokens;
        it is filled with zeros to a multiple of 128 tokens. (128, 128): the copies are exact
        transposes of each other.
      scale: as in `quantize`.
      group_sizes: int32 [g], only for x [m, k] and (1, 128): in the transposed copy every group of
        rows begins at a multiple of 128 tokens, zeros between. Rows past the groups are not read
        and hold anything in the first copy.
      index: int32 [m]: row i is x[index[i]]; indices are clamped. Only for x [rows, k].
      token_dims: how many dims before k are tokens. With two, x [..., s, m, k] has the transposed
        copy [..., k, s, m]; m is a multiple of 128 then, and the tile (1, 128).

    Returns:
      QArrays [..., m, k] and [..., k, tokens]: m with (128, 128), else m↑128, or with group_sizes
      `grouped_tokens(m, g)`.

    Raises:
      TypeError: not floats. ValueError: tile, scale, ranks or a pair that do not fit.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    op = "quantize_both"
    pair = isinstance(x, tuple)
    operands = list(x) if pair else [x]
    _check_scale(op, scale)
    for one in operands:
        _check_matrix(op, one)
    if pair and (x[0].shape != x[1].shape or x[0].dtype != x[1].dtype or x[0].shape[-1] % BLOCK):
        got, mend = ", ".join(describe("x", one) for one in x), "concatenate them"
        expected = "equal shapes and dtypes, a multiple of 128 columns"
        fail(op, "the two matrices cannot lie side by side.", got, expected, mend)
    _check_copies(op, operands[0], tile, token_dims, group_sizes=group_sizes, index=index)
    static = QuantizeStatic(
        "float", tile, scale, True, True,
        pair=pair, token_dims=token_dims, **_tokens(group_sizes, index),
    )  # fmt: skip
    present = _present(op, index=index, group_sizes=group_sizes)
    first, second = _copies(static, *operands, *present)
    return first, second


def requantize(
    q: QArray,
    *,
    scale: str = "pow2",
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
    token_dims: int = 1,
) -> QArray:
    """Returns the transposed copy of FP8 rows, scaled 1x128 along tokens.

    Exact where both scales are powers of two, but for what falls below the finer scale's numbers.

    Args:
      q: QArray [..., m, k], scaled (1, 128). The others: as in `quantize_both`.

    Returns:
      QArray [..., k, tokens], as `quantize_both`'s.

    Raises:
      ValueError: q has other scales, or an unknown scale.
    """
    op = "requantize"
    _check_scale(op, scale)
    check_quantised(op, "q", q)
    if not q.has_tile(ROW_BLOCKS):
        got = f"{describe('q', q.qvalue)}, {describe('scale', q.scale)}"
        mend = "quantize(x) with tile (1, 128)"
        fail(op, "q is not scaled by 1x128.", got, "scale [..., m, k/128]", mend)
    _check_copies(op, q.qvalue, ROW_BLOCKS, token_dims, group_sizes=group_sizes, index=index)
    static = QuantizeStatic(
        "fp8", ROW_BLOCKS, scale, False, True,
        token_dims=token_dims, **_tokens(group_sizes, index),
    )  # fmt: skip
    present = _present(op, index=index, group_sizes=group_sizes)
    return _copies(static, q.qvalue, q.scale, *present)[0]


def swiglu_quantize(
    h: jax.Array,
    row_weight: jax.Array,
    *,
    group_sizes: jax.Array | None = None,
    scale: str = "pow2",
) -> QArray:
    """Quantises row_weight · silu(gate) · up by 1x128, in one pass over gate and up.

    Args:
      h: bf16 or f16 [m, 2f]: gate beside up. row_weight: f32 [m].
      group_sizes: int32 [g]: rows past the groups are not read and hold anything in the result.

    Returns:
      QArray [m, f].

    Raises:
      TypeError: h is neither bf16 nor f16. ValueError: shapes that do not fit, an unknown scale.

    Source: SwiGLU (arXiv 2002.05202); DeepSeek-V3 (arXiv 2412.19437), section 3.3.3.
    """
    return _swiglu("swiglu_quantize", h, row_weight, group_sizes, scale, both=False)[0]


def swiglu_quantize_both(
    h: jax.Array,
    row_weight: jax.Array,
    *,
    group_sizes: jax.Array | None = None,
    scale: str = "pow2",
) -> tuple[QArray, QArray]:
    """Returns what `swiglu_quantize` does [m, f], and the transposed copy [f, tokens].

    Arguments as there; tokens as in `quantize_both`.
    """
    first, second = _swiglu("swiglu_quantize_both", h, row_weight, group_sizes, scale, both=True)
    return first, second


def _swiglu(op: str, h, row_weight, group_sizes, scale: str, *, both: bool) -> list[QArray]:
    _check_scale(op, scale)
    check_float(op, "h", h)
    if h.dtype not in HALVES:
        what, mend = "h has the wrong dtype.", "cast h to bfloat16"
        fail(op, what, describe("h", h), "bf16 or f16", mend, TypeError)
    _check_swiglu(op, h, row_weight, group_sizes)
    static = QuantizeStatic("swiglu", scale=scale, transposed=both, **_tokens(group_sizes, None))
    weight = row_weight.astype(jnp.float32)
    return _copies(static, h, weight, *_present(op, group_sizes=group_sizes))


def swiglu_backward(
    h: QArray,
    gradient: jax.Array,
    row_weight: jax.Array,
    group_sizes: jax.Array | None = None,
    *,
    scale: str = "pow2",
) -> tuple[QArray, QArray, QArray, QArray, jax.Array]:
    """The backward pass of row_weight · silu(gate) · up, quantised both ways in one pass.

    Args:
      h: QArray [m, 2f] scaled (1, 128): gate beside up, f a multiple of 128.
      gradient: bf16 [m, f], to the weighted product. row_weight: f32 [m].
      group_sizes: int32 [g], as in `quantize_both`.

    Returns:
      The gradient to h as rows [m, 2f]; transposed copies [f, tokens] of the gradient to gate, of
      the gradient to up, and of the weighted product; the gradient to row_weight, f32 [m] (anything
      past the groups).

    Raises:
      ValueError: shapes that do not fit, f not a multiple of 128.
    """
    op = "swiglu_backward"
    _check_scale(op, scale)
    check_quantised(op, "h", h)
    _check_swiglu(op, h.qvalue, row_weight, group_sizes)
    f = h.shape[1] // 2
    if f % BLOCK or gradient.shape != (h.shape[0], f) or not h.has_tile(ROW_BLOCKS):
        got = ", ".join((describe("h", h.qvalue), describe("gradient", gradient)))
        expected = "h [m, 2f] scaled by 1x128, gradient [m, f], f % 128 == 0"
        fail(op, "h and gradient do not fit.", got, expected, "pad f with zeros")
    static = QuantizeStatic(
        "swiglu_backward", ROW_BLOCKS, scale, True, True, group_sizes is not None
    )
    floats = gradient.astype(jnp.bfloat16), row_weight.astype(jnp.float32)
    operands = h.qvalue, h.scale, *floats, *_present(op, group_sizes=group_sizes)
    *copies, parts = _copies(static, *operands)
    return (*copies, parts.sum(0))


def _tokens(group_sizes: jax.Array | None, index: jax.Array | None) -> dict[str, bool]:
    return {"grouped": group_sizes is not None, "gather": index is not None}


def _present(op: str, **operands: jax.Array | None) -> list[jax.Array]:
    return [as_int32(op, name, x) for name, x in operands.items() if x is not None]


def _check_swiglu(op: str, h: jax.Array, row_weight: jax.Array, group_sizes) -> None:
    if h.ndim != 2 or h.shape[1] % 2 or row_weight.shape != h.shape[:1]:
        got = f"{describe('h', h)}, {describe('row_weight', row_weight)}"
        fail(
            op, "h or row_weight has the wrong shape.", got, "h [m, 2f], row_weight [m]", "reshape"
        )
    _check_copies(op, h, ROW_BLOCKS, 1, group_sizes=group_sizes)


def _copies(static: QuantizeStatic, *operands: jax.Array) -> list:
    """Returns QArrays, then what else the call gives."""
    results = call(static, *operands)
    pairs = len(results) // 2 * 2
    arrays = map(QArray, results[:pairs:2], results[1:pairs:2])
    return [*arrays, *results[pairs:]]


def dequantize(q: QArray, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns qvalue · scale, multiplied in float32, as `dtype` [..., rows, k]."""
    run = automatic(lambda *bits: reference.dequantize(*bits, q.tile).astype(dtype), q.qvalue)
    return run(q.qvalue, q.scale)
