"""A whole mixture-of-experts layer: router, experts, shared experts; on one device or on many."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jax_fp8gemm._bind.meshes import vary_alike
from jax_fp8gemm._core.checks import as_float, check_bool, check_option, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding, ScoreFunction, Wire
from jax_fp8gemm._moe.activations import Activation, activate, check_activation, is_gated
from jax_fp8gemm._moe.block import ExpertSpec, check_batch_invariant, check_tokens
from jax_fp8gemm._moe.exchange import axis_size
from jax_fp8gemm._moe.experts import run_experts
from jax_fp8gemm._moe.kernels import ExpertKernels, as_kernels, describe_kernels
from jax_fp8gemm._moe.placement import (
    AxisNames,
    ExpertAxes,
    Placement,
    TokenAxes,
    are_manual,
    axes_of,
    exchange_of,
    place,
    ready_outside,
    received_rows,
    size_of,
)
from jax_fp8gemm._moe.router import Router, as_router, route_spec
from jax_fp8gemm._moe.routing import RouteSpec, Routing
from jax_fp8gemm._moe.weights import ready, shared_matrices
from jax_fp8gemm._ops.bf16 import check_precision
from jax_fp8gemm._ops.matmul import fp8_matmul

# What layers pass on.
OPTIONS = (
    "top_k",
    "score_function",
    "normalize",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "capacity_factor",
    "device_capacity_factor",
    "expert_axis",
    "tensor_axis",
    "token_axes",
    "mesh",
    "exchange",
    "wire",
    "scale_rounding",
    "shared_columns",
    "cast_in_gemm",
    "precision",
    "activation",
    "batch_invariant",
)
FORMER_NAMES = {
    "score": "score_function",
    "scale": "scale_rounding (of FP8 numbers) or routed_scaling_factor (of gate weights)",
    "wi_0": "kernels=ExpertKernels(wi_0=, wi_1=, wo=)",
}


@renamed(**FORMER_NAMES)
def moe(
    x: jax.Array,
    gate_kernel: jax.Array | None,
    kernels: ExpertKernels,
    *,
    top_k: int | None = None,
    score_function: ScoreFunction = "softmax",
    bias: jax.Array | None = None,
    gate_bias: jax.Array | None = None,
    normalize: bool = True,
    routed_scaling_factor: float = 1.0,
    n_group: int | None = None,
    topk_group: int | None = None,
    logits: jax.Array | None = None,
    routing: Routing | None = None,
    capacity_factor: float | None = None,
    device_capacity_factor: float | None = None,
    shared: ExpertKernels | None = None,
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
) -> tuple[jax.Array, Routing]:
    """Routes each token to its experts and sums their weighted outputs; FP8 but for the router.

    routing = route(x · gate_kernel)
    y = expert_ffn(x, routing.expert_index, routing.gate_weights, kernels) + swiglu(x · shared)

    Args:
      x: bf16, f16 or f32 [..., h]; inside shard_map this device's tokens.
      gate_kernel: bf16, f16 or f32 [h, e]; logits are as exact as float32 products. None with
        logits or routing, which replace it.
      kernels: ExpertKernels with wi_0, wi_1 [e, h, f] and wo [e, f, h]; prepared or not. Or FP8
        weights, which are constants: QArrays [e, f, h] and [e, h, f]. Inside shard_map the shards
        of this device, in the order of the devices.
      top_k: see `route`.
      score_function: see `route`.
      bias: see `route`; it steers the choice alone, has no gradient, and is not gate_bias.
      gate_bias: bf16, f16 or f32 [e], added to the logits of gate_kernel, as in gpt-oss.
      normalize: see `route`.
      routed_scaling_factor: see `route`.
      n_group: see `route`.
      topk_group: see `route`. None of them with routing.
      logits: bf16, f16 or f32 [..., e], made elsewhere; split as x is.
      routing: the Routing of the tokens, flattened to one dim as moe returns it; split as x is.
      capacity_factor: None keeps every row. Else an expert takes capacity_factor times its even
        share of the rows at most. With exchange "all_to_all" it is a device that takes
        capacity_factor times its even share of a device's rows, at most all its tokens.
      device_capacity_factor: None: a device has memory for the rows of all tokens that it receives.
        Else for device_capacity_factor times its even share of them. Nothing is lost while they
        fit. Of more rows it takes first choices before second ones, in the order of tokens. The
        others add nothing and have no gradient, and Routing.dropped counts them.
      shared: ExpertKernels [h, fs], [h, fs], [fs, h] of an expert that sees every token; or
        QArrays [fs, h], [fs, h], [h, fs].
      expert_axis: the mesh axis, or axes, that split the experts. Inside shard_map it is one of its
        axes. Elsewhere moe makes its own shard_map, over all axes of the mesh.
      tensor_axis: the mesh axis, or axes, that split f.
      token_axes: the mesh axis, or axes, that split the first dim of x; or a PartitionSpec for
        x's dims before h. Losses are means over the tokens of all of them. None inside shard_map:
        expert_axis. None elsewhere: what x's type says on Explicit axes; and every Auto axis but
        tensor_axis, each over the first dim that it divides.
      mesh: None takes the mesh in use (`jax.set_mesh`), or that of the arrays' types.
      exchange: "all_gather" or "all_to_all", of tokens over expert_axis.
      wire: "fp8" or "bf16", how tokens travel. Results travel as bf16.
      scale_rounding: "pow2" or "none", see `quantize`. Copies of prepared kernels keep their own.
      shared_columns: of the gradients to kernels, as in `fp8_matmul`.
      cast_in_gemm: whether the GEMMs cast the kernels, see `fp8_ragged_dot`; None: decide.
      precision: "fp8" or "bf16", as in `fp8_matmul`; in bf16 tokens travel in bf16 too.
      activation: "swiglu", "geglu" (tanh), "squared_relu" of experts without wi_1, or a
        ClampedSwiglu; of the shared expert too. "swiglu" without biases has kernels of its own,
        the others take more passes.
      batch_invariant: whether a token's y, experts and weights have the same bits however many
        tokens stand beside it, see `gemm`. Not with a capacity, nor where a collective sums.

    Returns:
      y [..., h] of x's dtype, and the Routing of the tokens, flattened to one dim.

    Raises:
      ValueError: shapes do not fit, top_k is above e, experts do not split over the axis, there is
        no such axis, or an option is unknown or not possible. Not one of gate_kernel, logits and
        routing is given, or gate_bias without gate_kernel.
      TypeError: dtypes.
      NotImplementedError: a second derivative, or devices whose results cannot be batch_invariant.

    Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1.2 and 3.3.

    Example:
      kernels = ExpertKernels(wi_0=gate, wi_1=up, wo=down)
      y, routing = moe(x, gate_kernel, kernels, top_k=2)
      loss = task_loss(y) + 0.01 * routing.aux_loss + 0.001 * routing.z_loss
    """
    x = as_float("moe", "x", x)
    router = as_router(x, gate_kernel, gate_bias, logits, routing)
    check_activation("moe", activation)
    gated = is_gated(activation)
    kernels = as_kernels("moe", "kernels", kernels, gated=gated)
    if shared is not None:
        shared = as_kernels("moe", "shared", shared, ndim=2, gated=gated)
    axes = axes_of("moe", expert_axis, tensor_axis, token_axes)
    route = route_spec(
        router,
        bias,
        top_k,
        score_function=score_function,
        normalize=normalize,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        batch_invariant=batch_invariant,
    )
    spec = LayerSpec(
        route=route,
        capacity_factor=capacity_factor,
        device_capacity_factor=device_capacity_factor,
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
    spec.check()
    if not axes.any or are_manual("moe", axes):
        return _layer(spec, x, router, kernels, bias, shared)
    where = place("moe", x, kernels, axes, token_axes, mesh)
    return _over_devices(spec, where, x, router, kernels, bias, shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Static description of one layer; as the arguments of moe."""

    route: RouteSpec
    capacity_factor: float | None
    device_capacity_factor: float | None
    axes: ExpertAxes
    exchange: ExchangeKind
    wire: Wire
    scale_rounding: ScaleRounding
    shared_columns: bool
    cast_in_gemm: bool | None
    precision: Precision
    activation: Activation
    batch_invariant: bool

    def check(self) -> None:
        """Raises a ValueError or a TypeError for an option that is none."""
        check_option("moe", "exchange", self.exchange, ExchangeKind)
        check_option("moe", "wire", self.wire, Wire)
        check_precision("moe", self.precision, self.batch_invariant)
        check_option("moe", "scale_rounding", self.scale_rounding, ScaleRounding)
        check_bool("moe", "shared_columns", self.shared_columns)
        check_bool("moe", "cast_in_gemm", self.cast_in_gemm, or_none=True)
        _check_factor("capacity_factor", self.capacity_factor)
        _check_factor("device_capacity_factor", self.device_capacity_factor)
        check_bool("moe", "batch_invariant", self.batch_invariant)
        if self.batch_invariant:
            names = ("capacity_factor", "device_capacity_factor")
            bounds = {name: getattr(self, name) for name in names}
            check_batch_invariant("moe", self.axes, self.exchange, bounds)


