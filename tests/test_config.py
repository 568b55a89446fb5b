"""The choice of a config: legal, the same everywhere, measured where measurements exist."""

import dataclasses
import json
import math
import pathlib

import pytest

from jax_fp8gemm import config as configs
from jax_fp8gemm._tools.shapes import CARDS, DENSE, GROUPED, ODD, WEIGHT_GRADIENT
from jax_fp8gemm.config import GemmConfig, Problem
from jax_fp8gemm.variants import VARIANTS

TUNED = pathlib.Path(configs.__file__).parent / "tuned"


def problems() -> list[Problem]:
    flat = [
        Problem("dense", s.m, s.n, s.k, 1, s.scales, s.out)
        for s in [*DENSE, *WEIGHT_GRADIENT, *ODD]
    ]
    return flat + [shape.problem() for shape in GROUPED]


def test_every_choice_and_every_candidate_is_legal():
    for problem in problems():
        assert configs.legal(problem, configs.select(problem)) is None, problem
        for candidate in configs.candidates(problem):
            assert configs.legal(problem, candidate) is None, (problem, candidate)


@pytest.mark.parametrize("device", CARDS)
def test_tuned_rows_are_legal_and_used(device):
    rows = json.loads((TUNED / f"{configs.file_name(device)}.json").read_text())
    assert len(rows) > 50
    fields = {field.name for field in dataclasses.fields(GemmConfig)}
    for row in rows:
        keys = {k: row[k] for k in ("variant", "m", "n", "k", "g", "scales", "out")}
        problem = Problem(**keys, device=device)
        config = GemmConfig(**{name: row[name] for name in fields})
        assert configs.legal(problem, config) is None, row
        assert configs.select(problem) == config, row


def test_a_tuned_row_serves_its_neighbours_and_no_more():
    row = Problem("dense", 4096, 4096, 7168)
    near = dataclasses.replace(row, m=5000)
    assert configs.select(near) == configs.select(row)
    far = dataclasses.replace(row, m=2400)
    best = min(configs.candidates(far), key=lambda c: configs.predicted_seconds(far, c))
    assert configs.select(far) == best


def test_an_unknown_hopper_gpu_gets_the_nearest_table():
    problem = Problem("dense", 4096, 4096, 7168)
    assert configs.select(problem) == configs.select(dataclasses.replace(problem, device="x"))


@pytest.mark.parametrize(
    "config, reason",
    [
        (GemmConfig("wide", 128, 128, 4), "kernel 'wide'"),
        (GemmConfig("persistent", 64, 128, 4), "block 64x128"),
        (GemmConfig("persistent", 256, 192, 2), "accumulator registers"),
        (GemmConfig("persistent", 128, 128, 9), "bytes of shared memory"),
        (GemmConfig("persistent", 128, 128, 1), "stages 1"),
        (GemmConfig("persistent", 128, 128, 4, "both"), "multicast 'both'"),
        (GemmConfig("persistent", 128, 128, 4, split_k=2), "split_k: few_rows only"),
        (GemmConfig("persistent", 128, 176, 4), "three blocks of scales"),
        (GemmConfig("few_rows", 64, 64, 5), "an even number of stages"),
        (GemmConfig("few_rows", 64, 64, 4, split_k=3), "split_k of 1, 2 or 4"),
        (GemmConfig("few_rows", 128, 128, 4), "accumulator registers"),
    ],
)
def test_illegal_configs_are_named(config, reason):
    assert reason in configs.legal(Problem("dense", 64, 256, 1024), config)


def test_grouped_variants_refuse_what_their_groups_forbid():
    wide, split = (
        GemmConfig("persistent", 256, 128, 3),
        GemmConfig("few_rows", 64, 64, 4, split_k=2),
    )
    assert "128 rows" in configs.legal(Problem("contiguous", 512, 256, 256, 4), wide)
    assert "number of blocks" in configs.legal(Problem("ragged", 512, 256, 256, 4), split)


def test_casting_kernels_have_blocks_as_wide_as_those_of_scales():
    few = Problem("ragged", 8192, 4096, 7168, 32, rhs="bf16_transposed")
    assert configs.select(few).block_m == 256  # which reads and casts the weights least often
    assert "blocks as wide" in configs.legal(few, GemmConfig("persistent", 128, 192, 2))
    dense = dataclasses.replace(few, variant="dense", g=1)
    assert "not for dense" in configs.legal(dense, GemmConfig("persistent", 128, 128, 2))


def test_blocks_of_groups_are_those_to_expect_of_uneven_sizes():
    even = Problem("batched", 128, 128, 256, 8)
    config = GemmConfig("persistent", 128, 128, 4)
    assert configs.blocks(even, config) == 8
    uneven = dataclasses.replace(even, variant="masked")  # half of the groups need a second block
    assert 10 <= configs.blocks(uneven, config) <= 14
    assert configs.blocks(dataclasses.replace(uneven, m=20), config) == 8


def test_predictions_are_positive_and_grow_with_the_work():
    for variant in VARIANTS:
        scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
        small = Problem(variant, 512, 1024, 1024, 4, scales)
        large = dataclasses.replace(small, n=64 * 1024)
        for config in configs.candidates(large):
            times = [configs.predicted_seconds(p, config) for p in (small, large)]
            assert 0 < times[0] < times[1] < math.inf


def test_the_choice_can_be_printed(monkeypatch, capsys):
    monkeypatch.setenv("JAX_FP8GEMM_PRINT_CONFIGS", "1")
    configs.select(Problem("dense", 64, 2112, 7168))
    printed = capsys.readouterr().err
    assert "jax_fp8gemm: Problem(variant='dense'" in printed and "(tuned)" in printed
