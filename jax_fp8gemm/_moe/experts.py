"""The expert block: gate, up, SwiGLU and down for tokens sorted by expert, all in FP8.

One custom_vjp with float arguments and results. What it saves, and the order of its GEMMs:
docs/moe.md.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm._bind.meshes import automatic, vary_alike
from jax_fp8gemm._core.bits import from_bits, map_rows, named, save, take_rows, to_bits
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._core.layout import K_MULTIPLE
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ExchangeKind, ScaleRounding
from jax_fp8gemm._moe.exchange import (
    Slots,
    TokenExchange,
    collect,
    make_slots,
    send,
    send_together,
)
from jax_fp8gemm._moe.placement import (
    ExpertAxes,
    size_of,
)
from jax_fp8gemm._moe.routing import (
    Permutation,
    cut,
    first_choices,
    permutation_of,
    rows_or_zero,
    sum_rows,
)
from jax_fp8gemm._moe.weights import (
    ExpertKernels,
    multiply_by,
    operand,
)
from jax_fp8gemm._ops.casts import (
    cast_both,
    cast_rows,
    cast_swiglu,
    cast_swiglu_backward,
    recast,
)
from jax_fp8gemm._ops.gemm import multiply


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Static description of one expert block; as the arguments of expert_ffn.

    Attributes:
      axes: manual axes of the mesh.
      room: tokens that a device sends to another one at most, by all_to_all.
      most_rows: that the experts of a device take at most; None: all.
      batch_invariant: of y.
    """

    scale_rounding: ScaleRounding
    shared_columns: bool
    axes: ExpertAxes
    capacity: int | None = None
    exchange: TokenExchange | None = None
    room: int = 0
    most_rows: int | None = None
    batch_invariant: bool = False


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
        own = kernels.wi_0.shape[0]
        slots = make_slots(expert_index, own, size_of(axes.experts), spec.room)
    gate_weights = gate_weights.astype(jnp.float32)
    run = automatic(lambda *operands: _experts(*operands, spec), x, None)
    y, rows = run(*vary_alike(x, expert_index, gate_weights, kernels, slots))
    return (jax.lax.psum(y, axes.summed) if axes.summed else y), rows


def check_tokens(
    op: str,
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
) -> None:
    named = {"x": x, "expert_index": expert_index, "gate_weights": gate_weights}
    got = ", ".join(
        describe(name, value) for name, value in (named | {"wi_0": kernels.wi_0}).items()
    )
    if (x.ndim, expert_index.ndim) != (2, 2) or expert_index.shape[0] != x.shape[0]:
        expected, fix = "x [t, h], expert_index [t, top_k]", "reshape them to one row per token"
        fail(op, "x and expert_index do not fit.", got, expected, fix)
    if gate_weights.shape != expert_index.shape:
        expected, fix = (
            f"gate_weights {list(expert_index.shape)}",
            "pass one weight for each choice",
        )
        fail(op, "expert_index and gate_weights differ in shape.", got, expected, fix)
    if x.shape[1] != kernels.wi_0.shape[1]:
        expected, fix = f"wi_0 [e, {x.shape[1]}, f]", "if wi_0 is [e, f, h], swap its last dims"
        fail(op, "dim h differs between x and wi_0.", got, expected, fix)


def check_batch_invariant(
    op: str, axes: ExpertAxes, exchange: ExchangeKind, bounds: dict[str, float | None]
) -> None:
    """Raises where the rows that stand beside a token may change its result.

    Args:
      bounds: by name, what limits the rows that are computed.
    """
    given = [f"{name}={value}" for name, value in bounds.items() if value is not None]
    if given:
        what = "other tokens decide which rows have room, so nothing is batch_invariant."
        fix = "leave it out, so that every row is kept"
        fail(op, what, f"batch_invariant=True, {', '.join(given)}", "no bound on rows", fix)
    if axes.tensor or (axes.experts and exchange == "all_gather"):
        what = "results are summed by a collective, whose order may depend on the number of rows."
        got = f"batch_invariant=True, expert_axis={axes.experts}, tensor_axis={axes.tensor}, "
        got += f"exchange={exchange!r}"
        expected, fix = "sums in a fixed order", 'leave tensor_axis out, and pass "all_to_all"'
        fail(op, what, got, expected, fix, NotImplementedError)


