"""Trains a small mixture-of-experts language model in FP8 with optax, microbatch by microbatch.

pip install -e ".[cpu,examples]"  # cuda12 or cuda13 instead of cpu on a GPU
python examples/07_train_moe.py --steps 20
"""

import argparse

import jax
import jax.numpy as jnp
import moe_lm
import numpy as np
import optax

SIZE = moe_lm.Size(width=128, layers=2, heads=4, experts=4, hidden=128, context=32)
RULE = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


@jax.jit
def step(params, state, microbatches):
    """microbatches: uint8 [count, batch, context + 1]; their gradients are averaged."""

    def one(total, tokens):
        objective = lambda p: moe_lm.loss(p, tokens, SIZE, moe_lm.FP8)  # noqa: E731
        (_, entropy), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, gradients), entropy

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, entropies = jax.lax.scan(one, zeros, microbatches)
    mean = jax.tree.map(lambda g: g / len(microbatches), total)
    updates, state = RULE.update(mean, state, params)
    return optax.apply_updates(params, updates), state, entropies.mean()


def main(steps: int) -> list[float]:
    text, draw = moe_lm.corpus(1 << 20)[0], np.random.default_rng(0)
    params = moe_lm.init(jax.random.key(0), SIZE)
    state, losses = RULE.init(params), []
    for index in range(steps):
        windows = moe_lm.batch(text, draw, 16, SIZE.context).reshape(2, 8, -1)
        params, state, entropy = step(params, state, jnp.asarray(windows))
        losses.append(float(entropy))
        print(f"step {index + 1:3}  loss {losses[-1]:.3f} nats per byte")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    losses = main(parser.parse_args().steps)
    assert losses[-1] < losses[0]
