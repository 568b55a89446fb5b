"""The cost model: how long configs take for a problem, as one page of arithmetic.

It works on arrays, one element for each config, so that all configs of a problem are ranked at
once. benchmarks/fit_cost.py fits the constants to thousands of timings.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_fp8gemm._core.layout import K_STEP, ROW_BLOCKS, SCALE_BLOCK
from jax_fp8gemm._select.problem import SMS, STORE_BYTES, GemmConfig, Problem, blocks

CAST_BANDWIDTH = 3.9e6  # bytes per µs that casts read and write on an H200, measured
TENSOR_RATE = 8192  # FP8 operations per clock and SM, measured
LINE, SECTOR = 128, 32  # bytes of L2: one entry, and what of it is read at a time
UNEVEN = np.linspace(-1, 1, 9)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Constants of one kernel.

    Attributes:
      tensor: clocks of a step over the tensor core's own.
      apart: added to it where the columns of a block lie in two scale blocks.
      step: clocks of a step beside these.
      loads: bytes per clock from L2 into one SM.
      sharp: exponent by which the tensor core and loads of a step overlap.
      block: clocks for each block that nothing hides.
      latency: µs for launch, first bytes, last store.
      overlap: exponent by which SMs, L2 and memory overlap.
    """

    tensor: float
    apart: float
    step: float
    loads: float
    sharp: float
    block: float
    latency: float
    overlap: float


@dataclasses.dataclass(frozen=True)
class Constants:
    """What `microseconds` takes, fitted to timings on an H200.

    All were fitted together, so a single one may differ from what it is called: the clock of the
    card is 1.98 GHz at most.

    Attributes:
      clock: per µs.
      bandwidth: bytes per µs from device memory, when every SM asks for its share.
      alone: exponent of the part of the SMs that ask.
      l2: bytes per µs from L2 to all SMs. A multicast saves some of them.
      arrival: clocks until a copy is there, which the stages of the ring hide together.
      loads_straddling, loads_misaligned: times the bytes into one SM, where rows begin inside a
        line or a sector. Likewise l2_straddling and l2_misaligned those from L2, and
        memory_misaligned those from memory.
      spread: of the number of blocks, where groups have any size.
      multicast: clocks of a step for a shared copy.
      store_64, store_32, store_16: bytes per clock of a result, by the columns of its boxes.
      store_direct, store_direct_f32, store_few_rows: likewise from registers.
      drain: bytes per clock that leave an SM beside the next block's steps.
      rows_192, rows_256, columns_256: times the tensor core's clocks, for blocks of so many rows
        (of the persistent kernel, with a scale for each column). few_rows_128 likewise.
      split, split_element: clocks for a block that a cluster shares, and for an element of it.
      clusters_of_four: of the SMs that find a place in one.
      cast_step: clocks that a step takes at least, where rhs is cast.
    """

    blocks: Kernel  # the persistent kernel, with a scale for each block of rhs
    columns: Kernel  # the same with one for each column
    few_rows: Kernel
    clock: float
    bandwidth: float
    alone: float
    l2: float
    arrival: float
    loads_straddling: float
    loads_misaligned: float
    l2_straddling: float
    l2_misaligned: float
    memory_misaligned: float
    spread: float
    multicast: float
    store_64: float
    store_32: float
    store_16: float
    store_direct: float
    store_direct_f32: float
    store_few_rows: float
    drain: float
    rows_192: float
    rows_256: float
    columns_256: float
    few_rows_128: float
    split: float
    split_element: float
    clusters_of_four: float
    cast_step: float = 1800.0


