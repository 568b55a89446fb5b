"""Mixtures of experts in plain float32, to compare with: every token through every expert."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._moe.routing import route

# One 1x128 × 128x128 product of normal numbers differs from float32 by a calc_diff of 6 to 7e-4
# (docs/numerics.md). The forward pass has three such products on its way. A gradient has four or
# five, and once more the rounding of what was kept: 0.005 is a cosine of 0.995.
FORWARD, GRADIENT = 2.5e-3, 5e-3


def make_weights(key, e: int, h: int, f: int, dtype=jnp.float32):
    """Returns wi_0, wi_1 [e, h, f] and wo [e, f, h], scaled to keep the size of numbers."""
    keys = jax.random.split(key, 3)
    shapes = (e, h, f), (e, h, f), (e, f, h)
    return [
        (jax.random.normal(k, shape) / shape[1] ** 0.5).astype(dtype)
        for k, shape in zip(keys, shapes, strict=True)
    ]


def dense_ffn(x, experts, weights, wi_0, wi_1, wo):
    """y[t] = Σ_j weights[t, j] · swiglu(x[t]; expert experts[t, j]); others count nothing."""
    x, wi_0, wi_1, wo = (a.astype(jnp.float32) for a in (x, wi_0, wi_1, wo))
    y = jnp.zeros_like(x)
    for i in range(wi_0.shape[0]):
        share = jnp.where(experts == i, weights, 0).sum(1, keepdims=True)
        y += share * dot(jax.nn.silu(dot(x, wi_0[i])) * dot(x, wi_1[i]), wo[i])
    return y


def dense_moe(x, gate_kernel, wi_0, wi_1, wo, shared=None, **routing):
    """As moe on one device."""
    routed = route(dot(x.astype(jnp.float32), gate_kernel), **routing)
    y = dense_ffn(x, routed.experts, routed.weights, wi_0, wi_1, wo)
    if shared is not None:
        one = jnp.zeros((x.shape[0], 1), int)
        y += dense_ffn(x, one, jnp.ones(one.shape), *(w[None] for w in shared))
    return y, routed


def dot(a, b):
    return jnp.dot(a, b, precision="highest")


def cosine(x, y) -> float:
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
