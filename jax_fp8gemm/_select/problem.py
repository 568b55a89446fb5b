"""What the choice of a config depends on, and what a config is.

The choice is written into the program as attributes of the custom call, so it can be read there,
and every host makes the same one. What follows from it (threads, shared memory, how results leave)
is the plan, csrc/kernels/plan.cuh.
"""

import dataclasses
import functools
import math
import os

import numpy as np

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.extension import extension
from jax_fp8gemm._core.layout import K_STEP, TILE_NAMES, Tile, ceil_div, round_up
from jax_fp8gemm._core.types import (
    KernelName,
    MulticastName,
    OutName,
    RhsName,
    ScalesName,
    VariantName,
)
from jax_fp8gemm._core.variants import SCALES, VARIANTS

DEFAULT_DEVICE = "NVIDIA H200"
SMS = 132  # of an H100 or H200 SXM; the launch reads the real number
SMS_VARIABLE = "JAX_FP8GEMM_NUM_SMS"
SPREAD = (0.7, 1.3)  # multiples of the mean that sizes of groups are taken to have
STORE_BYTES = 16  # of which rows of a result must be multiples to leave by the copy engine


def most_sms(own: int) -> int:
    """Returns the multiprocessors that a GEMM may use, 0 for all.

    Args:
      own: the limit of this GEMM, which counts more than that of the environment; 0: none.

    Raises:
      ValueError: JAX_FP8GEMM_NUM_SMS is not a number of 1 or more.
    """
    text = os.environ.get(SMS_VARIABLE, "")
    if own or not text:
        return own
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        fix = "unset it, or set it to as many multiprocessors as GEMMs may use"
        got = f"{SMS_VARIABLE}={text!r}"
        fail("gemm", f"{SMS_VARIABLE} is not a number.", got, "an integer, 1 or more", fix)
    return int(text)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A GEMM as far as the choice of a config may depend on it.

    Attributes:
      m: rows of lhs, of all groups together; in "masked" the rows that one group is expected to
        have.
      k: of all groups together in "ragged_contracting".
      num_sms: upper bound of the multiprocessors; 0: all.
      rhs: "fp8", or bfloat16 that the kernel casts: "bf16" [n, k], "bf16_transposed" [k, n].
      batch_invariant: one order of sums over k, whatever m is: that of the persistent kernel.
    """

    variant: VariantName
    m: int
    n: int
    k: int
    g: int = 1
    scales: ScalesName = "1x128_128x128"
    out: OutName = "bf16"
    accumulate: bool = False
    num_sms: int = 0
    device: str = DEFAULT_DEVICE
    rhs: RhsName = "fp8"
    batch_invariant: bool = False

    @property
    def casts(self) -> bool:
        return self.rhs != "fp8"

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return SCALES[self.scales]

    @property
    def steps(self) -> int:
        """Steps of 128 along k, of all groups together."""
        return ceil_div(self.k, K_STEP)

    @property
    def any_size(self) -> bool:
        """Whether groups end anywhere in a block."""
        return VARIANTS[self.variant].groups == "m" and self.variant != "contiguous"

    @functools.cached_property
    def steps_of_group(self) -> float:
        """Steps along k of one GEMM; where groups are along k, the mean to expect."""
        k = self.one_group[1]
        if VARIANTS[self.variant].groups != "k":
            return max(2, ceil_div(k, K_STEP))
        return float(np.mean(np.maximum(1, np.ceil(np.linspace(*SPREAD, 13) * k / K_STEP))))

    @functools.cached_property
    def one_group(self) -> tuple[int, int]:
        """Rows and depth of one GEMM, where groups are all of one size."""
        groups = VARIANTS[self.variant].groups
        rows = ceil_div(self.m, self.g) if groups == "m" and self.variant != "masked" else self.m
        return rows, ceil_div(self.k, self.g) if groups == "k" else self.k


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How the kernel cuts the work up.

    Attributes:
      kernel: "persistent" (csrc/kernels/gemm.cuh) or "few_rows" (gemm_few_rows.cuh).
      block_m, block_n: rows and columns of one output block. block_m is 64 or 128 in the few-rows
        kernel, and 128, 192 or 256 in the persistent one.
      stages: slots of the shared-memory ring, each 128 of k deep.
      multicast: the operand ("lhs", "rhs") that a cluster of two CTAs shares, or "none".
      split_k: CTAs of a cluster that divide k between them (few_rows only).
      group_m: blocks along m visited before the next column of blocks.
    """

    kernel: KernelName
    block_m: int
    block_n: int
    stages: int
    multicast: MulticastName = "none"
    split_k: int = 1
    group_m: int = 8


