"""Times many configs of many GEMMs, the data that the cost model is fitted to (fit_cost.py).

python benchmarks/config_times.py --out benchmarks/results/config_times.json.gz

Nothing is checked here: tests/gpu do that for every kind of config. Operands come from one pool of
random numbers, and all configs of a GEMM are branches of one program, so that thousands fit into
minutes. Times are medians with a cold L2, as everywhere (jax_fp8gemm/_tools/timing.py).
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import progress

from jax_fp8gemm._bind.gemm_op import DTYPES
from jax_fp8gemm._bind.native import TARGET
from jax_fp8gemm._core.layout import SCALE_BLOCK, round_up, scale_shape_in_kernel
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.cost import ranked
from jax_fp8gemm._select.problem import GemmConfig, Problem, attributes
from jax_fp8gemm._tools import timing
from jax_fp8gemm._tools.operands import group_operand, group_sizes
from jax_fp8gemm._tools.shapes import LAYERS

REPS = 5
CONFIGS = 36  # of one GEMM at most
MOST_WORK = 1.2e12  # additions and multiplications of one launch
MOST_BYTES = 24 << 30  # of operands at once
POOL = 1 << 26  # distinct numbers
MOST_WEIGHTS = 1 << 30
ROWS = (1, 3, 4, 8, 16, 17, 32, 64, 96, 129, 160, 192, 200, 256, 333, 384, 448, 512, 576, 640, 700)
FIELDS = [field.name for field in dataclasses.fields(GemmConfig)]
KEYS = ("variant", "m", "n", "k", "g", "scales", "out")


# ---- which GEMMs --------------------------------------------------------------------------------


def size(draw: np.random.Generator, low: int, high: int, unit: int) -> int:
    """Returns a multiple of `unit`, log-uniform."""
    return round_up(round(math.exp(draw.uniform(math.log(low), math.log(high)))), unit)


def weight(draw: np.random.Generator) -> tuple[int, int]:
    """Returns n and k: half are of public models' layers."""
    if draw.uniform() < 0.5:
        layer = LAYERS[draw.integers(len(LAYERS))]
        return layer.n, layer.k
    unit = int(draw.choice([8, 64, 128]))
    most = 140_000 if draw.uniform() < 0.15 else 24_000  # wide vocabularies
    return size(draw, 256, most, unit), size(draw, 256, 16_000, max(unit, 16))


def dense(draw: np.random.Generator) -> Problem:
    n, k = weight(draw)
    if n * k > MOST_WEIGHTS:
        return dense(draw)
    most = max(1, min(16384, int(MOST_WORK / (2 * n * k))))
    m = int(draw.choice(ROWS)) if draw.uniform() < 0.5 else size(draw, 1, most, 1)
    return Problem("dense", min(m, most), n, k)


def gradient(draw: np.random.Generator) -> Problem:
    """A weight gradient: float32, a scale for every row and column."""
    m, n = weight(draw)
    k = size(draw, 256, 16384, 128)
    if m * n > 2**27:
        return gradient(draw)
    return Problem("dense", m, n, min(k, round_up(int(MOST_WORK / (2 * m * n)), 128)), 1,
                   "1x128_1x128", "f32")  # fmt: skip


def grouped(variant: Any, draw: np.random.Generator) -> Problem:
    n, k = weight(draw)
    g = int(draw.choice([2, 4, 8, 16, 32, 64]))
    if n * k * g > MOST_WEIGHTS:
        return grouped(variant, draw)
    if variant == "ragged_contracting":
        rows = size(draw, 128, 8192, 128)
        if g * n * k > 2**28 or rows * g * n * k * 2 > MOST_WORK:
            return grouped(variant, draw)
        return Problem(variant, n, k, rows * g, g, "1x128_1x128", "f32")
    rows = size(draw, 8, 8192, 1)
    rows = max(1, min(rows, int(MOST_WORK / (2 * n * k * g))))
    problem = Problem(variant, rows if variant == "masked" else rows * g, n, k, g)
    if variant == "contiguous":  # its m counts what is between groups
        padded = len(group_operand(problem, group_sizes(problem)))
        problem = dataclasses.replace(problem, m=padded)
    return problem


def drawn(seed: int, scale: float) -> list[Problem]:
    """Returns the GEMMs of a data set; of equal ones only one."""
    draw = np.random.default_rng(seed)
    problems = [dense(draw) for _ in range(round(230 * scale))]
    problems += [gradient(draw) for _ in range(round(60 * scale))]
    for variant, count in (
        ("ragged", 60), ("masked", 50), ("contiguous", 30), ("ragged_contracting", 40),
    ):  # fmt: skip
        problems += [grouped(variant, draw) for _ in range(round(count * scale))]
    return list(dict.fromkeys(problems))


