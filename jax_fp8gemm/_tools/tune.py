"""Times configs of a shape on the GPU at hand and keeps the fastest in a table.

The command is `python -m jax_fp8gemm.tuning`.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import time

import jax

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import ROW_BLOCKS
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.cost import predicted_seconds
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._tools.operands import compiled, group_sizes, random_operands, sample_error
from jax_fp8gemm._tools.timing import KERNEL, Contender, device_microseconds


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
        sizes = group_sizes(problem, total) if grouped else None
        # The rhs of a weight gradient: its casts share the scales of columns.
        return random_operands(problem, sizes, shared=float(problem.tiles[1] == ROW_BLOCKS))

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
        compiled_trials = [[future.result() for future in futures] for futures in made]
        progress(f"{sum(map(len, compiled_trials))} configs compiled")
        trials = list(itertools.chain(*pool.map(right, compiled_trials, operands)))
    progress("checked")
    times = device_microseconds({index: t.run for index, t in enumerate(trials)}, reps, KERNEL)
    for index, trial in enumerate(trials):
        trial.us = statistics.median(times[index])
    progress("timed")
    return trials


def tune_file(shapes: pathlib.Path, out: pathlib.Path, log: str | None, count: int, reps: int):
    """Tunes the shapes of a file and merges the winners into the table `out`.

    Args:
      shapes: a JSON list of {variant, m, n, k}, also g, scales, out, total (of rows).
      out: tuned/*.json. Rows of other shapes stay.
      log: where every timing goes.
      count: configs to time for each shape.
    """
    if jax.default_backend() != "gpu":
        got, fix = f"a {jax.default_backend()}", "run it on a Hopper GPU, with jax[cuda12]"
        fail("tuning", "nothing to time here.", got, "a GPU", fix, RuntimeError)
    wanted = json.loads(shapes.read_text())
    totals = [shape.pop("total", None) for shape in wanted]
    kind = jax.devices()[0].device_kind
    problems = [Problem(**shape, device=kind) for shape in wanted]
    trials = sorted(tune(problems, totals, count, reps), key=lambda t: t.us)
    if log:
        lines = (json.dumps(trial.row()) for trial in trials)
        pathlib.Path(log).write_text("\n".join(lines) + "\n")
    table = {key_of(row): row for row in json.loads(out.read_text())} if out.exists() else {}
    table |= {trial.key: trial.row() for trial in reversed(trials)}  # the fastest comes last
    lines = (json.dumps(table[key]) for key in sorted(table))
    out.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for problem in problems:
        print(json.dumps(table[key_of(dataclasses.asdict(problem))]))
