"""Which configs are worth timing: every measured winner, and no stage or split that is in vain."""

import dataclasses
import json
import pathlib

import pytest

from jax_fp8gemm._select import choice
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import file_name
from jax_fp8gemm._select.problem import GemmConfig, Problem, blocks, why_illegal
from jax_fp8gemm._tools.shapes import CARDS

LARGE = Problem("dense", 4096, 4096, 7168)
FEW = Problem("dense", 64, 2112, 7168)
TUNED = pathlib.Path(choice.__file__).parent / "tuned"


def shapes(problem: Problem, kernel: str = "persistent") -> set[tuple]:
    return {(c.block_m, c.block_n, c.multicast) for c in candidates(problem) if c.kernel == kernel}


@pytest.mark.parametrize("device", CARDS)
def test_every_measured_winner_is_a_candidate(device):
    fields = {field.name for field in dataclasses.fields(GemmConfig)}
    for row in json.loads((TUNED / f"{file_name(device)}.json").read_text()):
        keys = {k: row[k] for k in ("variant", "m", "n", "k", "g", "scales", "out")}
        config = GemmConfig(**{name: row[name] for name in fields})
        assert config in candidates(Problem(**keys, device=device)), row


def test_persistent_blocks_have_these_shapes():
    """Every multiple of 16 from 32 to 192 but 176, which touches three blocks of scales.

    With 192 rows, registers are enough for 128 columns. The operand that a cluster shares has 128
    rows or columns at least, or its block is square.
    """
    every, alone = ("none", "lhs", "rhs"), ("none", "rhs")
    expected = {(128, n, x) for n in (32, 64, 128, 144, 160, 192) for x in every}
    expected |= {(128, n, x) for n in (48, 80, 96, 112) for x in alone}
    expected |= {(192, n, x) for n in (64, 80, 96, 112, 128) for x in alone}
    expected |= {(256, 128, x) for x in every} | {(256, 96, x) for x in ("none", "lhs")}
    assert shapes(LARGE) == expected


def test_the_order_of_blocks_is_tried_where_it_matters():
    def orders(problem: Problem, *shape) -> list[int]:
        return sorted(
            c.group_m
            for c in candidates(problem)
            if (c.block_m, c.block_n, c.multicast) == shape and c.kernel == "persistent"
        )

    some = [(256, 128, "lhs"), (128, 192, "rhs")]
    for shape in shapes(LARGE):
        assert orders(LARGE, *shape) == ([4, 8, 16, 32] if shape in some else [8]), shape
    for rows, expected in {2048: [8], 2049: [4, 8, 16, 32]}.items():
        assert orders(dataclasses.replace(LARGE, m=rows), *some[0]) == expected
    groups = Problem("ragged", 8 * 2048, 4096, 7168, 8)  # of 2048 rows each
    assert orders(groups, *some[0]) == [8]


def test_persistent_rings_are_as_deep_as_fits_up_to_eight():
    for config in candidates(LARGE):
        deeper = dataclasses.replace(config, stages=config.stages + 1)
        assert 2 <= config.stages <= 8
        assert config.stages == 8 or why_illegal(LARGE, deeper), config
    assert {8, 4} <= {c.stages for c in candidates(LARGE)}


def few_rows(problem: Problem) -> list[GemmConfig]:
    return [c for c in candidates(problem) if c.kernel == "few_rows"]


def test_the_few_rows_kernel_is_tried_up_to_1024_rows_of_a_group():
    for variant, g in (("dense", 1), ("masked", 4), ("ragged", 4)):
        rows = 4 if variant == "ragged" else 1
        assert few_rows(Problem(variant, 1024 * rows, 512, 512, g)), variant
        assert not few_rows(Problem(variant, 1025 * rows, 512, 512, g)), variant


def test_few_rows_blocks_have_these_shapes():
    small = Problem("dense", 64, 128, 7168)  # every split fits
    widths = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128)
    found = {(c.block_m, c.block_n, c.split_k) for c in few_rows(small)}
    expected = {(m, n, s) for m in (64, 128) for n in widths for s in (1, 2, 4)}
    registers = {(128, n, s) for n in (112, 128) for s in (1, 2, 4)}  # more than there are
    assert found == expected - registers
    assert all(c.multicast == "none" and c.group_m == 8 for c in few_rows(small))


def test_k_is_split_only_where_every_cluster_runs_at_once():
    for config in few_rows(FEW):
        assert config.split_k == 1 or blocks(FEW, config) * config.split_k <= 132
    found = {(c.block_n, c.split_k) for c in few_rows(FEW)}
    assert {(64, 4), (32, 2), (8, 1), (16, 1)} <= found  # 132 CTAs, and 264 without a split
    wider = dataclasses.replace(FEW, n=2113)  # 34 blocks of 64 columns
    assert not {(64, 4), (32, 2)} & {(c.block_n, c.split_k) for c in few_rows(wider)}


def test_no_more_stages_than_a_cta_has_steps():
    """One block to a CTA: an even number of stages, one for each step and at most one beside it."""
    short = Problem("dense", 64, 256, 9 * 128)  # nine steps
    stages = {c.split_k: c.stages for c in few_rows(short) if (c.block_m, c.block_n) == (64, 8)}
    assert stages == {1: 10, 2: 6, 4: 4}
    for k in (128, 256):  # the pipeline has two steps at least
        problem = dataclasses.replace(short, k=k)
        assert {c.stages for c in few_rows(problem)} == {2}
    deep = dataclasses.replace(short, k=7168)
    narrow = {c.stages for c in few_rows(deep) if (c.block_m, c.block_n) == (64, 8)}
    assert narrow == {14, 16}  # 56 steps; a quarter of them


def test_a_cta_with_several_blocks_has_all_stages_that_fit():
    several = Problem("dense", 64, 133 * 8, 4 * 128)
    alone = dataclasses.replace(several, n=132 * 8)
    for problem, expected in ((several, 16), (alone, 4)):
        (found,) = (c for c in few_rows(problem) if (c.block_m, c.block_n) == (64, 8)
                    and c.split_k == 1)  # fmt: skip
        assert found.stages == expected
