"""The expert block: gate, up, SwiGLU and down for tokens sorted by expert, all in FP8.

One custom_vjp with float faces. What it saves, and the order of its products: docs/moe.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.expert_parallel import (
    Exchange,
    Slots,
    collect,
    map_rows,
    send,
    send_quantized,
)
from jax_fp8gemm.expert_weights import PreparedExperts, multiply, operand, prepared_of, save
from jax_fp8gemm.kernel_level import K_MULTIPLE, gemm
from jax_fp8gemm.meshes import automatic, vary_alike
from jax_fp8gemm.prepared import from_bits
from jax_fp8gemm.qarray import QArray
from jax_fp8gemm.quantizing import (
    check_float,
    quantize,
    quantize_both,
    quantize_rows,
    requantize,
    swiglu_backward,
    swiglu_quantize,
)
from jax_fp8gemm.reference import group_of_row
from jax_fp8gemm.routing import cut, permutation_of, rows_or_zero, sum_rows


def expert_ffn(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    wi_0: jax.Array | PreparedExperts,
    wi_1: jax.Array | None = None,
    wo: jax.Array | None = None,
    *,
    capacity: int | None = None,
    scale: str = "pow2",
) -> jax.Array:
    """Sends each token through its experts, in FP8 forward and backward.

    y[t] = Σ_j weights[t, j] · (silu(x[t] · wi_0[i]) * (x[t] · wi_1[i])) · wo[i], i = experts[t, j]

    Args:
      x: bf16, f16 or f32 [t, h].
      experts: int [t, top_k], on the device. One expert twice in a token is legal; a number outside
        0..e-1 is no expert and adds nothing.
      weights: f32 [t, top_k].
      wi_0, wi_1, wo: bf16, f16 or f32 [e, h, f], [e, h, f], [e, f, h]; or PreparedExperts alone.
      capacity: rows that an expert takes at most; later tokens' rows beyond it add nothing, and
        have no gradient. The forward products are then `masked`, else `ragged`.
      scale: "pow2" or "float32", see `quantize`; that of PreparedExperts is its own.

    Returns:
      [t, h], of x's dtype; products are bf16, sums over top_k float32. Gradients have the dtypes of
      x, weights, wi_0, wi_1 and wo; those of an expert without tokens are zero.

    Raises:
      ValueError: shapes that do not fit. TypeError: dtypes. NotImplementedError: a second
      derivative, jax.vmap.

    Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1.2 and 3.3.

    Example:
      y = expert_ffn(x, routing.experts, routing.weights, wi_0, wi_1, wo)
    """
    experts = jnp.asarray(experts)
    prepared = prepared_of("expert_ffn", wi_0, wi_1, wo, scale, experts.size)
    check_tokens("expert_ffn", x, experts, weights, prepared)
    if capacity is not None:
        if not isinstance(capacity, int | np.integer) or capacity < 1:
            expected, mend = "an integer ≥ 1, or None", "leave capacity out to keep every row"
            fail("expert_ffn", "no capacity.", f"capacity {capacity}", expected, mend)
        capacity = min(int(capacity), experts.size)
    return run_experts(x, experts, weights, prepared, Block(scale, capacity))


@dataclasses.dataclass(frozen=True)
class Block:
    """What of an expert block is known when it is traced; as the arguments of expert_ffn."""

    scale: str = "pow2"
    capacity: int | None = None
    exchange: Exchange | None = None


def run_experts(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    prepared: PreparedExperts,
    block: Block,
    slots: Slots | None = None,
) -> jax.Array:
    """As expert_ffn, checked. With an exchange x and the result are this device's tokens [t, h],
    experts and weights those of all rows that it receives, experts numbered from its first."""
    if 0 in x.shape or 0 in experts.shape:
        return jnp.zeros_like(x)
    weights = weights.astype(jnp.float32)
    run = automatic(lambda *operands: _experts(*operands, block), x)
    return run(*vary_alike(x, experts, weights, prepared, slots))


def check_tokens(op: str, x, experts, weights, prepared: PreparedExperts) -> None:
    check_float(op, "x", x)
    check_float(op, "weights", weights)
    named = (("x", x), ("experts", experts), ("weights", weights), ("wi_0", prepared.wi_0))
    got = ", ".join(describe(name, value) for name, value in named)
    if (x.ndim, experts.ndim) != (2, 2) or experts.shape[0] != x.shape[0]:
        expected = "x [t, h], experts [t, top_k]"
        fail(op, "x and experts do not fit.", got, expected, "reshape them to one row per token")
    if weights.shape != experts.shape:
        expected, mend = f"weights {list(experts.shape)}", "pass one weight for each choice"
        fail(op, "experts and weights differ in shape.", got, expected, mend)
    if x.shape[1] != prepared.wi_0.shape[1]:
        expected, mend = f"wi_0 [e, {x.shape[1]}, f]", "if wi_0 is [e, f, h], swap its last dims"
        fail(op, "dim h differs between x and wi_0.", got, expected, mend)
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        fail(op, "experts are no integers.", got, "int [t, top_k]", "cast them", TypeError)


# ---- the custom_vjp -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _experts(x, experts, weights, prepared, slots, block: Block):
    return _forward(x, experts, weights, prepared, slots, block)[0]


def _forward(x, experts, weights, prepared, slots, block: Block):
    """Residuals: x in FP8, a row for each token; SwiGLU's input in FP8; weights, in FP8 if copies
    were made; who goes where."""
    top_k, e = experts.shape[1], prepared.wi_0.shape[0]
    xq = _received(_pad_h(x), slots, block)
    permutation = permutation_of(experts, e)
    if block.capacity is not None:
        permutation = cut(permutation, block.capacity)
    token, row_weight = permutation.order // top_k, weights.reshape(-1)[permutation.order]
    products = _ragged_products if block.capacity is None else _masked_products
    matrices = operand(prepared, "up"), operand(prepared, "down")
    y, hq = products(xq, token, row_weight, permutation.group_sizes, matrices, block)
    y = _collected(y, permutation, top_k, slots, x, block)
    saved = save(xq, "moe_x"), save(hq, "moe_h")
    back = operand(prepared, "down_back"), operand(prepared, "up_back")
    # Empty arrays that remember dtypes and shapes.
    like = [a[:0] for a in (x, prepared.wi_0, prepared.wi_1, prepared.wo)]
    return y, (*saved, back, permutation, weights, slots, like)


def _backward(block: Block, residuals, dy):
    saved_x, saved_h, (down, up), permutation, weights, slots, like = residuals
    sizes, top_k, scale = permutation.group_sizes, weights.shape[1], block.scale
    token, row_weight = permutation.order // top_k, weights.reshape(-1)[permutation.order]
    by_groups = {"scale": scale, "group_sizes": sizes, "index": token}
    if block.exchange is not None and block.exchange.wire == "fp8":
        received = _received(_pad_h(dy), slots, block)
        dyq, dyt = _take(received, token), requantize(received, **by_groups)
    else:
        dyq, dyt = quantize_both(_sent(_pad_h(dy), slots, block), **by_groups)
    da = multiply(dyq, down, sizes, transposed=False)
    dh, gate_t, up_t, at, d_row_weight = swiglu_backward(
        from_bits(saved_h), da, row_weight, sizes, scale=scale
    )
    dx = multiply(dh, up, sizes, transposed=False)
    dx = _collected(dx, permutation, top_k, slots, like[0], block)
    d_down = _contracting(at, dyt, sizes, like[3].dtype)
    # x is turned once its place may be that of dy turned: XLA would do it before all else.
    saved_x, d_down = jax.lax.optimization_barrier((saved_x, d_down))
    xt = requantize(from_bits(saved_x), **by_groups)
    d_kernels = [
        _contracting(xt, gate_t, sizes, like[1].dtype),
        _contracting(xt, up_t, sizes, like[2].dtype),
        d_down,
    ]
    d_weights = rows_or_zero(d_row_weight, permutation.inverse()).reshape(weights.shape)
    return dx, None, d_weights, _weight_gradients(d_kernels, like[1:]), None


_experts.defvjp(_forward, _backward)


def _weight_gradients(kernels, like) -> PreparedExperts:
    """Takes the filling off; in the dtypes of the weights."""
    gradients = [
        gradient[:, : a.shape[1], : a.shape[2]].astype(a.dtype)
        for gradient, a in zip(kernels, like, strict=True)
    ]
    return PreparedExperts(*gradients, None)


# ---- the products -------------------------------------------------------------------------------


def _contracting(lhs: QArray, rhs: QArray, sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Gradients of weights; float32 but for weights that are themselves bfloat16."""
    out_dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    return gemm(lhs, rhs, sizes, variant="ragged_contracting", out_dtype=out_dtype)


