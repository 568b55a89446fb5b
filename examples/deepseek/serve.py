"""Generates text with a checkpoint in DeepSeek's layout, its weights in FP8 as they are stored.

python examples/deepseek/train.py --steps 300 --save small
python examples/deepseek/serve.py small --prompt "def "
python examples/deepseek/serve.py small --devices 4    # experts over 4 devices
"""

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator

import files
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import Cache, Model


@nnx.jit
def run(model: Model, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Returns the logits of the last token, f32 [b, vocabulary], and the cache with all of them."""
    logits, cache, _ = model(tokens, cache)
    return logits[:, -1], cache


def generate(model: Model, prompt: jax.Array, count: int) -> Iterator[jax.Array]:
    """Yields the most likely next tokens, int32 [b], `count` times, after the prompt [b, s]."""
    cache = Cache.empty(model.config, prompt.shape[0], prompt.shape[1] + count)
    logits, cache = run(model, prompt, cache)  # prefill
    for left in range(count, 0, -1):
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        yield token
        if left > 1:
            logits, cache = run(model, token[:, None], cache)  # decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--devices", type=int, default=1, help="split the experts over them")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").exists():
        sys.exit(f"{arguments.folder} has no config.json: train.py --save makes such a folder")
    mesh = None
    if arguments.devices > 1:
        mesh = jax.make_mesh((arguments.devices,), ("expert",))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model = files.load(arguments.folder, mesh)
        prompt = jnp.asarray(np.frombuffer(arguments.prompt.encode(), np.uint8), jnp.int32)[None]
        print(arguments.prompt, end="", flush=True)
        start = time.perf_counter()
        for token in generate(model, prompt, arguments.count):
            print(bytes([int(token[0])]).decode(errors="replace"), end="", flush=True)
        each = (time.perf_counter() - start) / arguments.count
    print(f"\n{1e3 * each:.1f} ms a token, compilation included")


if __name__ == "__main__":
    main()
