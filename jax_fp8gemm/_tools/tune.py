"""Times configs of GEMMs on the GPU at hand and keeps the fastest of each.

`tune` does so for a user's program and file, `tune_file` for the tables of this package.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_fp8gemm._core.checks import is_integer
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._select.choice import saved, select
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._select.saved import prepare, write
from jax_fp8gemm._tools.measure import Case, Trial, measure
from jax_fp8gemm._tools.problems import problem_text
from jax_fp8gemm._tools.programs import calls_of, problems_of

REPS = 9  # launches of each config; the median counts


@dataclasses.dataclass(frozen=True)
class TunedGemm:
    """The fastest config that was found for one GEMM.

    Attributes:
      name: its variant, sizes and what else decides, as the command takes it.
      config: the fastest one.
      us: its time.
      before: the config that was chosen until now.
      before_us: its time.
    """

    name: str
    config: GemmConfig
    us: float
    before: GemmConfig
    before_us: float

    @property
    def gain(self) -> float:
        """How many times as fast the GEMM is now."""
        return self.before_us / self.us


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found; str() is a table.

    Attributes:
      device: name of the GPU.
      path: of the file that has the configs.
      rows: one for each GEMM, the largest gain first.
    """

    device: str
    path: str
    rows: tuple[TunedGemm, ...]

    def __str__(self) -> str:
        width = max([4, *(len(row.name) for row in self.rows)])
        lines = [f"{'':{width}} {'µs before':>10} {'now':>10} {'gain':>6}"]
        lines += [
            f"{row.name:{width}} {row.before_us:10.2f} {row.us:10.2f} {row.gain:6.2f}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"kept in {self.path}"])


def tune(function: Callable, *args: Any, configs: int = 12) -> Tuning:
    """Times configs for every GEMM of a program, and keeps the fastest in a file for `gemm`.

    The file is JAX_FP8GEMM_TUNED, or one beside the compiled kernels. Programs that are lowered
    from now on use it, in this process and in later ones. What is compiled already stays as it is.

    Args:
      function: jitted, or to be jitted. It closes over static arguments.
      args: its arguments: pytrees of arrays or of jax.ShapeDtypeStruct. Contents do not matter.
      configs: how many to time beside the one that is chosen today, 1 or more.

    Returns:
      Tuning, which is printed too.

    Raises:
      RuntimeError: there is no Hopper GPU.
      ValueError: the program has no GEMM of this library, configs is not a positive integer, or
        there is no place for the file.

    Example:
      fp8.tune(jax.jit(step), jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16))
    """
    device = hopper()
    problems = problems_of(calls_of(function, *args), device)
    if not problems:
        fix = "pass a function that calls gemm, fp8_matmul, fp8_ragged_dot or a layer"
        got, expected = f"{function}", "a GEMM whose config is not given"
        fail("tune", "the program has nothing to tune.", got, expected, fix)
    return tune_problems(problems, configs)


def tune_problems(problems: Sequence[Problem], configs: int = 12) -> Tuning:
    """As `tune`, for GEMMs on the GPU at hand, each of them once."""
    if not is_integer(configs) or configs < 1:
        got, fix = f"configs={configs!r}", "leave it out, or pass how many to time"
        fail("tune", "configs is not a positive integer.", got, "1 or more", fix)
    device = hopper()
    path = prepare(device)
    chosen = {problem: select(problem) for problem in problems}
    found = measure([Case(problem) for problem in problems], configs, REPS)
    best = {trials[0].case.problem: min(trials, key=lambda t: t.us) for trials in found if trials}
    write(path, device, {problem: (trial.config, trial.us) for problem, trial in best.items()})
    saved.cache_clear()
    rows = [
        _row(chosen[trials[0].case.problem], trials, best[trials[0].case.problem])
        for trials in found
        if trials
    ]
    tuning = Tuning(device, path, tuple(sorted(rows, key=lambda row: -row.gain)))
    print(tuning)
    return tuning


def _row(before: GemmConfig, trials: list[Trial], best: Trial) -> TunedGemm:
    before_us = next((trial.us for trial in trials if trial.config == before), math.nan)
    name = problem_text(best.case.problem)
    return TunedGemm(name, best.config, best.us, before, before_us)


def hopper() -> str:
    """Returns the name of the GPU at hand.

    Raises:
      RuntimeError: it is no Hopper GPU, or there is none.
    """
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or str(capability) != "9.0":
        got = f"{device.device_kind!r} of platform {device.platform!r}"
        got += f", compute capability {capability}" if capability else ""
        expected = "an H100 or H200, compute capability 9.0"
        fix = "run it on such a GPU with jax[cuda12] or jax[cuda13], and copy the file from there"
        what = "there is no Hopper GPU to time configs on."
        fail("tune", what, got, expected, fix, RuntimeError)
    return device.device_kind


# ---- the tables of this package -----------------------------------------------------------------

KEYS = ("variant", "m", "n", "k", "g", "scales", "out")  # of a GEMM, in a tuned row


def tune_file(shapes: pathlib.Path, out: pathlib.Path, log: str | None, count: int, reps: int):
    """Tunes the shapes of a file and merges the winners into the table `out`.

    Args:
      shapes: a JSON list of {variant, m, n, k}, also g, scales, out, total (of rows).
      out: tuned/*.json. Rows of other shapes stay.
      log: where every timing goes.
      count: configs to time for each shape.
    """
    device = hopper()
    given = json.loads(shapes.read_text())
    totals = [shape.pop("total", None) for shape in given]
    cases = [
        Case(Problem(**shape, device=device), total)
        for shape, total in zip(given, totals, strict=True)
    ]
    found = measure(cases, count, reps)
    trials = sorted((trial for trials in found for trial in trials), key=lambda t: t.us)
    if log:
        lines = (json.dumps(_table_row(trial)) for trial in trials)
        pathlib.Path(log).write_text("\n".join(lines) + "\n")
    table = {_key(row): row for row in json.loads(out.read_text())} if out.exists() else {}
    fastest_last = map(_table_row, reversed(trials))
    table |= {_key(row): row for row in fastest_last}
    lines = (json.dumps(table[key]) for key in sorted(table))
    out.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for case in cases:
        print(json.dumps(table[_key(dataclasses.asdict(case.problem))]))


def _table_row(trial: Trial) -> dict[str, Any]:
    problem = dataclasses.asdict(trial.case.problem)
    keys = {name: problem[name] for name in KEYS}
    return {**keys, **dataclasses.asdict(trial.config), "us": round(trial.us, 2)}


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in KEYS)
