"""A mixture-of-experts layer of Flax nnx, trained with its balance loss.

pip install -e ".[cpu,examples]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_fp8gemm.nnx import Fp8Linear, Fp8MoE


class Model(nnx.Module):
    def __init__(self, width: int, hidden: int, num_experts: int, rngs: nnx.Rngs):
        self.embed = Fp8Linear(width, width, dtype=jnp.bfloat16, rngs=rngs)
        self.moe = Fp8MoE(width, hidden, num_experts, top_k=2, shared_features=hidden, rngs=rngs)

    def __call__(self, x: jax.Array):
        x = self.embed(x)
        y, routing = self.moe(x)
        return x + y, routing


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, target: jax.Array):
    def loss(model):
        y, routing = model(x)
        error = jnp.mean((y.astype(jnp.float32) - target) ** 2)
        return error + 0.01 * routing.aux_loss + 1e-3 * routing.z_loss, (error, routing)

    (_, (error, routing)), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return error, jnp.bincount(routing.expert_index.reshape(-1), length=routing.scores.shape[1])


def main(steps: int = 30, tokens: int = 512, width: int = 128, hidden: int = 128) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width))
    maps = jax.random.normal(keys[1], (2, width, width)) * width**-0.5
    target = jnp.where(x[:, :1] > 0, x @ maps[0], x @ maps[1])  # work for two experts
    model = Model(width, hidden, 4, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for _ in range(steps):
        error, rows = step(model, optimizer, x, target)
        losses.append(float(error))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; rows of each expert: {rows}")
    return losses


if __name__ == "__main__":
    main()
