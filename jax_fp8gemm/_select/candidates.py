"""The configs that are worth timing for a problem."""

import dataclasses

from jax_fp8gemm._core.layout import K_STEP, ceil_div, round_up
from jax_fp8gemm._core.types import MulticastName
from jax_fp8gemm._select.problem import SMS, GemmConfig, Problem, blocks, deepest

# (block_m, block_n, multicast). Widths follow n / 132: one wave of blocks on all SMs. Of configs
# that cost the same by the model, the first one is taken.
Shape = tuple[int, int, MulticastName]
EVERY: tuple[MulticastName, ...] = ("none", "lhs", "rhs")
ALONE: tuple[MulticastName, ...] = ("none", "rhs")
PERSISTENT: list[Shape] = [
    (256, 128, "lhs"),
    (256, 128, "none"),
    (256, 128, "rhs"),
    (256, 96, "lhs"),
    (256, 96, "none"),
    *[(128, n, which) for n in (192, 160, 144, 128, 64, 32) for which in EVERY],
    *[(128, n, which) for n in (112, 96, 80, 48) for which in ALONE],
    *[(192, n, which) for n in (128, 112, 96, 80, 64) for which in ALONE],
]
LARGEST: list[Shape] = [(256, 128, "lhs"), (128, 192, "rhs")]  # where the order of blocks matters
LARGEST_ROWS = 2048  # above which it does
GROUPS_OF_BLOCKS = (4, 16, 32)  # group_m, beside the usual one
FEW_ROWS_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128)
FEW_ROWS = 1024  # up to which the few-rows kernel is tried
MOST_STAGES, MOST_FEW_ROWS_STAGES = 8, 16


def candidates(problem: Problem) -> list[GemmConfig]:
    """Returns the legal configs worth timing, in no order."""
    wanted = []
    for block_m, block_n, multicast in PERSISTENT:
        config = GemmConfig("persistent", block_m, block_n, MOST_STAGES, multicast)
        wanted.append(config)
        if problem.one_group[0] > LARGEST_ROWS and (block_m, block_n, multicast) in LARGEST:
            wanted += [dataclasses.replace(config, group_m=group) for group in GROUPS_OF_BLOCKS]
    if problem.one_group[0] <= FEW_ROWS and not problem.batch_invariant:
        wanted += _few_rows(problem)
    return deepest(problem, wanted)


def _few_rows(problem: Problem) -> list[GemmConfig]:
    steps = max(2, ceil_div(problem.one_group[1], K_STEP))
    wanted = []
    for block_m in (64, 128):
        for block_n in FEW_ROWS_WIDTHS:
            for split_k in (1, 2, 4):
                stages = MOST_FEW_ROWS_STAGES
                config = GemmConfig("few_rows", block_m, block_n, stages, split_k=split_k)
                ctas = blocks(problem, config) * split_k
                if split_k > 1 and ctas > SMS:
                    continue  # one block for each cluster: more would come in waves
                if ctas <= SMS:  # one block to a CTA: a stage for each step is all it can use
                    stages = min(stages, round_up(ceil_div(steps, split_k), 2))
                wanted.append(dataclasses.replace(config, stages=stages))
    return wanted
