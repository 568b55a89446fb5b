"""Mixtures of experts in plain float32, to compare with: every token through every expert."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8gemm as fp8

# One 1x128 × 128x128 GEMM of normal numbers differs from float32 by a calc_diff of 6 to 7e-4
# (docs/numerics.md). The forward pass has three such GEMMs on its way. A gradient has four or
# five, and once more the rounding of what was kept: 0.005 is a cosine of 0.995.
FORWARD, GRADIENT = 2.5e-3, 5e-3


def make_kernels(key, e: int, h: int, f: int, dtype=jnp.float32) -> fp8.ExpertKernels:
    """Returns wi_0, wi_1 [e, h, f] and wo [e, f, h], scaled to keep the size of numbers."""
    keys = jax.random.split(key, 3)
    shapes = {"wi_0": (e, h, f), "wi_1": (e, h, f), "wo": (e, f, h)}
    named = {
        name: (jax.random.normal(k, shape) / shape[1] ** 0.5).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return fp8.ExpertKernels(**named)


def make_shared(key, h: int, f: int, dtype=jnp.float32) -> fp8.ExpertKernels:
    """Returns the matrices of an expert that sees every token."""
    return jax.tree.map(lambda w: w[0], make_kernels(key, 1, h, f, dtype))


def dense_ffn(x, expert_index, gate_weights, kernels: fp8.ExpertKernels):
    """As expert_ffn; choices of no expert count nothing."""
    x, kernels = jax.tree.map(lambda a: a.astype(jnp.float32), (x, kernels))
    y = jnp.zeros_like(x)
    for i in range(kernels.wo.shape[0]):
        share = jnp.where(expert_index == i, gate_weights, 0).sum(1, keepdims=True)
        gate, up = dot(x, kernels.wi_0[i]), dot(x, kernels.wi_1[i])
        y += share * dot(jax.nn.silu(gate) * up, kernels.wo[i])
    return y


def dense_moe(x, gate_kernel, kernels: fp8.ExpertKernels, shared=None, **routing):
    """As moe on one device."""
    routed = fp8.route(dot(x.astype(jnp.float32), gate_kernel), **routing)
    y = dense_ffn(x, routed.expert_index, routed.gate_weights, kernels)
    if shared is not None:
        one = jnp.zeros((x.shape[0], 1), int)
        y += dense_ffn(x, one, jnp.ones(one.shape), jax.tree.map(lambda w: w[None], shared))
    return y, routed


def grouped_route(logits, top_k, *, n_group, topk_group, bias, routed_scaling_factor):
    """DeepSeek-V3's router: returns expert_index, gate_weights and scores."""
    t, e = logits.shape
    scores = jax.nn.sigmoid(logits)
    steered = scores + bias[None]
    strength = jnp.sort(steered.reshape(t, n_group, -1), axis=2)[:, :, -2:].sum(2)
    kept = jnp.argsort(-strength, axis=1, stable=True)[:, :topk_group]
    group = jnp.arange(e)[None] // (e // n_group)
    open_to_it = (group[:, :, None] == kept[:, None]).any(2)
    order = jnp.argsort(jnp.where(open_to_it, -steered, jnp.inf), axis=1, stable=True)
    chosen = order[:, :top_k]
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    return chosen, routed_scaling_factor * weights / weights.sum(1, keepdims=True), scores


def balance_in_sequences(expert_index, scores, length: int):
    """Σ_i f_i · P_i of each sequence, one after the other; their mean."""
    (t, top_k), e = expert_index.shape, scores.shape[1]
    shares, total = scores / scores.sum(1, keepdims=True), 0
    for start in range(0, t, length):
        chosen = jax.nn.one_hot(expert_index[start : start + length], e).sum((0, 1))
        total += (e / (top_k * length) * chosen * shares[start : start + length].mean(0)).sum()
    return total / (t // length)


def dot(a, b):
    return jnp.dot(a, b, precision="highest")


def cosine(x, y) -> float:
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
