"""Which block shape, pipeline and cluster a product gets: a pure function of its shape.

The choice is written into the program as attributes of the custom call, so it can be read there,
and every host makes the same one.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import sys

import numpy as np

from jax_fp8gemm import _native
from jax_fp8gemm.qarray import BLOCKS, ROW_BLOCKS, ROWS, TENSOR, Tile, ceil_div, round_up
from jax_fp8gemm.variants import SCALES, VARIANTS

DEFAULT_DEVICE = "NVIDIA H200"
SMS = 132  # of an H100 or H200 SXM; the launch reads the real number

TILE_NAMES: dict[Tile, str] = {
    ROW_BLOCKS: "1x128",
    BLOCKS: "128x128",
    ROWS: "1xk",
    TENSOR: "tensor",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product as far as the choice of a config may depend on it.

    Attributes:
      m: rows of lhs, of all groups together; in "masked" the rows that one group is expected to
        have.
      rhs: "fp8", or bfloat16 that the kernel casts: "bf16" [n, k], "bf16_transposed" [k, n].
      k: of all groups together in "ragged_contracting".
    """

    variant: str
    m: int
    n: int
    k: int
    g: int = 1
    scales: str = "1x128_128x128"
    out: str = "bf16"
    accumulate: bool = False
    num_sms: int = 0
    device: str = DEFAULT_DEVICE
    rhs: str = "fp8"

    @property
    def casts(self) -> bool:
        return self.rhs != "fp8"

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return SCALES[self.scales]

    @property
    def one_group(self) -> tuple[int, int]:
        """Rows and depth of one product, where groups are all of one size."""
        groups = VARIANTS[self.variant].groups
        rows = ceil_div(self.m, self.g) if groups == "m" and self.variant != "masked" else self.m
        return rows, ceil_div(self.k, self.g) if groups == "k" else self.k


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How the kernel cuts the work up.

    Attributes:
      kernel: "persistent" (csrc/kernels/gemm.cuh) or "few_rows" (gemm_few_rows.cuh).
      block_m, block_n: rows and columns of one output block.
      stages: slots of the shared-memory ring, each 128 of k deep.
      multicast: the operand ("lhs", "rhs") that a cluster of two CTAs shares, or "none".
      split_k: CTAs of a cluster that divide k between them (few_rows only).
      group_m: blocks along m visited before the next column of blocks.
    """

    kernel: str
    block_m: int
    block_n: int
    stages: int
    multicast: str = "none"
    split_k: int = 1
    group_m: int = 8


def _computed(problem: Problem) -> dict[str, int | str]:
    """Returns the attributes that say what is computed, whatever the config."""
    lhs, rhs = problem.tiles
    return {
        "variant": problem.variant,
        "lhs_scale": TILE_NAMES[lhs],
        "rhs_scale": TILE_NAMES[rhs],
        "rhs": problem.rhs,
        "out": problem.out,
        "accumulate": int(problem.accumulate),
        "aligned": int(problem.n % (4 if problem.out == "f32" else 8) == 0),  # rows of 16 bytes
    }


def _steps(problem: Problem) -> int:
    return ceil_div(problem.k, 128)


def _fields(c: GemmConfig) -> tuple:
    return c.kernel, c.block_m, c.block_n, c.stages, c.multicast, c.split_k, c.group_m


SPREAD = (0.7, 1.3)  # multiples of the mean that sizes of groups are taken to have


def blocks(problem: Problem, config: GemmConfig) -> int:
    """Returns the number of output blocks, those that a cluster computes in vain included.

    Where groups of rows have any size it is the number to expect.
    """
    rows, n = problem.one_group[0], ceil_div(problem.n, config.block_n)
    if config.multicast == "lhs":
        n = round_up(n, 2)
    unit = config.block_m * (2 if config.multicast == "rhs" else 1)
    m = float(ceil_div(rows, unit))
    if VARIANTS[problem.variant].groups == "m":
        m = float(np.mean(np.ceil(np.linspace(*SPREAD, 13) * rows / unit)))
    return math.ceil(problem.g * m * unit / config.block_m * n)


def legal(problem: Problem, config: GemmConfig) -> str | None:
    """Returns why `config` cannot run `problem`, or None: see csrc/kernels/plan.cuh."""
    return _native.plan(_computed(problem), [_fields(config)], _steps(problem))[0][0]


# (block_m, block_n, multicast). Widths follow n / 132: one wave of blocks on all SMs. The first is
# taken of those that cost the same by the model.
_PERSISTENT = [
    *[(256, 128, which) for which in ("lhs", "none", "rhs")],
    *[(256, 96, which) for which in ("lhs", "none")],
    *[(128, n, which) for n in (192, 160, 144, 128, 64, 32) for which in ("none", "lhs", "rhs")],
    *[(128, n, which) for n in (112, 96, 80, 48) for which in ("none", "rhs")],
]
_LARGEST = [(256, 128, "lhs"), (128, 192, "rhs")]  # for which the order of blocks matters
_FEW_ROWS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128)


def candidates(problem: Problem) -> list[GemmConfig]:
    """Returns the legal configs worth timing, in no order."""
    tried = [GemmConfig("persistent", m, n, 8, multicast) for m, n, multicast in _PERSISTENT]
    steps = max(2, ceil_div(problem.one_group[1], 128))
    if problem.one_group[0] <= 1024:
        for block_m, block_n, split_k in itertools.product((64, 128), _FEW_ROWS, (1, 2, 4)):
            config = GemmConfig("few_rows", block_m, block_n, 16, split_k=split_k)
            ctas = blocks(problem, config) * split_k
            if split_k > 1 and ctas > SMS:
                continue  # one block for each cluster: more would come in waves
            if ctas <= SMS:
                # With one block to a CTA, a stage for each step is all that can be used.
                most = min(16, round_up(ceil_div(steps, split_k), 2))
                config = dataclasses.replace(config, stages=most)
            tried.append(config)
    stages = _native.deepest(_computed(problem), [_fields(c) for c in tried], _steps(problem))
    found = []
    for config, most in zip(tried, stages, strict=True):
        if most:
            found.append(dataclasses.replace(config, stages=most))
        where = config.block_m, config.block_n, config.multicast
        if most and problem.one_group[0] > 2048 and where in _LARGEST:
            found += [dataclasses.replace(found[-1], group_m=group) for group in (4, 16, 32)]
    return found


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Constants of `predicted_seconds`, fitted to timings on an H200; those of few rows and of a
    split to timings on an H100 (docs/measured.md)."""

    clock: float = 1.80e9  # Hz, under load with promotion
    bandwidth: float = 4.7e12  # B/s from device memory, when every SM asks for its share
    l2_bytes: float = 46.0  # per clock into one SM
    tensor: float = 1.25  # clocks of a step over the tensor core's own
    per_column: float = 1.25  # likewise with a scale for each column
    few_rows_tensor: float = 2.5
    few_rows_l2_bytes: float = 59.0
    cast_step: float = 1800.0  # clocks that a step takes at least, where rhs is cast
    latency: float = 4.5e-6  # s: launch, first bytes, last store
    few_rows_latency: float = 4.1e-6
    block: float = 1400.0  # clocks for each block that nothing hides
    few_rows_block: float = 1600.0
    split_block: float = 3000.0  # for each block of a cluster that shares it
    output: float = 27.0  # bytes per clock that leave one SM


