"""A training step on a mesh: weights spread over all devices, batches and columns cut up.

pip install -e ".[cpu]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    x = x.astype(jnp.bfloat16)
    h = jax.nn.gelu(fp8.fp8_matmul(x, params["up"], preferred_element_type=jnp.bfloat16))
    out = fp8.fp8_matmul(h, params["down"], preferred_element_type=jnp.bfloat16)
    return jnp.mean((out.astype(jnp.float32) - y) ** 2)


@jax.jit
def step(params, x, y):
    value, gradients = jax.value_and_grad(loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - 10.0 * g, params, gradients), value


def main(steps: int = 20, width: int = 512, hidden: int = 512) -> list[float]:
    count = len(jax.devices())
    tensor = 2 if count % 2 == 0 else 1
    shape = (count // tensor, tensor)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def made(key, shape, *spec):
        make = jax.jit(
            jax.random.normal, static_argnums=1, out_shardings=NamedSharding(mesh, P(*spec))
        )
        return make(key, shape)

    keys = jax.random.split(jax.random.key(0), 4)
    # FSDP over "data", tensor parallel over "model": columns of "up", then rows of "down". The step
    # gathers FP8 copies of weights over "data", where it also adds up their gradients; over "model"
    # it adds up what "down" gives. No activation is gathered.
    params = {
        "up": made(keys[0], (width, hidden), "data", "model") * width**-0.5,
        "down": made(keys[1], (hidden, width), "model", "data") * hidden**-0.5,
    }
    x = made(keys[2], (128 * count, width), "data")
    y = jnp.tanh(x @ made(keys[3], (width, width)) * width**-0.5)
    losses = []
    for _ in range(steps):
        params, value = step(params, x, y)
        losses.append(float(value))
    print(f"{count} devices as {dict(mesh.shape)}: loss from {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
