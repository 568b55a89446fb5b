"""The expert block: gate, up, SwiGLU and down for tokens sorted by expert, all in FP8.

One custom_vjp with float arguments and results. What it saves, and the order of its GEMMs:
docs/moe.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm._bind.meshes import automatic, vary_alike
from jax_fp8gemm._core.bits import from_bits, map_rows, named, save, take_rows, to_bits
from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._core.layout import K_MULTIPLE, ceil_div
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._moe.block import ExpertSpec, permutation_here, rows_here
from jax_fp8gemm._moe.exchange import (
    Slots,
    collect,
    make_slots,
    send,
    send_together,
)
from jax_fp8gemm._moe.experts_bf16 import bf16_experts
from jax_fp8gemm._moe.kernels import ExpertKernels, without_biases
from jax_fp8gemm._moe.order import (
    rows_or_zero,
    sum_rows,
)
from jax_fp8gemm._moe.placement import (
    received_rows,
    size_of,
)
from jax_fp8gemm._moe.unfused import (
    Biases,
    Gradients,
    activated,
    activated_backward,
    add_bias,
    add_bias_backward,
    biases_of,
    is_fused,
)
from jax_fp8gemm._moe.weights import (
    are_constant,
    as_constants,
    float_matrices,
    multiply_by,
    operand,
    turned,
)
from jax_fp8gemm._ops.casts import (
    cast_both,
    cast_rows,
    cast_swiglu,
    cast_swiglu_backward,
    recast,
)
from jax_fp8gemm._ops.gemm import multiply


def run_experts(
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
    spec: ExpertSpec,
) -> tuple[jax.Array, jax.Array]:
    """As expert_ffn, checked; on the manual axes of a mesh with this device's tokens and experts.

    Experts are numbered over all devices.

    Returns:
      y [t, h], and int32 [] how many rows the experts of this device took.
    """
    if 0 in x.shape or 0 in expert_index.shape:
        return jnp.zeros_like(x), jnp.zeros_like(x, jnp.int32, shape=())
    slots, via, axes = None, spec.exchange, spec.axes
    if via is not None and via.kind == "all_to_all":
        own = kernels.sizes[0]
        slots = make_slots(expert_index, own, size_of(axes.experts), spec.room)
    if axes.experts:  # else all rows are here
        rows = received_rows(axes, *expert_index.shape) // size_of(axes.experts)
        expected = max(rows, 1) if isinstance(rows, int) else 0
        spec = dataclasses.replace(spec, expected_rows=expected)
    gate_weights = gate_weights.astype(jnp.float32)
    block: Callable = _experts if spec.precision == "fp8" else bf16_experts
    run = automatic(lambda *operands: block(*operands, spec), x, None)
    if kernels.wo_bias is not None and axes.tensor:  # results are added up over these axes
        first = jax.lax.axis_index(axes.tensor) == 0
        kernels = dataclasses.replace(kernels, wo_bias=jnp.where(first, kernels.wo_bias, 0))
    biases = Biases(None, None)
    if spec.precision == "fp8":
        biases, kernels = biases_of(kernels, spec), as_constants(without_biases(kernels))
    y, rows = run(*vary_alike(x, expert_index, gate_weights, kernels, slots, biases))
    return (jax.lax.psum(y, axes.summed) if axes.summed else y), rows


# ---- the custom_vjp -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _experts(x, expert_index, gate_weights, kernels, slots, biases, spec: ExpertSpec):
    return _forward(x, expert_index, gate_weights, kernels, slots, biases, spec)[0]


def _forward(x, expert_index, gate_weights, kernels, slots, biases, spec: ExpertSpec):
    """Residuals: x in FP8, a row for each token; SwiGLU's input in FP8; kernels, in FP8 if copies
    were made; who goes where."""
    # An empty slot holds zeros, so that what travels is the number of the expert plus one.
    choices = expert_index + 1, gate_weights
    xq, (expert_index, gate_weights) = _received(_pad_h(x), slots, spec, *choices)
    if spec.exchange is not None:  # what remembers x need not send it again for these
        expert_index = checkpoint_name(expert_index, "moe_x")
        gate_weights = checkpoint_name(gate_weights, "moe_x")
        expert_index, kernels = _cast_meanwhile(expert_index, kernels)
    xq, saved_x = named(xq, "moe_x")
    count = jax.tree.leaves(kernels)[0].shape[0]
    permutation = permutation_here(expert_index - 1, count, spec)
    token, row_weight = rows_here(permutation, gate_weights)
    gemms = _ragged_gemms if spec.capacity is None else _masked_gemms
    matrices = operand(kernels, "up"), operand(kernels, "down")
    y, hq = gemms(xq, token, row_weight, permutation.group_sizes, (*matrices, biases), spec)
    y = add_bias(y, row_weight, biases.down, permutation.group_sizes)
    y = _collected(y, permutation, gate_weights, slots, x, spec)
    saved = saved_x, save(hq, "moe_h")
    back = operand(kernels, "down_back"), operand(kernels, "up_back")
    # Empty arrays that remember dtypes and shapes.
    floats = () if are_constant(kernels) else float_matrices(kernels)
    like = [a[:0] for a in (x, *floats)]
    rows = permutation.group_sizes.sum(dtype=jnp.int32)
    return (y, rows), (*saved, back, permutation, gate_weights, slots, biases, like)


# NOTE: jitted, for jax.vmap with spmd_axis_name around shard_map: op by op, JAX 0.10.2 takes the
# constants of a backward rule for unsharded, and refuses to add them to what is sharded.
@functools.partial(jax.jit, static_argnums=0)
def _backward(spec: ExpertSpec, residuals, gradients):
    dy, _ = gradients
    saved_x, saved_h, (down, up), permutation, gate_weights, slots, biases, like = residuals
    sizes, rounding = permutation.group_sizes, spec.scale_rounding
    token, row_weight = rows_here(permutation, gate_weights)
    shared, constant = spec.shared_columns, len(like) == 1
    if constant:
        down, up = turned(down), turned(up)
    by_groups: dict[str, Any] = {
        "scale_rounding": rounding,
        "group_sizes": sizes,
        "index": token,
        "share": spec.share(token.shape[0]),
    }
    if spec.exchange is not None and spec.exchange.wire == "fp8":
        received, _ = _received(_pad_h(dy), slots, spec)
        dyq, dyt = _take(received, token), recast(received, **by_groups, shared_columns=shared)
    else:
        dyq, dyt = cast_both(_sent(_pad_h(dy), slots, spec), **by_groups, shared_columns=shared)
    expected = spec.expected_rows
    da = multiply_by(down, dyq, sizes, transposed=False, expected_rows=expected)
    d = _activation_gradients(from_bits(saved_h), da, row_weight, biases, sizes, spec)
    dx = multiply_by(up, d.h, sizes, transposed=False, expected_rows=expected)
    dx = _collected(dx, permutation, gate_weights, slots, like[0], spec)
    d_row_weight, d_biases = d.row_weight, Biases(d.bias, None)
    if biases.down is not None:
        more, d_bias = add_bias_backward(dyq, row_weight, biases.down, sizes)
        d_row_weight, d_biases = d_row_weight + more, Biases(d.bias, d_bias)
    if constant:
        d_weights = _weight_gradients(d_row_weight, permutation, gate_weights, slots, spec)
        return dx, None, d_weights, None, None, d_biases
    contracting = functools.partial(_contracting, sizes=sizes, expected=expected)
    d_down = contracting(d.activation_transposed, dyt, dtype=like[-1].dtype)
    # x is transposed once it may take the place of dy's transpose: XLA would do it first of all.
    saved_x, d_down = jax.lax.optimization_barrier((saved_x, d_down))
    xt = recast(from_bits(saved_x), **by_groups)
    d_up = [contracting(xt, q, dtype=like[1].dtype) for q in d.transposed]
    d_weights = _weight_gradients(d_row_weight, permutation, gate_weights, slots, spec)
    d_kernels = _kernel_gradients([*d_up, d_down], like[1:])
    return dx, None, d_weights, d_kernels, None, d_biases


_experts.defvjp(_forward, _backward)


def _weight_gradients(rows, permutation, gate_weights, slots, spec: ExpertSpec) -> jax.Array:
    """Returns the gradient to each own choice's weight, of the gradients to rows' weights."""
    gradients = rows_or_zero(rows, permutation.inverse(gate_weights.size))
    return collect(gradients.reshape(gate_weights.shape), spec.exchange, slots)


def _kernel_gradients(gradients: list[jax.Array], like: list[jax.Array]) -> ExpertKernels:
    """Takes the padding off; in the dtypes of the kernels."""
    *wi, wo = (
        gradient[:, : a.shape[1], : a.shape[2]].astype(a.dtype)
        for gradient, a in zip(gradients, like, strict=True)
    )
    return ExpertKernels(wi_0=wi[0], wi_1=wi[1] if len(wi) == 2 else None, wo=wo)


def _activation_gradients(h, da, row_weight, biases, sizes, spec: ExpertSpec) -> Gradients:
    if not is_fused(spec, biases):
        return activated_backward(h, da, row_weight, biases.up, sizes, spec)
    d = cast_swiglu_backward(
        h,
        da,
        row_weight,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        group_sizes=sizes,
        share=spec.share(da.shape[0]),
    )
    transposed = [d.gate_transposed, d.up_transposed]
    return Gradients(d.h, transposed, d.activation_transposed, d.row_weight, None)


# ---- the GEMMs ----------------------------------------------------------------------------------


def _contracting(
    lhs: QArray, rhs: QArray, sizes: jax.Array, dtype: jnp.dtype, expected: int
) -> jax.Array:
    """Gradients of kernels; float32 but for kernels that are themselves bfloat16."""
    out = dtype if dtype == jnp.bfloat16 else jnp.float32
    how: dict[str, Any] = {"variant": "ragged_contracting", "scales": "1x128_1x128"}
    return multiply(lhs, rhs, out, sizes, **how, expected_rows=expected)


def _ragged_gemms(xq, token, row_weight, sizes, matrices, spec: ExpertSpec):
    """Returns the weighted results [rows, h] and SwiGLU's input in FP8 [rows, 2f], end to end."""
    up, down, biases = matrices
    options: dict[str, Any] = {
        "scale_rounding": spec.scale_rounding,
        "group_sizes": sizes,
        "share": spec.share(token.shape[0]),
    }
    how: dict[str, Any] = {
        "transposed": True,
        "expected_rows": spec.expected_rows,
        "batch_invariant": spec.batch_invariant,
    }
    h = multiply_by(up, _take(xq, token), sizes, **how)
    if is_fused(spec, biases):
        (a,) = cast_swiglu(h, row_weight, **options)
    else:
        group = group_of_row(sizes, h.shape[0])
        real = activated(h, row_weight, biases.up, group, spec)
        a = cast_rows(real.astype(jnp.bfloat16), **options)
    y = multiply_by(down, a, sizes, **how)
    return y, cast_rows(h, **options)


