"""Which block shape, pipeline and cluster a GEMM gets: a pure function of its problem."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys

from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.cost import ranked
from jax_fp8gemm._select.problem import GemmConfig, Problem, blocks, why_illegal
from jax_fp8gemm._select.saved import Table, file_name, read

TUNED_RATIO = 1.5  # a tuned row serves m up to this factor away, with the same number of blocks


@functools.cache
def _tuned(device: str) -> dict:
    """Returns the measured winners of a device: (variant, n, k, ...) -> {m: config}."""
    folder = pathlib.Path(__file__).parent / "tuned"
    path = folder / f"{file_name(device)}.json"
    if not path.exists():
        path = folder / "nvidia-h200.json"  # the nearest relative of every Hopper GPU
    table: dict = {}
    fields = {field.name for field in dataclasses.fields(GemmConfig)}
    for row in json.loads(path.read_text()):
        key = tuple(row[name] for name in ("variant", "n", "k", "g", "scales", "out"))
        config = GemmConfig(**{name: row[name] for name in fields})
        table.setdefault(key, {})[row["m"]] = config
    return table


@functools.cache
def saved(device: str) -> Table:
    """Returns the configs of the user's file. It is read at the first choice of a process, and
    again once saved.cache_clear() was called, as `tune` does after it has written."""
    return read(device)


def select(problem: Problem) -> GemmConfig:
    """Returns the config for `problem`: that of the user's file, else the tuned row of the nearest
    m that needs as many blocks, else the model's best."""
    chosen, source = choose(problem)
    if os.environ.get("JAX_FP8GEMM_PRINT_CONFIGS") == "1":
        print(f"jax_fp8gemm: {problem} -> {chosen} ({source})", file=sys.stderr)
    return chosen


def choose(problem: Problem) -> tuple[GemmConfig, str]:
    """As select, and where the config comes from: "saved", "tuned" or "model"."""
    p = problem
    if p in saved(p.device):
        return saved(p.device)[p], "saved"
    tuned = {} if p.casts else _tuned(p.device)
    by_m = tuned.get((p.variant, p.n, p.k, p.g, p.scales, p.out), {})

    def distance(m: int) -> float:
        return abs(math.log(m / p.m))

    def serves(m: int) -> bool:
        here, there = (blocks(x, by_m[m]) for x in (p, dataclasses.replace(p, m=m)))
        return here == there and why_illegal(p, by_m[m]) is None

    near = [m for m in by_m if distance(m) <= math.log(TUNED_RATIO)]
    near.sort(key=distance)
    chosen = next((by_m[m] for m in near if serves(m)), None)
    if chosen is not None:
        return chosen, "tuned"
    return ranked(p, candidates(p))[0], "model"
