"""Fits the constants of the cost model (jax_fp8gemm/_select/cost.py), or tells how good they are.

python benchmarks/fit_cost.py           # regret of the constants as they are
python benchmarks/fit_cost.py --fit     # prints better ones, fitted from these

One random half of the GEMMs in results/config_times*.json.gz is fitted, the other half judges.
Regret is the time of the config that the model picks over that of the fastest one timed.
"""

import argparse
import dataclasses
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
from protocol import progress

from jax_fp8gemm._select.cost import H200, Constants, Features, Kernel, features, microseconds
from jax_fp8gemm._select.problem import GemmConfig, Problem

DATA = sorted((pathlib.Path(__file__).parent / "results").glob("config_times*.json.gz"))
KEYS = ("variant", "m", "n", "k", "g", "scales", "out")
KERNELS = ("blocks", "columns", "few_rows")
NEAR = 0.15  # configs whose log time is this far from the best count e times less


@dataclasses.dataclass(frozen=True)
class Data:
    """Timings: configs of one GEMM lie side by side."""

    features: Features
    us: np.ndarray
    starts: np.ndarray  # index of the first config of each GEMM
    family: list[str]
    fitted: np.ndarray  # whether a GEMM is of the half that is fitted

    @property
    def gemm(self) -> np.ndarray:
        """The index of each timing's GEMM."""
        return np.repeat(np.arange(len(self.starts)), np.diff([*self.starts, len(self.us)]))

    def part(self, fitted: bool) -> "Data":
        """Returns the timings of one half."""
        chosen = self.fitted[self.gemm] == fitted
        counts = np.diff([*self.starts, len(self.us)])[self.fitted == fitted]
        arrays = {name: x[chosen] for name, x in vars(self.features).items()}
        family = [f for f, own in zip(self.family, self.fitted, strict=True) if own == fitted]
        starts = np.cumsum(counts) - counts
        return Data(Features(**arrays), self.us[chosen], starts, family,
                    self.fitted[self.fitted == fitted])  # fmt: skip


def read(paths: Sequence[pathlib.Path] = DATA) -> Data:
    files = [json.loads(gzip.decompress(path.read_bytes())) for path in paths]
    parts, times, family = [], [], []
    for row in (row for stored in files for row in stored["rows"]):
        problem = Problem(**{key: row[key] for key in KEYS})
        configs = [GemmConfig(*config[:-1]) for config in row["configs"]]
        parts.append(features(problem, configs))
        times.append([config[-1] for config in row["configs"]])
        tile = "a scale for each column" if problem.scales == "1x128_1x128" else "128x128 blocks"
        family.append(f"`{problem.variant}`, {tile}")
    names = [field.name for field in dataclasses.fields(Features)]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    counts = [len(some) for some in times]
    halves = [
        np.random.default_rng(stored["seed"]).permutation(count) < count // 2
        for stored in files
        for count in [len(stored["rows"])]
    ]
    starts = np.cumsum(counts) - counts
    return Data(Features(**joined), np.concatenate(times), starts, family, np.concatenate(halves))


def regrets(data: Data, constants: Constants) -> np.ndarray:
    """Returns, for each GEMM, the time of the model's config over the best time."""
    predicted = np.split(microseconds(data.features, constants), data.starts[1:])
    measured = np.split(data.us, data.starts[1:])
    return np.array(
        [us[np.argmin(p)] / us.min() for p, us in zip(predicted, measured, strict=True)]
    )


def loss(data: Data, constants: Constants, softness: float, accuracy: float) -> float:
    """Returns what is minimised: the regret of a soft choice, and the error of times near the best.

    softness: log times that differ by it are chosen e times less often.
    """
    log = np.log(microseconds(data.features, constants))
    if not np.isfinite(log).all():
        return 1e3
    best = np.minimum.reduceat(data.us, data.starts)[data.gemm]
    beside = np.log(data.us / best)
    chosen = np.exp(-(log - np.minimum.reduceat(log, data.starts)[data.gemm]) / softness)
    chosen /= np.add.reduceat(chosen, data.starts)[data.gemm]
    regret = np.add.reduceat(chosen * beside, data.starts)
    error, near = log - np.log(data.us), np.exp(-beside / NEAR)
    own = np.add.reduceat(near * error, data.starts) / np.add.reduceat(near, data.starts)
    spread = np.sqrt((near * (error - own[data.gemm]) ** 2).sum() / near.sum())
    worst = np.sqrt((regret**2).mean())
    return regret.mean() + 0.5 * worst + accuracy * spread + 0.02 * np.abs(own).mean()


def flat(constants: Constants) -> np.ndarray:
    """Returns the logarithms of all constants but zeros and `cast_step`."""
    found = [getattr(getattr(constants, kernel), f.name) for kernel in KERNELS
             for f in dataclasses.fields(Kernel)]  # fmt: skip
    found += [getattr(constants, name) for name in numbers()]
    return np.log(np.maximum(found, 1e-6))


def numbers() -> list[str]:
    names = [field.name for field in dataclasses.fields(Constants)]
    return [name for name in names if name not in (*KERNELS, "cast_step")]


def constants_of(logarithms: np.ndarray) -> Constants:
    values = iter(float(f"{x:.4g}") for x in np.exp(logarithms))
    kernels = {
        kernel: Kernel(**{f.name: next(values) for f in dataclasses.fields(Kernel)})
        for kernel in KERNELS
    }
    return Constants(**kernels, **{name: next(values) for name in numbers()})


# Softness and accuracy of one round after the other, which ever more ask for the choice alone.
ROUNDS = ((0.03, 0.3), (0.02, 0.1), (0.012, 0.05))


def fit(data: Data, rounds: Sequence[tuple[float, float]] = ROUNDS, sweeps: int = 3) -> Constants:
    """Returns constants fitted from today's. sweeps: over all of them, in a round."""
    found = flat(H200)
    for softness, accuracy in rounds:
        result = scipy.optimize.minimize(
            lambda x, *how: loss(data, constants_of(x), *how), found, (softness, accuracy),
            method="Powell", options={"maxiter": sweeps, "xtol": 1e-3, "ftol": 1e-5},
            bounds=[(x - 0.7, x + 0.7) for x in found],
        )  # fmt: skip
        found = result.x
        progress(f"loss {result.fun:.4f}")
    return constants_of(found)


class Regret(NamedTuple):
    count: int  # of GEMMs
    mean: float
    worst: float
    above: int  # of 8 %


def summary(data: Data, constants: Constants) -> dict[str, Regret]:
    """Returns the regret of each half, and of each family of GEMMs."""
    found = regrets(data, constants)
    parts = {"fitted half": data.fitted, "other half": ~data.fitted}
    parts |= {f: np.array([own == f for own in data.family]) for f in dict.fromkeys(data.family)}
    return {
        name: Regret(int(some.sum()), np.exp(np.log(found[some]).mean()) - 1,
                     found[some].max() - 1, int((found[some] > 1.08).sum()))
        for name, some in parts.items()
    }  # fmt: skip


def report(data: Data, constants: Constants) -> None:
    for name, r in summary(data, constants).items():
        print(f"{name:34} {r.count:4}: {r.mean:.2%}, worst {r.worst:.1%}, {r.above} above 8 %")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(arguments)
    data = read()
    report(data, H200)
    if options.fit:
        found = fit(data.part(True))
        print(found)
        report(data, found)


if __name__ == "__main__":
    main()