def _masked_gemms(xq, token, row_weight, sizes, matrices, spec: ExpertSpec):
    """The same by way of slots [e, capacity], of which each expert's first ones are computed.

    The others hold anything, NaN too. But no row of the results takes from them, and a row's scales
    are its own.
    """
    up, down, biases = matrices
    rows, e, rounding = token.shape[0], sizes.shape[0], spec.scale_rounding
    assert spec.capacity is not None
    capacity = min(spec.capacity, rows)
    starts = jnp.cumsum(sizes) - sizes
    row = (starts[:, None] + jnp.arange(capacity)[None]).reshape(-1)
    row = jnp.minimum(row, rows - 1)  # of each slot; any where it holds nothing

    # How many rows an expert has on average: decides on the blocks.
    most = spec.expected_rows or rows
    expected = min(capacity, ceil_div(most, e)) if isinstance(most, int) else 0

    def masked(lhs, rhs):
        lhs = jax.tree.map(lambda x: x.reshape(e, capacity, -1), lhs)
        how = {"transposed": True, "variant": "masked", "expected_rows": expected}
        out = multiply_by(rhs, lhs, sizes, **how)
        return out.reshape(e * capacity, -1)

    h = masked(_take(xq, token[row]), up)
    if is_fused(spec, biases):
        (a,) = cast_swiglu(h, row_weight[row], scale_rounding=rounding)
    else:
        real = activated(h, row_weight[row], biases.up, jnp.arange(len(h)) // capacity, spec)
        a = cast_rows(real.astype(jnp.bfloat16), scale_rounding=rounding)
    y = masked(a, down)
    group = jnp.minimum(group_of_row(sizes, rows), e - 1)
    slot = group * capacity + jnp.arange(rows) - starts[group]  # of each row; any past the groups
    return y[slot], _take(cast_rows(h, scale_rounding=rounding), slot)


def _cast_meanwhile(received: jax.Array, kernels: ExpertKernels) -> tuple[jax.Array, ExpertKernels]:
    """Lets the casts of kernels run while tokens travel: what needs `received` waits for both.

    XLA would cast each matrix just before its GEMM, and have nothing to do meanwhile.
    """
    if kernels.copies is None or are_constant(kernels):
        return received, kernels
    # The scales stand for what is made with them.
    scales = {name: scale for name, (_, scale) in kernels.copies.items()}
    received, scales = jax.lax.optimization_barrier((received, scales))
    copies = {name: (bits, scales[name]) for name, (bits, _) in kernels.copies.items()}
    return received, dataclasses.replace(kernels, copies=copies)


# ---- rows ---------------------------------------------------------------------------------------


def _take(q: QArray, index: jax.Array) -> QArray:
    return map_rows(lambda x: take_rows(x, index), q)


def _collected(rows, permutation, gate_weights, slots, like: jax.Array, spec: ExpertSpec):
    """Returns the sum of each own token's rows, as wide as `like` and of its dtype."""
    dtype = like.dtype if spec.exchange is None else jnp.bfloat16  # what travels is bf16
    tokens, top_k = gate_weights.shape
    same = spec.batch_invariant
    sums = sum_rows(rows, permutation, top_k, dtype, tokens, in_order=same)
    sums = collect(sums, spec.exchange, slots, in_order=same)
    return sums[:, : like.shape[1]].astype(like.dtype)


def _pad_h(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % K_MULTIPLE)])


def _sent(x: jax.Array, slots: Slots | None, spec: ExpertSpec) -> jax.Array:
    if spec.exchange is None:
        return x
    return send(x.astype(jnp.bfloat16), spec.exchange, slots)


def _received(
    x: jax.Array, slots: Slots | None, spec: ExpertSpec, *beside: jax.Array
) -> tuple[QArray, list[jax.Array]]:
    """What the experts' device has of everybody's x, scaled by 1x128, and of what goes with it."""
    via, rounding = spec.exchange, spec.scale_rounding
    if via is not None and via.wire == "bf16":
        floats, *others = send_together((x.astype(jnp.bfloat16), *beside), via, slots)
        return cast_rows(floats, scale_rounding=rounding), others
    bits = to_bits(cast_rows(x, scale_rounding=rounding))
    values, scale, *others = send_together((*bits, *beside), via, slots)
    return from_bits((values, scale)), others
