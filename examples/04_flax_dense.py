"""A small network of Flax in FP8: one line changed, its float checkpoint loads.

pip install -e ".[cpu,examples]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jax_fp8gemm.linen import Fp8Dense

RULE = optax.adamw(3e-3)


class Mlp(nn.Module):
    features: int
    hidden: int
    dense: type[nn.Dense] = Fp8Dense  # the line that was `= nn.Dense`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(self.dense(self.hidden, dtype=jnp.bfloat16)(x))
        return self.dense(self.features, dtype=jnp.bfloat16)(x)


def main(steps: int = 30, width: int = 128, hidden: int = 256) -> tuple[list[float], float]:
    model, plain = Mlp(width, hidden), Mlp(width, hidden, nn.Dense)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, width))
    target = jnp.tanh(x @ jax.random.normal(keys[1], (width, width)) * width**-0.5)
    params = plain.init(keys[2], x)  # of the float network
    first = params

    def loss(params):
        return jnp.mean((model.apply(params, x).astype(jnp.float32) - target) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = RULE.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = RULE.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    y, exact = model.apply(first, x), plain.apply(first, x)
    error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; FP8 against bf16 at first: {error:.3f}")
    return losses, error


if __name__ == "__main__":
    main()
