"""DeepGEMM's grouped GEMMs: groups of rows, masked groups, and groups along k."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._ops.deep_gemm_operands import (
    Options,
    Pair,
    check_options,
    flat,
    get_num_sms,
    group_of_row,
    multiply_adding,
    operand,
    returns_output,
    sizes_of_ends,
    transposed,
)
from jax_fp8gemm._ops.gemm import gemm

# ---- groups of rows -----------------------------------------------------------------------------


@returns_output("d = m_grouped_fp8_gemm_nt_contiguous(a, b, grouped_layout)")
def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    grouped_layout: ArrayLike,
    *,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns bfloat16 [m, n]: each row of a times the transpose of its group's matrix.

    Args:
      a: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      b: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      grouped_layout: int32 [m], the group of each row, the same for each 128 rows; -1 for padding.
        With use_psum_layout int32 [g], where the rows of each group end. A group begins at the
        next multiple of 128 after the end of the one before.
      use_psum_layout: whether grouped_layout says where groups end.
      ensure_zero_padding: rows of padding are zero in any case.
      expected_m_for_psum_layout: not looked at.
      options: see `fp8_gemm_nt`.
    """
    del ensure_zero_padding, expected_m_for_psum_layout
    op = "m_grouped_fp8_gemm_nt_contiguous"
    lhs, rhs = operand(op, "a", a), operand(op, "b", b)
    return _contiguous(op, lhs, rhs, grouped_layout, use_psum_layout, options)


