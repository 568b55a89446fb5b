"""Times quantising kernels, and products with all their casts: device time, cold L2.

python benchmarks/quantize.py
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from pallas_peer import tuned
from protocol import BANDWIDTH, beside, progress, row, runs, save, version_of

import jax_fp8gemm as fp8
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.groups import grouped_tokens
from jax_fp8gemm._core.layout import SCALE_BLOCK, round_up
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import operands as made_up
from jax_fp8gemm._tools import timing

REPS = 11
TOKENS, WIDTH, EXPERTS = 16384, 7168, 8
KERNEL = "fp8_quantize"  # the entry point, csrc/quantize_spec.cpp


def group_sizes() -> np.ndarray:
    return made_up.group_sizes(Problem("ragged", TOKENS, 1, 1, EXPERTS))


def nbytes(tree) -> int:
    """Returns the bytes of all arrays; of copies by groups, those of every group's whole tiles."""
    room = grouped_tokens(TOKENS, EXPERTS)  # for any sizes
    used = sum(round_up(int(size), SCALE_BLOCK) for size in group_sizes())

    def one(x) -> int:
        size = x.size * x.dtype.itemsize
        return size * used // room if x.shape[-1] in (room, room // SCALE_BLOCK) else size

    return sum(map(one, jax.tree.leaves(tree)))


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def casts() -> dict[str, tuple[Callable, tuple, float]]:
    """Returns each fused cast with its operands and the TB/s it is to reach."""
    x, h = random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    gradient = random(TOKENS, WIDTH // 2, seed=1)
    w = random(EXPERTS // 2, WIDTH, 2048)
    weight = jax.random.uniform(jax.random.key(2), (TOKENS,))
    sizes = jnp.asarray(group_sizes())
    index = jax.random.permutation(jax.random.key(3), TOKENS).astype(jnp.int32)

    def gathered(x, index, sizes):
        return fp8.quantize_rows(x, index=index, group_sizes=sizes)

    def grouped(x, sizes):
        return fp8.quantize_both(x, group_sizes=sizes)

    q, hq = jax.jit(fp8.quantize)(x), jax.jit(fp8.quantize)(h)
    return {
        "1x128 rows": (fp8.quantize, (x,), 3.9),
        "1x128 rows + transposed": (fp8.quantize_both, (x,), 3.6),
        "1x128 rows + transposed, by groups": (grouped, (x, sizes), 3.6),
        "128x128, both copies": (lambda w: fp8.quantize_both(w, (128, 128)), (w,), 3.6),
        "1x128 rows, by groups, gathered": (gathered, (x, index, sizes), 3.5),
        "FP8 rows to transposed": (fp8.requantize, (q,), 3.6),
        "SwiGLU, rows": (fp8.swiglu_quantize, (h, weight), 3.6),
        "SwiGLU, rows + transposed": (fp8.swiglu_quantize_both, (h, weight), 3.6),
        "SwiGLU backward": (fp8.swiglu_backward, (hq, gradient, weight, sizes), 3.4),
        "XLA: 1x128 rows": (lambda x: reference.quantize(x, (1, 128), "pow2"), (x,), 0),
        "XLA: 1x128 rows + transposed": (xla_both, (x,), 0),
    }


def xla_both(x):
    return [reference.quantize(y, (1, 128), "pow2") for y in (x, x.T)]


def time_casts() -> list[dict]:
    """Every byte of operands and results counts once; what XLA adds to a kernel is in its time."""
    contenders, bytes_of, targets = {}, {}, {}
    for name, (function, operands, target) in casts().items():
        run = jax.jit(function)
        bytes_of[name] = nbytes(operands) + nbytes(run(*operands))
        targets[name] = target
        contenders[name] = functools.partial(run, *operands)
    rows = []
    ran = timing.device_kernels(contenders, REPS, burst=True)
    ours = {name: run for name, run in contenders.items() if targets[name]}
    read = timing.device_microseconds(ours, 7, KERNEL, burst=True, flush="read")
    for name, launches in ran.items():
        totals = sorted(sum(us for _, us in launch) for launch in launches)
        kernel = [sum(us for n, us in launch if KERNEL in n) for launch in launches]
        us = statistics.median(totals)
        own = statistics.median(kernel)
        rate = bytes_of[name] / (own or us) / 1e6
        rows.append({
            "op": f"quantize: {name}", "variant": "quantize", "m": TOKENS, "k": WIDTH,
            "us": round(us, 2), "us_kernel": round(own, 2), "p10": round(totals[1], 2),
            "p90": round(totals[-2], 2), "bytes": bytes_of[name], "gbs": round(1e3 * rate, 1),
            "target_gbs": 1e3 * targets[name], "roofline": round(rate * 1e12 / BANDWIDTH, 3),
        })  # fmt: skip
        note = ""
        if name in read:
            clean = statistics.median(read[name])
            rows[-1] |= {"us_kernel_read_flush": round(clean, 2),
                         "gbs_read_flush": round(1e-3 * bytes_of[name] / clean, 1)}  # fmt: skip
            note = f"; L2 without dirty lines {bytes_of[name] / clean / 1e6:5.2f}"
        print(f"{name:36} {us:8.1f} µs, kernel {own:8.1f} µs: {rate:5.2f} TB/s{note}", flush=True)
    return rows


def peak_bytes(function, *operands) -> int:
    """Returns what a compiled program needs beside its arguments."""
    memory = function.lower(*operands).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def gradients(product: Callable) -> Callable:
    """Returns a step of product(x, w, ...) and the loss Σ y² / 2, whose gradient is y."""

    @jax.jit
    def both(x, w, *rest):
        y, pull = jax.vjp(lambda x, w: product(x, w, *rest), x, w)
        return y, pull(y)

    return both


def compare(problem: Problem, op: str, contenders: dict, ours: str) -> list[dict]:
    """Times whole programs in turn; each contender is (jitted function, operands).

    A row of a peer has the peer's time as `us` and ours as `peer_us`.
    """
    good = {name: c for name, c in contenders.items() if runs(name, *c)}
    started = {name: functools.partial(f, *a) for name, (f, a) in good.items()}
    ran = timing.device_kernels(started, 5, burst=[list(started)])
    totals = {name: timing.sums(launches) for name, launches in ran.items()}
    rows = []
    for name in good:
        own = row(problem, f"{op}: {name}", totals[name], products=3)
        products = statistics.median(timing.sums(ran[name], timing.KERNEL))
        own |= {"bytes_peak": peak_bytes(*good[name][:1], *good[name][1])}
        if products:
            own["us_products"] = round(products, 2)
        if name != ours:
            own |= beside(ours, totals[ours], "this package")
            own |= {} if "fp8" in name else {"version": version_of(name)}
        rows.append(own)
        print(f"{own['op']:60} {own['us']:9.1f} µs, peak {own['bytes_peak'] / 2**20:7.0f} MiB "
              f"{statistics.median(totals[name]) / statistics.median(totals[ours]):.2f} × ours",
              flush=True)  # fmt: skip
    return rows


def matmul() -> list[dict]:
    m, k, n = TOKENS, WIDTH, 4096
    x, w = random(m, k), random(k, n, seed=1)
    contenders = {"fp8_matmul": fp8.fp8_matmul, "bf16 jnp.dot": jnp.dot}
    contenders |= {
        f"fp8_matmul, residuals {r}": functools.partial(fp8.fp8_matmul, residuals=r)
        for r in ("fp8", "input")
    }
    problem = Problem("dense", m, n, k)
    made = {name: (gradients(f), (x, w)) for name, f in contenders.items()}
    return compare(problem, "forward + backward", made, "fp8_matmul")


def ragged_dot() -> list[dict]:
    """The weights are quantised once, outside of what is timed."""
    m, k, n = 2 * TOKENS, WIDTH, 4096
    problem = Problem("ragged", m, n, k, EXPERTS)
    x, w = random(m, k), random(EXPERTS, k, n, seed=1)
    sizes = jnp.asarray(made_up.group_sizes(problem))
    prepared = dataclasses.replace(jax.jit(fp8.prepare_weight)(w), w=None)

    def ours(x, w, prepared, sizes):
        return fp8.fp8_ragged_dot(x, dataclasses.replace(prepared, w=w), sizes)

    made = {
        "fp8_ragged_dot": (gradients(ours), (x, w, prepared, sizes)),
        "jax.lax.ragged_dot": (gradients(jax.lax.ragged_dot), (x, w, sizes)),
    }
    pallas = tuned(m, k, n, EXPERTS)
    if pallas:
        made["Pallas ragged_dot_mgpu, tuned"] = gradients(pallas), (x, w, sizes)
    return compare(problem, f"ragged forward + backward {n}x{k}", made, "fp8_ragged_dot")


def memory() -> list[dict]:
    """Peak memory of four layers x + gelu(x · up) · down, whose inputs are activations."""
    width = WIDTH // 2
    x = random(TOKENS, width)
    kernels = [(random(width, WIDTH, seed=i), random(WIDTH, width, seed=-i)) for i in range(1, 5)]

    def step(product: Callable) -> Callable:
        def loss(kernels, x):
            for up, down in kernels:
                x = x + product(jax.nn.gelu(product(x, up)), down)
            return jnp.mean(x.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss))

    contenders = {"bf16 jnp.dot": jnp.dot} | {
        f"fp8_matmul, residuals {r}": functools.partial(fp8.fp8_matmul, residuals=r)
        for r in ("fp8_t", "fp8", "input")
    }
    peaks = {name: peak_bytes(step(f), kernels, x) for name, f in contenders.items()}
    for name, peak in peaks.items():
        print(f"memory of four layers: {name:30} {peak / 2**20:7.0f} MiB", flush=True)
    return [
        {"op": f"memory of four layers: {name}", "variant": "dense", "m": TOKENS, "n": WIDTH,
         "k": width, "bytes_peak": peak, "bytes_peak_bf16": peaks["bf16 jnp.dot"]}
        for name, peak in peaks.items()
    ]  # fmt: skip


def parts(only: str) -> Iterator[list[dict]]:
    parts = {"casts": time_casts, "matmul": matmul, "ragged": ragged_dot, "memory": memory}
    for name, part in parts.items():
        if only in name:
            yield part()
            progress(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--only", default="", help="casts, matmul, ragged or memory")
    options = parser.parse_args()
    for rows in parts(options.only):
        save(rows, options.out)


if __name__ == "__main__":
    main()
