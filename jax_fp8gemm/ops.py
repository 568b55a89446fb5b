"""What users of float arrays call: fp8_matmul, fp8_ragged_dot; quantised inside."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.kernel_level import contract_tokens, gemm, gemm_casting
from jax_fp8gemm.meshes import explicit_sharding, vary_alike
from jax_fp8gemm.prepared import (
    Weight,
    both_copies,
    cast_in_products,
    check_weight,
    describe_weight,
    forward_copy,
    from_bits,
    pad_k,
    save,
    split,
)
from jax_fp8gemm.qarray import BLOCK, QArray
from jax_fp8gemm.quantizing import (
    FLOATS,
    check_float,
    quantize,
    quantize_both,
    quantize_rows,
    quantize_transposed,
    requantize,
)
from jax_fp8gemm.reference import group_ends

RESIDUALS = ("fp8_t", "fp8", "input")


@dataclasses.dataclass(frozen=True)
class How:
    """What of a product is known when it is traced."""

    dtype: jnp.dtype
    scale: str
    residuals: str
    name: str  # residuals are named for jax.checkpoint policies
    casts: bool = False  # the products cast the weights themselves


def fp8_matmul(
    x: jax.Array,
    w: Weight,
    *,
    preferred_element_type: jnp.dtype | None = None,
    scale: str = "pow2",
    residuals: str = "fp8_t",
) -> jax.Array:
    """Multiplies in FP8, forward and backward: y[..., n] = Σ_k x[..., k] · w[k, n].

    Forward and the gradient to x scale 1x128 × 128x128, the gradient to w 1x128 × 1x128 along
    tokens, in float32. Floats come in and go out; FP8 never crosses a derivative.

    Args:
      x: bf16, f16 or f32 [..., k].
      w: bf16, f16 or f32 [k, n], as Flax stores kernels; or what `prepare_weight` made of it.
      preferred_element_type: dtype of y; default: the promoted dtype of x and w.
      scale: "pow2" or "float32", see `quantize`.
      residuals: what is kept of x for the backward pass. "fp8_t": the transposed FP8 copy, 1.03
        bytes an element; "fp8": FP8 rows, quantised again in the backward pass (exact with pow2);
        "input": x itself.

    Returns:
      [..., n]. Gradients have the dtypes of x and w. Residuals are named "fp8_matmul_x" and
      "fp8_matmul_w" for jax.checkpoint policies.

    Raises:
      ValueError: rank of w is not 2, or k differs; unknown residuals. TypeError: not floats.
      NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = jax.jit(fp8_matmul)(x, w)
    """
    op = "fp8_matmul"
    check_float(op, "x", x)
    check_weight(op, "w", w)
    _check_residuals(op, residuals)
    both = describe("x", x) + ", " + describe_weight("w", w)
    if w.ndim != 2 or x.ndim < 1:
        fail(op, "w or x has the wrong rank.", both, "x [..., k], w [k, n]", "reshape them")
    if x.shape[-1] != w.shape[0]:
        expected, mend = f"w [{x.shape[-1]}, n]", "if w is stored [n, k], pass w.T"
        fail(op, "dim k differs between x and w.", both, expected, mend)
    dtype = result_dtype(op, x, w, preferred_element_type)
    how = How(dtype, scale, residuals, op)
    y = _matmul(*vary_alike(x if x.ndim > 1 else x[None], *split(w)), how)
    return y if x.ndim > 1 else y[0]


def result_dtype(op: str, lhs: jax.Array, rhs: Weight, preferred) -> jnp.dtype:
    dtype = jnp.dtype(preferred or jnp.result_type(lhs.dtype, rhs.dtype))
    if dtype not in FLOATS:
        got = f"preferred_element_type {dtype}"
        fail(op, "no such result.", got, "bf16, f16 or f32", "cast the result", TypeError)
    return dtype


def _check_residuals(op: str, residuals: str) -> None:
    if residuals not in RESIDUALS:
        fail(op, "unknown residuals.", repr(residuals), f"one of {RESIDUALS}", "choose one")


def _product(
    lhs: QArray,
    rhs: QArray,
    dtype: jnp.dtype,
    group_sizes: jax.Array | None = None,
    variant: str = "dense",
) -> jax.Array:
    """A product as `dtype`; float16 by way of float32."""
    out_dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    product = gemm(pad_k(lhs), pad_k(rhs), group_sizes, variant=variant, out_dtype=out_dtype)
    return product.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, w, copies, how: How):
    return _product(quantize(x, scale=how.scale), forward_copy(w, copies, how.scale), how.dtype)


def _matmul_forward(x, w, copies, how: How):
    """Residuals: x as `how` says, w's FP8 copy, and what the gradients are to be like."""
    nk, kn = both_copies(w, copies, how.scale)
    rows, saved = _keep(_tokens(x), how)
    y = _product(rows, nk, how.dtype).reshape(*x.shape[:-1], nk.shape[0])
    return y, (saved, save(kn, f"{how.name}_w"), Like.of(x), Like.of(w))


