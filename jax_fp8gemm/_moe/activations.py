"""What experts do between their GEMMs, in plain JAX; plain SwiGLU also has a kernel."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.errors import fail


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """g · sigmoid(alpha · g) · (u + up_offset), g = min(gate, limit), u = up within ±limit.

    Attributes:
      limit: above 0. 7 in gpt-oss.
      alpha: 1.702 in gpt-oss.
      up_offset: 1 in gpt-oss.

    Source: gpt-oss (arXiv 2508.10925).

    Example:
      y = expert_ffn(x, index, weights, kernels, activation=ClampedSwiglu(limit=7.0))
    """

    limit: float
    alpha: float = 1.0
    up_offset: float = 0.0


ActivationName = Literal["swiglu", "geglu", "squared_relu"]
Activation = ActivationName | ClampedSwiglu


def check_activation(op: str, activation: Any) -> None:
    if isinstance(activation, ClampedSwiglu):
        if not 0 < activation.limit < math.inf:
            got, fix = f"limit={activation.limit!r}", 'pass activation="swiglu" for no limit'
            fail(op, "limit is not a positive number.", got, "a finite number above 0", fix)
    elif not isinstance(activation, str) or activation not in get_args(ActivationName):
        names = ", ".join(f'"{name}"' for name in get_args(ActivationName))
        expected = f"{names} or a ClampedSwiglu"
        fail(op, "activation is unknown.", f"activation={activation!r}", expected, "choose one")


def is_gated(activation: Activation) -> bool:
    return activation != "squared_relu"


def activate(parts: list[jax.Array], activation: Activation) -> jax.Array:
    """Returns the activation, float32, of gate and up, or of the one that squared ReLU takes."""
    gate, *rest = (part.astype(jnp.float32) for part in parts)
    if activation == "squared_relu":
        return jax.nn.relu(gate) ** 2
    (up,) = rest
    if activation == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    assert isinstance(activation, ClampedSwiglu)
    gate = jnp.minimum(gate, activation.limit)
    up = jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + activation.up_offset)