def _over_devices(
    spec: LayerSpec,
    where: Placement,
    x: jax.Array,
    router: Router,
    kernels: ExpertKernels,
    bias: jax.Array | None,
    shared: ExpertKernels | None,
) -> tuple[jax.Array, Routing]:
    """Calls _layer in a shard_map of its own."""
    spec = dataclasses.replace(spec, axes=where.axes)
    whole, tokens = PartitionSpec(), where.tokens

    def local(x, router, kernels, bias, shared):
        router = router.each_token(lambda part: part.reshape(-1, part.shape[-1]))
        y, routing = _layer(spec, x, router, kernels, bias, shared)
        each = (routing.expert_index, routing.gate_weights, routing.scores)
        folded = [part.reshape(*x.shape[:-1], -1) for part in each]
        return y, folded, (routing.aux_loss, routing.z_loss, routing.dropped)

    kernels = ready_outside(
        "moe",
        kernels,
        where,
        rows=math.prod(x.shape[:-1]) * spec.route.top_k,
        x=x,
        rounding=spec.scale_rounding,
        wanted=spec.cast_in_gemm,
        precision=spec.precision,
    )
    router = router.each_token(lambda part: where.fold(part, x.shape[:-1]))
    if shared is not None:
        shared = where.halves("moe", "shared", shared)
    shared_specs = None if shared is None else where.kernels(shared)
    y, each, losses = where.run(
        local,
        (x, router, kernels, bias, shared),
        (tokens, router.specs(where), where.kernels(kernels), whole, shared_specs),
        (tokens, tokens, whole),
    )
    return where.like(y, x), Routing(*map(where.flat, each), *losses)


