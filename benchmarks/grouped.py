"""Times grouped GEMMs on the GPU at hand, in turn with what else there is: device time, cold L2.

python benchmarks/grouped.py
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pallas_peer
from gemm_rows import Case, measure, ready
from protocol import beside, progress, row, runs, save, summary

import jax_fp8gemm as fp8
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import operands as made_up
from jax_fp8gemm._tools import shapes, timing

REPS = 11
GROUPS, ROWS = 8, 32768
WEIGHTS = ((4096, 7168), (7168, 2048))


def products(only: str) -> list[dict]:
    """Times every shape in turn with DeepGEMM."""
    listed = [shape for shape in shapes.GROUPED if only in shape.name]
    cases = [case_of(shape, "", 1.0) for shape in listed]
    along_k = [shape for shape in listed if shape.variant == "ragged_contracting"]
    cases += [case_of(shape, "no scale shared, ", 0.0) for shape in along_k]
    compiling = ready(cases)
    rows = []
    # One family at a time: the operands of all would not fit.
    for family, some in itertools.groupby(cases, family_of):
        rows += measure(list(some), compiling, REPS)
        progress(" ".join(map(str, family)))
    return rows


def case_of(shape: shapes.GroupedShape, prefix: str, shared: float) -> Case:
    """Returns a row to measure; only weight gradients have column scales to share."""
    shared *= shape.variant == "ragged_contracting"
    return Case(f"{prefix}grouped: {shape.name}", problem_of(shape), shape.sizes(), shared)


def family_of(case: Case) -> tuple:
    p = case.problem
    return (p.variant,) if p.variant == "masked" else (p.variant, p.g, "groups")


def problem_of(shape: shapes.GroupedShape) -> Problem:
    kind = jax.devices()[0].device_kind
    return dataclasses.replace(shape.problem(), device=kind)


# ---- beside the ragged dots that JAX has --------------------------------------------------------


def tokamax(lhs, rhs, sizes):
    import tokamax

    return tokamax.ragged_dot(lhs, rhs, sizes)


def peers() -> dict[str, Callable]:
    """Returns what a JAX user has today, in bf16."""
    made = {
        f"Pallas ragged_dot_mgpu {config}": functools.partial(pallas_peer.forward, config=config)
        for config in pallas_peer.FORWARD
    }
    return {**made, "tokamax.ragged_dot": tokamax, "jax.lax.ragged_dot": jax.lax.ragged_dot}


def ragged_dot(n: int, k: int) -> list[dict]:
    """Times forward products of floats, casts included, beside ours with weights in FP8 before."""
    problem = Problem("ragged", ROWS, n, k, GROUPS)
    keys = jax.random.split(jax.random.key(0))
    lhs = jax.random.normal(keys[0], (ROWS, k), jnp.bfloat16)
    rhs = jax.random.normal(keys[1], (GROUPS, k, n), jnp.bfloat16)
    sizes = jnp.asarray(made_up.group_sizes(problem))
    weights = jax.jit(lambda w: fp8.quantize(jnp.swapaxes(w, 1, 2), (128, 128)))(rhs)

    @jax.jit
    def ours(lhs, weights, sizes):
        return fp8.gemm(fp8.quantize(lhs), weights, sizes, variant="ragged")

    floats = lhs, rhs, sizes
    contenders = {
        "weights quantised beforehand": functools.partial(ours, lhs, weights, sizes),
        "fp8_ragged_dot": functools.partial(jax.jit(fp8.fp8_ragged_dot), *floats),
    }
    for name, peer in peers().items():
        jitted = jax.jit(peer)
        if runs(name, jitted, floats):
            contenders[name] = functools.partial(jitted, *floats)
        progress(name)
    times = timing.device_microseconds(contenders, 3)  # all in turn
    mine = times.pop("weights quantised beforehand")
    best = min((n for n in times if "Pallas" in n), key=lambda n: min(times[n]), default=None)
    rows = []
    for name, us in times.items():
        if "Pallas" in name and name != best:
            print(f"{name}: {statistics.median(us):.0f} µs", flush=True)
            continue
        op = f"beside {name.split(' (')[0]}: 8x4096 {n}x{k}"
        rows.append(row(problem, op, mine, **beside(name, us)))
    return rows


def parts(options: argparse.Namespace) -> Iterator[list[dict]]:
    if "products" in options.only:
        yield products(options.rows)
    if "peers" in options.only and not options.rows:
        for n, k in WEIGHTS:
            yield ragged_dot(n, k)


PARTS = ("products", "peers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--rows", default="", help="only shapes whose name contains this")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="default: both")
    options = parser.parse_args()
    for rows in parts(options):
        save(rows, options.out)
        for variant in ("contiguous", "ragged_4", "ragged_8", "masked", "ragged_contracting"):
            summary(rows, f"grouped: {variant}")
        for r in rows:
            if "DeepGEMM" not in r.get("peer", ""):
                print(f"{r['op']} {r['us']} µs, {r['gbs']} GB/s; peer {r.get('peer_us', '')}")


if __name__ == "__main__":
    main()
