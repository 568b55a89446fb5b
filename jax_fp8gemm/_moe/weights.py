"""The matrices of experts, in floats or in FP8, and GEMMs by them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.bits import Bits, from_bits, save, to_bits, transpose
from jax_fp8gemm._core.checks import check_option, renamed
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import BLOCKS, K_MULTIPLE, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import Precision, ScaleRounding, VariantName
from jax_fp8gemm._moe.kernels import ExpertKernels, as_kernels
from jax_fp8gemm._ops.casts import cast_both
from jax_fp8gemm._ops.gemm import multiply, multiply_casting
from jax_fp8gemm._ops.weights import Weight, cast_in_gemm, prepare_weight

# An FP8 copy, two whose results lie side by side, or the float weights that a GEMM casts.
Matrix = Any  # Bits, tuple[Bits, Bits] or tuple[jax.Array, ...]


@renamed(scale="scale_rounding", wi_0="ExpertKernels(wi_0=, wi_1=, wo=)")
def prepare_experts(
    kernels: ExpertKernels, *, scale_rounding: ScaleRounding = "pow2"
) -> ExpertKernels:
    """Quantizes experts' matrices by 128x128, both ways: for as many calls as they stay the same.

    Args:
      kernels: ExpertKernels, bf16, f16 or f32; or QArrays.
      scale_rounding: "pow2" or "none", see `quantize`. QArrays keep their scales.

    Returns:
      ExpertKernels with the same matrices, to which gradients flow, and their FP8 copies. Of
      QArrays: QArrays with gate and up as one, f filled with zeros to a multiple of 128. That is
      one GEMM in place of two.

    Raises:
      ValueError: shapes do not fit, or scale_rounding is unknown.
      TypeError: dtypes.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      prepared = prepare_experts(ExpertKernels(wi_0=gate, wi_1=up, wo=down))
      y = expert_ffn(x, routing.expert_index, routing.gate_weights, prepared)
    """
    check_option("prepare_experts", "scale_rounding", scale_rounding, ScaleRounding)
    gated = getattr(kernels, "wi_1", None) is not None or getattr(kernels, "wi", None) is not None
    gated = gated or not isinstance(kernels, ExpertKernels)
    kernels = as_kernels("prepare_experts", "kernels", kernels, gated=gated)
    if not kernels.is_fp8:
        return _with_copies(kernels, scale_rounding)
    up, down = _fp8_matrices(kernels)
    if gated and kernels.wi is None:
        up = _joined(up, axis=-2)
    first = "wi" if gated else "wi_0"
    matrices: dict[str, Any] = {first: from_bits(up), "wo": from_bits(down)}
    return ExpertKernels(**matrices, **_padded_biases(kernels))


def _with_copies(kernels: ExpertKernels, rounding: ScaleRounding) -> ExpertKernels:
    _, h, f = kernels.wi_0.shape
    pad_h, pad_f = -h % K_MULTIPLE, -f % SCALE_BLOCK
    *wi, wo = jax.lax.stop_gradient(float_matrices(kernels))
    wi = [jnp.pad(w, [(0, 0), (0, pad_h), (0, pad_f)]) for w in wi]
    pair = (wi[0], wi[1]) if len(wi) == 2 else wi[0]
    up = cast_both(pair, BLOCKS, scale_rounding=rounding)
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
    precision: Precision,
    split: bool = False,
) -> ExpertKernels:
    """Returns kernels with their copies, or as they are: where GEMMs cast them, FP8 ones, for bf16.

    Args:
      rows: of all experts here. others, wanted, split: see weights.cast_in_gemm.
    """
    if precision == "bf16":
        return dataclasses.replace(kernels, copies=None)
    if kernels.copies is not None or kernels.is_fp8:
        if wanted:
            got, fix = "prepared kernels", "leave cast_in_gemm out, or pass float kernels"
            got = "kernels in FP8" if kernels.is_fp8 else got
            fail(op, "the GEMMs cannot cast prepared kernels.", got, "float kernels", fix)
        return kernels
    *wi, wo = float_matrices(kernels)
    pairs: list[tuple[jax.Array, ...]] = [(*wi,), (wo,)]
    options = {"rows": rows, "rounding": rounding, "others": others}
    if cast_in_gemm(op, pairs, **options, wanted=wanted, split=split):
        return kernels
    return _with_copies(kernels, rounding)


def float_matrices(kernels: ExpertKernels) -> list[jax.Array]:
    """Returns gate, up and down; without up where there is none."""
    return [w for w in (kernels.wi_0, kernels.wi_1, kernels.wo) if w is not None]


def _padded_biases(kernels: ExpertKernels) -> dict[str, Any]:
    """Returns the biases as wide as `_fp8_matrices`."""
    pad = -kernels.sizes[-1] % SCALE_BLOCK
    named = {"wi_0_bias": kernels.wi_0_bias, "wi_1_bias": kernels.wi_1_bias}
    padded = {n: None if b is None else jnp.pad(b, [(0, 0), (0, pad)]) for n, b in named.items()}
    return {**padded, "wo_bias": kernels.wo_bias}


def _fp8_matrices(kernels: ExpertKernels) -> tuple[Any, Bits]:
    """Returns FP8 kernels as bits: "up", or gate's and up's, and "down"; f a multiple of 128."""
    pad = -kernels.sizes[-1] % SCALE_BLOCK

    def padded(q: QArray, *widths: tuple[int, int]) -> Bits:
        bits, scale = to_bits(q)
        lead = [(0, 0)] * (bits.ndim - 2)
        return (jnp.pad(bits, (*lead, *widths)) if pad else bits), scale

    down = padded(kernels.wo, (0, 0), (0, pad))
    if kernels.wi is not None:
        return to_bits(kernels.wi), down
    wi = (w for w in (kernels.wi_0, kernels.wi_1) if w is not None)
    up = tuple(padded(w, (0, pad), (0, 0)) for w in wi)
    return up if len(up) == 2 else up[0], down


def _joined(pair: tuple[Bits, Bits], axis: int) -> Bits:
    bits, scales = zip(*pair, strict=True)
    return jnp.concatenate(bits, axis), jnp.concatenate(scales, axis)


def as_constants(kernels: ExpertKernels) -> ExpertKernels:
    """Returns FP8 kernels as copies alone, to which nothing flows; others as they are."""
    if not kernels.is_fp8:
        return kernels
    up, down = _fp8_matrices(kernels)
    copies = {"up": up, "down": down}
    return dataclasses.replace(kernels, wi_0=None, wi_1=None, wi=None, wo=None, copies=copies)


def are_constant(kernels: ExpertKernels) -> bool:
    """Whether these are what `as_constants` made of FP8 kernels."""
    return kernels.wo is None


def operand(kernels: ExpertKernels, name: str) -> Matrix:
    """Returns what `multiply_by` takes: the FP8 copy of this name, or the weights of the copy.

    For the gradient GEMMs of constants it is the forward copy, which `turned` turns there.
    """
    if are_constant(kernels):
        name = name.removesuffix("_back")
    if kernels.copies is not None:
        return kernels.copies[name]
    *wi, wo = float_matrices(kernels)
    return (wo,) if name.startswith("down") else (*wi,)


def shared_matrices(kernels: ExpertKernels) -> list[Weight]:
    """Returns what `fp8_matmul` takes, of an expert that sees every token: gate and up, or both as
    one matrix, and down."""
    given = (kernels.wi_0, kernels.wi_1, kernels.wi, kernels.wo)
    prepare = prepare_weight if kernels.is_fp8 else lambda w: w
    return [prepare(w) for w in given if w is not None]


def turned(matrix: Any) -> Bits:
    """Returns the transpose of a constant's copy, of gate and up side by side."""
    if isinstance(matrix[0], tuple):
        return _joined((turned(matrix[0]), turned(matrix[1])), axis=-1)
    return to_bits(transpose(from_bits(matrix)))


def multiply_by(
    matrix: Matrix,
    lhs: QArray,
    sizes: jax.Array,
    *,
    transposed: bool,
    variant: VariantName = "ragged",
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> jax.Array:
    """Returns the GEMM by what `operand` returned; transposed: for a forward GEMM.

    Rows past the groups hold anything: nothing may read them.
    """
    how: dict[str, Any] = {
        "variant": variant,
        "expected_rows": expected_rows,
        "batch_invariant": batch_invariant,
    }
    if isinstance(matrix[0], tuple):
        parts = (multiply_by(one, lhs, sizes, transposed=transposed, **how) for one in matrix)
        return jnp.concatenate(list(parts), -1)
    how["leave_rest"] = variant == "ragged"
    if matrix[0].dtype in (jnp.uint8, jnp.uint32):  # a copy, which lies as the GEMM wants it
        return multiply(lhs, from_bits((matrix[0], matrix[1])), jnp.bfloat16, sizes, **how)
    return multiply_casting(lhs, matrix, sizes, transposed=transposed, **how)
