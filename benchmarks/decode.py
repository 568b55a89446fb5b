"""Times one DeepSeek-V3 MoE layer with FP8 weights, as generation and prefill call it.

python benchmarks/decode.py

256 experts, a shared one, the router with its groups. Device time of all kernels, cold L2. The
limits: bytes of what the chosen experts' weights, x and y hold at 4.4 TB/s, and FP8 operations.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from protocol import BANDWIDTH, PEAK, progress, save

import jax_fp8gemm as fp8
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._tools import timing

WIDTH, HIDDEN, EXPERTS, TOP_K = 7168, 2048, 256, 8  # arXiv 2412.19437, section 4.2
N_GROUP, TOPK_GROUP, SCALING = 8, 4, 2.5
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 4096)
REPS = 11


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def weight(key: jax.Array, lead: tuple[int, ...], n: int, k: int) -> fp8.QArray:
    values = (64 * jax.random.normal(key, (*lead, n, k), jnp.bfloat16)).astype(FP8)
    scale = jnp.exp2(jax.random.randint(key, (*lead, n // 128, k // 128), -13, -11) * 1.0)
    return fp8.QArray(values, scale)


def kernels(seed: int, lead: tuple[int, ...]) -> fp8.ExpertKernels:
    keys = jax.random.split(jax.random.key(seed), 3)
    up = [weight(key, lead, HIDDEN, WIDTH) for key in keys[:2]]
    return fp8.ExpertKernels(wi_0=up[0], wi_1=up[1], wo=weight(keys[2], lead, WIDTH, HIDDEN))


def layer(x, gate, bias, experts, shared) -> tuple[jax.Array, jax.Array]:
    """Returns the layer's result, and which experts were chosen."""
    y, aux = fp8.moe(
        x, gate, experts, top_k=TOP_K, score_function="sigmoid", bias=bias, n_group=N_GROUP,
        topk_group=TOPK_GROUP, routed_scaling_factor=SCALING, shared=shared,
    )  # fmt: skip
    return y, aux.expert_index


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    options = parser.parse_args(arguments)
    operands = (
        jax.random.normal(jax.random.key(1), (WIDTH, EXPERTS), jnp.float32) / WIDTH**0.5,
        jnp.zeros(EXPERTS), kernels(2, (EXPERTS,)), kernels(3, ()),
    )  # fmt: skip
    progress("weights made")
    contenders, used = {}, {}
    for tokens in options.tokens:
        x = jax.random.normal(jax.random.key(tokens), (tokens, WIDTH), jnp.bfloat16)
        contenders[tokens] = functools.partial(
            jax.jit(layer).lower(x, *operands).compile(), x, *operands
        )
        used[tokens] = len(np.unique(contenders[tokens]()[1]))
    progress("compiled")
    times = timing.device_microseconds(contenders, REPS)
    rows = []
    for tokens, us in times.items():
        median, low, high = timing.spread(us)
        count, one = used[tokens], 3 * WIDTH * HIDDEN
        nbytes = (count + 1) * one * (1 + 4 / 128**2) + 4 * WIDTH * EXPERTS + 4 * tokens * WIDTH
        flops = 2 * one * tokens * (TOP_K + 1)
        limit = max(nbytes / BANDWIDTH, flops / PEAK) * 1e6
        row = {
            "op": f"MoE layer with FP8 weights, {tokens} tokens", "us": round(median, 2),
            "p10": round(low, 2), "p90": round(high, 2), "experts": count, "bytes": round(nbytes),
            "flops": flops, "limit_us": round(limit, 2), "times_limit": round(median / limit, 3),
        }  # fmt: skip
        rows.append(row)
        print(f"{tokens:6} tokens: {median:9.1f} µs = {median / limit:.2f} × limit")
    save(rows, options.out)


if __name__ == "__main__":
    main()
