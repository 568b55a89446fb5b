"""A jitted training step of a two-layer network whose five GEMMs run in FP8.

pip install -e ".[cpu]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8


def init(key: jax.Array, width: int, hidden: int) -> dict[str, jax.Array]:
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (width, hidden)) * width**-0.5,
        "down": jax.random.normal(down, (hidden, width)) * hidden**-0.5,
    }


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    x = x.astype(jnp.bfloat16)
    h = jax.nn.gelu(fp8.fp8_matmul(x, params["up"], preferred_element_type=jnp.bfloat16))
    out = fp8.fp8_matmul(h, params["down"], preferred_element_type=jnp.bfloat16)
    return jnp.mean((out.astype(jnp.float32) - y) ** 2)


@jax.jit
def step(params, x, y):
    value, gradients = jax.value_and_grad(loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 10.0 * g, params, gradients), value


def main(steps: int = 30, width: int = 128, hidden: int = 256) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = init(keys[0], width, hidden)
    x = jax.random.normal(keys[1], (512, width))
    y = x @ jax.random.normal(keys[2], (width, width)) * width**-0.5
    losses = []
    for _ in range(steps):
        params, value = step(params, x, y)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main()
