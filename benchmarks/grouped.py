"""Times grouped products on the GPU at hand, beside what else a JAX user has: device time, cold L2.

python benchmarks/grouped.py
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import pallas_peer
import shapes
from protocol import ANCHORS, DEEPGEMM, deepgemm, progress, row, runs, save, summary

import jax_fp8gemm as fp8
from jax_fp8gemm import tuning
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem

REPS = 11
PADDED = "DeepGEMM, contiguous: the same rows, padded (stored)"  # beside ragged
GROUPS, ROWS = 8, 32768
WEIGHTS = ((4096, 7168), (7168, 2048))


def products(only: str) -> list[dict]:
    """Times every shape in bursts, beside DeepGEMM's stored times."""
    listed = [shape for shape in shapes.GROUPED if only in shape.name]
    times = {}
    # One variant at a time: the operands of all would not fit.
    for _, some in itertools.groupby(listed, lambda shape: (shape.variant, shape.g)):
        times |= burst(list(some))
    rows = []
    for shape in listed:
        problem = shape.problem()
        total = None if shape.variant == "ragged_contracting" else shape.total
        stored = "contiguous" if shape.variant == "ragged" else shape.variant
        peer = ANCHORS[stored].get(f"{shape.g}x{shape.rows}", {}).get(f"{shape.n}x{shape.k}")
        name = DEEPGEMM if stored == shape.variant else PADDED
        extra = {"config": str(select(problem)), **deepgemm(peer, name)}
        rows.append(row(problem, f"grouped: {shape.name}", times[shape.name], total, **extra))
    return rows


def burst(listed: list) -> dict[str, list[float]]:
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        operands = list(pool.map(lambda shape: shape.operands(), listed))
        made = pool.map(
            lambda a: tuning.compiled(a[0].problem(), None, a[1]),
            zip(listed, operands, strict=True),
        )
        contenders = dict(zip((shape.name for shape in listed), made, strict=True))
    found = tuning.device_microseconds(contenders, REPS, tuning.KERNEL, burst=True)
    progress(f"{listed[0].variant}, {listed[0].g} groups")
    return found


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
    sizes = jnp.asarray(tuning.group_sizes(problem))
    weights = jax.jit(lambda w: fp8.quantize(jnp.swapaxes(w, 1, 2), (128, 128)))(rhs)

    @jax.jit
    def ours(lhs, weights, sizes):
        return fp8.gemm(fp8.quantize(lhs), weights, sizes, variant="ragged")

    floats = lhs, rhs, sizes
    contenders = {
        "weights quantized beforehand": functools.partial(ours, lhs, weights, sizes),
        "fp8_ragged_dot": functools.partial(jax.jit(fp8.fp8_ragged_dot), *floats),
    }
    for name, peer in peers().items():
        jitted = jax.jit(peer)
        if runs(name, jitted, floats):
            contenders[name] = functools.partial(jitted, *floats)
        progress(name)
    times = tuning.device_microseconds(contenders, 3, burst=True)
    mine = times.pop("weights quantized beforehand")
    best = min((n for n in times if "Pallas" in n), key=lambda n: min(times[n]), default=None)
    rows = []
    for name, us in times.items():
        if "Pallas" in name and name != best:
            print(f"{name}: {statistics.median(us):.0f} µs", flush=True)
            continue
        op = f"beside {name.split(' (')[0]}: 8x4096 {n}x{k}"
        rows.append(row(problem, op, mine, peer=name, peer_us=round(statistics.median(us), 1)))
    return rows


def parts(only: str) -> Iterator[list[dict]]:
    yield products(only)
    if not only:
        for n, k in WEIGHTS:
            yield ragged_dot(n, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--rows", default="", help="only shapes whose name contains this")
    options = parser.parse_args()
    for rows in parts(options.rows):
        save(rows, options.out)
        for variant in ("contiguous", "ragged_4", "ragged_8", "masked", "ragged_contracting"):
            summary(rows, f"grouped: {variant}")
        for r in rows:
            if "DeepGEMM" not in r.get("peer", ""):
                print(f"{r['op']} {r['us']} µs, {r['gbs']} GB/s; peer {r.get('peer_us', '')}")


if __name__ == "__main__":
    main()