@returns_output("d = m_grouped_fp8_gemm_nn_contiguous(a, b, grouped_layout)")
def m_grouped_fp8_gemm_nn_contiguous(
    a: Pair,
    b: Pair,
    grouped_layout: ArrayLike,
    *,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns bfloat16 [m, n]: each row of a times its group's matrix. b's transpose is copied.

    Args:
      a: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      b: e4m3 [g, k, n] and its f32 scales [g, ceil(k / 128), ceil(n / 128)].
      grouped_layout: see `m_grouped_fp8_gemm_nt_contiguous`.
      use_psum_layout: see `m_grouped_fp8_gemm_nt_contiguous`.
      ensure_zero_padding: see `m_grouped_fp8_gemm_nt_contiguous`.
      options: see `m_grouped_fp8_gemm_nt_contiguous`.
    """
    del ensure_zero_padding
    op = "m_grouped_fp8_gemm_nn_contiguous"
    lhs, rhs = operand(op, "a", a), transposed(operand(op, "b", b))
    return _contiguous(op, lhs, rhs, grouped_layout, use_psum_layout, options)


@returns_output("out = m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(lhs, rhs, m_indices)")
def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Pair, rhs: Pair, m_indices: ArrayLike
) -> jax.Array:
    """Returns bfloat16 [m, n]: the former name of `m_grouped_fp8_gemm_nt_contiguous`.

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      m_indices: int32 [m], the same for each 128 rows; -1 for padding, whose rows become zero.
    """
    op = "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous"
    operands = operand(op, "lhs", lhs), operand(op, "rhs", rhs)
    return _contiguous(op, *operands, m_indices, False, {})


def _contiguous(
    op: str, lhs: QArray, rhs: QArray, layout: ArrayLike, psum: bool, options: Options
) -> jax.Array:
    check_options(op, lhs, rhs, options)
    groups = group_of_row(op, layout, lhs.shape[0]) if psum else layout
    return gemm(lhs, rhs, groups=groups, variant="contiguous", num_sms=get_num_sms())


@returns_output("d = m_grouped_fp8_gemm_nt_masked(a, b, masked_m, expected_m)")
def m_grouped_fp8_gemm_nt_masked(
    a: Pair, b: Pair, masked_m: ArrayLike, expected_m: int, **options: Unpack[Options]
) -> jax.Array:
    """Returns bfloat16 [g, m, n], of which the first masked_m[i] rows of group i are defined.

    Args:
      a: e4m3 [g, m, k] and its f32 scales [g, m, ceil(k / 128)].
      b: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      masked_m: int32 [g].
      expected_m: rows that a group is expected to have; decides on the blocks, not on results.
      options: see `fp8_gemm_nt`.
    """
    op = "m_grouped_fp8_gemm_nt_masked"
    lhs, rhs = operand(op, "a", a), operand(op, "b", b)
    check_options(op, lhs, rhs, options)
    sms = get_num_sms()
    return gemm(lhs, rhs, masked_m, variant="masked", num_sms=sms, expected_rows=expected_m)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


@returns_output("out = m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs, rhs, masked_m, expected_m)")
def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Pair, rhs: Pair, masked_m: ArrayLike, expected_m: int
) -> jax.Array:
    """Returns bfloat16 [g, m, n]: the former name of `m_grouped_fp8_gemm_nt_masked`.

    Args:
      lhs: e4m3 [g, m, k] and its f32 scales [g, m, ceil(k / 128)].
      rhs: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      masked_m: int32 [g].
      expected_m: rows that a group is expected to have; decides on the blocks, not on results.
    """
    return m_grouped_fp8_gemm_nt_masked(lhs, rhs, masked_m, expected_m)


# ---- groups along k -----------------------------------------------------------------------------


@returns_output("d = k_grouped_fp8_gemm_nt_contiguous(a, b, ks, c=c)")
def k_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    ks: ArrayLike,
    *,
    c: jax.Array | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns float32 [g, m, n]: for each group the product over its part of k, added to c.

    Args:
      a: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)]. Or flat, as in DeepGEMM: e4m3 [Σ m · k],
        one [m, k] of each group after another, with scales [m, Σ ceil(k / 128)].
      b: likewise with n for m.
      ks: int32 [g], multiples of 128 that lie end to end along k. On the device or not, where a and
        b are [m, k]; a list where they are flat.
      c: f32 [g, m, n].
      options: see `fp8_gemm_nt`.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    pairs = (("a", a), ("b", b))
    lhs, rhs = (
        flat(op, name, pair, ks) if np.ndim(pair[0]) == 1 else operand(op, name, pair)
        for name, pair in pairs
    )
    return _k_grouped(op, lhs, rhs, ks, c, options)


@returns_output("d = k_grouped_fp8_gemm_tn_contiguous(a, b, ks, c=c)")
def k_grouped_fp8_gemm_tn_contiguous(
    a: Pair,
    b: Pair,
    ks: ArrayLike,
    *,
    c: jax.Array | None = None,
    use_psum_layout: bool = False,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns float32 [g, m, n]: for each group aᵀ · b over its rows, added to c.

    Args:
      a: e4m3 [k, m] and its f32 scales [k / 128, m], as `per_channel_cast_to_fp8` returns.
      b: e4m3 [k, n] and its f32 scales [k / 128, n].
      ks: int32 [g], multiples of 128 that lie end to end along k; on the device or not. With
        use_psum_layout where each group ends. A group begins at the next multiple of 128 after
        the end of the one before. Fill what lies between with zeros.
      c: f32 [g, m, n].
      use_psum_layout: whether ks says where groups end.
      options: see `fp8_gemm_nt`.
    """
    op = "k_grouped_fp8_gemm_tn_contiguous"
    lhs, rhs = transposed(operand(op, "a", a)), transposed(operand(op, "b", b))
    return _k_grouped(op, lhs, rhs, sizes_of_ends(op, ks) if use_psum_layout else ks, c, options)


@returns_output("out = k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(lhs, rhs, batch_sizes, c=out)")
def k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(
    lhs: Pair, rhs: Pair, batch_sizes: list[int], *, c: jax.Array | None = None
) -> jax.Array:
    """Returns float32 [g, m, n]: for each batch the product over its k, added to c.

    Args:
      lhs: e4m3 [Σ m · k], one [m, k] of each batch after another, and f32 [Σ ceil(k / 128), m].
      rhs: likewise with n for m.
      batch_sizes: k of each batch, any sizes, on the host.
      c: f32 [g, m, n]: what DeepGEMM adds to in place.
    """
    op = "k_grouped_wgrad_gemm_fp8_fp8_fp32_nt"
    pairs = (("lhs", lhs), ("rhs", rhs))
    left, right = (flat(op, name, (pair[0], pair[1].T), batch_sizes) for name, pair in pairs)
    return _k_grouped(op, left, right, np.asarray(batch_sizes), c, {})


def _k_grouped(
    op: str, lhs: QArray, rhs: QArray, ks: ArrayLike, c: jax.Array | None, options: Options
) -> jax.Array:
    check_options(op, lhs, rhs, {"recipe": (1, 1, 128), **options})
    how = {"group_sizes": ks, "variant": "ragged_contracting"}
    return multiply_adding(op, lhs, rhs, c, jnp.float32, **how)
