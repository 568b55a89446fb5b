"""The matrices of experts, in floats or in FP8, and GEMMs by them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.bits import Bits, from_bits, save
from jax_fp8gemm._core.checks import as_float, check_option, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, K_MULTIPLE, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray, exportable
from jax_fp8gemm._core.types import ScaleRounding, VariantName
from jax_fp8gemm._ops.casts import cast_both
from jax_fp8gemm._ops.gemm import multiply, multiply_casting
from jax_fp8gemm._ops.weights import cast_in_gemm

Matrix = Bits | tuple[jax.Array, ...]  # an FP8 copy, or the float weights that a GEMM casts


@exportable("PreparedExperts")
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExpertKernels:
    """The matrices of experts: gate, up and down. `prepare_experts` adds their FP8 copies.

    Attributes:
      wi_0, wi_1: bf16, f16 or f32 [e, h, f], gate and up. Gradients flow to them.
      wo: [e, f, h], down; likewise.
      copies: None, or FP8 copies for each GEMM, with what it contracts over last, as (uint8 bits,
        f32 scales): "up" [e, 2f, h] and "down" [e, h, f]; for the gradients "up_back" [e, h, 2f]
        and "down_back" [e, f, h]. h is filled with zeros to a multiple of 16, f to one of 128.

    An expert that sees every token has matrices of two dims: [h, f], [h, f], [f, h].
    """

    wi_0: jax.Array
    wi_1: jax.Array
    wo: jax.Array
    copies: dict[str, Bits] | None = None


@renamed(scale="scale_rounding", wi_0="ExpertKernels(wi_0=, wi_1=, wo=)")
def prepare_experts(
    kernels: ExpertKernels, *, scale_rounding: ScaleRounding = "pow2"
) -> ExpertKernels:
    """Quantizes experts' matrices by 128x128, both ways: for as many calls as they stay the same.

    Args:
      kernels: ExpertKernels, bf16, f16 or f32.
      scale_rounding: "pow2" or "none", see `quantize`.

    Returns:
      ExpertKernels with the same matrices, to which gradients flow, and their FP8 copies.

    Raises:
      ValueError: shapes do not fit, or scale_rounding is unknown. TypeError: dtypes.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      prepared = prepare_experts(ExpertKernels(wi_0=gate, wi_1=up, wo=down))
      y = expert_ffn(x, routing.expert_index, routing.gate_weights, prepared)
    """
    check_option("prepare_experts", "scale_rounding", scale_rounding, ScaleRounding)
    kernels = as_kernels("prepare_experts", "kernels", kernels)
    return _with_copies(kernels, scale_rounding)


def _with_copies(kernels: ExpertKernels, rounding: ScaleRounding) -> ExpertKernels:
    _, h, f = kernels.wi_0.shape
    pad_h, pad_f = -h % K_MULTIPLE, -f % SCALE_BLOCK
    wi_0, wi_1, wo = jax.lax.stop_gradient((kernels.wi_0, kernels.wi_1, kernels.wo))
    wi_0, wi_1 = (jnp.pad(w, [(0, 0), (0, pad_h), (0, pad_f)]) for w in (wi_0, wi_1))
    up = cast_both((wi_0, wi_1), BLOCKS, scale_rounding=rounding)
    wo = jnp.pad(wo, [(0, 0), (0, pad_f), (0, pad_h)])
    down = cast_both(wo, BLOCKS, scale_rounding=rounding)
    copies = {"up": up.transposed, "down": down.transposed}
    copies |= {"up_back": up.rows, "down_back": down.rows}
    saved = {name: save(q, "moe_weights") for name, q in copies.items()}
    return dataclasses.replace(kernels, copies=saved)


def ready(
    op: str,
    kernels: ExpertKernels,
    *,
    rounding: ScaleRounding,
    rows: Any,
    others: tuple[jax.Array, ...],
    wanted: bool | None,
    split: bool = False,
) -> ExpertKernels:
    """Returns kernels with their copies, or as they are where the GEMMs cast them.

    Args:
      rows: of all experts here. others, wanted, split: see weights.cast_in_gemm.
    """
    if kernels.copies is not None:
        if wanted:
            got, fix = "prepared kernels", "leave cast_in_gemm out, or pass float kernels"
            fail(op, "the GEMMs cannot cast prepared kernels.", got, "float kernels", fix)
        return kernels
    pairs: list[tuple[jax.Array, ...]] = [(kernels.wi_0, kernels.wi_1), (kernels.wo,)]
    options = {"rows": rows, "rounding": rounding, "others": others}
    if cast_in_gemm(op, pairs, **options, wanted=wanted, split=split):
        return kernels
    return _with_copies(kernels, rounding)


def operand(kernels: ExpertKernels, name: str) -> Matrix:
    """Returns what `multiply_by` takes: the FP8 copy of this name, or the weights of the copy."""
    if kernels.copies is not None:
        return kernels.copies[name]
    return (kernels.wo,) if name.startswith("down") else (kernels.wi_0, kernels.wi_1)


def multiply_by(
    matrix: Matrix,
    lhs: QArray,
    sizes: jax.Array,
    *,
    transposed: bool,
    variant: VariantName = "ragged",
    batch_invariant: bool = False,
) -> jax.Array:
    """Returns the GEMM by what `operand` returned; transposed: for a forward GEMM."""
    if matrix[0].dtype == jnp.uint8:  # a copy, which lies as the GEMM wants it
        return multiply(
            lhs,
            from_bits((matrix[0], matrix[1])),
            jnp.bfloat16,
            sizes,
            variant=variant,
            batch_invariant=batch_invariant,
        )
    return multiply_casting(
        lhs,
        matrix,
        sizes,
        transposed=transposed,
        variant=variant,
        batch_invariant=batch_invariant,
    )


def as_kernels(op: str, name: str, kernels: Any, ndim: int = 3) -> ExpertKernels:
    """Returns experts' matrices, checked; ndim: 3, or 2 for an expert that sees every token."""
    dims = "[e, h, f], [e, h, f], [e, f, h]" if ndim == 3 else "[h, f], [h, f], [f, h]"
    if not isinstance(kernels, ExpertKernels):
        got, fix = type(kernels).__name__, f"{name}=ExpertKernels(wi_0=, wi_1=, wo=)"
        expected = f"ExpertKernels with wi_0, wi_1, wo {dims}"
        fail(op, f"{name} is not an ExpertKernels.", got, expected, fix, TypeError)
    given = {"wi_0": kernels.wi_0, "wi_1": kernels.wi_1, "wo": kernels.wo}
    named = {matrix: as_float(op, matrix, w) for matrix, w in given.items()}
    kernels = ExpertKernels(**named, copies=kernels.copies)
    got = ", ".join(describe(matrix, w) for matrix, w in named.items())
    if any(w.ndim != ndim for w in named.values()):
        fix = "stack the experts along dim 0" if ndim == 3 else "pass one expert's matrices"
        fail(op, f"{name} have the wrong rank.", got, f"wi_0, wi_1, wo {dims}", fix)
    if 0 in kernels.wi_0.shape[:-2]:
        expected, fix = "1 expert or more", "leave the layer out where there are none"
        fail(op, "there are no experts.", got, expected, fix)
    *lead, h, f = kernels.wi_0.shape
    if kernels.wi_1.shape != (*lead, h, f) or kernels.wo.shape != (*lead, f, h):
        expected = f"wi_1 {[*lead, h, f]}, wo {[*lead, f, h]}"
        fail(op, f"{name} do not fit each other.", got, expected, "swap the dims of one of them")
    if kernels.wi_0.dtype != kernels.wi_1.dtype:
        what = "wi_0 and wi_1 differ in dtype."
        fail(op, what, got, "one dtype", "cast one of them", TypeError)
    return kernels