def configs_of(problem: Problem, draw: np.random.Generator) -> list[GemmConfig]:
    """Returns today's choice, what the model likes, and some of the rest."""
    best_first = ranked(problem, candidates(problem))
    first, rest = best_first[: CONFIGS * 2 // 3], best_first[CONFIGS * 2 // 3 :]
    some = [rest[i] for i in draw.permutation(len(rest))[: CONFIGS - len(first)]]
    return list(dict.fromkeys([select(problem), *first, *some]))


# ---- operands and programs ----------------------------------------------------------------------


class Pool:
    """Random FP8 numbers and scales, without a program for every shape."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        values = np.clip(64 * draw.standard_normal(POOL, np.float32), -448, 448)
        self.fp8 = np.tile(values.astype(FP8), 20)
        self.scales = np.tile(draw.uniform(0.005, 0.015, POOL // 4).astype(np.float32), 4)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.fp8[: math.prod(shape)].reshape(shape)

    def scale(self, shape: tuple[int, ...], tile: Any, shared: bool) -> np.ndarray:
        shape = scale_shape_in_kernel(shape, tile)
        found = self.scales[: math.prod(shape)].reshape(shape)
        if not shared:
            return found
        first = np.repeat(found[..., ::SCALE_BLOCK], SCALE_BLOCK, -1)
        return np.ascontiguousarray(first[..., : shape[-1]])


def operands_of(pool: Pool, p: Problem) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Returns operands in the kernel's layout, and the result's shape."""
    row = VARIANTS[p.variant]
    letters = {"g": p.g, "m": p.m, "n": p.n, "k": p.k}
    groups = []
    if row.group_operand:
        groups = [np.asarray(group_operand(p, group_sizes(p)), np.int32)]
        if p.variant == "contiguous":
            groups = [groups[0][: p.m]]
        if p.variant == "masked":
            letters["m"] = round_up(int(groups[0].max()), 64)
    lhs, rhs, out = (tuple(letters[c] for c in dims) for dims in (row.lhs, row.rhs, row.out))
    shared = p.scales == "1x128_1x128"
    scales = [pool.scale(lhs, p.tiles[0], False), pool.scale(rhs, p.tiles[1], shared)]
    return [pool.values(lhs), pool.values(rhs), *scales, *groups], out


def branches(problem: Problem, configs: Sequence[GemmConfig], out: tuple[int, ...]) -> Any:
    """Returns index, operands -> the result by that config, jitted."""
    result = jax.ShapeDtypeStruct(out, DTYPES[problem.out])

    def branch(config):
        found = attributes(problem, config)
        return lambda *operands: jax.ffi.ffi_call(TARGET, result)(*operands, **found)

    def run(index, *operands):
        return jax.lax.switch(index, [branch(config) for config in configs], *operands)

    return jax.jit(run)


@dataclasses.dataclass
class Case:
    problem: Problem
    configs: list[GemmConfig]
    operands: list[np.ndarray]
    out: tuple[int, ...]
    run: Any = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.operands) + 8 * math.prod(self.out)

    def compile(self) -> None:
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.operands]
        run = branches(self.problem, self.configs, self.out)
        self.run = run.lower(jax.ShapeDtypeStruct((), jnp.int32), *types).compile()


def compiled(problems: list[Problem], seed: int) -> list[Case]:
    pool, draw = Pool(), np.random.default_rng(seed)
    cases = [Case(p, configs_of(p, draw), *operands_of(pool, p)) for p in problems]
    progress(f"{len(cases)} GEMMs, {sum(len(c.configs) for c in cases)} configs")
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for done, _ in enumerate(threads.map(Case.compile, cases)):
            if done % 50 == 0:
                progress(f"{done} compiled")
    return cases


# ---- times --------------------------------------------------------------------------------------


def batches(cases: list[Case]) -> Iterator[list[Case]]:
    some: list[Case] = []
    for case in cases:
        if some and sum(c.nbytes for c in [*some, case]) > MOST_BYTES:
            yield some
            some = []
        some.append(case)
    yield some


def times(cases: list[Case], buffer: jax.Array) -> tuple[list[list[float]], jax.Array]:
    """Returns µs of each config of each case."""
    ready = [(case, [jax.device_put(x) for x in case.operands]) for case in cases]
    numbers = [jnp.int32(i) for i in range(max(len(c.configs) for c in cases))]
    for case, operands in ready:
        for i in range(len(case.configs)):
            jax.block_until_ready(case.run(numbers[i], *operands))
    with timing.tracing() as events:
        for case, operands in ready:
            for _ in range(REPS):
                for i in range(len(case.configs)):
                    buffer = timing._flush(buffer, jnp.uint32(i % 8))
                    case.run(numbers[i], *operands)
            jax.block_until_ready(buffer)
    ours = iter([event.us for event in events if timing.KERNEL in event.name])
    found = []
    for case in cases:
        runs = [[next(ours) for _ in case.configs] for _ in range(REPS)]
        found.append([statistics.median(column) for column in zip(*runs, strict=True)])
    if next(ours, None) is not None:
        raise RuntimeError("more launches in the trace than were made")
    return found, buffer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of GEMMs")
    parser.add_argument("--rows", type=int, nargs=2, default=(0, 1 << 30), help="of one group")
    options = parser.parse_args(arguments)
    low, high = options.rows
    problems = [p for p in drawn(options.seed, options.scale) if low <= p.one_group[0] <= high]
    cases = compiled(problems, options.seed)
    progress("compiled")
    buffer = jnp.zeros(timing.FLUSH_BYTES // 4, jnp.uint32)
    rows: list[dict] = []
    path = pathlib.Path(options.out)
    for some in batches(cases):
        found, buffer = times(some, buffer)
        for case, us in zip(some, found, strict=True):
            p = dataclasses.asdict(case.problem)
            listed = [
                [getattr(config, name) for name in FIELDS] + [round(t, 2)]
                for config, t in zip(case.configs, us, strict=True)
            ]
            rows.append({name: p[name] for name in KEYS} | {"configs": listed})
        # NOTE: written after every batch, so that nothing is lost where time runs out.
        about = {"device": jax.devices()[0].device_kind, "seed": options.seed,
                 "commit": os.environ.get("JAX_FP8GEMM_COMMIT", ""),
                 "fields": [*FIELDS, "us"]}  # fmt: skip
        path.write_bytes(gzip.compress(json.dumps(about | {"rows": rows}).encode(), mtime=0))
        progress(f"{len(rows)} of {len(cases)} GEMMs timed")


if __name__ == "__main__":
    main()