# fmt: off
H200 = Constants(
    blocks=Kernel(
        tensor=0.186, apart=0.08762, step=245.5, loads=288.1, sharp=0.4957,
        block=402.1, latency=2.646, overlap=2.109,
    ),
    columns=Kernel(
        tensor=0.6537, apart=0.005501, step=114.8, loads=288.1, sharp=0.4957,
        block=270.7, latency=2.646, overlap=2.109,
    ),
    few_rows=Kernel(
        tensor=3.043, apart=0.0, step=160.2, loads=77.15, sharp=3.336,
        block=1892.0, latency=2.174, overlap=2.124,
    ),
    clock=3293.0,
    bandwidth=5084000.0,
    alone=0.6463,
    l2=44330000.0,
    arrival=354.3,
    loads_straddling=1.426,
    loads_misaligned=0.3974,
    l2_straddling=2.729,
    l2_misaligned=7.683,
    memory_misaligned=0.9513,
    spread=0.02312,
    multicast=162.4,
    store_64=12.42,
    store_32=10.19,
    store_16=12.26,
    store_direct=27.12,
    store_direct_f32=4.998,
    store_few_rows=9.188,
    drain=16.26,
    rows_192=1.366,
    rows_256=1.609,
    columns_256=0.9332,
    few_rows_128=1.321,
    split=700.9,
    split_element=1.308,
    clusters_of_four=0.9101,
)
# fmt: on
H100 = dataclasses.replace(H200, bandwidth=H200.bandwidth * 3.35 / 4.8)  # by data sheets


@dataclasses.dataclass(frozen=True)
class Features:
    """What a time depends on: an array for each, with an element for each config."""

    kernel: np.ndarray  # index into the kernels of Constants
    block_m: np.ndarray
    block_n: np.ndarray
    stages: np.ndarray
    lhs_shared: np.ndarray  # by a cluster
    rhs_shared: np.ndarray
    split_k: np.ndarray
    blocks: np.ndarray
    m: np.ndarray  # of one group
    n: np.ndarray
    k: np.ndarray  # of one group
    g: np.ndarray
    row_bytes: np.ndarray  # of lhs and rhs
    steps: np.ndarray  # of one group
    sms: np.ndarray
    out_bytes: np.ndarray  # of an element
    aligned: np.ndarray  # whether results may leave by the copy engine
    f32: np.ndarray
    ragged: np.ndarray
    any_size: np.ndarray  # whether groups end anywhere in a block
    casts: np.ndarray


def features(problem: Problem, configs: Sequence[GemmConfig]) -> Features:
    p, (m, k) = problem, problem.one_group
    persistent = 1 if p.tiles[1] == ROW_BLOCKS else 0
    out_bytes = 4 if p.out == "f32" else 2
    own = {
        "kernel": [2 if c.kernel == "few_rows" else persistent for c in configs],
        "block_m": [c.block_m for c in configs],
        "block_n": [c.block_n for c in configs],
        "stages": [c.stages for c in configs],
        "lhs_shared": [c.multicast == "lhs" for c in configs],
        "rhs_shared": [c.multicast == "rhs" for c in configs],
        "split_k": [c.split_k for c in configs],
        "blocks": [blocks(p, c) for c in configs],
    }
    same = {
        "m": m, "n": p.n, "k": k, "g": p.g, "row_bytes": p.k, "steps": p.steps_of_group,
        "sms": min(p.num_sms or SMS, SMS), "out_bytes": out_bytes,
        "aligned": p.n * out_bytes % STORE_BYTES == 0, "f32": p.out == "f32",
        "ragged": p.variant == "ragged", "any_size": p.any_size, "casts": p.casts,
    }  # fmt: skip
    shared = {name: np.full(len(configs), value) for name, value in same.items()}
    return Features(**{name: np.array(values) for name, values in own.items()}, **shared)


def microseconds(f: Features, c: Constants) -> np.ndarray:
    """Returns the model's times; good for ranking, no more.

    SMs:    waves · (steps of k · step + block), a step as long as its tensor core work or copies
    L2:     all copies / its rate
    memory: all bytes / its rate
    time  = the three, overlapped, + latency
    """
    own = {
        field.name: np.array([getattr(x, field.name) for x in (c.blocks, c.columns, c.few_rows)])[
            f.kernel
        ]
        for field in dataclasses.fields(Kernel)
    }
    steps = f.steps / f.split_k
    step = _step(f, c, own)
    stored = np.minimum(f.block_m, f.m) * f.block_n * f.out_bytes
    block = own["block"] + stored / f.split_k / _store_rate(f, c)
    shares = c.split + c.split_element * f.block_m * f.block_n
    block = block + np.where(f.split_k > 1, shares, 0)
    waves = _waves(f, c)
    drains = (f.kernel < 2) & (waves > 1)
    block = block + np.where(drains, np.maximum(0, stored / c.drain - steps * step), 0)
    sms = waves * (steps * step + block) / c.clock

    rows = np.where(f.any_size, f.block_m, np.minimum(f.block_m, f.m))
    rows = rows * np.where(f.lhs_shared, 0.5, 1)
    columns = f.block_n * np.where(f.rhs_shared, 0.5, 1) * np.where(f.casts, 2, 1)
    copied = f.blocks * f.steps * K_STEP * (rows + columns)
    l2 = copied * _by_alignment(f, c.l2_straddling, c.l2_misaligned) / c.l2

    used = np.minimum(1, f.blocks * f.split_k / SMS) ** c.alone
    read = (f.m * f.k + f.n * f.k * np.where(f.casts, 2, 1)) * _by_alignment(
        f, c.memory_misaligned, c.memory_misaligned
    )
    memory = f.g * (read + f.out_bytes * f.m * f.n) / (c.bandwidth * used)

    e = own["overlap"]
    return (sms**e + l2**e + memory**e) ** (1 / e) + own["latency"]


