"""A whole mixture-of-experts layer: router, experts, shared experts; on one device or on many."""

import functools
import math

import jax
import jax.numpy as jnp

from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.expert_parallel import (
    Exchange,
    axis_size,
    check_exchange,
    make_slots,
    send,
)
from jax_fp8gemm.expert_weights import PreparedExperts, prepared_of
from jax_fp8gemm.experts import Block, check_tokens, run_experts
from jax_fp8gemm.meshes import vary_alike
from jax_fp8gemm.ops import fp8_matmul
from jax_fp8gemm.quantizing import check_float
from jax_fp8gemm.routing import Routing, route

# What layers pass on.
OPTIONS = ("top_k", "score", "normalize", "scale", "capacity_factor", "exchange", "wire")


def moe(
    x: jax.Array,
    gate_kernel: jax.Array,
    wi_0: jax.Array | PreparedExperts,
    wi_1: jax.Array | None = None,
    wo: jax.Array | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    bias: jax.Array | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    capacity_factor: float | None = None,
    shared: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    expert_axis: str | None = None,
    exchange: str = "all_gather",
    wire: str = "fp8",
) -> tuple[jax.Array, Routing]:
    """Routes tokens to their experts and adds up what these say; FP8 but for the router.

    y = expert_ffn(x, *route(x · gate_kernel)) + swiglu(x · shared)

    Args:
      x: bf16, f16 or f32 [..., h]; with expert_axis this device's tokens.
      gate_kernel: bf16, f16 or f32 [h, e]; logits are made in float32.
      wi_0, wi_1, wo: [e, h, f], [e, h, f], [e, f, h], or PreparedExperts alone. With expert_axis
        the experts of this device: e / devices of them, in the order of the devices.
      top_k, score, bias, normalize, scale: see `route`.
      capacity_factor: None keeps every row. Else an expert takes capacity_factor times its even
        share of the rows at most; with exchange "all_to_all" it is a device that takes
        capacity_factor times its even share of a device's rows, at most all its tokens.
      shared: kernels [h, fs], [h, fs], [fs, h] of an expert that sees every token.
      expert_axis: inside shard_map, the mesh axis over which tokens and experts are split. Losses
        are those of all its tokens.
      exchange: "all_gather" or "all_to_all", of tokens over expert_axis.
      wire: "fp8" or "bf16", how tokens travel; results travel as bf16.

    Returns:
      y [..., h] of x's dtype, and the Routing of the tokens, flattened to one dim.

    Raises:
      ValueError: shapes that do not fit, top_k above e, experts that do not split over the axis.
      TypeError: dtypes. NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), sections 2.1.2 and 3.3.

    Example:
      y, routing = moe(x, gate_kernel, wi_0, wi_1, wo, top_k=2)
      loss = task_loss(y) + 0.01 * routing.aux_loss + 0.001 * routing.z_loss
    """
    check_float("moe", "x", x)
    check_float("moe", "gate_kernel", gate_kernel)
    check_exchange("moe", exchange, wire)
    _check_options(capacity_factor, shared)
    rows = math.prod(x.shape[:-1]) * top_k
    prepared = prepared_of("moe", wi_0, wi_1, wo, "pow2", rows)
    via = None if expert_axis is None else Exchange(expert_axis, exchange, wire)
    devices = _check_experts(x, gate_kernel, prepared, expert_axis)
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(
        tokens.astype(jnp.float32), gate_kernel.astype(jnp.float32), precision="highest"
    )
    routing = route(
        logits, top_k, score=score, bias=bias, normalize=normalize, scale=scale, axis=expert_axis
    )
    check_tokens("moe", tokens, routing.experts, routing.weights, prepared)
    y = _exchanged(tokens, routing, prepared, via, devices, capacity_factor)
    if shared is not None:
        y = y + _shared(tokens, shared)
    return y.reshape(x.shape), routing


def _check_options(capacity_factor: float | None, shared) -> None:
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        got, mend = f"capacity_factor {capacity_factor}", "leave it out to keep every row"
        fail("moe", "no capacity.", got, "a finite number above 0, or None", mend)
    if shared is not None and len(shared) != 3:
        expected = "kernels [h, fs], [h, fs], [fs, h]"
        fail("moe", "shared is not complete.", f"{len(shared)} kernels", expected, "pass all three")


def _check_experts(x, gate_kernel, prepared: PreparedExperts, expert_axis: str | None) -> int:
    """Returns over how many devices the experts are split."""
    named = (("x", x), ("gate_kernel", gate_kernel), ("wi_0", prepared.wi_0))
    got = ", ".join(describe(name, value) for name, value in named)
    if x.ndim < 1 or gate_kernel.ndim != 2 or x.shape[-1] != gate_kernel.shape[0]:
        expected, mend = "x [..., h], gate_kernel [h, e]", "if it is [e, h], pass gate_kernel.T"
        fail("moe", "x and gate_kernel do not fit.", got, expected, mend)
    e, own = gate_kernel.shape[1], prepared.wi_0.shape[0]
    devices = 1 if expert_axis is None else axis_size("moe", expert_axis, e)
    if own * devices != e:
        what = f"{own} experts here, {e} in gate_kernel, over {devices} devices."
        mend = "name expert_axis inside shard_map, or pass all experts outside"
        fail("moe", what, got, f"wi_0 [{e // devices}, h, f]", mend)
    return devices


def _exchanged(tokens, routing, prepared, via, devices: int, capacity_factor: float | None):
    """expert_ffn over the devices of an axis: choices and weights travel here, x further in."""
    (t, top_k), own = routing.experts.shape, prepared.wi_0.shape[0]
    experts, weights, slots, capacity = routing.experts, routing.weights, None, None
    if via is not None and via.kind == "all_to_all":
        room = t if capacity_factor is None else math.ceil(capacity_factor * t * top_k / devices)
        slots = make_slots(experts, own, devices, min(t, max(1, room)))
    elif capacity_factor is not None:
        capacity = min(t * top_k, max(1, math.ceil(capacity_factor * t * top_k / own)))
    if via is not None:
        experts, weights, slots = vary_alike(experts, weights, slots)
        first = own * jax.lax.axis_index(via.axis)
        experts = send(experts, via, slots, empty=-1) - first
        weights = send(weights, via, slots)
    return run_experts(tokens, experts, weights, prepared, Block("pow2", capacity, via), slots)


def _shared(x: jax.Array, kernels: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    x, (wi_0, wi_1, wo) = vary_alike(x, kernels)
    matmul = functools.partial(fp8_matmul, preferred_element_type=x.dtype)
    gate, up = (matmul(x, w).astype(jnp.float32) for w in (wi_0, wi_1))
    return matmul((jax.nn.silu(gate) * up).astype(x.dtype), wo)
