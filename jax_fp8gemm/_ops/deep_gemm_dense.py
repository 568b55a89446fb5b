"""DeepGEMM's dense GEMMs, and its einsum of heads."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._ops.deep_gemm_operands import (
    Options,
    Pair,
    check_options,
    multiply_adding,
    operand,
    returns_output,
    transposed,
)


@returns_output("d = fp8_gemm_nt(a, b), or d = fp8_gemm_nt(a, b, c=c)")
def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    *,
    c: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns a · bᵀ, plus c.

    Args:
      a: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      b: e4m3 [n, k] and its f32 scales [ceil(n / 128), ceil(k / 128)], or [n, ceil(k / 128)].
      c: bf16 or f32 [m, n], added in float32. Donate it to save a copy.
      out_dtype: bf16 or f32; default: c's, or bf16.
      options: recipe, recipe_a, recipe_b: checked against the scales. compiled_dims,
        disable_ue8m0_cast: not looked at.

    Returns:
      [m, n].

    Raises:
      ValueError: shapes do not fit.
      TypeError: an operand has no scales, an output argument, or dtypes that do not fit.
      NotImplementedError: a recipe that Hopper does not have.

    Source: DeepGEMM, csrc/apis/gemm.hpp.

    Example:
      d = fp8_gemm_nt(per_token_cast_to_fp8(x, False), per_block_cast_to_fp8(w, False))
    """
    op = "fp8_gemm_nt"
    return _dense(op, operand(op, "a", a), operand(op, "b", b), c, out_dtype, options)


