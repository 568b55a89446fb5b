"""The same GEMMs by XLA in bf16: for comparison, and for GPUs without FP8.

Operands are rounded to bf16, sums are float32, forward and backward. So are gradients of weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm._bind.meshes import explicit_sharding
from jax_fp8gemm._core.checks import check_option
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.groups import clamped_sizes
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import Precision
from jax_fp8gemm._ops.quantize import dequantize
from jax_fp8gemm._ops.recipe import Like
from jax_fp8gemm._ops.weights import PreparedWeight, Weight

BF16, F32 = jnp.bfloat16, jnp.float32
TOKENS_CONTRACTED = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def in_floats(q: QArray) -> jax.Array:
    """Returns an FP8 weight [..., out, in] as bf16 [..., in, out]."""
    return jnp.swapaxes(dequantize(q, BF16), -1, -2)


def float_weight(w: Weight) -> jax.Array:
    """Returns the weight [..., k, n] itself, or what its FP8 copy stands for."""
    if not isinstance(w, PreparedWeight):
        return w
    return in_floats(w.forward) if w.w is None else w.w


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_bf16(x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x[..., k] · w[k, n] as `dtype`; on Explicit axes sharded as fp8_matmul's."""
    numbers = ((x.ndim - 1,), (0,)), ((), ())
    return _dot(x, w, numbers, _result_sharding(x, w)).astype(dtype)


def _dot(a: jax.Array, b: jax.Array, numbers, at: NamedSharding | None) -> jax.Array:
    a, b = a.astype(BF16), b.astype(BF16)
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=F32, out_sharding=at)


def _result_sharding(x: jax.Array, w: jax.Array) -> NamedSharding | None:
    """Rows as x's, columns as w's unless rows have these axes; what splits k is summed."""
    at = explicit_sharding(x) or explicit_sharding(w)
    if at is None:
        return None
    rows = tuple(jax.typeof(x).sharding.spec)[: x.ndim - 1]
    column = tuple(jax.typeof(w).sharding.spec)[1]
    taken = {axis for entry in rows for axis in _names(entry)}
    column = None if taken & set(_names(column)) else column
    return NamedSharding(at.mesh, PartitionSpec(*rows, column))


def _names(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _matmul_forward(x, w, dtype):
    saved = x.astype(BF16), w.astype(BF16)
    return matmul_bf16(*saved, dtype), (*saved, Like.of(x), Like.of(w))


def _matmul_backward(dtype, residuals, dy):
    x, w, like_x, like_w = residuals
    tokens = tuple(range(x.ndim - 1))
    dx = _dot(dy, w, (((dy.ndim - 1,), (1,)), ((), ())), like_x.sharding)
    dw = _dot(x, dy, ((tokens, tokens), ((), ())), like_w.sharding)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


matmul_bf16.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_dot_bf16(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """As jax.lax.ragged_dot, of any int32 sizes; rows past the groups are zero."""
    sizes = clamped_sizes(group_sizes, lhs.shape[0])
    return _ragged(_inside(lhs, sizes), rhs, sizes).astype(dtype)


def _ragged(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(lhs.astype(BF16), rhs.astype(BF16), sizes, preferred_element_type=F32)


def _inside(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns zeros for rows past the groups, whatever they hold."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < sizes.sum(), x, 0)


def _ragged_forward(lhs, rhs, group_sizes, dtype):
    saved = lhs.astype(BF16), rhs.astype(BF16)
    y = ragged_dot_bf16(*saved, group_sizes, dtype)
    return y, (*saved, group_sizes, Like.of(lhs), Like.of(rhs))


def _ragged_backward(dtype, residuals, dy):
    lhs, rhs, group_sizes, like_lhs, like_rhs = residuals
    sizes = clamped_sizes(group_sizes, lhs.shape[0])
    dy, lhs = _inside(dy.astype(BF16), sizes), _inside(lhs, sizes)
    dlhs = _ragged(dy, jnp.swapaxes(rhs, 1, 2), sizes)
    drhs = jax.lax.ragged_dot_general(lhs, dy, sizes, TOKENS_CONTRACTED, preferred_element_type=F32)
    return dlhs.astype(like_lhs.dtype), drhs.astype(like_rhs.dtype), None


ragged_dot_bf16.defvjp(_ragged_forward, _ragged_backward)


def check_precision(op: str, precision: object, batch_invariant: bool) -> None:
    """Raises a ValueError for an unknown precision, or for one that promises no order of sums."""
    check_option(op, "precision", precision, Precision)
    if precision == "bf16" and batch_invariant:
        what, got = "XLA's products are not batch_invariant.", "precision='bf16'"
        fix = "leave one of the two out"
        fail(op, what, f"{got}, batch_invariant=True", "precision='fp8'", fix)