# ---- the custom_vjp -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _experts(x, expert_index, gate_weights, kernels, slots, spec: ExpertSpec):
    return _forward(x, expert_index, gate_weights, kernels, slots, spec)[0]


def _forward(x, expert_index, gate_weights, kernels, slots, spec: ExpertSpec):
    """Residuals: x in FP8, a row for each token; SwiGLU's input in FP8; kernels, in FP8 if copies
    were made; who goes where."""
    # An empty slot holds zeros, so that what travels is the number of the expert plus one.
    choices = expert_index + 1, gate_weights
    xq, (expert_index, gate_weights) = _received(_pad_h(x), slots, spec, *choices)
    if spec.exchange is not None:  # what remembers x need not send it again for these
        expert_index = checkpoint_name(expert_index, "moe_x")
        gate_weights = checkpoint_name(gate_weights, "moe_x")
    xq, saved_x = named(xq, "moe_x")
    permutation = _permutation(expert_index - 1, kernels.wi_0.shape[0], spec)
    token, row_weight = _rows(permutation, gate_weights)
    gemms = _ragged_gemms if spec.capacity is None else _masked_gemms
    matrices = operand(kernels, "up"), operand(kernels, "down")
    y, hq = gemms(xq, token, row_weight, permutation.group_sizes, matrices, spec)
    y = _collected(y, permutation, gate_weights, slots, x, spec)
    saved = saved_x, save(hq, "moe_h")
    back = operand(kernels, "down_back"), operand(kernels, "up_back")
    # Empty arrays that remember dtypes and shapes.
    like = [a[:0] for a in (x, kernels.wi_0, kernels.wi_1, kernels.wo)]
    rows = permutation.group_sizes.sum(dtype=jnp.int32)
    return (y, rows), (*saved, back, permutation, gate_weights, slots, like)


# NOTE: jitted, for jax.vmap with spmd_axis_name around shard_map: op by op, JAX 0.10.2 takes the
# constants of a backward rule for unsharded, and refuses to add them to what is sharded.
@functools.partial(jax.jit, static_argnums=0)
def _backward(spec: ExpertSpec, residuals, gradients):
    dy, _ = gradients
    saved_x, saved_h, (down, up), permutation, gate_weights, slots, like = residuals
    sizes, rounding = permutation.group_sizes, spec.scale_rounding
    token, row_weight = _rows(permutation, gate_weights)
    shared = spec.shared_columns
    by_groups = {"scale_rounding": rounding, "group_sizes": sizes, "index": token}
    if spec.exchange is not None and spec.exchange.wire == "fp8":
        received, _ = _received(_pad_h(dy), slots, spec)
        dyq, dyt = _take(received, token), recast(received, **by_groups, shared_columns=shared)
    else:
        dyq, dyt = cast_both(_sent(_pad_h(dy), slots, spec), **by_groups, shared_columns=shared)
    da = multiply_by(down, dyq, sizes, transposed=False)
    d = cast_swiglu_backward(
        from_bits(saved_h),
        da,
        row_weight,
        scale_rounding=rounding,
        shared_columns=shared,
        group_sizes=sizes,
    )
    dx = multiply_by(up, d.h, sizes, transposed=False)
    dx = _collected(dx, permutation, gate_weights, slots, like[0], spec)
    d_down = _contracting(d.activation_transposed, dyt, sizes, like[3].dtype)
    # x is transposed once it may take the place of dy's transpose: XLA would do it first of all.
    saved_x, d_down = jax.lax.optimization_barrier((saved_x, d_down))
    xt = recast(from_bits(saved_x), **by_groups)
    d_kernels = [
        _contracting(xt, d.gate_transposed, sizes, like[1].dtype),
        _contracting(xt, d.up_transposed, sizes, like[2].dtype),
        d_down,
    ]
    d_weights = rows_or_zero(d.row_weight, permutation.inverse(gate_weights.size))
    d_weights = collect(d_weights.reshape(gate_weights.shape), spec.exchange, slots)
    return dx, None, d_weights, _kernel_gradients(d_kernels, like[1:]), None