def _step(f: Features, c: Constants, own: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the clocks of one step of k in one SM."""
    apart = (SCALE_BLOCK % f.block_n != 0) & (f.block_n % SCALE_BLOCK != 0)
    tensor = f.block_m * f.block_n * K_STEP * 2 / TENSOR_RATE
    tensor = tensor * (own["tensor"] + np.where(apart, own["apart"], 0))
    tall = np.where(f.kernel == 1, c.columns_256, c.rows_256)
    tensor = tensor * np.select(
        [(f.kernel == 2) & (f.block_m == 128), f.kernel == 2, f.block_m == 256, f.block_m == 192],
        [c.few_rows_128, 1, tall, c.rows_192],
        1,
    )
    tensor = np.where(f.casts, np.maximum(tensor, c.cast_step), tensor)
    rows = np.where(f.any_size, f.block_m, np.minimum(f.block_m, f.m))
    loaded = K_STEP * (rows + f.block_n * np.where(f.casts, 2, 1))
    loads = loaded / own["loads"] * _by_alignment(f, c.loads_straddling, c.loads_misaligned)
    arrival, e = c.arrival / f.stages, own["sharp"]
    shared = np.where(f.lhs_shared | f.rhs_shared, c.multicast, 0)
    return (tensor**e + loads**e + arrival**e) ** (1 / e) + own["step"] + shared


def _by_alignment(f: Features, straddling: float, misaligned: float) -> np.ndarray:
    inside = np.where(f.row_bytes % SECTOR == 0, straddling, misaligned)
    return np.where(f.row_bytes % LINE == 0, 1, inside)


def _store_rate(f: Features, c: Constants) -> np.ndarray:
    """Returns bytes per clock at which a block's results leave; see store() in plan.cuh."""
    divisor = f.block_n & -f.block_n
    box = np.minimum(divisor, np.where(f.f32, 32, 64))
    rate = np.select([box >= 64, box == 32], [c.store_64, c.store_32], c.store_16)
    direct = ~f.aligned | f.f32 & (f.ragged | (f.block_n > 128))
    rate = np.where(direct, np.where(f.f32, c.store_direct_f32, c.store_direct), rate)
    return np.where(f.kernel == 2, c.store_few_rows, rate)


def _waves(f: Features, c: Constants) -> np.ndarray:
    """Returns how many blocks the busiest SM has, one after the other."""
    sms = f.sms * np.where(f.split_k == 4, c.clusters_of_four, 1)
    waves = f.blocks * f.split_k / sms
    spread = np.where(f.any_size, c.spread, 0)
    return np.maximum(1, np.mean([np.ceil(waves * (1 + spread * x) - 1e-9) for x in UNEVEN], 0))


def predicted_microseconds(problem: Problem, configs: Sequence[GemmConfig]) -> np.ndarray:
    """Returns the model's µs of `problem` with each config, on the card that it names."""
    card = H100 if "H100" in problem.device else H200
    return microseconds(features(problem, configs), card)


def ranked(problem: Problem, configs: Sequence[GemmConfig]) -> list[GemmConfig]:
    """Returns the configs, the best by the model first; of equal ones the first as it was."""
    order = np.argsort(predicted_microseconds(problem, configs), kind="stable")
    return [configs[i] for i in order]


def streaming_microseconds(size: int) -> float:
    """Returns the time of a kernel that reads and writes `size` bytes in all, and little else."""
    return size / CAST_BANDWIDTH + H200.blocks.latency