def _ragged_products(xq, token, row_weight, sizes, matrices, block: Block):
    """Returns the weighted results [rows, h] and SwiGLU's input in FP8 [rows, 2f], end to end."""
    up, down = matrices
    h = multiply(_take(xq, token), up, sizes, transposed=True)
    a = swiglu_quantize(h, row_weight, group_sizes=sizes, scale=block.scale)
    y = multiply(a, down, sizes, transposed=True)
    return y, quantize_rows(h, scale=block.scale, group_sizes=sizes)


def _masked_products(xq, token, row_weight, sizes, matrices, block: Block):
    """The same by way of slots [e, capacity], of which each expert's first ones are computed.

    The others hold anything, NaN too, but no row of the results takes from them, and a row's
    scales are its own.
    """
    up, down = matrices
    rows, e = token.shape[0], sizes.shape[0]
    capacity = min(block.capacity, rows)
    starts = jnp.cumsum(sizes) - sizes
    row = (starts[:, None] + jnp.arange(capacity)).reshape(-1)
    row = jnp.minimum(row, rows - 1)  # of each slot; any where it holds nothing

    def masked(lhs, rhs):
        lhs = jax.tree.map(lambda x: x.reshape(e, capacity, -1), lhs)
        product = multiply(lhs, rhs, sizes, transposed=True, variant="masked")
        return product.reshape(e * capacity, -1)

    h = masked(_take(xq, token[row]), up)
    y = masked(swiglu_quantize(h, row_weight[row], scale=block.scale), down)
    group = jnp.minimum(group_of_row(sizes, rows), e - 1)
    slot = group * capacity + jnp.arange(rows) - starts[group]  # of each row; any past the groups
    return y[slot], _take(quantize(h, scale=block.scale), slot)


