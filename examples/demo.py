"""Trains a small byte-level language model in FP8 beside a bf16 twin, on Python's own sources.

Every linear layer of one twin goes through fp8_matmul: our kernels on a Hopper GPU, the reference
elsewhere. Both twins start from the same numbers and see the same batches.
"""

import argparse
import functools
import pathlib
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8gemm as fp8

WIDTH, HIDDEN, LAYERS, CONTEXT, BATCH, EMBED = 256, 512, 2, 16, 512, 32


def corpus(limit: int = 4 << 20) -> np.ndarray:
    """Returns the bytes of the standard library's modules, in the order of their names."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(text[:limit], np.uint8)


def init(key: jax.Array) -> dict:
    keys = iter(jax.random.split(key, 3 + 2 * LAYERS))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    return {
        "embed": jax.random.normal(next(keys), (256, EMBED)),
        "inp": matrix(CONTEXT * EMBED, WIDTH),
        "layers": [(matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH)) for _ in range(LAYERS)],
        "head": matrix(WIDTH, 256),
    }


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-6)


def loss(params: dict, tokens: jax.Array, dot) -> jax.Array:
    """Cross entropy of the byte after each window, in nats. tokens: uint8 [batch, context + 1]."""
    x = params["embed"].astype(jnp.bfloat16)[tokens[:, :-1].astype(jnp.int32)]
    x = dot(x.reshape(len(tokens), -1), params["inp"])
    for up, down in params["layers"]:
        h = jax.nn.gelu(dot(norm(x).astype(jnp.bfloat16), up))
        x = x + dot(h, down)
    logits = norm(x) @ params["head"]
    target = tokens[:, -1].astype(jnp.int32)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(tokens)), target])


def bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w.astype(jnp.bfloat16))


def fp8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return fp8.fp8_matmul(x, w, preferred_element_type=jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="dot", donate_argnums=(0, 1))
def step(params, moments, tokens, rate, dot):
    """One step of Adam without bias correction."""
    value, gradients = jax.value_and_grad(loss)(params, tokens, dot)
    first, second = moments
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, second, gradients)
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second
    )
    return params, (first, second), value


def train(steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Returns the losses of both twins."""
    text, draw = corpus(), np.random.default_rng(seed)
    twins = {}
    for name, dot in (("fp8", fp8_dot), ("bf16", bf16_dot)):
        params = init(jax.random.key(seed))
        zeros = jax.tree.map(jnp.zeros_like, params)
        twins[name] = [dot, params, (zeros, jax.tree.map(jnp.zeros_like, zeros))]
    losses: dict[str, list] = {name: [] for name in twins}
    start = time.perf_counter()
    for index in range(steps):
        at = draw.integers(0, len(text) - CONTEXT - 1, BATCH)
        tokens = jnp.asarray(text[at[:, None] + np.arange(CONTEXT + 1)])
        rate = 2e-3 * min(1.0, (index + 1) / 20) * (1 - 0.9 * index / steps)
        for name, (dot, params, moments) in twins.items():
            params, moments, value = step(params, moments, tokens, rate, dot)
            twins[name][1:] = params, moments
            losses[name].append(float(value))
        progress(index + 1, steps, losses, time.perf_counter() - start)
    return losses


def progress(done: int, steps: int, losses: dict[str, list[float]], seconds: float) -> None:
    bar = "█" * (30 * done // steps)
    now = "  ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
    end = "\n" if done == steps else ""
    print(f"\r  {bar:30} {done}/{steps}  loss: {now}  {seconds:.0f} s", end=end, flush=True)


def plot(losses: dict[str, list[float]], path: str) -> None:
    """Saves the two curves, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("  (pip install matplotlib to get the curves as a picture)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, values in losses.items():
        smooth = np.convolve(values, np.ones(10) / 10, "valid")
        plt.plot(smooth, label=name)
    plt.xlabel("step")
    plt.ylabel("loss, nats per byte (mean of 10 steps)")
    plt.legend()
    plt.savefig(path, dpi=120)
    print(f"  curves: {path}")


def one_product(m: int = 1024, n: int = 1024, k: int = 2048) -> None:
    """Prints one product's error and its time as the host sees it."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
    run = jax.jit(fp8.fp8_matmul)
    exact = jnp.dot(x, w, preferred_element_type=jnp.float32)
    error = float(jnp.linalg.norm(run(x, w) - exact) / jnp.linalg.norm(exact))
    start = time.perf_counter()
    for _ in range(5):
        y = run(x, w)
    y.block_until_ready()
    ms = 1e3 * (time.perf_counter() - start) / 5
    print(f"  [{m}, {k}] x [{k}, {n}]: relative error {error:.3f}, {ms:.2f} ms with all casts")


def main(steps: int, picture: str) -> int:
    device = jax.devices()[0]
    kernel = device.platform in ("gpu", "cuda")
    which = "FP8 kernels" if kernel else "the plain-JAX reference (no Hopper GPU here)"
    print(f"Training two twins on {device.device_kind}; fp8_matmul runs {which}.")
    losses = train(steps)
    first, last = losses["fp8"][0], float(np.mean(losses["fp8"][-20:]))
    gap = last / float(np.mean(losses["bf16"][-20:])) - 1
    print(f"  loss {first:.3f} -> {last:.3f}; the FP8 twin ends {100 * gap:+.2f} % from bf16")
    plot(losses, picture)
    one_product()
    return 0 if last < first and abs(gap) < 0.05 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", default="demo.png")
    options = parser.parse_args()
    sys.exit(main(options.steps, options.picture))
