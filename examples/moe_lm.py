"""A byte-level mixture-of-experts language model, for the demo and the convergence benchmark.

The two arms differ in `dot` and `experts` alone: FP8 through this library, or bf16.
"""

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8gemm as fp8


@dataclasses.dataclass(frozen=True)
class Size:
    """layers × (attention of `heads` heads, `experts` experts of hidden width `hidden`)."""

    width: int
    layers: int
    heads: int
    experts: int
    hidden: int
    context: int
    top_k: int = 2


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a model multiplies.

    Attributes:
      dot: (x [..., k], w [k, n]) -> [..., n].
      experts: (x [t, h], Routing, ExpertKernels) -> [t, h].
      dtype: of what is multiplied, as it comes in.
    """

    name: str
    dot: Callable
    experts: Callable
    dtype: jnp.dtype = jnp.bfloat16


@functools.cache
def corpus(limit: int | None = None) -> tuple[np.ndarray, str]:
    """Returns the bytes of Python's standard library, in the order of names, and their SHA-256."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    text, size = [], 0
    for path in paths:
        text.append(path.read_bytes())
        size += len(text[-1])
        if limit and size >= limit:
            break
    data = b"".join(text)[:limit]
    return np.frombuffer(data, np.uint8), hashlib.sha256(data).hexdigest()


# ---- The two arms -------------------------------------------------------------------------------


def _bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w.astype(jnp.bfloat16))


def _f32_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(jnp.float32), w)


def fp8_arm(name: str, shared_columns: bool = True) -> Arm:
    """Returns the arm of this library. shared_columns: see `fp8_matmul`."""
    how = {"shared_columns": shared_columns}

    def experts(x: jax.Array, routing: fp8.Routing, kernels: fp8.ExpertKernels) -> jax.Array:
        return fp8.expert_ffn(x, routing.expert_index, routing.gate_weights, kernels, **how)

    return Arm(
        name, functools.partial(fp8.fp8_matmul, preferred_element_type=jnp.bfloat16, **how), experts
    )


def plain_experts(ragged_dot: Callable = jax.lax.ragged_dot, dtype=jnp.bfloat16) -> Callable:
    """Returns the expert block in `dtype` around a ragged dot (lhs, rhs, group_sizes)."""

    def experts(x: jax.Array, routing: fp8.Routing, kernels: fp8.ExpertKernels) -> jax.Array:
        wi_0, wi_1, wo = (w.astype(dtype) for w in (kernels.wi_0, kernels.wi_1, kernels.wo))
        num_experts, top_k = wi_0.shape[0], routing.expert_index.shape[1]
        rows, permutation = fp8.permute(x.astype(dtype), routing.expert_index, num_experts)
        sizes = permutation.group_sizes
        weights = routing.gate_weights.reshape(-1)[permutation.order][:, None]
        gate, up = ragged_dot(rows, wi_0, sizes), ragged_dot(rows, wi_1, sizes)
        hidden = (jax.nn.silu(gate.astype(jnp.float32)) * up * weights).astype(dtype)
        return fp8.unpermute(ragged_dot(hidden, wo, sizes), permutation, top_k)

    return experts


FP8 = fp8_arm("fp8")
BF16 = Arm("bf16", _bf16_dot, plain_experts())
F32 = Arm("f32", _f32_dot, plain_experts(dtype=jnp.float32), jnp.float32)


# ---- The model ----------------------------------------------------------------------------------


def init(key: jax.Array, size: Size) -> dict:
    """Returns float32 parameters; those of layers are stacked for a scan."""
    keys = iter(jax.random.split(key, 8))
    w, f, e, n = size.width, size.hidden, size.experts, size.layers

    def matrices(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    layers = {
        "qkv": matrices(n, w, 3 * w),
        "out": matrices(n, w, w) / (2 * n) ** 0.5,
        "gate_kernel": matrices(n, w, e),
        "wi_0": matrices(n, e, w, f),
        "wi_1": matrices(n, e, w, f),
        "wo": matrices(n, e, f, w) / (2 * n) ** 0.5,
        "norms": jnp.ones((n, 2, w)),
    }
    embed = 0.02 * jax.random.normal(next(keys), (256, w))
    return {"embed": embed, "layers": layers, "head": 0.02 * matrices(w, 256) * w**0.5}


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns table[tokens]. Its gradient is a product: XLA leaves open in which order a scatter
    adds, so that no two runs would be the same."""
    return table[tokens]


def _embed_backward(kept: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    tokens, rows = kept
    picked = jax.nn.one_hot(tokens.reshape(-1), rows)
    return jnp.dot(picked.T, dy.reshape(len(picked), -1), precision="highest"), None


embed.defvjp(lambda table, tokens: (table[tokens], (tokens, len(table))), _embed_backward)


def norm(x: jax.Array, dtype: jnp.dtype, weight: jax.Array | float = 1.0) -> jax.Array:
    """RMS norm in float32, as `dtype`."""
    x = x.astype(jnp.float32)
    scaled = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * weight
    return scaled.astype(dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of x [b, s, heads, d]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def layer(x: jax.Array, p: dict, size: Size, arm: Arm) -> tuple[jax.Array, jax.Array]:
    """Returns x, f32 [b, s, w], after attention and experts, and the load-balance loss."""
    b, s, w = x.shape
    qkv = arm.dot(norm(x, arm.dtype, p["norms"][0]), p["qkv"]).reshape(b, s, 3, size.heads, -1)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    q, k = (rotate(norm(a, arm.dtype)) for a in (q, k))  # keeps logits small, and training stable
    flash = jax.devices()[0].platform == "gpu" and arm.dtype == jnp.bfloat16
    mixed = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn" if flash else "xla"
    )
    x = x + arm.dot(mixed.reshape(b, s, w), p["out"])
    tokens = norm(x, arm.dtype, p["norms"][1]).reshape(-1, w)
    routing = fp8.route(tokens.astype(jnp.float32) @ p["gate_kernel"], size.top_k)
    kernels = fp8.ExpertKernels(wi_0=p["wi_0"], wi_1=p["wi_1"], wo=p["wo"])
    y = arm.experts(tokens, routing, kernels)
    return x + y.reshape(b, s, w), routing.aux_loss


def loss(params: dict, tokens: jax.Array, size: Size, arm: Arm) -> tuple[jax.Array, jax.Array]:
    """Returns the loss to minimise, and the cross entropy alone, in nats per byte.

    tokens: uint8 [batch, context + 1].
    """
    tokens = tokens.astype(jnp.int32)
    x = embed(params["embed"], tokens[:, :-1])
    step = functools.partial(layer, size=size, arm=arm)
    x, balance = jax.lax.scan(step, x, params["layers"])
    logits = jnp.dot(norm(x, arm.dtype), params["head"].astype(arm.dtype)).astype(jnp.float32)
    picked = jnp.sum(logits * jax.nn.one_hot(tokens[:, 1:], 256), -1)
    entropy = jnp.mean(jax.nn.logsumexp(logits, -1) - picked)
    return entropy + 0.01 * balance.mean(), entropy


def batch(text: np.ndarray, draw: np.random.Generator, count: int, context: int) -> np.ndarray:
    """Returns uint8 [count, context + 1] windows of the text."""
    at = draw.integers(0, len(text) - context - 1, count)
    return text[at[:, None] + np.arange(context + 1)]