def _layer(
    spec: LayerSpec,
    x: jax.Array,
    router: Router,
    kernels: ExpertKernels,
    bias: jax.Array | None,
    shared: ExpertKernels | None,
) -> tuple[jax.Array, Routing]:
    """moe on one device, or on the shards of a device inside shard_map."""
    _check_experts(router, kernels, spec.axes)
    kernels = ready(
        "moe",
        kernels,
        rounding=spec.scale_rounding,
        rows=_rows_here(spec, x),
        others=(x,),
        wanted=spec.cast_in_gemm,
        precision=spec.precision,
    )
    tokens = x.reshape(-1, x.shape[-1])
    routing = router.decide(spec.route, tokens, bias, spec.axes.tokens or None)
    check_tokens("moe", tokens, routing.expert_index, routing.gate_weights, kernels)
    y, dropped = _routed(spec, tokens, routing, kernels)
    if shared is not None:
        y = y + _shared(spec, tokens, shared)
    return y.reshape(x.shape), dataclasses.replace(routing, dropped=dropped)


def _rows_here(spec: LayerSpec, x: jax.Array) -> int:
    """Returns how many rows the experts of a device have on average."""
    rows = received_rows(spec.axes, math.prod(x.shape[:-1]), spec.route.top_k)
    return rows // size_of(spec.axes.experts)