def predicted_seconds(problem: Problem, config: GemmConfig) -> float:
    """Returns the cost model's time of `problem` with `config`; good for ranking, no more.

    time = max(waves · (steps of k · max(tensor core, L2) + block overhead) / clock,
               bytes / bandwidth) + latency
    """
    p, c, model = problem, config, CostModel()
    few_rows = c.kernel == "few_rows"
    m, k = p.one_group
    steps = max(2, ceil_div(k, 128)) / c.split_k
    sms = min(p.num_sms or SMS, SMS)
    if c.split_k == 4:
        sms = sms * 10 // 11  # no more clusters of four find a place
    ctas = blocks(p, c) * c.split_k
    waves = ceil_div(ctas, sms)
    tensor = c.block_m * c.block_n * 128 * 2 / 8192
    if few_rows:
        tensor *= model.few_rows_tensor
    else:
        tensor *= model.per_column if p.tiles[1] in (ROW_BLOCKS, ROWS) else model.tensor
    # A multicast saves reads of L2, but what arrives in an SM is the same.
    loads = 128 * (min(c.block_m, m) + c.block_n * (2 if p.casts else 1))
    loads /= model.few_rows_l2_bytes if few_rows else model.l2_bytes
    if p.casts:
        tensor = max(tensor, model.cast_step)
    out_bytes = 4 if p.out == "f32" else 2
    block = model.few_rows_block if few_rows else model.block
    block += min(c.block_m, m) * c.block_n * out_bytes / c.split_k / model.output
    if c.split_k > 1:
        block += model.split_block
    cycles = waves * (steps * max(tensor, loads) + block)
    traffic = p.g * (m * k + p.n * k * (2 if p.casts else 1) + out_bytes * m * p.n)
    streaming = traffic / (model.bandwidth * min(1.0, ctas / SMS))
    latency = model.few_rows_latency if few_rows else model.latency
    return max(cycles / model.clock, streaming) + latency


TUNED_RATIO = 1.5  # a tuned row serves m up to this factor away


def file_name(device: str) -> str:
    """Returns what files about a kind of device are called: "nvidia-h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


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


def select(problem: Problem) -> GemmConfig:
    """Returns the config for `problem`: the tuned row of the nearest m, else the model's best."""
    p = problem
    tuned = {} if p.casts else _tuned(p.device)
    by_m = tuned.get((p.variant, p.n, p.k, p.g, p.scales, p.out), {})

    def distance(m: int) -> float:
        return abs(math.log(m / p.m))

    near = [m for m in by_m if distance(m) <= math.log(TUNED_RATIO)]
    near.sort(key=distance)
    chosen = next((by_m[m] for m in near if legal(p, by_m[m]) is None), None)
    source = "tuned"
    if chosen is None:
        chosen, source = min(candidates(p), key=lambda c: predicted_seconds(p, c)), "model"
    if os.environ.get("JAX_FP8GEMM_PRINT_CONFIGS") == "1":
        print(f"jax_fp8gemm: {p} -> {chosen} ({source})", file=sys.stderr)
    return chosen


def attributes(problem: Problem, config: GemmConfig) -> dict[str, np.int64 | str]:
    """Returns the attributes of the custom call: the kernel's whole specification."""
    found = {
        **_computed(problem),
        "kernel": config.kernel,
        "block_m": config.block_m,
        "block_n": config.block_n,
        "stages": config.stages,
        "multicast": config.multicast,
        "split_k": config.split_k,
        "group_m": config.group_m,
    }
    if problem.num_sms:
        found["num_sms"] = problem.num_sms
    return {name: x if isinstance(x, str) else np.int64(x) for name, x in found.items()}
