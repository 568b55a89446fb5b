"""DeepGEMM's casts, alignments and layouts: its names and meanings, this library's kernels."""

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.checks import as_float, check_bool
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, SCALE_BLOCK, Tile, round_up
from jax_fp8gemm._core.types import ScaleRounding
from jax_fp8gemm._ops.casts import cast_rows, cast_transposed

Pair = tuple[jax.Array, jax.Array]


# ---- casts --------------------------------------------------------------------------------------


def per_token_cast_to_fp8(
    x: jax.Array, use_ue8m0: bool, gran_k: int = SCALE_BLOCK, use_packed_ue8m0: bool = False
) -> Pair:
    """Quantizes rows by 1x128, as `quantize(x)` does.

    A tile of zeros has scale 1, and small numbers keep their digits: no tile counts as 1e-4.

    Args:
      x: bf16, f16 or f32 [m, k].
      use_ue8m0: whether scales are rounded up to powers of two.
      gran_k: 128.
      use_packed_ue8m0: False.

    Returns:
      e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].

    Raises:
      TypeError: x is not a float array.
      ValueError: x is not a matrix.
      NotImplementedError: another gran_k, or packed scales.

    Source: DeepGEMM, deep_gemm/utils/math.py.

    Example:
      a = per_token_cast_to_fp8(x, use_ue8m0=False)
    """
    op = "per_token_cast_to_fp8"
    if use_packed_ue8m0:
        fix = "leave use_packed_ue8m0 out: Hopper's kernels read f32 scales"
        got = f"use_packed_ue8m0={use_packed_ue8m0!r}"
        fail(op, "packed scales are Blackwell's.", got, "False", fix, NotImplementedError)
    return _cast(op, x, use_ue8m0, gran_k, ROW_BLOCKS)


def per_block_cast_to_fp8(x: jax.Array, use_ue8m0: bool, gran_k: int = SCALE_BLOCK) -> Pair:
    """Quantizes by 128x128, as `quantize(x, (128, 128))` does.

    Args:
      x: bf16, f16 or f32 [n, k].
      use_ue8m0: whether scales are rounded up to powers of two.
      gran_k: 128.

    Returns:
      e4m3 [n, k] and its f32 scales [ceil(n / 128), ceil(k / 128)].

    Raises:
      TypeError: x is not a float array.
      ValueError: x is not a matrix.
      NotImplementedError: another gran_k.

    Source: DeepGEMM, deep_gemm/utils/math.py.

    Example:
      b = per_block_cast_to_fp8(w, use_ue8m0=False)
    """
    return _cast("per_block_cast_to_fp8", x, use_ue8m0, gran_k, BLOCKS)


def per_channel_cast_to_fp8(x: jax.Array, use_ue8m0: bool, gran_k: int = SCALE_BLOCK) -> Pair:
    """Quantizes columns, 128 rows by one column a scale: operands of k_grouped_fp8_gemm_tn.

    Args:
      x: bf16, f16 or f32 [k, m], k a multiple of 128.
      use_ue8m0: whether scales are rounded up to powers of two.
      gran_k: 128.

    Returns:
      e4m3 [k, m] and its f32 scales [k / 128, m].

    Raises:
      TypeError: x is not a float array.
      ValueError: x is not a matrix, or k no multiple of 128.
      NotImplementedError: another gran_k.

    Source: DeepGEMM, deep_gemm/utils/math.py.

    Example:
      a = per_channel_cast_to_fp8(x, use_ue8m0=False)
    """
    op = "per_channel_cast_to_fp8"
    x, rounding = _checked(op, x, use_ue8m0, gran_k)
    if x.shape[0] % SCALE_BLOCK:
        fix = f"pad x to {round_up(x.shape[0], SCALE_BLOCK)} rows with zeros"
        fail(op, "k is not a multiple of 128.", describe("x", x), "x [k, m], k % 128 == 0", fix)
    q = cast_transposed(x, scale_rounding=rounding)
    return q.qvalue.T, q.scale.T


def _cast(op: str, x: jax.Array, use_ue8m0: bool, gran_k: int, tile: Tile) -> Pair:
    x, rounding = _checked(op, x, use_ue8m0, gran_k)
    q = cast_rows(x, tile, scale_rounding=rounding)
    return q.qvalue, q.scale


def _checked(
    op: str, x: jax.Array, use_ue8m0: bool, gran_k: int
) -> tuple[jax.Array, ScaleRounding]:
    x = as_float(op, "x", x)
    check_bool(op, "use_ue8m0", use_ue8m0)
    if x.ndim != 2:
        fail(op, "x is not a matrix.", describe("x", x), "x of rank 2", "reshape x, or jax.vmap")
    if gran_k != SCALE_BLOCK:
        fix = "leave gran_k out: the kernels scale 128 of k"
        fail(op, "gran_k is not 128.", f"gran_k={gran_k!r}", "128", fix, NotImplementedError)
    return x, "pow2" if use_ue8m0 else "none"


# ---- alignment and layout -----------------------------------------------------------------------


def align(x: int, y: int) -> int:
    """Returns x rounded up to a multiple of y.

    Args:
      x: a count.
      y: a positive integer.
    """
    return round_up(x, y)


def get_tma_aligned_size(size: int, element_bytes: int) -> int:
    """Returns `size` elements rounded up to whole 16 bytes, the copy engine's alignment.

    Args:
      size: in elements.
      element_bytes: of one element; a divisor of 16.
    """
    return round_up(size, 16 // element_bytes)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Returns 128: a block of so many rows, or of so much of k, belongs to one group."""
    return SCALE_BLOCK


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """Returns 128, whatever number of rows is expected, as DeepGEMM does on Hopper.

    Args:
      expected_m: not looked at.
    """
    del expected_m
    return SCALE_BLOCK


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Takes 128, DeepGEMM's alignment on Hopper.

    Args:
      new_value: 128.

    Raises:
      NotImplementedError: another alignment.
    """
    if new_value != SCALE_BLOCK:
        op, fix = "set_mk_alignment_for_contiguous_layout", 'use gemm(variant="ragged"): no padding'
        got = f"new_value={new_value!r}"
        fail(op, "groups are aligned to 128.", got, "128", fix, NotImplementedError)


def get_mn_major_tma_aligned_tensor(x: jax.Array) -> jax.Array:
    """Returns `x` unchanged: here the layout of scales is the library's business.

    Args:
      x: f32 [m, ceil(k / 128)] or [g, m, ceil(k / 128)].
    """
    return x


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor


# ---- measure ------------------------------------------------------------------------------------


def calc_diff(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns 1 − 2·Σxy / Σ(x² + y²), as Σ(x − y)² / Σ(x² + y²), which does not cancel.

    Args:
      x: a float array.
      y: likewise, of the same shape.

    Returns:
      f32 scalar, 0 for equal arrays, also for zeros.

    Source: DeepGEMM, deep_gemm/testing/numeric.py.

    Example:
      assert calc_diff(y, reference) < 1e-3
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    total = jnp.sum(x * x + y * y)
    return jnp.sum((x - y) ** 2) / jnp.where(total == 0, 1, total)
