"""DeepGEMM's functional names over the same kernels: port code by changing the import.

Nothing is written in place: every function returns its output. Arguments mean what they mean in
DeepGEMM; scale arrays may have any layout in memory.
"""

import jax
import jax.numpy as jnp

from jax_fp8gemm.errors import message
from jax_fp8gemm.ops import gemm
from jax_fp8gemm.qarray import QArray, round_up
from jax_fp8gemm.qarray import ceil_div as ceil_div

_num_sms: int | None = None


def set_num_sms(num_sms: int | None) -> None:
    """Limits the multiprocessors of products traced from now on; None for no limit."""
    global _num_sms
    if num_sms is not None and num_sms < 1:
        raise ValueError(
            message("set_num_sms", "no multiprocessors.", got=str(num_sms), expected="at least 1",
                    mend="pass None for no limit")
        )  # fmt: skip
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