_experts.defvjp(_forward, _backward)


def _permutation(expert_index: jax.Array, e: int, spec: ExpertSpec) -> Permutation:
    """Returns the order of the rows of this device's e experts."""
    if spec.axes.experts:
        expert_index = expert_index - e * jax.lax.axis_index(spec.axes.experts)
    if spec.most_rows is not None:
        expert_index = first_choices(expert_index, e, spec.most_rows)
    permutation = permutation_of(expert_index, e)
    if spec.capacity is not None:
        permutation = cut(permutation, spec.capacity)
    if spec.most_rows is not None:  # the rest lies past the groups
        permutation = dataclasses.replace(permutation, order=permutation.order[: spec.most_rows])
    return permutation


def _rows(permutation: Permutation, gate_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the token of each row, and its weight."""
    token = permutation.order // gate_weights.shape[1]
    return token, gate_weights.reshape(-1)[permutation.order]


def _kernel_gradients(gradients: list[jax.Array], like: list[jax.Array]) -> ExpertKernels:
    """Takes the padding off; in the dtypes of the kernels."""
    wi_0, wi_1, wo = (
        gradient[:, : a.shape[1], : a.shape[2]].astype(a.dtype)
        for gradient, a in zip(gradients, like, strict=True)
    )
    return ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)


# ---- the GEMMs ----------------------------------------------------------------------------------


def _contracting(lhs: QArray, rhs: QArray, sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Gradients of kernels; float32 but for kernels that are themselves bfloat16."""
    out = dtype if dtype == jnp.bfloat16 else jnp.float32
    return multiply(lhs, rhs, out, sizes, variant="ragged_contracting", scales="1x128_1x128")


def _ragged_gemms(xq, token, row_weight, sizes, matrices, spec: ExpertSpec):
    """Returns the weighted results [rows, h] and SwiGLU's input in FP8 [rows, 2f], end to end."""
    up, down = matrices
    options: dict[str, Any] = {"scale_rounding": spec.scale_rounding, "group_sizes": sizes}
    how: dict[str, Any] = {"transposed": True, "batch_invariant": spec.batch_invariant}
    h = multiply_by(up, _take(xq, token), sizes, **how)
    (a,) = cast_swiglu(h, row_weight, **options)
    y = multiply_by(down, a, sizes, **how)
    return y, cast_rows(h, **options)


def _masked_gemms(xq, token, row_weight, sizes, matrices, spec: ExpertSpec):
    """The same by way of slots [e, capacity], of which each expert's first ones are computed.

    The others hold anything, NaN too. But no row of the results takes from them, and a row's scales
    are its own.
    """
    up, down = matrices
    rows, e, rounding = token.shape[0], sizes.shape[0], spec.scale_rounding
    assert spec.capacity is not None
    capacity = min(spec.capacity, rows)
    starts = jnp.cumsum(sizes) - sizes
    row = (starts[:, None] + jnp.arange(capacity)[None]).reshape(-1)
    row = jnp.minimum(row, rows - 1)  # of each slot; any where it holds nothing

    def masked(lhs, rhs):
        lhs = jax.tree.map(lambda x: x.reshape(e, capacity, -1), lhs)
        out = multiply_by(rhs, lhs, sizes, transposed=True, variant="masked")
        return out.reshape(e * capacity, -1)

    h = masked(_take(xq, token[row]), up)
    (a,) = cast_swiglu(h, row_weight[row], scale_rounding=rounding)
    y = masked(a, down)
    group = jnp.minimum(group_of_row(sizes, rows), e - 1)
    slot = group * capacity + jnp.arange(rows) - starts[group]  # of each row; any past the groups
    return y[slot], _take(cast_rows(h, scale_rounding=rounding), slot)


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
