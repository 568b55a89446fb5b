"""Times one DeepSeek-V3 MoE layer with FP8 weights, as generation and prefill call it.

python benchmarks/decode.py

256 experts, a shared one, the router with its groups. Device time of all kernels, cold L2. The
limits: bytes of what the chosen experts' weights, x and y hold at 4.4 TB/s, and FP8 operations.
Then a whole layer of examples/deepseek with its attention: a token for each of many sequences
whose latents are kept, and a prompt. Products of attention are in bf16, its limit is 790 TFLOP/s.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import BANDWIDTH, PEAK, progress, save

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples/deepseek"))

import files
import model

import jax_fp8gemm as fp8
from jax_fp8gemm._core.layout import ceil_div
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._tools import timing

WIDTH, HIDDEN, EXPERTS, TOP_K = 7168, 2048, 256, 8  # arXiv 2412.19437, section 4.2
N_GROUP, TOPK_GROUP, SCALING = 8, 4, 2.5
TOKENS = (1, 8, 32, 64, 128, 256, 1024, 4096)
REPS = 11
BF16_PEAK = 790e12  # operations a second
SEQUENCES, KEPT, PROMPT = 64, 4096, 2048


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def weight(key: jax.Array, lead: tuple[int, ...], n: int, k: int) -> fp8.QArray:
    values = (64 * jax.random.normal(key, (*lead, n, k), jnp.bfloat16)).astype(FP8)
    shape = (*lead, ceil_div(n, 128), ceil_div(k, 128))
    scale = jnp.exp2(jax.random.randint(key, shape, -13, -11) * 1.0)
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


def whole_layer(experts: fp8.ExpertKernels, shared: fp8.ExpertKernels) -> nnx.Module:
    """Returns a layer of the published model with random weights in FP8."""
    c, keys = model.V3, iter(jax.random.split(jax.random.key(4), 5))
    layer = nnx.eval_shape(lambda: model.Layer(c, c.dense_layers, nnx.Rngs(0)))
    matrices = {
        "q_a": (c.q_rank, c.hidden_size), "q_b": (c.heads * 192, c.q_rank),
        "kv_a": (576, c.hidden_size), "kv_b": (c.heads * 256, c.kv_rank),
        "o": (c.hidden_size, c.heads * c.value_dim),
    }  # fmt: skip
    norms = {"q_a_norm": c.q_rank, "kv_a_norm": c.kv_rank}
    attention = {name: weight(next(keys), (), *shape) for name, shape in matrices.items()}
    attention |= {name: jnp.ones(width, jnp.bfloat16) for name, width in norms.items()}
    ones = jnp.ones(c.hidden_size, jnp.bfloat16)
    gate = jax.random.normal(jax.random.key(1), (c.hidden_size, c.experts)) / c.hidden_size**0.5
    part = {
        "attention": attention, "attention_norm": ones, "mlp_norm": ones, "gate_kernel": gate,
        "correction_bias": jnp.zeros(c.experts), "experts": vars(experts), "shared": vars(shared),
    }  # fmt: skip
    files._fill(layer, part, c)
    return layer


def whole_limit(tokens: int, kept: int, chosen: int) -> float:
    """Returns the µs of a whole layer's bytes and operations, whichever are more in each part."""
    c, one = model.V3, 3 * WIDTH * HIDDEN
    projections = c.hidden_size * (c.q_rank + 576 + c.heads * c.value_dim)
    projections += c.heads * 192 * c.q_rank
    flops = 2 * tokens * (projections + one * (TOP_K + 1)) / PEAK
    nbytes = (projections + c.heads * 256 * c.kv_rank + (chosen + 1) * one) / BANDWIDTH
    if kept:  # latents of every sequence are read once
        attention = 2 * tokens * c.heads * (2 * c.kv_rank + c.rope_dim) * kept
        latents = 2 * tokens * kept * (c.kv_rank + c.rope_dim)
    else:  # half of the pairs of tokens
        attention = 2 * c.heads * (192 + c.value_dim) * tokens**2 / 2
        latents = 0
    return 1e6 * (max(flops, nbytes) + max(attention / BF16_PEAK, latents / BANDWIDTH))


def whole(experts: fp8.ExpertKernels, shared: fp8.ExpertKernels) -> list[dict]:
    c, given = model.V3, whole_layer(experts, shared)
    kept = [
        jax.random.normal(jax.random.key(i), (SEQUENCES, KEPT, width), jnp.bfloat16)
        for i, width in enumerate((c.kv_rank, c.rope_dim))
    ]
    run = nnx.jit(lambda layer, x, positions, kept: layer(x, positions, kept)[::2])
    random = functools.partial(jax.random.normal, jax.random.key(9), dtype=jnp.bfloat16)
    cases = {
        f"decode, {SEQUENCES} sequences of {KEPT} tokens": (
            (random((SEQUENCES, 1, WIDTH)), jnp.array([KEPT - 1]), kept), SEQUENCES, KEPT),
        f"prefill, {PROMPT} tokens": (
            (random((1, PROMPT, WIDTH)), jnp.arange(PROMPT), None), PROMPT, 0),
    }  # fmt: skip
    rows = []
    for name, (operands, tokens, room) in cases.items():
        chosen = len(np.unique(run(given, *operands)[1].expert_index))
        us = timing.device_microseconds({0: functools.partial(run, given, *operands)}, REPS)[0]
        median, low, high = timing.spread(us)
        limit = whole_limit(tokens, room, chosen)
        rows.append({
            "op": f"whole DeepSeek-V3 layer with FP8 weights, {name}", "us": round(median, 2),
            "p10": round(low, 2), "p90": round(high, 2), "experts": chosen,
            "limit_us": round(limit, 2), "times_limit": round(median / limit, 3),
        })  # fmt: skip
        print(f"whole layer, {name}: {median:9.1f} µs = {median / limit:.2f} × limit")
    return rows


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
    save(whole(*operands[2:]), options.out)


if __name__ == "__main__":
    main()
