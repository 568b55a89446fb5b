"""expert_ffn: tokens through their chosen experts, on one device or over a mesh."""

import dataclasses
import functools

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from jax_fp8gemm._core.checks import (
    as_float,
    as_int32,
    check_bool,
    check_option,
    check_positive,
    renamed,
)
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding, Wire
from jax_fp8gemm._moe.activations import Activation, check_activation, is_gated
from jax_fp8gemm._moe.block import ExpertSpec, check_batch_invariant, check_tokens
from jax_fp8gemm._moe.experts import run_experts
from jax_fp8gemm._moe.kernels import ExpertKernels, as_kernels
from jax_fp8gemm._moe.placement import (
    AxisNames,
    ExpertAxes,
    TokenAxes,
    are_manual,
    axes_of,
    exchange_of,
    place,
    ready_outside,
    received_rows,
    size_of,
)
from jax_fp8gemm._moe.weights import ready
from jax_fp8gemm._ops.bf16 import check_precision


@renamed(
    experts="expert_index",
    weights="gate_weights",
    wi_0="kernels=ExpertKernels(wi_0=, wi_1=, wo=)",
    scale="scale_rounding",
)
def expert_ffn(
    x: jax.Array,
    expert_index: ArrayLike,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
    *,
    capacity: int | None = None,
    expert_axis: AxisNames | None = None,
    tensor_axis: AxisNames | None = None,
    token_axes: TokenAxes | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    exchange: ExchangeKind = "all_gather",
    wire: Wire = "fp8",
    scale_rounding: ScaleRounding = "pow2",
    shared_columns: bool = True,
    cast_in_gemm: bool | None = None,
    precision: Precision = "fp8",
    activation: Activation = "swiglu",
    batch_invariant: bool = False,
) -> jax.Array:
    """Sends each token through its experts, in FP8 forward and backward.

    y[t] = Σ_j gate_weights[t, j] · (silu(x[t] · wi_0[i]) * (x[t] · wi_1[i])) · wo[i],
    i = expert_index[t, j]

    Args:
      x: bf16, f16 or f32 [t, h].
      expert_index: int [t, top_k], on the device. One expert twice in a token is legal. A number
        outside 0..e-1 is no expert and adds nothing.
      gate_weights: f32 [t, top_k].
      kernels: ExpertKernels with wi_0, wi_1 [e, h, f] and wo [e, f, h]; prepared or not. Or FP8
        weights, which are constants: QArrays [e, f, h] and [e, h, f].
      capacity: rows that an expert takes at most, 1 or more. Later tokens' rows beyond it add
        nothing, and have no gradient. The forward GEMMs are then `masked`, else `ragged`. Over
        devices: of the tokens that its device receives.
      expert_axis: see `moe`.
      tensor_axis: see `moe`.
      token_axes: see `moe`.
      mesh: see `moe`.
      exchange: see `moe`.
      wire: see `moe`. expert_index numbers the experts of all devices.
      scale_rounding: "pow2" or "none", see `quantize`. Copies of prepared kernels keep their own.
      shared_columns: of the gradients to kernels, as in `fp8_matmul`.
      cast_in_gemm: whether the GEMMs cast the kernels, see `fp8_ragged_dot`; None: decide.
      precision: "fp8" or "bf16", as in `fp8_matmul`; in bf16 tokens travel in bf16 too.
      activation: "swiglu", "geglu" (tanh), "squared_relu" of experts without wi_1, or a
        ClampedSwiglu. "swiglu" without biases has kernels of its own.
      batch_invariant: of y, see `moe`.

    Returns:
      [t, h], of x's dtype. GEMMs have results in bf16, sums over top_k are float32. Gradients have
      the dtypes of x, gate_weights and kernels. Those of an expert without tokens are zero.

    Raises:
      ValueError: shapes do not fit, or an option is unknown or not possible.
      TypeError: dtypes.
      NotImplementedError: a second derivative, or devices whose results cannot be batch_invariant.

    Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1.2 and 3.3.

    Example:
      y = expert_ffn(x, routing.expert_index, routing.gate_weights, kernels)
    """
    op = "expert_ffn"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    check_option(op, "exchange", exchange, ExchangeKind)
    check_option(op, "wire", wire, Wire)
    check_precision(op, precision, batch_invariant)
    check_activation(op, activation)
    kernels = as_kernels(op, "kernels", kernels, gated=is_gated(activation))
    x, gate_weights = as_float(op, "x", x), as_float(op, "gate_weights", gate_weights)
    expert_index = as_int32(op, "expert_index", expert_index)
    check_bool(op, "shared_columns", shared_columns)
    check_bool(op, "cast_in_gemm", cast_in_gemm, or_none=True)
    check_tokens(op, x, expert_index, gate_weights, kernels)
    check_positive(op, "capacity", capacity)
    check_bool(op, "batch_invariant", batch_invariant)
    axes = axes_of(op, expert_axis, tensor_axis, token_axes)
    if batch_invariant:
        check_batch_invariant(op, axes, exchange, {"capacity": capacity})
    spec = FfnSpec(
        capacity=None if capacity is None else int(capacity),
        axes=axes,
        exchange=exchange,
        wire=wire,
        scale_rounding=scale_rounding,
        shared_columns=shared_columns,
        cast_in_gemm=cast_in_gemm,
        precision=precision,
        activation=activation,
        batch_invariant=batch_invariant,
    )
    if not axes.any or are_manual(op, axes):
        return _ffn(spec, x, expert_index, gate_weights, kernels)
    where = place(op, x, kernels, axes, token_axes, mesh)
    spec = dataclasses.replace(spec, axes=where.axes)
    kernels = ready_outside(
        op,
        kernels,
        where,
        rows=expert_index.size,
        x=x,
        rounding=scale_rounding,
        wanted=cast_in_gemm,
        precision=precision,
    )
    operands, tokens = (x, expert_index, gate_weights, kernels), where.tokens
    specs = tokens, tokens, tokens, where.kernels(kernels)
    return where.like(where.run(functools.partial(_ffn, spec), operands, specs, tokens), x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnSpec:
    """Static description of one call; as the arguments of expert_ffn."""

    capacity: int | None
    axes: ExpertAxes
    exchange: ExchangeKind
    wire: Wire
    scale_rounding: ScaleRounding
    shared_columns: bool
    cast_in_gemm: bool | None
    precision: Precision
    activation: Activation
    batch_invariant: bool


def _ffn(
    spec: FfnSpec,
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
) -> jax.Array:
    """expert_ffn on one device, or on the shards of a device inside shard_map."""
    op, (t, top_k) = "expert_ffn", expert_index.shape
    via = exchange_of(op, spec.axes, spec.exchange, spec.wire)
    received, here = received_rows(spec.axes, t, top_k), size_of(spec.axes.experts)
    kernels = ready(
        op,
        kernels,
        rounding=spec.scale_rounding,
        rows=received // here,
        others=(x,),
        wanted=spec.cast_in_gemm,
        precision=spec.precision,
    )
    experts = ExpertSpec(
        precision=spec.precision,
        activation=spec.activation,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        axes=spec.axes,
        capacity=None if spec.capacity is None else min(spec.capacity, received),
        exchange=via,
        room=t,
        batch_invariant=spec.batch_invariant,
    )
    return run_experts(x, expert_index, gate_weights, kernels, experts)[0]
