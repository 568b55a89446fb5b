"""fp8_matmul: floats in and out, FP8 inside, forward and backward."""

import functools
import math

import jax
from jax.typing import DTypeLike

from jax_fp8gemm._bind.meshes import vary_alike
from jax_fp8gemm._core.bits import from_bits, named, save
from jax_fp8gemm._core.checks import as_float, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import TOKEN_MULTIPLE
from jax_fp8gemm._core.types import Precision, Residuals, ScaleRounding
from jax_fp8gemm._ops.bf16 import check_precision, float_weight, matmul_bf16
from jax_fp8gemm._ops.casts import cast_both, cast_rows
from jax_fp8gemm._ops.gemm import multiply
from jax_fp8gemm._ops.recipe import Like, MatmulSpec, keep, kept_transposed, spec_of
from jax_fp8gemm._ops.weights import (
    Weight,
    as_weight,
    both_copies,
    describe_weight,
    forward_copy,
    split,
)


@renamed(scale="scale_rounding")
def fp8_matmul(
    x: jax.Array,
    w: Weight,
    *,
    preferred_element_type: DTypeLike | None = None,
    scale_rounding: ScaleRounding = "pow2",
    residuals: Residuals = "fp8_t",
    shared_columns: bool = True,
    precision: Precision = "fp8",
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies in FP8, forward and backward: y[..., n] = Σ_k x[..., k] · w[k, n].

    Forward and the gradient to x scale 1x128 × 128x128. The gradient to w scales 1x128 × 1x128
    along tokens, in float32. Floats come in and go out: FP8 never crosses a derivative.

    Args:
      x: bf16, f16 or f32 [..., k].
      w: bf16, f16 or f32 [k, n], as Flax stores kernels; or what `prepare_weight` made of it.
      preferred_element_type: dtype of y; default: the promoted dtype of x and w.
      scale_rounding: "pow2" or "none", see `quantize`.
      residuals: what is kept of x for the backward pass. "fp8_t": the transposed FP8 copy, 1.03
        bytes an element. "fp8": FP8 rows, quantized again in the backward pass (exact with pow2).
        "input": x itself.
      shared_columns: whether neighbouring columns of gradients may share a scale in the GEMM that
        makes the gradient to w, which is then faster. See `quantize_both`.
      precision: "fp8"; or "bf16": the same in bf16, by XLA on any device. An FP8 weight is
        dequantized. Other options then mean nothing.
      batch_invariant: of y, see `gemm`. Gradients are made as ever.

    Returns:
      [..., n]. Gradients have the dtypes of x and w. Residuals are named "fp8_matmul_x" and
      "fp8_matmul_w" for jax.checkpoint policies.

    Raises:
      ValueError: the rank of w is not 2, k differs, or an option is unknown.
      TypeError: x or w is not a float array.
      NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = jax.jit(fp8_matmul)(x, w)
    """
    op = "fp8_matmul"
    x, w = as_float(op, "x", x), as_weight(op, "w", w)
    if w.ndim != 2 or x.ndim < 1:
        got = f"{describe('x', x)}, {describe_weight('w', w)}"
        fail(op, "w or x has the wrong rank.", got, "x [..., k], w [k, n]", "reshape them")
    if x.shape[-1] != w.shape[0]:
        m, k, n = math.prod(x.shape[:-1]), x.shape[-1], w.shape[1]
        got = f"{describe('x', x)} (m={m}, k={k}), "
        got += f"{describe_weight('w', w)} (k={w.shape[0]}, n={n})"
        fix = "if w is stored [n, k], pass w.T"
        fail(op, "dim k differs between x and w.", got, f"w [{k}, n]", fix)
    spec = spec_of(
        op,
        x,
        w,
        preferred_element_type,
        rounding=scale_rounding,
        residuals=residuals,
        shared_columns=shared_columns,
        batch_invariant=batch_invariant,
    )
    check_precision(op, precision, batch_invariant)
    if precision == "bf16":
        return matmul_bf16(*vary_alike(x, float_weight(w)), spec.dtype)
    y: jax.Array = _matmul(*vary_alike(x if x.ndim > 1 else x[None], *split(w)), spec)
    return y if x.ndim > 1 else y[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, w, copies, spec: MatmulSpec):
    rows = cast_rows(x, scale_rounding=spec.scale_rounding)
    nk = forward_copy(w, copies, spec.scale_rounding)
    return multiply(rows, nk, spec.dtype, batch_invariant=spec.batch_invariant)


def _forward(x, w, copies, spec: MatmulSpec):
    """Residuals: x as `spec` says, w's FP8 copy, and what the gradients are to be like."""
    kn, nk = both_copies(w, copies, spec.scale_rounding)
    rows, saved = keep(_tokens(x), spec)
    nk, _ = named(nk, f"{spec.name}_w")
    y = multiply(rows, nk, spec.dtype, batch_invariant=spec.batch_invariant)
    y = y.reshape(*x.shape[:-1], nk.shape[0])
    return y, (saved, save(kn, f"{spec.name}_w"), Like.of(x), Like.of(w))


@functools.partial(jax.jit, static_argnums=0)  # see _moe/experts.py
def _backward(spec: MatmulSpec, residuals, dy):
    saved, saved_w, like_x, like_w = residuals
    tokens = _tokens(dy)
    rows, transposed = cast_both(
        tokens,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        token_dims=tokens.ndim - 1,
    )
    kn = from_bits(saved_w)
    dx = multiply(rows, kn, like_x.dtype).reshape(*dy.shape[:-1], kn.shape[0])
    if like_w is None:
        return like_x.match(dx), None, None
    x, at = kept_transposed(saved, spec), like_w.sharding
    dw = multiply(x, transposed, like_w.dtype, scales="1x128_1x128", out_sharding=at)
    return like_x.match(dx), like_w.match(dw), None


def _tokens(x: jax.Array) -> jax.Array:
    """Merges dims of tokens, unless blocks of 128 lie inside the last: then all may be sharded."""
    if x.shape[-2] % TOKEN_MULTIPLE == 0:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # no -1: a dim may be empty


_matmul.defvjp(_forward, _backward)
