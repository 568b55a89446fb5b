"""Times the router of a mixture of experts, beside what it was before: device time, cold L2.

python benchmarks/router.py

Logits and both gradients, beside float32 products without tensor cores, with the errors of both
against float64. Then scores, choice, counts and the order of the rows, beside XLA's own sorts.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from protocol import beside, progress, save
from quantize import peak_bytes

from jax_fp8gemm._moe.gate import gate_logits
from jax_fp8gemm._moe.order import Permutation, permutation_of
from jax_fp8gemm._moe.routing import route
from jax_fp8gemm._tools import timing

REPS = 11
SAMPLE = 2048  # rows or columns whose errors are taken


@dataclasses.dataclass(frozen=True)
class Shape:
    t: int
    h: int
    e: int
    top_k: int = 8

    def __str__(self) -> str:
        return f"{self.t} tokens x {self.h} x {self.e} experts"


# SonicMoE's benchmark (arXiv 2512.14080); DeepSeek-V3's router with few and with many tokens.
SHAPES = [Shape(24576, 1536, 128), Shape(4096, 7168, 256), Shape(32768, 7168, 256)]


def in_float32(x, kernel):
    """The logits as they were made before."""
    return jnp.dot(x.astype(jnp.float32), kernel, precision="highest")


def with_gradients(function: Callable) -> Callable:
    @jax.jit
    def run(x, kernel, d):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(d)

    return run


def operands(shape: Shape, dtype) -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (shape.t, shape.h), dtype)
    kernel = jax.random.normal(keys[1], (shape.h, shape.e)) * shape.h**-0.5
    return x, kernel, jax.random.normal(keys[2], (shape.t, shape.e))


def errors(got, given, top_k: int) -> dict:
    """Returns errors relative to the norm, and how many of the sampled tokens choose otherwise."""
    x, kernel, d = given
    tokens = np.random.default_rng(0).permutation(len(x))[:SAMPLE]
    dims = np.random.default_rng(1).permutation(x.shape[1])[:SAMPLE]
    wide = functools.partial(np.asarray, dtype=np.float64)
    right = wide(x[tokens]) @ wide(kernel), wide(d[tokens]) @ wide(kernel).T, wide(x[:, dims]).T
    right = *right[:2], right[2] @ wide(d)
    sampled = [wide(a) for a in (got[0][tokens], got[1][tokens], got[2][dims])]
    names = ("error_logits", "error_dx", "error_dkernel")
    found = {
        name: float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for name, a, b in zip(names, sampled, right, strict=True)
    }
    choices = [np.argsort(-y, axis=1, kind="stable")[:, :top_k] for y in (sampled[0], right[0])]
    return {**found, "tokens_that_choose_otherwise": int((choices[0] != choices[1]).any(1).sum())}


def compare(op: str, ours: tuple, before: tuple, ours_too: dict, before_too: dict) -> list[dict]:
    """Times two (name, jitted function, operands) in turn; returns a row of each."""
    contenders = {name: functools.partial(run, *given) for name, run, given in (ours, before)}
    ran = timing.device_kernels(contenders, REPS, burst=[list(contenders)])
    totals = {name: timing.sums(launches) for name, launches in ran.items()}
    rows = []
    for (name, run, given), other, extra in ((ours, before, ours_too), (before, ours, before_too)):
        us, low, high = timing.spread(totals[name])
        rows.append({
            "op": f"router: {op}: {name}", "variant": "router", "us": round(us, 2),
            "p10": round(low, 2), "p90": round(high, 2), "kernels": len(ran[name][0]),
            "bytes_peak": peak_bytes(run, *given), **extra, **beside(other[0], totals[other[0]]),
        })  # fmt: skip
        print(f"{rows[-1]['op']:90} {us:9.1f} µs, {rows[-1]['kernels']} kernels", extra, flush=True)
    print(f"   {rows[0]['us'] / rows[1]['us']:.3f} of the time before", flush=True)
    return rows


def products(shape: Shape, dtype=jnp.bfloat16) -> list[dict]:
    given = operands(shape, dtype)
    made = [("bf16 parts", gate_logits), ("float32", in_float32)]
    made = [(name, with_gradients(f), given) for name, f in made]
    judged = [errors(run(*given), given, shape.top_k) for _, run, _ in made]
    op = f"logits and gradients, {shape}, x {jnp.dtype(dtype).name}"
    return compare(op, *made, *judged)


# ---- choice and order ---------------------------------------------------------------------------


def choose(logits, top_k: int):
    """Returns the routing, the order of the rows, and its inverse."""
    routing = route(logits, top_k)
    permutation = permutation_of(routing.expert_index, logits.shape[1])
    return routing.gate_weights, routing.aux_loss, permutation, permutation.inverse()


def choose_by_sorts(logits, top_k: int):
    """The same as it was made before."""
    scores, e = jax.nn.softmax(logits), logits.shape[1]
    expert_index = jax.lax.top_k(scores, top_k)[1]
    weights = jnp.take_along_axis(scores, expert_index, axis=1)
    weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
    chosen = (expert_index[:, :, None] == jnp.arange(e)[None, None]).sum(1, dtype=jnp.float32)
    aux_loss = e * jnp.sum(chosen.mean(0) / top_k * scores.mean(0))
    flat = expert_index.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    permutation = Permutation(order, jnp.bincount(flat, length=e).astype(jnp.int32))
    return weights, aux_loss, permutation, permutation.inverse()


def choices(shape: Shape) -> list[dict]:
    logits = jax.random.normal(jax.random.key(0), (shape.t, shape.e))
    made = [("maxima and a byte-wide sort", choose), ("sorts", choose_by_sorts)]
    made = [(name, jax.jit(functools.partial(f, top_k=shape.top_k)), (logits,)) for name, f in made]
    ours, before = (run(*given)[2:] for _, run, given in made)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(before), strict=True)
    same = all(bool((a == b).all()) for a, b in pairs)
    op = f"choice and order, {shape}, top-{shape.top_k}"
    return compare(op, *made, {"same_bits": same}, {})


def parts(only: str, shapes=tuple(SHAPES)) -> Iterator[list[dict]]:
    for shape in shapes:
        made = {
            "products": functools.partial(products, shape),
            "float32 x": functools.partial(products, shape, jnp.float32),
            "choices": functools.partial(choices, shape),
        }
        for name, part in made.items():
            if only in name:
                yield part()
                progress(f"{name} of {shape}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--only", default="", help="products, float32 x or choices")
    options = parser.parse_args()
    for rows in parts(options.only):
        save(rows, options.out)


if __name__ == "__main__":
    main()
