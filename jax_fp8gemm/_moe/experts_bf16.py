"""The expert block with GEMMs by XLA in bf16: plain JAX, which JAX itself differentiates."""

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._moe.activations import activate
from jax_fp8gemm._moe.block import ExpertSpec, permutation_here, rows_here
from jax_fp8gemm._moe.exchange import Slots, collect, send
from jax_fp8gemm._moe.kernels import ExpertKernels, fp8_halves, of_rows
from jax_fp8gemm._moe.order import _collect as sum_of_tokens
from jax_fp8gemm._moe.order import _spread as rows_of_tokens
from jax_fp8gemm._moe.weights import float_matrices
from jax_fp8gemm._ops.bf16 import in_floats, ragged_dot_bf16

F32 = jnp.dtype(jnp.float32)


def bf16_experts(
    x: jax.Array,
    expert_index: jax.Array,
    gate_weights: jax.Array,
    kernels: ExpertKernels,
    slots: Slots | None,
    biases: object,
    spec: ExpertSpec,
) -> tuple[jax.Array, jax.Array]:
    """As run_experts: y [t, h], and how many rows the experts of this device took.

    biases: of FP8 experts; here kernels have their own.

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
    rows: jax.Array = rows_of_tokens(tokens, permutation, top_k)
    *wi, wo = _floats(kernels)
    parts: list[jax.Array] = [ragged_dot_bf16(rows, w, sizes, F32) for w in wi]
    group = group_of_row(sizes, rows.shape[0])
    for i, bias in enumerate((kernels.wi_0_bias, kernels.wi_1_bias)):
        if bias is not None:
            parts[i] += of_rows(bias, group)
    a = row_weight[:, None] * activate(parts, spec.activation)
    out: jax.Array = ragged_dot_bf16(a, wo, sizes, F32)
    if kernels.wo_bias is not None:
        out += row_weight[:, None] * of_rows(kernels.wo_bias, group)
    y: jax.Array = sum_of_tokens(out, permutation, top_k)
    return collect(y, via, slots).astype(x.dtype), sizes.sum(dtype=jnp.int32)


def _floats(kernels: ExpertKernels) -> list[jax.Array]:
    """Returns gate, up and down [e, in, out]."""
    if not kernels.is_fp8:
        return float_matrices(kernels)
    apart = fp8_halves(kernels)
    return [in_floats(w) for w in (apart.wi_0, apart.wi_1, apart.wo) if w is not None]