def _matmul_backward(how: How, residuals, dy):
    saved, saved_w, like_x, like_w = residuals
    tokens = _tokens(dy)
    rows, transposed = quantize_both(tokens, scale=how.scale, token_dims=tokens.ndim - 1)
    kn = from_bits(saved_w)
    dx = _product(rows, kn, like_x.dtype).reshape(*dy.shape[:-1], kn.shape[0])
    if like_w is None:
        return like_x.match(dx), None, None
    dw = contract_tokens(_transposed(saved, how), transposed, like_w.dtype, like_w.sharding)
    return like_x.match(dx), like_w.match(dw), None


def _tokens(x: jax.Array) -> jax.Array:
    """Merges dims of tokens, unless blocks of 128 lie inside the last: then all may be sharded."""
    if x.shape[-2] % BLOCK == 0:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # no -1: a dim may be empty


_matmul.defvjp(_matmul_forward, _matmul_backward)


# ---- Residuals ----------------------------------------------------------------------------------


def _keep(x: jax.Array, how: How, group_sizes: jax.Array | None = None):
    """Returns x's FP8 rows, and what is kept for the backward pass."""
    name, tokens = f"{how.name}_x", {"group_sizes": group_sizes, "token_dims": x.ndim - 1}
    if how.residuals == "fp8_t":
        rows, transposed = quantize_both(x, scale=how.scale, **tokens)
        return rows, save(transposed, name)
    rows = quantize_rows(x, scale=how.scale, group_sizes=group_sizes)
    return rows, save(rows, name) if how.residuals == "fp8" else checkpoint_name(x, name)


def _transposed(saved, how: How, group_sizes: jax.Array | None = None) -> QArray:
    """Returns x's transposed copy, by groups where there are any."""
    if how.residuals == "fp8_t":
        return from_bits(saved)
    if how.residuals == "fp8":
        rows = from_bits(saved)
        tokens = {"group_sizes": group_sizes, "token_dims": rows.ndim - 1}
        return requantize(rows, scale=how.scale, **tokens)
    tokens = {"group_sizes": group_sizes, "token_dims": saved.ndim - 1}
    return quantize_transposed(saved, scale=how.scale, **tokens)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Like:
    """What a gradient shares with its argument: the dtype, and the sharding on Explicit axes."""

    dtype: jnp.dtype
    sharding: NamedSharding | None

    @classmethod
    def of(cls, x: jax.Array | None) -> "Like | None":
        return None if x is None else cls(x.dtype, explicit_sharding(x))

    def match(self, gradient: jax.Array) -> jax.Array:
        gradient = gradient.astype(self.dtype)
        return gradient if self.sharding is None else jax.sharding.reshard(gradient, self.sharding)


# ---- fp8_ragged_dot -----------------------------------------------------------------------------


