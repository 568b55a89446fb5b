"""The cost model: how long a config takes for a problem, as one page of arithmetic."""

import dataclasses

from jax_fp8gemm._core.layout import K_STEP, ROW_BLOCKS, ceil_div
from jax_fp8gemm._select.problem import SMS, GemmConfig, Problem, blocks

TENSOR_RATE = 8192  # FP8 operations per clock and SM, measured


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Constants of `predicted_seconds`, fitted to timings on an H200.

    Those of few rows and of a split are fitted to timings on an H100 (docs/measured.md).
    """

    clock: float = 1.80e9  # Hz, under load with promotion
    bandwidth: float = 4.7e12  # B/s from device memory, when every SM asks for its share
    l2_bytes: float = 46.0  # per clock into one SM
    tensor: float = 1.25  # clocks of a step over the tensor core's own
    shared_columns: float = 1.0  # likewise with a scale for each column, which blocks share
    few_rows_tensor: float = 2.5
    few_rows_l2_bytes: float = 59.0
    cast_step: float = 1800.0  # clocks that a step takes at least, where rhs is cast
    latency: float = 4.5e-6  # s: launch, first bytes, last store
    few_rows_latency: float = 4.1e-6
    block: float = 1400.0  # clocks for each block that nothing hides
    few_rows_block: float = 1600.0
    split_block: float = 3000.0  # for each block of a cluster that shares it
    clusters_of_four: float = 10 / 11  # of the SMs that find a place in one
    output: float = 27.0  # bytes per clock that leave one SM


def predicted_seconds(problem: Problem, config: GemmConfig) -> float:
    """Returns the cost model's time of `problem` with `config`; good for ranking, no more.

    time = max(waves · (steps of k · max(tensor core, L2) + block overhead) / clock,
               bytes / bandwidth) + latency
    """
    p, c, model = problem, config, CostModel()
    few_rows = c.kernel == "few_rows"
    m, k = p.one_group
    steps = max(2, ceil_div(k, K_STEP)) / c.split_k
    sms = min(p.num_sms or SMS, SMS)
    if c.split_k == 4:
        sms = int(sms * model.clusters_of_four)
    ctas = blocks(p, c) * c.split_k
    waves = ceil_div(ctas, sms)
    tensor = c.block_m * c.block_n * K_STEP * 2 / TENSOR_RATE
    if few_rows:
        tensor *= model.few_rows_tensor
    else:
        tensor *= model.shared_columns if p.tiles[1] == ROW_BLOCKS else model.tensor
    # A multicast saves reads of L2, but what arrives in an SM is the same.
    loaded = K_STEP * (min(c.block_m, m) + c.block_n * (2 if p.casts else 1))
    loads = loaded / (model.few_rows_l2_bytes if few_rows else model.l2_bytes)
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


def streaming_seconds(size: int) -> float:
    """Returns the time of a kernel that reads and writes `size` bytes in all, and little else."""
    model = CostModel()
    return size / model.bandwidth + model.latency
