"""Trains a small mixture-of-experts language model in FP8 beside a bf16 twin, on Python's sources.

Every linear layer and expert of one twin is FP8: our kernels on a Hopper GPU, the reference
elsewhere. Both twins start from the same numbers and see the same batches.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
import moe_lm
import numpy as np

import jax_fp8gemm as fp8

SMALL = moe_lm.Size(width=128, layers=2, heads=4, experts=4, hidden=128, context=64)
BATCH = 16


@functools.partial(jax.jit, static_argnames=("size", "arm"), donate_argnums=(0, 1))
def step(params, moments, tokens, rate, size, arm):
    """One step of Adam without bias correction."""
    objective = functools.partial(moe_lm.loss, size=size, arm=arm)
    (_, entropy), gradients = jax.value_and_grad(objective, has_aux=True)(params, tokens)
    first, second = moments
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, second, gradients)
    params = jax.tree.map(
        lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second
    )
    return params, (first, second), entropy


def train(steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Returns the losses of both twins."""
    text, draw = moe_lm.corpus(4 << 20)[0], np.random.default_rng(seed)
    twins = {}
    for arm in (moe_lm.FP8, moe_lm.BF16):
        params = moe_lm.init(jax.random.key(seed), SMALL)
        moments = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        twins[arm] = params, tuple(moments)
    losses: dict[str, list] = {arm.name: [] for arm in twins}
    start = time.perf_counter()
    for index in range(steps):
        tokens = jnp.asarray(moe_lm.batch(text, draw, BATCH, SMALL.context))
        rate = 3e-3 * min(1.0, (index + 1) / 20) * (1 - 0.9 * index / steps)
        for arm, (params, moments) in twins.items():
            params, moments, value = step(params, moments, tokens, rate, SMALL, arm)
            twins[arm] = params, moments
            losses[arm.name].append(float(value))
        progress(index + 1, steps, losses, time.perf_counter() - start)
    return losses


def progress(done: int, steps: int, losses: dict[str, list[float]], seconds: float) -> None:
    bar = "█" * (30 * done // steps)
    now = "  ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
    rate = 2 * done * BATCH * SMALL.context / seconds
    end = "\n" if done == steps else ""
    print(f"\r  {bar:30} {done}/{steps}  loss: {now}  {rate:.0f} tokens/s", end=end, flush=True)


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


def one_gemm(m: int = 1024, n: int = 1024, k: int = 2048) -> None:
    """Prints the error of one GEMM and its time as the host sees it."""
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
    print(f"Training two MoE twins on {device.device_kind}; the FP8 one runs {which}.")
    losses = train(steps)
    first, last = losses["fp8"][0], float(np.mean(losses["fp8"][-20:]))
    gap = last / float(np.mean(losses["bf16"][-20:])) - 1
    print(f"  loss {first:.3f} -> {last:.3f}; the FP8 twin ends {100 * gap:+.2f} % from bf16")
    plot(losses, picture)
    one_gemm()
    return 0 if last < first and abs(gap) < 0.05 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", default="demo.png")
    options = parser.parse_args()
    sys.exit(main(options.steps, options.picture))
