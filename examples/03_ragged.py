"""A mixture of experts in FP8: rows sorted by expert, one matrix each, sizes on the device.

pip install -e ".[cpu]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8


@jax.jit
def experts(x: jax.Array, w: jax.Array, expert: jax.Array) -> jax.Array:
    """Row i of x times w[expert[i]]."""
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=w.shape[0])  # never leaves the device
    y = fp8.fp8_ragged_dot(x[order], w, sizes)
    return jnp.zeros_like(y).at[order].set(y)


def main(rows: int = 512, k: int = 256, n: int = 384, g: int = 8) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (g, k, n), jnp.bfloat16)
    expert = jax.random.categorical(keys[2], jnp.arange(g) / 2.0, shape=(rows,))  # uneven
    y = experts(x, w, expert)
    exact = jnp.einsum("mk,mkn->mn", x, w[expert], preferred_element_type=jnp.float32)
    error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    gradient = jax.grad(lambda w: (experts(x, w, expert).astype(jnp.float32) ** 2).mean())(w)
    print(f"rows of each expert: {jnp.bincount(expert, length=g)}")
    print(f"relative error {error:.3f}, gradient {gradient.shape} {gradient.dtype}")
    return error


if __name__ == "__main__":
    main()
