"""SwiGLU and its backward pass, fused with the cast of their results."""

from typing import Any

import jax
from jax.typing import ArrayLike

from jax_fp8gemm._core.checks import (
    HALVES,
    as_float,
    as_groups,
    check_bool,
    check_option,
    check_quantized,
    renamed,
)
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import ROW_BLOCKS, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ScaleRounding
from jax_fp8gemm._ops.casts import (
    BothCopies,
    SwigluGradients,
    cast_swiglu,
    cast_swiglu_backward,
)


@renamed(scale="scale_rounding")
def swiglu_quantize(
    h: jax.Array,
    row_weight: jax.Array,
    *,
    group_sizes: ArrayLike | None = None,
    scale_rounding: ScaleRounding = "pow2",
) -> QArray:
    """Quantizes row_weight · silu(gate) · up by 1x128, in one pass over gate and up.

    Args:
      h: bf16 or f16 [m, 2f]: gate beside up.
      row_weight: f32 [m].
      group_sizes: int [g]. Rows past the groups are not read, and hold anything in the result.
      scale_rounding: "pow2" or "none", see `quantize`.

    Returns:
      QArray [m, f], scaled (1, 128).

    Raises:
      TypeError: h is neither bf16 nor f16.
      ValueError: shapes do not fit, or scale_rounding is unknown.

    Source: SwiGLU (arXiv 2002.05202); DeepSeek-V3 (arXiv 2412.19437), section 3.3.3.
    """
    op = "swiglu_quantize"
    h, row_weight, groups = _checked(op, h, row_weight, group_sizes, scale_rounding)
    return cast_swiglu(h, row_weight, scale_rounding=scale_rounding, group_sizes=groups)[0]


@renamed(scale="scale_rounding")
def swiglu_quantize_both(
    h: jax.Array,
    row_weight: jax.Array,
    *,
    group_sizes: ArrayLike | None = None,
    scale_rounding: ScaleRounding = "pow2",
) -> BothCopies:
    """Quantizes row_weight · silu(gate) · up, and its transpose, in one pass.

    Args:
      h: see `swiglu_quantize`.
      row_weight: see `swiglu_quantize`.
      group_sizes: see `swiglu_quantize`.
      scale_rounding: see `swiglu_quantize`.

    Returns:
      BothCopies: rows, a QArray [m, f], and transposed, a QArray [f, tokens], as `quantize_both`'s.

    Raises:
      TypeError: h is neither bf16 nor f16.
      ValueError: shapes do not fit, or scale_rounding is unknown.

    Source: SwiGLU (arXiv 2002.05202); DeepSeek-V3 (arXiv 2412.19437), section 3.3.3.
    """
    op = "swiglu_quantize_both"
    h, row_weight, groups = _checked(op, h, row_weight, group_sizes, scale_rounding)
    copies = cast_swiglu(
        h, row_weight, scale_rounding=scale_rounding, group_sizes=groups, transposed=True
    )
    return BothCopies(*copies)


@renamed(scale="scale_rounding")
def swiglu_backward(
    h: QArray,
    gradient: jax.Array,
    row_weight: jax.Array,
    group_sizes: ArrayLike | None = None,
    *,
    scale_rounding: ScaleRounding = "pow2",
    shared_columns: bool = False,
) -> SwigluGradients:
    """The backward pass of row_weight · silu(gate) · up, with all casts in one pass.

    Args:
      h: QArray [m, 2f] scaled (1, 128): gate beside up. f is a multiple of 128.
      gradient: bf16, f16 or f32 [m, f], to the weighted result; it is read as bf16.
      row_weight: f32 [m].
      group_sizes: int [g], see `quantize_both`.
      scale_rounding: "pow2" or "none", see `quantize`.
      shared_columns: of the transposed gradients to gate and up, see `quantize_both`.

    Returns:
      SwigluGradients: the gradient to h as rows; transposed copies of the gradient to gate, of the
      gradient to up, and of the weighted result; the gradient to row_weight.

    Raises:
      TypeError: h is not a QArray, or gradient is not a float array.
      ValueError: shapes do not fit, or f is not a multiple of 128.

    Source: SwiGLU (arXiv 2002.05202).
    """
    op = "swiglu_backward"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    check_bool(op, "shared_columns", shared_columns)
    check_quantized(op, "h", h)
    gradient = as_float(op, "gradient", gradient)
    row_weight, groups = _checked_rows(op, h.qvalue, row_weight, group_sizes)
    f = h.shape[1] // 2
    if f % SCALE_BLOCK or gradient.shape != (h.shape[0], f) or not h.has_tile(ROW_BLOCKS):
        got = f"{describe('h', h.qvalue)}, {describe('gradient', gradient)}"
        expected = "h [m, 2f] scaled by 1x128, gradient [m, f], f a multiple of 128"
        fail(op, "h and gradient do not fit.", got, expected, "pad f with zeros")
    return cast_swiglu_backward(
        h,
        gradient,
        row_weight,
        scale_rounding=scale_rounding,
        shared_columns=shared_columns,
        group_sizes=groups,
    )


def _checked(
    op: str, h: Any, row_weight: Any, group_sizes: Any, scale_rounding: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns h, row_weight, and group_sizes as int32, checked for the forward pass."""
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    h = as_float(op, "h", h)
    if h.dtype not in HALVES:
        what, fix = "h has the wrong dtype.", "cast h to bfloat16"
        fail(op, what, describe("h", h), "bf16 or f16", fix, TypeError)
    return h, *_checked_rows(op, h, row_weight, group_sizes)


def _checked_rows(
    op: str, h: jax.Array, row_weight: Any, group_sizes: Any
) -> tuple[jax.Array, jax.Array | None]:
    row_weight = as_float(op, "row_weight", row_weight)
    if h.ndim != 2 or h.shape[1] % 2 or row_weight.shape != h.shape[:1]:
        got = f"{describe('h', h)}, {describe('row_weight', row_weight)}"
        what = "h or row_weight has the wrong shape."
        fail(op, what, got, "h [m, 2f], row_weight [m]", "reshape them")
    groups = None if group_sizes is None else as_groups(op, "group_sizes", group_sizes)
    return row_weight, groups
