"""Trains the model of model.py at small size on Python's sources, byte by byte.

python examples/deepseek/train.py --steps 60
python examples/deepseek/train.py --devices 4    # experts over 4 devices
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import files
import jax
import jax.numpy as jnp
import moe_lm
import numpy as np
import optax
from flax import nnx
from model import Config, Experts, Model

import jax_fp8gemm as fp8

BALANCE = 1e-4  # of the sequence-wise loss: DeepSeek-V3, section 4.2
RATE = 1e-3  # of the bias: the same


def loss(model: Model, tokens: jax.Array) -> tuple[jax.Array, tuple]:
    """Returns the loss to minimise, and the entropy in nats per byte with the routings."""
    logits, _, routings = model(tokens[:, :-1])
    picked = jnp.sum(logits * jax.nn.one_hot(tokens[:, 1:], logits.shape[-1]), -1)
    entropy = jnp.mean(jax.nn.logsumexp(logits, -1) - picked)
    balance = sum(fp8.sequence_loss(r, tokens.shape[1] - 1) for r in routings)
    return entropy + BALANCE * balance, (entropy, routings)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    (_, (entropy, routings)), gradients = nnx.value_and_grad(loss, has_aux=True)(model, tokens)
    optimizer.update(model, gradients)
    blocks = [layer.mlp for layer in model.layers if isinstance(layer.mlp, Experts)]
    for block, routing in zip(blocks, routings, strict=True):
        block.bias[...] = fp8.update_bias(block.bias[...], routing, rate=RATE)
    return entropy


def train(
    config: Config, steps: int, batch: int = 16, context: int = 64
) -> tuple[Model, list[float]]:
    """Returns the model and its losses."""
    model = Model(config, nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, 10, max(steps, 11), 3e-4)
    optimizer = nnx.Optimizer(model, optax.adamw(rate, b2=0.98), wrt=nnx.Param)
    text, draw, losses = moe_lm.corpus(4 << 20)[0], np.random.default_rng(0), []
    start = time.perf_counter()
    for index in range(steps):
        tokens = jnp.asarray(moe_lm.batch(text, draw, batch, context), jnp.int32)
        losses.append(float(step(model, optimizer, tokens)))
        bar = "█" * (30 * (index + 1) // steps)
        seconds = time.perf_counter() - start
        print(f"\r{bar:30} {index + 1}/{steps} loss {losses[-1]:.3f} {seconds:.0f} s", end="")
    print()
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=pathlib.Path, help="a new folder for the checkpoint")
    parser.add_argument("--devices", type=int, default=1, help="split the experts over them")
    arguments = parser.parse_args()
    config, mesh = Config(), contextlib.nullcontext()
    if arguments.devices > 1:
        config = dataclasses.replace(config, expert_axis="expert")
        mesh = jax.set_mesh(jax.make_mesh((arguments.devices,), ("expert",)))
    with mesh:
        model, _ = train(config, arguments.steps)
    if arguments.save:
        arguments.save.mkdir(parents=True)
        files.save(model, arguments.save)
        print(f"{arguments.save} has an FP8 checkpoint. Try serve.py {arguments.save}")


if __name__ == "__main__":
    main()
