"""DeepGEMM's functional names over the same kernels: port code by changing the import.

Nothing is written in place: every function returns its output. Arguments mean what they mean in
DeepGEMM; scale arrays may have any layout in memory.
"""

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.checks import check_positive
from jax_fp8gemm._core.layout import SCALE_BLOCK, ceil_div, round_up
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._ops.gemm import gemm

__all__ = [
    "ceil_div",
    "gemm_fp8_fp8_bf16_nt",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_tma_aligned_size",
    "k_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "set_num_sms",
]

_num_sms: int | None = None


def set_num_sms(num_sms: int | None) -> None:
    """Limits the multiprocessors of products traced from now on; None for no limit."""
    global _num_sms
    check_positive("set_num_sms", "num_sms", num_sms)
    _num_sms = num_sms


def get_num_sms() -> int | None:
    """Returns what set_num_sms set."""
    return _num_sms


def get_tma_aligned_size(size: int, element_bytes: int) -> int:
    """Returns `size` elements rounded up to whole 16 bytes, the copy engine's alignment."""
    return round_up(size, 16 // element_bytes)


def get_col_major_tma_aligned_tensor(x: jax.Array) -> jax.Array:
    """Returns `x` unchanged: here the layout of scales is the library's business.

    Args:
      x: f32 [m, ceil(k / 128)] or [g, m, ceil(k / 128)].
    """
    return x


def gemm_fp8_fp8_bf16_nt(
    lhs: tuple[jax.Array, jax.Array], rhs: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Returns lhs · rhsᵀ as bfloat16 [m, n].

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [n, k] and its f32 scales [ceil(n / 128), ceil(k / 128)].
    """
    return gemm(QArray(*lhs), QArray(*rhs), out_dtype=jnp.bfloat16, num_sms=_num_sms)


def get_m_alignment_for_contiguous_layout() -> int:
    """Returns 128: a block of so many rows belongs to one group."""
    return SCALE_BLOCK


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: tuple[jax.Array, jax.Array], rhs: tuple[jax.Array, jax.Array], m_indices: jax.Array
) -> jax.Array:
    """Returns bfloat16 [m, n]: row i of lhs times the matrix m_indices[i] of rhs.

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      m_indices: int32 [m], the same for each 128 rows; -1 for padding, whose rows become zero.
    """
    operands = QArray(*lhs), QArray(*rhs)
    return gemm(*operands, groups=m_indices, variant="contiguous", num_sms=_num_sms)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: tuple[jax.Array, jax.Array],
    rhs: tuple[jax.Array, jax.Array],
    masked_m: jax.Array,
    expected_m: int,
) -> jax.Array:
    """Returns bfloat16 [g, m, n], of which the first masked_m[i] rows of group i are defined.

    Args:
      lhs: e4m3 [g, m, k] and its f32 scales [g, m, ceil(k / 128)].
      rhs: e4m3 [g, n, k] and its f32 scales [g, ceil(n / 128), ceil(k / 128)].
      masked_m: int32 [g].
      expected_m: rows that a group is expected to have; decides on the blocks, not on results.
    """
    operands = QArray(*lhs), QArray(*rhs), masked_m
    return gemm(*operands, variant="masked", num_sms=_num_sms, expected_rows=expected_m)


def k_grouped_fp8_gemm_nt_contiguous(
    lhs: tuple[jax.Array, jax.Array],
    rhs: tuple[jax.Array, jax.Array],
    ks: jax.Array,
    c: jax.Array | None = None,
) -> jax.Array:
    """Returns float32 [g, m, n]: for each group the product over its part of k, added to c.

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [n, k] and its f32 scales [n, ceil(k / 128)].
      ks: int32 [g], multiples of 128 that lie end to end along k; on the device or not.
      c: f32 [g, m, n].
    """
    operands = QArray(*lhs), QArray(*rhs), ks
    return gemm(
        *operands, variant="ragged_contracting", out_dtype=jnp.float32, init=c, num_sms=_num_sms
    )