def fp8_ragged_dot(
    lhs: jax.Array,
    rhs: Weight,
    group_sizes: jax.Array,
    *,
    preferred_element_type: jnp.dtype | None = None,
    scale: str = "pow2",
    residuals: str = "fp8_t",
) -> jax.Array:
    """Multiplies groups of rows by a matrix each, as jax.lax.ragged_dot does, in FP8.

    out[i, n] = Σ_k lhs[i, k] · rhs[group of i, k, n]; zero for rows past the groups.

    Args:
      lhs: bf16, f16 or f32 [m, k]. Rows past the groups are not looked at.
      rhs: bf16, f16 or f32 [g, k, n]; or what `prepare_weight` made of it.
      group_sizes: int [g], any sizes, on the device and never read back. Negative sizes count as
        zero, and what does not fit into m is cut off.
      preferred_element_type: dtype of the result; default: the promoted dtype of lhs and rhs.
      scale: "pow2" or "float32", see `quantize`.
      residuals: what is kept of lhs, as in `fp8_matmul`.

    Returns:
      [m, n]. Gradients have the dtypes of lhs and rhs; that of a group without rows is zero.
      Residuals are named "fp8_ragged_dot_x" and "fp8_ragged_dot_w". With few rows in a group,
      everything in bf16, and one device or shard_map, the products cast rhs themselves, and it is
      kept as it is.

    Raises:
      ValueError: ranks, k or the number of groups do not fit. TypeError: not floats, sizes that
      are no integers. NotImplementedError: a second derivative, jax.vmap.

    Source: jax.lax.ragged_dot; DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = fp8_ragged_dot(x, w, jnp.array([3, 0, 5]))
    """
    op = "fp8_ragged_dot"
    check_float(op, "lhs", lhs)
    check_weight(op, "rhs", rhs)
    _check_residuals(op, residuals)
    group_sizes = jnp.asarray(group_sizes)
    _check_ragged(op, lhs, rhs, group_sizes)
    dtype = result_dtype(op, lhs, rhs, preferred_element_type)
    if not rhs.shape[0]:
        return jnp.zeros_like(lhs, dtype, shape=(lhs.shape[0], rhs.shape[2]))
    w, copies = split(rhs)
    results_are_bf16 = {dtype, lhs.dtype} == {jnp.dtype(jnp.bfloat16)}
    casts = copies is None and results_are_bf16
    casts = casts and cast_in_products((w,), rows=lhs.shape[0], scale=scale)
    how = How(dtype, scale, residuals, op, casts)
    return _ragged_dot(*vary_alike(lhs, w, copies, group_sizes), how)


def _check_ragged(op: str, lhs, rhs: Weight, group_sizes) -> None:
    both = f"{describe('lhs', lhs)}, {describe_weight('rhs', rhs)}, "
    both += describe("group_sizes", group_sizes)
    if (lhs.ndim, rhs.ndim, group_sizes.ndim) != (2, 3, 1):
        expected = "lhs [m, k], rhs [g, k, n], group_sizes [g]"
        fail(op, "wrong ranks.", both, expected, "reshape them")
    if lhs.shape[1] != rhs.shape[1]:
        expected, mend = f"rhs [g, {lhs.shape[1]}, n]", "if rhs is [g, n, k], swap its last dims"
        fail(op, "dim k differs between lhs and rhs.", both, expected, mend)
    if rhs.shape[0] != group_sizes.shape[0]:
        expected = f"group_sizes [{rhs.shape[0]}]"
        fail(op, "the number of groups differs.", both, expected, "pass one size for each matrix")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        mend = "cast group_sizes to int32"
        fail(op, "group_sizes must be integers.", both, "int [g]", mend, TypeError)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ragged_dot(lhs, rhs, copies, group_sizes, how: How):
    rows = quantize_rows(lhs, scale=how.scale, group_sizes=group_sizes)
    if how.casts:
        return gemm_casting(rows, (rhs,), group_sizes, transposed=True)
    return _product(rows, forward_copy(rhs, copies, how.scale), how.dtype, group_sizes, "ragged")


def _ragged_forward(lhs, rhs, copies, group_sizes, how: How):
    """Residuals: lhs as `how` says, rhs's FP8 copy or itself, what the gradients are to be like."""
    rows, saved = _keep(lhs, how, group_sizes)
    like = group_sizes, Like.of(lhs), Like.of(rhs)
    if how.casts:
        return gemm_casting(rows, (rhs,), group_sizes, transposed=True), (saved, rhs, *like)
    nk, kn = both_copies(rhs, copies, how.scale)
    y = _product(rows, nk, how.dtype, group_sizes, "ragged")
    return y, (saved, save(kn, f"{how.name}_w"), *like)


def _ragged_backward(how: How, residuals, dy):
    saved, saved_rhs, group_sizes, like_lhs, like_rhs = residuals
    rows, transposed = quantize_both(dy, scale=how.scale, group_sizes=group_sizes)
    if how.casts:
        dlhs = gemm_casting(rows, (saved_rhs,), group_sizes, transposed=False)
    else:
        dlhs = _product(rows, from_bits(saved_rhs), like_lhs.dtype, group_sizes, "ragged")
    if like_rhs is None:
        return like_lhs.match(dlhs), None, None, None
    own = jnp.diff(group_ends(group_sizes, dy.shape[0]), prepend=0)  # clamped, as rows were placed
    lhs = _transposed(saved, how, group_sizes)
    drhs = _product(lhs, transposed, like_rhs.dtype, own, "ragged_contracting")
    return like_lhs.match(dlhs), like_rhs.match(drhs), None, None


_ragged_dot.defvjp(_ragged_forward, _ragged_backward)