# ---- rows ---------------------------------------------------------------------------------------


def _take(q: QArray, index: jax.Array) -> QArray:
    """Rows of q. Bytes travel in fours: XLA moves 16 bytes a thread then, and only 4 otherwise."""

    def take(x: jax.Array) -> jax.Array:
        if x.dtype != jnp.uint8:
            return x[index]
        fours = jax.lax.bitcast_convert_type(x.reshape(len(x), -1, 4), jnp.uint32)
        return jax.lax.bitcast_convert_type(fours[index], jnp.uint8).reshape(-1, x.shape[1])

    return map_rows(take, q)


def _collected(rows, permutation, top_k: int, slots, like: jax.Array, block: Block) -> jax.Array:
    """Returns the sum of each own token's rows, as wide as `like` and of its dtype."""
    dtype = like.dtype if block.exchange is None else jnp.bfloat16  # what travels is bf16
    sums = collect(sum_rows(rows, permutation, top_k, dtype), block.exchange, slots)
    return sums[:, : like.shape[1]].astype(like.dtype)


def _pad_h(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % K_MULTIPLE)])


def _sent(x: jax.Array, slots: Slots | None, block: Block) -> jax.Array:
    if block.exchange is None:
        return x
    return send(x.astype(jnp.bfloat16), block.exchange, slots)


def _received(x: jax.Array, slots: Slots | None, block: Block) -> QArray:
    """What the experts' device has of everybody's x, scaled by 1x128."""
    if block.exchange is not None and block.exchange.wire == "fp8":
        return send_quantized(quantize(x, scale=block.scale), block.exchange, slots)
    return quantize(_sent(x, slots, block), scale=block.scale)
