"""Times a training step of a mixture-of-experts model whose experts are DeepSeek-V3's.

python benchmarks/train_step.py

Forward, backward and AdamW with float32 masters; wall-clock time, since that is what training
takes. Beside it the same model in bf16 around JAX's Pallas kernels, tuned by hand.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from protocol import progress, save
from train_moe import arm_of, compiled_step, moe_lm, optimizer

# Width, hidden width and choices of each token: DeepSeek-V3 (arXiv 2412.19437), section 4.2.
SIZE = moe_lm.Size(width=7168, layers=2, heads=56, experts=16, hidden=2048, context=4096, top_k=8)
SEQUENCES = 4
WARM, TIMED = 3, 12


def step_seconds(name: str, size: moe_lm.Size, sequences: int) -> tuple[list[float], int]:
    """Returns s of each step, and the bytes that a step needs beside parameters and state."""
    rule = optimizer(1000)
    arm = arm_of(name, size, sequences)
    params = jax.jit(lambda: moe_lm.init(jax.random.key(0), size))()
    state = jax.jit(rule.init)(params)
    text = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    draw = np.random.default_rng(1)
    tokens = [
        jnp.asarray(moe_lm.batch(text, draw, sequences, size.context)) for _ in range(WARM + TIMED)
    ]
    step = compiled_step(arm, size, rule, sequences)
    progress(f"{name} compiled")
    times = []
    for each in tokens:
        start = time.perf_counter()
        params, state, entropy = jax.block_until_ready(step(params, state, each))
        times.append(time.perf_counter() - start)
    if not np.isfinite(float(entropy)):
        raise RuntimeError(f"{name}: the loss is {float(entropy)}")
    return times[WARM:], step.memory_analysis().temp_size_in_bytes


def rows(size: moe_lm.Size, sequences: int) -> list[dict]:
    count = sequences * size.context
    what = f"{size.layers} layers, {size.experts} experts of {size.width} x {size.hidden}"
    found = {name: step_seconds(name, size, sequences) for name in ("bf16", "fp8")}
    ours = 1e6 * statistics.median(found["fp8"][0])
    made = []
    for name, (times, temporary) in found.items():
        us = sorted(1e6 * t for t in times)
        made.append({
            "op": f"training step, {what}, {count} tokens: {name}",
            "us": round(statistics.median(us)), "p10": round(us[1]), "p90": round(us[-2]),
            "tokens": count, "bytes_peak": temporary,
            "tokens_per_s": round(1e6 * count / statistics.median(us)),
            **({} if name == "fp8" else {"peer": "fp8", "peer_us": round(ours)}),
        })  # fmt: skip
        print(
            f"{made[-1]['op']} {made[-1]['us'] / 1e3:.1f} ms, {made[-1]['tokens_per_s']} tokens/s, "
            f"temporary {temporary / 2**30:.2f} GiB, {made[-1]['us'] / ours:.3f} x ours"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    options = parser.parse_args()
    save(rows(SIZE, SEQUENCES), options.out)


if __name__ == "__main__":
    main()
