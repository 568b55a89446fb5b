"""Times configs on the device at hand and keeps the winners: `python -m jax_fp8gemm.tuning`.

The only module that reads a clock: the device's own, through jax.profiler.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._bind.gemm_op import Static, product
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import BLOCK, Tile, round_up, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.cost import predicted_seconds
from jax_fp8gemm._select.problem import SPREAD, GemmConfig, Problem

FLUSH_BYTES = 256 << 20  # several times the 50 or 60 MB of L2
FLUSH_KERNEL = "shift_left"  # the operation that names the kernel of the flush in a trace
READING_KERNEL = "reduce"  # likewise
FLUSH_US = 20.0  # that a flush takes at least
PAUSE = 0.1  # s between bursts, for the clock to recover
KERNEL = "fp8_gemm"  # the entry point, csrc/gemm_spec.cpp
OURS = "fp8_"  # how all entry points begin
Contender = Callable[[], jax.Array]


@functools.partial(jax.jit, donate_argnums=0)
def _flush(buffer: jax.Array, value: jax.Array) -> jax.Array:
    """Overwrites `buffer`, and so everything else in L2."""
    return jax.lax.shift_left(jax.lax.iota(jnp.uint32, buffer.size), value)


def _kernels(folder: str) -> list[tuple[str, float]]:
    """Returns (name, µs) of everything that ran on the first GPU, in order."""
    events = []
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if plane.name.startswith("/device:GPU:0"):
                for line in plane.lines:
                    if "Stream" in line.name:
                        events += [(e.start_ns, e.name, e.duration_ns / 1e3) for e in line.events]
    return [(name, us) for _, name, us in sorted(events)]


@jax.jit
def _flush_by_reading(buffer: jax.Array, value: jax.Array) -> jax.Array:
    """Reads `buffer`, and leaves L2 full of lines that nobody has to write back."""
    return jnp.max(jax.lax.shift_left(buffer, value))


def device_kernels(
    contenders: dict[Hashable, Contender], reps: int, *, burst: bool = False, flush: str = "write"
) -> dict[Hashable, list[list]]:
    """Runs contenders, L2 flushed before each launch, and returns what ran on the device.

    Args:
      contenders: by name, functions that start work on the device and return its output.
      reps: launches of each contender.
      burst: all launches of one contender, a pause, then the next's, so that each runs at the
        clock of a short burst; otherwise contenders take turns, and share a clock.
      flush: "write" or "read" 256 MB before each launch.

    Returns:
      For each contender, for each launch, [(kernel name, µs), ...].
    """
    buffer = jnp.zeros(FLUSH_BYTES // 4, jnp.uint32)
    names = list(contenders)
    order = [n for n in names for _ in range(reps)] if burst else names * reps
    for run in contenders.values():
        jax.block_until_ready(run())
    jax.block_until_ready(_flush_by_reading(buffer, jnp.uint32(0)))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        for index, name in enumerate(order):
            if burst and index % reps == 0:
                time.sleep(PAUSE)
            value = jnp.uint32(index % 8)
            if flush == "write":
                buffer = _flush(buffer, value)
                jax.block_until_ready(buffer)
            else:
                jax.block_until_ready(_flush_by_reading(buffer, value))
            jax.block_until_ready(contenders[name]())
        jax.profiler.stop_trace()
        events = _kernels(folder)
    launches = _between_flushes(events, flush)
    if len(launches) != len(order):
        raise RuntimeError(f"{len(launches)} flushes in the trace, {len(order)} expected")
    found: dict[Hashable, list[list]] = {name: [] for name in names}
    for name, launch in zip(order, launches, strict=True):
        found[name].append(launch)
    return found


def _between_flushes(events: list[tuple[str, float]], flush: str) -> list[list]:
    """Splits a trace at the flushes; one by reading is two kernels."""
    launches: list[list] = []
    kernel = FLUSH_KERNEL if flush == "write" else READING_KERNEL
    in_flush = False
    for name, us in events:
        if kernel in name and us > FLUSH_US:
            launches.append([])
            in_flush = flush == "read"
        elif in_flush and OURS not in name:
            in_flush = False  # the second, small, kernel of the reduction
        elif launches:
            launches[-1].append((name, us))
    return launches


def device_microseconds(
    contenders: dict[Hashable, Contender], reps: int, only: str = "", **how
) -> dict[Hashable, list[float]]:
    """Returns, for each contender, the µs of each launch: the sum of kernels that `only` is in."""
    ran = device_kernels(contenders, reps, **how)
    return {
        name: [sum(us for kernel, us in launch if only in kernel) for launch in launches]
        for name, launches in ran.items()
    }


def random_operand(key: jax.Array, shape: tuple[int, ...], tile: Tile) -> QArray:
    """Returns normal numbers in FP8, with scales of about 1/100 that differ from tile to tile."""
    values, scales = jax.random.split(key)
    q = jnp.clip(64 * jax.random.normal(values, shape, jnp.bfloat16), -448, 448).astype(FP8)
    scale = jax.random.uniform(scales, scale_shape(shape, tile), minval=0.005, maxval=0.015)
    return QArray(q, scale)


def group_sizes(
    problem: Problem,
    total: int | None = None,
    *,
    spread: tuple[float, float] = SPREAD,
    seed: int = 0,
) -> np.ndarray:
    """Returns sizes in a range of multiples of their mean; together `total` rows, or k."""
    variant = VARIANTS[problem.variant]
    if total is None:
        rows = problem.m * (problem.g if problem.variant == "masked" else 1)
        total = problem.k if variant.groups == "k" else rows
    unit = BLOCK if variant.groups == "k" else 1
    weights = np.random.default_rng(seed).uniform(*spread, problem.g)
    ends = np.round(np.cumsum(weights) / weights.sum() * total / unit) * unit
    return np.diff(ends, prepend=0).astype(np.int32)


def group_operand(problem: Problem, sizes: np.ndarray) -> np.ndarray:
    """Returns what gemm takes as group_sizes for groups of these sizes."""
    if VARIANTS[problem.variant].group_operand == "m":  # every group padded to whole blocks
        rows = [np.repeat([i, -1], [n, -n % BLOCK]) for i, n in enumerate(sizes)]
        return np.concatenate(rows).astype(np.int32)
    return sizes


def sizes_of(problem: Problem, operand: jax.Array) -> np.ndarray:
    """Returns the sizes that group_operand was given."""
    operand = np.asarray(operand)
    if VARIANTS[problem.variant].group_operand == "m":
        return np.bincount(operand[operand >= 0], minlength=problem.g)
    return operand


def random_operands(problem: Problem, sizes: np.ndarray | None = None, *, seed: int = 0) -> tuple:
    """Returns lhs, rhs and, in a grouped variant, the group operand for groups of `sizes`."""
    row, p = VARIANTS[problem.variant], problem
    letters = {"g": p.g, "m": p.m, "n": p.n, "k": p.k}
    groups = None
    if row.group_operand:
        groups = group_operand(p, group_sizes(p) if sizes is None else sizes)
    if p.variant == "contiguous":
        letters["m"] = len(groups)
    if p.variant == "masked":
        letters["m"] = round_up(int(groups.max()), 64)
    keys = jax.random.split(jax.random.key(seed))
    make = jax.jit(random_operand, static_argnums=(1, 2))
    shapes = (tuple(letters[c] for c in dims) for dims in (row.lhs, row.rhs))
    operands = tuple(make(*a) for a in zip(keys, shapes, p.tiles, strict=True))
    return operands if groups is None else (*operands, jnp.asarray(groups))


def compiled(problem: Problem, config: GemmConfig | None, operands) -> Contender:
    """Returns a function that runs the product with `config`, compiled ahead."""
    executable = executable_of(problem, config, operands)
    return lambda: executable(*operands)


def executable_of(problem: Problem, config: GemmConfig | None, operands):
    """Compiles the product; operands may be shapes."""
    rows = problem.m if problem.variant == "masked" else 0
    static = Static(problem.variant, problem.scales, problem.out, problem.num_sms, config, rows)
    function = jax.jit(lambda lhs, rhs, groups=None: product(lhs, rhs, static, groups))
    return function.lower(*operands).compile()


def sample_error(problem: Problem, out: jax.Array, operands) -> float:
    """Returns calc_diff, Σ(out − exact)² / Σ(out² + exact²), of 32 rows in each group."""
    rows, groups, columns = sample(problem, operands)
    picked = out[groups, rows] if out.ndim == 3 else out[rows]
    return float(_squared_error(picked, *operands[:2], rows, groups, columns))


def sample(problem: Problem, operands) -> tuple:
    """Returns rows of lhs [g, 32], their groups [g, 32], and each group's range of k [g, 2].

    g: groups without rows are left out.
    """
    p, row, draw = problem, VARIANTS[problem.variant], np.random.default_rng(1)
    sizes = sizes_of(p, operands[2]) if row.group_operand else np.full(p.g, p.m)
    counts = sizes if row.groups == "m" else np.full(p.g, p.m)
    rows = np.stack([draw.integers(0, max(n, 1), 32) for n in counts])
    rows[:, -1] = np.maximum(counts - 1, 0)
    if p.variant in ("ragged", "contiguous"):
        taken = sizes if p.variant == "ragged" else -(-sizes // BLOCK) * BLOCK
        rows += (np.cumsum(taken) - taken)[:, None]
    ends = np.cumsum(sizes) if row.groups == "k" else np.full(p.g, p.k)
    columns = np.stack([ends - sizes if row.groups == "k" else 0 * ends, ends], 1)
    found = rows, np.repeat(np.arange(p.g)[:, None], 32, 1), columns
    return tuple(x[counts > 0] for x in found)


@jax.jit
def _squared_error(picked, lhs, rhs, rows, groups, columns) -> jax.Array:
    def one_group(carry, group):
        got, rows, group, (start, end) = group
        left, right = QArray(lhs.qvalue, lhs.scale), QArray(rhs.qvalue, rhs.scale)
        if lhs.ndim == 3:
            left = jax.tree.map(lambda x: x[group[0]], left)
        if rhs.ndim == 3:
            right = jax.tree.map(lambda x: x[group[0]], right)
        scale = left.scale[rows] if left.scale.shape[0] > 1 else left.scale
        left = reference.dequantize(left.qvalue[rows], scale, lhs.tile)
        right = reference.dequantize(right.qvalue, right.scale, rhs.tile)
        at = jnp.arange(lhs.shape[-1])
        left = jnp.where((at >= start) & (at < end), left, 0)
        exact = jnp.einsum("rk,nk->rn", left, right, precision=jax.lax.Precision.HIGHEST)
        got = got.astype(jnp.float32)
        error, total = carry
        return (error + jnp.sum((got - exact) ** 2), total + jnp.sum(got**2 + exact**2)), None

    groups = (picked.reshape(*rows.shape, -1), rows, groups, columns)
    error, total = jax.lax.scan(one_group, (0.0, 0.0), groups)[0]
    return error / total


def best_by_model(problem: Problem, count: int) -> list[GemmConfig]:
    """Returns the `count` candidates the cost model likes, a quarter or more of each kernel."""
    ranked = sorted(candidates(problem), key=lambda c: predicted_seconds(problem, c))
    kinds = [[c for c in ranked if c.kernel == kind] for kind in ("persistent", "few_rows")]
    sure = [config for kind in kinds for config in kind[: count // 4]]
    return sure + [config for config in ranked if config not in sure][: count - len(sure)]


@dataclasses.dataclass
class Trial:
    """One config of one product, compiled."""

    problem: Problem
    config: GemmConfig
    run: Contender
    us: float = math.inf

    @property
    def key(self) -> tuple:
        return key_of(dataclasses.asdict(self.problem))

    def row(self) -> dict:
        keys = dict(zip(KEYS, self.key, strict=True))
        return {**keys, **dataclasses.asdict(self.config), "us": round(self.us, 2)}


KEYS = ("variant", "m", "n", "k", "g", "scales", "out")  # of a product, in a tuned row


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEYS)


def tune(problems: list[Problem], totals: list, count: int, reps: int) -> list[Trial]:
    """Returns timings of `count` configs of each product; those that give a wrong one are left out.

    Everything is compiled first, then timed in one trace, so that a shape costs seconds.
    """
    start = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)

    def make_operands(problem, total) -> tuple:
        grouped = VARIANTS[problem.variant].group_operand
        return random_operands(problem, group_sizes(problem, total) if grouped else None)

    def make_trial(problem, config, operands) -> Trial:
        return Trial(problem, config, compiled(problem, config, operands))

    def right(trials: list[Trial], operands) -> list[Trial]:
        errors = [sample_error(trial.problem, trial.run(), operands) for trial in trials]
        for trial, error in zip(trials, errors, strict=True):
            if not error <= 1e-5:
                print(f"WRONG {trial.problem} {trial.config}: {error:.1e}", file=sys.stderr)
        return [trial for trial, error in zip(trials, errors, strict=True) if error <= 1e-5]

    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        operands = list(pool.map(make_operands, problems, totals))
        progress(f"operands of {len(problems)} products")
        made = [
            [
                pool.submit(make_trial, problem, config, own)
                for config in best_by_model(problem, count)
            ]
            for problem, own in zip(problems, operands, strict=True)
        ]
        trials = [[future.result() for future in futures] for futures in made]
        progress(f"{sum(map(len, trials))} configs compiled")
        trials = list(itertools.chain(*pool.map(right, trials, operands)))
    progress("checked")
    times = device_microseconds({index: t.run for index, t in enumerate(trials)}, reps, KERNEL)
    for index, trial in enumerate(trials):
        trial.us = statistics.median(times[index])
    progress("timed")
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes",
        help="file with a JSON list of {variant, m, n, k}, also g, scales, out, total (of rows)",
    )
    parser.add_argument("--out", required=True, help="tuned/*.json: gets or keeps other products")
    parser.add_argument("--log", help="where every timing goes")
    parser.add_argument("--count", type=int, default=12, help="configs to time for each shape")
    parser.add_argument("--reps", type=int, default=9)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        got, fix = f"a {jax.default_backend()}", "run it on a Hopper GPU, with jax[cuda12]"
        fail("tuning", "nothing to time here.", got, "a GPU", fix, RuntimeError)
    shapes = json.loads(pathlib.Path(options.shapes).read_text())
    totals = [shape.pop("total", None) for shape in shapes]
    kind = jax.devices()[0].device_kind
    problems = [Problem(**shape, device=kind) for shape in shapes]
    trials = sorted(tune(problems, totals, options.count, options.reps), key=lambda t: t.us)
    if options.log:
        lines = (json.dumps(trial.row()) for trial in trials)
        pathlib.Path(options.log).write_text("\n".join(lines) + "\n")
    path = pathlib.Path(options.out)
    table = {key_of(row): row for row in json.loads(path.read_text())} if path.exists() else {}
    table |= {trial.key: trial.row() for trial in reversed(trials)}  # the fastest comes last
    lines = (json.dumps(table[key]) for key in sorted(table))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for problem in problems:
        print(json.dumps(table[key_of(dataclasses.asdict(problem))]))


if __name__ == "__main__":
    main()
