"""Times configs of GEMMs on the GPU at hand. Those that give a wrong result are left out."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import sys
from collections.abc import Hashable, Sequence
from typing import Any

import jax

from jax_fp8gemm._core.layout import ROW_BLOCKS
from jax_fp8gemm._core.progress import Progress
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.cost import ranked
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._tools.operands import (
    executable_of,
    group_sizes,
    random_operands,
    sample_error,
)
from jax_fp8gemm._tools.timing import KERNEL, Contender, device_microseconds

MOST_BYTES = 16 << 30  # of operands that are in memory at once
MOST_ERROR = 1e-5  # calc_diff of a result in bf16, see docs/numerics.md


@dataclasses.dataclass(frozen=True)
class Case:
    """A GEMM to time; total: rows of all groups, or k; None: as many as m says, see group_sizes."""

    problem: Problem
    total: int | None = None

    def operands(self) -> tuple:
        problem = self.problem
        grouped = VARIANTS[problem.variant].group_operand
        sizes = group_sizes(problem, self.total) if grouped else None
        # The rhs of a weight gradient: its casts share the scales of columns.
        return random_operands(problem, sizes, shared=float(problem.tiles[1] == ROW_BLOCKS))

    @functools.cached_property
    def types(self) -> Any:
        """The operands' types."""
        return jax.eval_shape(self.operands)

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.types))


@dataclasses.dataclass
class Trial:
    """One config of one GEMM, compiled, and its time."""

    case: Case
    config: GemmConfig
    executable: Any
    us: float = math.inf


def configs_to_try(problem: Problem, count: int) -> list[GemmConfig]:
    """Returns what is chosen today, and then the `count` candidates that the cost model likes.

    A quarter of these or more is of each kernel, if there are so many.
    """
    best_first = ranked(problem, candidates(problem))
    kinds = [[c for c in best_first if c.kernel == kind] for kind in ("persistent", "few_rows")]
    sure = [config for kind in kinds for config in kind[: count // 4]]
    rest = [config for config in best_first if config not in sure][: count - len(sure)]
    return list(dict.fromkeys([select(problem), *sure, *rest]))


def measure(cases: Sequence[Case], count: int, reps: int) -> list[list[Trial]]:
    """Returns the trials of each case in the order of `configs_to_try`, all of whose results are
    right.

    All configs are compiled first, in threads. Then as many GEMMs as memory holds are timed in one
    trace, L2 cold before each launch.

    Args:
      count: configs beside today's. reps: launches of each, of which the median is taken.
    """
    compiled = _compiled(cases, count)
    progress = Progress("timing", len(cases))
    found: list[list[Trial]] = []
    for start, end in _batches([case.nbytes for case in cases]):
        right = [_right(trials) for trials in compiled[start:end]]
        runs: dict[Hashable, Contender] = {
            (i, j): functools.partial(trial.executable, *operands)
            for i, (trials, operands) in enumerate(right)
            for j, trial in enumerate(trials)
        }
        times = device_microseconds(runs, reps, KERNEL)
        for i, (trials, _) in enumerate(right):
            for j, trial in enumerate(trials):
                trial.us = statistics.median(times[i, j])
            found.append(trials)
            progress.step()
    return found


def _compiled(cases: Sequence[Case], count: int) -> list[list[Trial]]:
    wanted = [(case, config) for case in cases for config in configs_to_try(case.problem, count)]
    types = {case: case.types for case in cases}  # once, before there are threads
    progress = Progress("compiling", len(wanted))
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        made = {
            pool.submit(executable_of, case.problem, config, types[case]): (case, config)
            for case, config in wanted
        }
        for _ in concurrent.futures.as_completed(made):
            progress.step()
    trials: dict[Case, list[Trial]] = {case: [] for case in cases}
    for future, (case, config) in made.items():
        trials[case].append(Trial(case, config, future.result()))
    return list(trials.values())


def _batches(sizes: list[int]) -> list[tuple[int, int]]:
    """Returns ranges of cases whose operands together are in memory; of one at least."""
    ranges, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > MOST_BYTES:
            ranges.append((start, i))
            start, total = i, 0
        total += size
    return [*ranges, (start, len(sizes))] if sizes else []


def _right(trials: list[Trial]) -> tuple[list[Trial], tuple]:
    """Returns the trials with a right result, and operands to run them on."""
    case = trials[0].case
    operands = case.operands()
    right = []
    for trial in trials:
        error = sample_error(case.problem, trial.executable(*operands), operands)
        if error <= MOST_ERROR:
            right.append(trial)
        else:
            print(f"WRONG {case.problem} {trial.config}: {error:.1e}", file=sys.stderr)
    return right, operands