def _routed(
    spec: LayerSpec, tokens: jax.Array, routing: Routing, kernels: ExpertKernels
) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the chosen experts add, with the room that there is, and what had no room."""
    t, top_k = routing.expert_index.shape
    axes, factor, capacity, room = spec.axes, spec.capacity_factor, None, t
    via = exchange_of("moe", axes, spec.exchange, spec.wire)
    received, devices = received_rows(axes, t, top_k), size_of(axes.experts)
    if factor is not None and via is not None and via.kind == "all_to_all":
        room = min(t, max(1, math.ceil(factor * t * top_k / devices)))
    elif factor is not None:
        e = kernels.sizes[0] * devices
        capacity = min(received, max(1, math.ceil(factor * received / e)))
    most, factor = None, spec.device_capacity_factor
    if factor is not None:
        most = min(received, max(1, math.ceil(factor * received / devices)))
    experts = ExpertSpec(
        precision=spec.precision,
        activation=spec.activation,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        axes=axes,
        capacity=capacity,
        exchange=via,
        room=room,
        most_rows=most,
        batch_invariant=spec.batch_invariant,
    )
    choices = routing.expert_index, routing.gate_weights
    y, rows = run_experts(tokens, *choices, kernels, experts)
    if most is None:
        return y, None
    every = tuple(dict.fromkeys((*axes.tokens, *axes.experts, *axes.tensor)))
    # Devices of a tensor axis take the same rows.
    taken = jax.lax.psum(rows, every) // size_of(axes.tensor) if every else rows
    return y, t * top_k * size_of(axes.tokens) - taken


def _check_factor(name: str, factor: Any) -> None:
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if factor is not None and not (number and 0 < factor < math.inf):
        got, fix = f"{name}={factor!r}", "leave it out to keep every row"
        expected = "a finite number above 0, or None"
        fail("moe", f"{name} is not a positive number.", got, expected, fix)


def _check_experts(router: Router, kernels: ExpertKernels, axes: ExpertAxes) -> None:
    """Checks that the experts here are those of one device."""
    name, array = router.of_experts
    e, own = array.shape[-1], kernels.sizes[0]
    devices = axis_size("moe", axes.experts, e)
    if own * devices == e:
        return
    got = f"{describe(name, array)}, {describe_kernels(kernels)}"
    what = f"{own} experts here, {e} in {name}, over {devices} devices."
    fix = "pass all experts, or name expert_axis"
    if axes.experts:
        names = ", ".join(map(repr, axes.experts))
        fix = f"split the kernels over {names} by in_specs: P({names})"
    expected = f"wi_0 [{e // devices}, h, f]"
    fail("moe", what, got, "wo" + expected[4:] if kernels.is_fp8 else expected, fix)


def _shared(spec: LayerSpec, x: jax.Array, kernels: ExpertKernels) -> jax.Array:
    """The expert that sees every token; where tensor axes split it, what this device adds."""
    axes = spec.axes
    if axes.gathered:
        x = jax.lax.all_gather(x, axes.gathered, tiled=True)
    biases = kernels.wi_0_bias, kernels.wi_1_bias, kernels.wo_bias
    x, matrices, biases = vary_alike(x, shared_matrices(kernels), biases)
    matmul = functools.partial(
        fp8_matmul,
        preferred_element_type=x.dtype,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        precision=spec.precision,
        batch_invariant=spec.batch_invariant,
    )
    *wi, wo = matrices
    parts = [matmul(x, w).astype(jnp.float32) for w in wi]
    if kernels.wi is not None:
        parts = jnp.split(parts[0], 2, axis=-1)
    parts = [p if b is None else p + b[None] for p, b in zip(parts, biases, strict=False)]
    y = matmul(activate(parts, spec.activation).astype(x.dtype), wo)
    if biases[2] is not None:
        first = jax.lax.axis_index(axes.tensor) == 0 if axes.tensor else True
        y = y + jnp.where(first, biases[2], 0).astype(y.dtype)[None]
    if axes.gathered:
        y = jax.lax.psum_scatter(y, axes.gathered, tiled=True)
    here = tuple(axis for axis in axes.tensor if axis in axes.summed)
    return jax.lax.psum(y, here) if here else y
