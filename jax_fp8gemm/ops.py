"""What users of float arrays call: fp8_matmul, fp8_ragged_dot; quantised inside."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.kernel_level import K_MULTIPLE, check_float, gemm, quantize
from jax_fp8gemm.qarray import BLOCK, BLOCKS, FP8, QArray
from jax_fp8gemm.reference import group_ends


def fp8_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    preferred_element_type: jnp.dtype | None = None,
    scale: str = "pow2",
) -> jax.Array:
    """Multiplies in FP8, forward and backward: y[..., n] = Σ_k x[..., k] · w[k, n].

    Forward and the gradient to x scale 1x128 × 128x128, the gradient to w 1x128 × 1x128 along
    tokens, in float32. Floats come in and go out; FP8 never crosses a derivative.

    Args:
      x: bf16, f16 or f32 [..., k].
      w: bf16, f16 or f32 [k, n], as Flax stores kernels.
      preferred_element_type: dtype of y; default: the promoted dtype of x and w.
      scale: "pow2" or "float32", see `quantize`.

    Returns:
      [..., n]. Gradients have the dtypes of x and w. Residuals are named "fp8_matmul_x" and
      "fp8_matmul_w" for jax.checkpoint policies.

    Raises:
      ValueError: rank of w is not 2, or k differs. TypeError: not floats.
      NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = jax.jit(fp8_matmul)(x, w)
    """
    check_float("fp8_matmul", "x", x)
    check_float("fp8_matmul", "w", w)
    both = describe("x", x) + ", " + describe("w", w)
    if w.ndim != 2 or x.ndim < 1:
        fail(
            "fp8_matmul", "w or x has the wrong rank.", both, "x [..., k], w [k, n]", "reshape them"
        )
    if x.shape[-1] != w.shape[0]:
        expected, mend = f"w [{x.shape[-1]}, n]", "if w is stored [n, k], pass w.T"
        fail("fp8_matmul", "dim k differs between x and w.", both, expected, mend)
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(x, w))
    y = _matmul(x.reshape(-1, x.shape[-1]), w, scale, dtype)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _pad_k(q: QArray) -> QArray:
    """Zero-fills the last dim to what a product contracts over; the scales already cover it."""
    pad = -q.shape[-1] % K_MULTIPLE
    if not pad:
        return q
    bits = jnp.pad(_to_bits(q.qvalue), [(0, 0)] * (q.ndim - 1) + [(0, pad)])
    return QArray(_from_bits(bits), q.scale)


# NOTE: jax.checkpoint saves floats through reduce_precision, which turns e4m3 numbers above 240
# into NaN; as uint8 they are left alone.
def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _from_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, FP8)


def _transpose(q: QArray) -> QArray:
    """The transposed matrix; exact where a tile has as many rows as columns."""
    return QArray(jnp.swapaxes(q.qvalue, -1, -2), jnp.swapaxes(q.scale, -1, -2))


def _product(lhs: QArray, rhs: QArray, dtype: jnp.dtype) -> jax.Array:
    """A dense product as `dtype`; float16 by way of float32."""
    out_dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    return gemm(_pad_k(lhs), _pad_k(rhs), out_dtype=out_dtype).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, scale, dtype):
    return _product(quantize(x, scale=scale), _transpose(quantize(w, BLOCKS, scale=scale)), dtype)


def _matmul_forward(x, w, scale, dtype):
    """Residuals: x's transposed copy and w's, in FP8; empty arrays that remember the dtypes."""
    wq = quantize(w, BLOCKS, scale=scale)
    y = _product(quantize(x, scale=scale), _transpose(wq), dtype)
    saved_x = _save(quantize(x.T, scale=scale), "fp8_matmul_x")
    saved_w = _save(wq, "fp8_matmul_w")
    return y, (saved_x, saved_w, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _matmul_backward(scale, dtype, residuals, dy):
    saved_x, saved_w, like_x, like_w = residuals
    dx = _product(quantize(dy, scale=scale), _load(saved_w), like_x.dtype)
    dw = gemm(_pad_k(_load(saved_x)), _pad_k(quantize(dy.T, scale=scale)), out_dtype=jnp.float32)
    return dx, dw.astype(like_w.dtype)


def _save(q: QArray, name: str) -> tuple[jax.Array, jax.Array]:
    return checkpoint_name(_to_bits(q.qvalue), name), checkpoint_name(q.scale, name)


def _load(saved: tuple[jax.Array, jax.Array]) -> QArray:
    return QArray(_from_bits(saved[0]), saved[1])


_matmul.defvjp(_matmul_forward, _matmul_backward)


# ---- fp8_ragged_dot -----------------------------------------------------------------------------


def fp8_ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    preferred_element_type: jnp.dtype | None = None,
    scale: str = "pow2",
) -> jax.Array:
    """Multiplies groups of rows by a matrix each, as jax.lax.ragged_dot does, in FP8.

    out[i, n] = Σ_k lhs[i, k] · rhs[group of i, k, n]; zero for rows past the groups.

    Args:
      lhs: bf16, f16 or f32 [m, k]. Rows past the groups are not looked at.
      rhs: bf16, f16 or f32 [g, k, n].
      group_sizes: int [g], any sizes, on the device and never read back. Negative sizes count as
        zero, and what does not fit into m is cut off.
      preferred_element_type: dtype of the result; default: the promoted dtype of lhs and rhs.
      scale: "pow2" or "float32", see `quantize`.

    Returns:
      [m, n]. Gradients have the dtypes of lhs and rhs; that of a group without rows is zero.

    Raises:
      ValueError: ranks, k or the number of groups do not fit. TypeError: not floats, sizes that
      are no integers. NotImplementedError: a second derivative.

    Source: jax.lax.ragged_dot; DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = fp8_ragged_dot(x, w, jnp.array([3, 0, 5]))
    """
    check_float("fp8_ragged_dot", "lhs", lhs)
    check_float("fp8_ragged_dot", "rhs", rhs)
    group_sizes = jnp.asarray(group_sizes)
    both = ", ".join(
        describe(name, x) for name, x in (("lhs", lhs), ("rhs", rhs), ("group_sizes", group_sizes))
    )
    if (lhs.ndim, rhs.ndim, group_sizes.ndim) != (2, 3, 1):
        expected = "lhs [m, k], rhs [g, k, n], group_sizes [g]"
        fail("fp8_ragged_dot", "wrong ranks.", both, expected, "reshape them")
    if lhs.shape[1] != rhs.shape[1]:
        expected, mend = f"rhs [g, {lhs.shape[1]}, n]", "if rhs is [g, n, k], swap its last dims"
        fail("fp8_ragged_dot", "dim k differs between lhs and rhs.", both, expected, mend)
    if rhs.shape[0] != group_sizes.shape[0]:
        expected = f"group_sizes [{rhs.shape[0]}]"
        mend = "pass one size for each matrix of rhs"
        fail("fp8_ragged_dot", "the number of groups differs.", both, expected, mend)
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        mend = "cast group_sizes to int32"
        fail("fp8_ragged_dot", "group_sizes are no integers.", both, "int [g]", mend, TypeError)
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
    return _ragged_dot(lhs, rhs, group_sizes, scale, dtype)


def _ragged_product(lhs: QArray, rhs: QArray, group_sizes, dtype: jnp.dtype) -> jax.Array:
    out_dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    lhs, rhs = _pad_k(lhs), _pad_k(rhs)
    return gemm(lhs, rhs, group_sizes, variant="ragged", out_dtype=out_dtype).astype(dtype)


def _by_groups(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Moves rows so that every group begins at a multiple of 128, zeros between, as [k, rows].

    Rows past the groups are not looked at. Groups take (m + min(g, m) · 127) // 128 · 128 rows at
    most, whatever their sizes.
    """
    m, g = x.shape[0], group_sizes.shape[0]
    rows = (m + min(g, m) * (BLOCK - 1)) // BLOCK * BLOCK
    ends = group_ends(group_sizes, m)
    sizes = jnp.diff(ends, prepend=0)
    places = jnp.cumsum(-(-sizes // BLOCK)) * BLOCK  # where the next group begins
    group = jnp.searchsorted(places, jnp.arange(rows), side="right")
    last = jnp.minimum(group, g - 1)
    offset = jnp.arange(rows) - jnp.where(group > 0, places[group - 1], 0)
    inside = (group < g) & (offset < sizes[last])
    source = jnp.where(inside, ends[last] - sizes[last] + offset, 0)
    return jnp.where(inside[:, None], x[source], 0).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged_dot(lhs, rhs, group_sizes, scale, dtype):
    rhs = _transpose(quantize(rhs, BLOCKS, scale=scale))
    return _ragged_product(quantize(lhs, scale=scale), rhs, group_sizes, dtype)


def _ragged_forward(lhs, rhs, group_sizes, scale, dtype):
    """Residuals: lhs's transposed copy by groups and rhs's, in FP8."""
    wq = quantize(rhs, BLOCKS, scale=scale)
    y = _ragged_product(quantize(lhs, scale=scale), _transpose(wq), group_sizes, dtype)
    saved_lhs = _save(quantize(_by_groups(lhs, group_sizes), scale=scale), "fp8_ragged_dot_lhs")
    saved_rhs = _save(wq, "fp8_ragged_dot_rhs")
    like = jnp.zeros(0, lhs.dtype), jnp.zeros(0, rhs.dtype)
    return y, (saved_lhs, saved_rhs, group_sizes, *like)


def _ragged_backward(scale, dtype, residuals, dy):
    saved_lhs, saved_rhs, group_sizes, like_lhs, like_rhs = residuals
    dlhs = _ragged_product(quantize(dy, scale=scale), _load(saved_rhs), group_sizes, like_lhs.dtype)
    # What counts of a group is its clamped size.
    own = jnp.diff(group_ends(group_sizes, dy.shape[0]), prepend=0)
    drhs = gemm(
        _load(saved_lhs),
        quantize(_by_groups(dy, group_sizes), scale=scale),
        own,
        variant="ragged_contracting",
        out_dtype=jnp.float32,
    )
    return dlhs, drhs.astype(like_rhs.dtype), None


_ragged_dot.defvjp(_ragged_forward, _ragged_backward)