@returns_output("d = fp8_gemm_nn(a, b), or d = fp8_gemm_nn(a, b, c=c)")
def fp8_gemm_nn(
    a: Pair,
    b: Pair,
    *,
    c: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns a · b, plus c: `fp8_gemm_nt` of b's transpose, which is copied.

    Args:
      a: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      b: e4m3 [k, n] and its f32 scales [ceil(k / 128), ceil(n / 128)], or [ceil(k / 128), n].
      c: see `fp8_gemm_nt`.
      out_dtype: see `fp8_gemm_nt`.
      options: see `fp8_gemm_nt`.
    """
    op = "fp8_gemm_nn"
    return _dense(op, operand(op, "a", a), transposed(operand(op, "b", b)), c, out_dtype, options)


@returns_output("d = fp8_gemm_tn(a, b), or d = fp8_gemm_tn(a, b, c=c)")
def fp8_gemm_tn(
    a: Pair,
    b: Pair,
    *,
    c: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns aᵀ · b, plus c: `fp8_gemm_nt` of both transposes, which are copied.

    Args:
      a: e4m3 [k, m] and its f32 scales [ceil(k / 128), m].
      b: e4m3 [k, n] and its f32 scales [ceil(k / 128), ceil(n / 128)], or [ceil(k / 128), n].
      c: see `fp8_gemm_nt`.
      out_dtype: see `fp8_gemm_nt`.
      options: see `fp8_gemm_nt`.
    """
    op = "fp8_gemm_tn"
    lhs, rhs = transposed(operand(op, "a", a)), transposed(operand(op, "b", b))
    return _dense(op, lhs, rhs, c, out_dtype, options)


@returns_output("d = fp8_gemm_tt(a, b), or d = fp8_gemm_tt(a, b, c=c)")
def fp8_gemm_tt(
    a: Pair,
    b: Pair,
    *,
    c: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns aᵀ · bᵀ, plus c: `fp8_gemm_nt` of a's transpose, which is copied.

    Args:
      a: e4m3 [k, m] and its f32 scales [ceil(k / 128), m].
      b: e4m3 [n, k] and its f32 scales [ceil(n / 128), ceil(k / 128)], or [n, ceil(k / 128)].
      c: see `fp8_gemm_nt`.
      out_dtype: see `fp8_gemm_nt`.
      options: see `fp8_gemm_nt`.
    """
    op = "fp8_gemm_tt"
    return _dense(op, transposed(operand(op, "a", a)), operand(op, "b", b), c, out_dtype, options)


@returns_output("out = gemm_fp8_fp8_bf16_nt(lhs, rhs)")
def gemm_fp8_fp8_bf16_nt(lhs: Pair, rhs: Pair) -> jax.Array:
    """Returns lhs · rhsᵀ as bfloat16 [m, n]: the former name of `fp8_gemm_nt`.

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [n, k] and its f32 scales [ceil(n / 128), ceil(k / 128)].
    """
    op = "gemm_fp8_fp8_bf16_nt"
    return _dense(op, operand(op, "lhs", lhs), operand(op, "rhs", rhs), None, None, {})


@returns_output("out = wgrad_gemm_fp8_fp8_fp32_nt(lhs, rhs, c=out)")
def wgrad_gemm_fp8_fp8_fp32_nt(lhs: Pair, rhs: Pair, *, c: jax.Array | None = None) -> jax.Array:
    """Returns lhs · rhsᵀ, plus c, as float32 [m, n]: a gradient to a weight.

    Args:
      lhs: e4m3 [m, k] and its f32 scales [m, ceil(k / 128)].
      rhs: e4m3 [n, k] and its f32 scales [n, ceil(k / 128)].
      c: f32 [m, n]: what DeepGEMM adds to in place.
    """
    op = "wgrad_gemm_fp8_fp8_fp32_nt"
    operands = operand(op, "lhs", lhs), operand(op, "rhs", rhs)
    return _dense(op, *operands, c, jnp.float32, {"recipe": (1, 1, 128)})


def _dense(
    op: str,
    lhs: QArray,
    rhs: QArray,
    c: jax.Array | None,
    out_dtype: DTypeLike | None,
    options: Options,
) -> jax.Array:
    check_options(op, lhs, rhs, options)
    return multiply_adding(op, lhs, rhs, c, out_dtype)


# ---- einsum -------------------------------------------------------------------------------------

# By expression: the order of a's dims and of b's for [g, m, k] · [g, n, k], and of the result's.
_EINSUMS = {
    "bhr,hdr->bhd": ((1, 0, 2), (0, 1, 2), (1, 0, 2)),
    "bhd,hdr->bhr": ((1, 0, 2), (0, 2, 1), (1, 0, 2)),
    "bhd,bhr->hdr": ((1, 2, 0), (1, 2, 0), (0, 1, 2)),
}


@returns_output('d = fp8_einsum("bhr,hdr->bhd", a, b)')
def fp8_einsum(
    expr: str,
    a: Pair,
    b: Pair,
    *,
    c: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """Returns one of three products of each head h, plus c.

    Args:
      expr: "bhr,hdr->bhd", "bhd,hdr->bhr" or "bhd,bhr->hdr".
      a: e4m3 [b, h, r] with f32 scales [b, h, ceil(r / 128)], or d for r. In the third
        [ceil(b / 128), h, d].
      b: e4m3 [h, d, r] with f32 scales [h, ceil(d / 128), ceil(r / 128)]. In the third [b, h, r]
        with [ceil(b / 128), h, r].
      c: see `fp8_gemm_nt`.
      out_dtype: see `fp8_gemm_nt`.
      options: see `fp8_gemm_nt`.

    Raises:
      NotImplementedError: another expression.
    """
    op = "fp8_einsum"
    if expr not in _EINSUMS:
        expected = " or ".join(f'"{one}"' for one in _EINSUMS)
        fix = 'for other products use gemm(variant="batched")'
        fail(op, "there is no such expression.", f"{expr!r}", expected, fix, NotImplementedError)
    of_a, of_b, of_d = _EINSUMS[expr]
    lhs, rhs = (
        QArray(q.qvalue.transpose(order), q.scale.transpose(order))
        for q, order in ((operand(op, "a", a), of_a), (operand(op, "b", b), of_b))
    )
    check_options(op, lhs, rhs, options)
    init = None if c is None else jnp.asarray(c).transpose(of_d)
    y = multiply_adding(op, lhs, rhs, init, out_dtype, variant="batched")
    return y.transpose(of_d)