def computed(problem: Problem) -> dict[str, int | str]:
    """Returns the attributes of the custom call that say what is computed, whatever the config."""
    lhs, rhs = problem.tiles
    size = 4 if problem.out == "f32" else 2
    return {
        "variant": problem.variant,
        "lhs_scale": TILE_NAMES[lhs],
        "rhs_scale": TILE_NAMES[rhs],
        "rhs": problem.rhs,
        "out": problem.out,
        "accumulate": int(problem.accumulate),
        "aligned": int(problem.n * size % STORE_BYTES == 0),
    }


def attributes(
    problem: Problem, config: GemmConfig, *, pair: bool = False, leave_rest: bool = False
) -> dict[str, np.int64 | str]:
    """Returns the attributes of the custom call: the kernel's whole specification.

    A limit of multiprocessors is one only where there is a limit, and the options only where they
    are true: see GemmSpec.
    """
    found: dict[str, int | str] = {
        **computed(problem),
        "kernel": config.kernel,
        "block_m": config.block_m,
        "block_n": config.block_n,
        "stages": config.stages,
        "multicast": config.multicast,
        "split_k": config.split_k,
        "group_m": config.group_m,
    }
    found |= {"num_sms": problem.num_sms} if problem.num_sms else {}
    found |= {"pair": 1} if pair else {}
    found |= {"leave_rest": 1} if leave_rest else {}
    return {name: x if isinstance(x, str) else np.int64(x) for name, x in found.items()}


def _fields(c: GemmConfig) -> tuple[str, int, int, int, str, int, int]:
    """Returns the config as the extension's functions take it."""
    return c.kernel, c.block_m, c.block_n, c.stages, c.multicast, c.split_k, c.group_m


def why_illegal(problem: Problem, config: GemmConfig) -> str | None:
    """Returns why `config` cannot run `problem`, or None."""
    if problem.batch_invariant and config.kernel != "persistent":
        return "batch_invariant needs the persistent kernel: another one sums k in another order"
    reason, *_ = extension.plan(computed(problem), [_fields(config)], problem.steps)[0]
    return reason


def deepest(problem: Problem, configs: list[GemmConfig]) -> list[GemmConfig]:
    """Returns each config with as many stages as fit, up to its own; without those that do not."""
    fields = [_fields(config) for config in configs]
    stages = extension.deepest(computed(problem), fields, problem.steps)
    return [
        config if own == config.stages else dataclasses.replace(config, stages=own)
        for config, own in zip(configs, stages, strict=True)
        if own
    ]


def blocks(problem: Problem, config: GemmConfig) -> int:
    """Returns the number of output blocks, those that a cluster computes in vain included.

    Where groups of rows have any size it is the number to expect.
    """
    rows, n = problem.one_group[0], ceil_div(problem.n, config.block_n)
    if config.multicast == "lhs":
        n = round_up(n, 2)
    unit = config.block_m * (2 if config.multicast == "rhs" else 1)
    if problem.variant == "contiguous":  # a block's rows are of one group
        m = ceil_div(problem.m, unit) / problem.g
    elif problem.any_size:
        m = _expected_units(rows, unit)
    else:
        m = float(ceil_div(rows, unit))
    return math.ceil(round(problem.g * m, 6) * unit / config.block_m * n)


@functools.lru_cache(maxsize=1024)
def _expected_units(rows: int, unit: int) -> float:
    """Returns how many units of rows a group needs on average, whose mean size is `rows`."""
    return float(np.mean(np.ceil(np.linspace(*SPREAD, 13) * rows / unit)))
