"""The expert block with GEMMs by XLA in bf16: plain JAX, which JAX itself differentiates."""

import jax
import jax.numpy as jnp

from jax_fp8gemm._moe.block import ExpertSpec, permutation_here, rows_here
from jax_fp8gemm._moe.exchange import Slots, collect, send
from jax_fp8gemm._moe.kernels import ExpertKernels, fp8_halves
from jax_fp8gemm._moe.routing import _collect as sum_of_tokens
from jax_fp8gemm._moe.routing import _spread as rows_of_tokens
from jax_fp8gemm._ops.bf16 import in_floats, ragged_dot_bf16

F32 = jnp.dtype(jnp.float32)


def bf16_experts(
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
    slots: Slots | None,
    spec: ExpertSpec,
) -> tuple[jax.Array, jax.Array]:
    """As run_experts: y [t, h], and how many rows the experts of this device took.

    Tokens travel in bf16. All rows have memory, also where the spec bounds them.
    """
    via, tokens = spec.exchange, x.astype(jnp.bfloat16)
    if via is not None:
        # An empty slot holds zeros: what travels is the number of the expert plus one.
        expert_index = send(expert_index + 1, via, slots) - 1
        gate_weights, tokens = send(gate_weights, via, slots), send(tokens, via, slots)
    permutation = permutation_here(expert_index, kernels.sizes[0], spec)
    _, row_weight = rows_here(permutation, gate_weights)
    top_k, sizes = gate_weights.shape[1], permutation.group_sizes
    rows = rows_of_tokens(tokens, permutation, top_k)
    wi_0, wi_1, wo = _floats(kernels)
    parts: list[jax.Array] = [ragged_dot_bf16(rows, w, sizes, F32) for w in (wi_0, wi_1)]
    gate, up = parts
    a = row_weight[:, None] * jax.nn.silu(gate) * up
    y: jax.Array = sum_of_tokens(ragged_dot_bf16(a, wo, sizes, F32), permutation, top_k)
    return collect(y, via, slots).astype(x.dtype), sizes.sum(dtype=jnp.int32)


def _floats(kernels: ExpertKernels) -> tuple[jax.Array, ...]:
    """Returns gate, up and down [e, in, out]."""
    if not kernels.is_fp8:
        return kernels.wi_0, kernels.wi_1, kernels.wo
    apart = fp8_halves(kernels)
    return in_floats(apart.wi_0), in_floats(apart.wi_1), in_floats(apart.wo)
