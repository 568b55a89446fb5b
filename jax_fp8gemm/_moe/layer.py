"""A whole mixture-of-experts layer: router, experts, shared experts; on one device or on many."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.meshes import vary_alike
from jax_fp8gemm._core.checks import as_float, check_bool, check_option, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.types import ExchangeKind, ScaleRounding, ScoreFunction, Wire
from jax_fp8gemm._moe.exchange import TokenExchange, axis_size, make_slots, send
from jax_fp8gemm._moe.experts import ExpertSpec, check_tokens, run_experts
from jax_fp8gemm._moe.gate import gate_logits
from jax_fp8gemm._moe.routing import Routing, route
from jax_fp8gemm._moe.weights import ExpertKernels, as_kernels, ready
from jax_fp8gemm._ops.matmul import fp8_matmul

# What layers pass on.
OPTIONS = (
    "top_k",
    "score_function",
    "normalize",
    "routed_scaling_factor",
    "capacity_factor",
    "exchange",
    "wire",
    "scale_rounding",
    "shared_columns",
    "cast_in_gemm",
)
FORMER_NAMES = {
    "score": "score_function",
    "scale": "scale_rounding (of FP8 numbers) or routed_scaling_factor (of gate weights)",
    "wi_0": "kernels=ExpertKernels(wi_0=, wi_1=, wo=)",
}


@renamed(**FORMER_NAMES)
def moe(
    x: jax.Array,
    gate_kernel: jax.Array,
    kernels: ExpertKernels,
    *,
    top_k: int,
    score_function: ScoreFunction = "softmax",
    bias: jax.Array | None = None,
    normalize: bool = True,
    routed_scaling_factor: float = 1.0,
    capacity_factor: float | None = None,
    shared: ExpertKernels | None = None,
    expert_axis: str | None = None,
    exchange: ExchangeKind = "all_gather",
    wire: Wire = "fp8",
    scale_rounding: ScaleRounding = "pow2",
    shared_columns: bool = True,
    cast_in_gemm: bool | None = None,
) -> tuple[jax.Array, Routing]:
    """Routes each token to its experts and sums their weighted outputs; FP8 but for the router.

    routing = route(x · gate_kernel)
    y = expert_ffn(x, routing.expert_index, routing.gate_weights, kernels) + swiglu(x · shared)

    Args:
      x: bf16, f16 or f32 [..., h]; with expert_axis this device's tokens.
      gate_kernel: bf16, f16 or f32 [h, e]; logits are as exact as float32 products.
      kernels: ExpertKernels with wi_0, wi_1 [e, h, f] and wo [e, f, h]; prepared or not. With
        expert_axis the experts of this device: e / devices of them, in the order of the devices.
      top_k, score_function, bias, normalize, routed_scaling_factor: see `route`.
      capacity_factor: None keeps every row. Else an expert takes capacity_factor times its even
        share of the rows at most. With exchange "all_to_all" it is a device that takes
        capacity_factor times its even share of a device's rows, at most all its tokens.
      shared: ExpertKernels [h, fs], [h, fs], [fs, h] of an expert that sees every token.
      expert_axis: inside shard_map, the mesh axis over which tokens and experts are split. Losses
        are those of all its tokens.
      exchange: "all_gather" or "all_to_all", of tokens over expert_axis.
      wire: "fp8" or "bf16", how tokens travel. Results travel as bf16.
      scale_rounding: "pow2" or "none", see `quantize`. Copies of prepared kernels keep their own.
      shared_columns: of the gradients to kernels, as in `fp8_matmul`.
      cast_in_gemm: whether the GEMMs cast the kernels, see `fp8_ragged_dot`; None: decide.

    Returns:
      y [..., h] of x's dtype, and the Routing of the tokens, flattened to one dim.

    Raises:
      ValueError: shapes do not fit, top_k is above e, experts do not split over the axis, or an
        option is unknown or not possible.
      TypeError: dtypes.
      NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1.2 and 3.3.

    Example:
      kernels = ExpertKernels(wi_0=gate, wi_1=up, wo=down)
      y, routing = moe(x, gate_kernel, kernels, top_k=2)
      loss = task_loss(y) + 0.01 * routing.aux_loss + 0.001 * routing.z_loss
    """
    options = {"score_function": ScoreFunction, "exchange": ExchangeKind, "wire": Wire}
    given = {"score_function": score_function, "exchange": exchange, "wire": wire}
    for name, literal in options.items():
        check_option("moe", name, given[name], literal)
    check_option("moe", "scale_rounding", scale_rounding, ScaleRounding)
    check_bool("moe", "normalize", normalize)
    check_bool("moe", "shared_columns", shared_columns)
    check_bool("moe", "cast_in_gemm", cast_in_gemm, or_none=True)
    x, gate_kernel = as_float("moe", "x", x), as_float("moe", "gate_kernel", gate_kernel)
    kernels = as_kernels("moe", "kernels", kernels)
    _check_capacity(capacity_factor)
    if shared is not None:
        shared = as_kernels("moe", "shared", shared, ndim=2)
    devices = _check_experts(x, gate_kernel, kernels, expert_axis)
    rows = math.prod(x.shape[:-1]) * top_k
    kernels = ready(
        "moe", kernels, rounding=scale_rounding, rows=rows, others=(x,), wanted=cast_in_gemm
    )
    tokens = x.reshape(-1, x.shape[-1])
    routing = route(
        gate_logits(tokens, gate_kernel),
        top_k,
        score_function=score_function,
        bias=bias,
        normalize=normalize,
        routed_scaling_factor=routed_scaling_factor,
        axis=expert_axis,
    )
    check_tokens("moe", tokens, routing.expert_index, routing.gate_weights, kernels)
    via = None
    if expert_axis is not None:
        via = TokenExchange(axis=expert_axis, kind=exchange, wire=wire)
    spec = ExpertSpec(scale_rounding=scale_rounding, shared_columns=shared_columns, exchange=via)
    y = _exchanged(tokens, routing, kernels, spec, devices, capacity_factor)
    if shared is not None:
        y = y + _shared(tokens, shared, spec)
    return y.reshape(x.shape), routing


def _check_capacity(capacity_factor: Any) -> None:
    number = isinstance(capacity_factor, int | float) and not isinstance(capacity_factor, bool)
    if capacity_factor is not None and not (number and 0 < capacity_factor < math.inf):
        got, fix = f"capacity_factor={capacity_factor!r}", "leave it out to keep every row"
        expected = "a finite number above 0, or None"
        fail("moe", "capacity_factor is not a positive number.", got, expected, fix)


def _check_experts(
    x: jax.Array, gate_kernel: jax.Array, kernels: ExpertKernels, expert_axis: str | None
) -> int:
    """Returns over how many devices the experts are split."""
    named = {"x": x, "gate_kernel": gate_kernel, "wi_0": kernels.wi_0}
    got = ", ".join(describe(name, value) for name, value in named.items())
    if x.ndim < 1 or gate_kernel.ndim != 2 or x.shape[-1] != gate_kernel.shape[0]:
        expected, fix = "x [..., h], gate_kernel [h, e]", "if it is [e, h], pass gate_kernel.T"
        fail("moe", "x and gate_kernel do not fit.", got, expected, fix)
    e, own = gate_kernel.shape[1], kernels.wi_0.shape[0]
    devices = 1 if expert_axis is None else axis_size("moe", expert_axis, e)
    if own * devices != e:
        what = f"{own} experts here, {e} in gate_kernel, over {devices} devices."
        fix = "pass all experts, or name expert_axis inside shard_map"
        if expert_axis is not None:
            fix = f"split the kernels over {expert_axis!r} by in_specs: P({expert_axis!r})"
        fail("moe", what, got, f"wi_0 [{e // devices}, h, f]", fix)
    return devices


def _exchanged(
    tokens: jax.Array,
    routing: Routing,
    kernels: ExpertKernels,
    spec: ExpertSpec,
    devices: int,
    capacity_factor: float | None,
) -> jax.Array:
    """expert_ffn over the devices of an axis: choices and weights travel here, x further in."""
    (t, top_k), own, via = routing.expert_index.shape, kernels.wi_0.shape[0], spec.exchange
    expert_index, gate_weights, slots = routing.expert_index, routing.gate_weights, None
    capacity = None
    if via is not None and via.kind == "all_to_all":
        room = t if capacity_factor is None else math.ceil(capacity_factor * t * top_k / devices)
        slots = make_slots(expert_index, own, devices, min(t, max(1, room)))
    elif capacity_factor is not None:
        capacity = min(t * top_k, max(1, math.ceil(capacity_factor * t * top_k / own)))
    if via is not None:
        expert_index, gate_weights, slots = vary_alike(expert_index, gate_weights, slots)
        first = own * jax.lax.axis_index(via.axis)
        expert_index = send(expert_index, via, slots, empty=-1) - first
        gate_weights = send(gate_weights, via, slots)
    spec = dataclasses.replace(spec, capacity=capacity)
    return run_experts(tokens, expert_index, gate_weights, kernels, spec, slots)


def _shared(x: jax.Array, kernels: ExpertKernels, spec: ExpertSpec) -> jax.Array:
    x, (wi_0, wi_1, wo) = vary_alike(x, (kernels.wi_0, kernels.wi_1, kernels.wo))
    matmul = functools.partial(
        fp8_matmul,
        preferred_element_type=x.dtype,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
    )
    gate, up = (matmul(x, w).astype(jnp.float32) for w in (wi_0, wi_1))
    return matmul((jax.nn.silu(gate) * up).astype(x.dtype), wo)
