"""The choice of a config: legal, the same everywhere, measured where measurements exist."""

import dataclasses
import importlib
import json
import math
import pathlib
import sys

import pytest

from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select import choice
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import file_name, select
from jax_fp8gemm._select.cost import H200, predicted_microseconds, ranked
from jax_fp8gemm._select.problem import GemmConfig, Problem, blocks, why_illegal
from jax_fp8gemm._tools.shapes import CARDS, DENSE, GROUPED, ODD, WEIGHT_GRADIENT

TUNED = pathlib.Path(choice.__file__).parent / "tuned"


def problems() -> list[Problem]:
    flat = [
        Problem("dense", s.m, s.n, s.k, 1, s.scales, s.out)
        for s in [*DENSE, *WEIGHT_GRADIENT, *ODD]
    ]
    return flat + [shape.problem() for shape in GROUPED]


def test_every_choice_and_every_candidate_is_legal():
    for problem in problems():
        assert why_illegal(problem, select(problem)) is None, problem
        for candidate in candidates(problem):
            assert why_illegal(problem, candidate) is None, (problem, candidate)


@pytest.mark.parametrize("device", CARDS)
def test_tuned_rows_are_legal_and_used(device):
    rows = json.loads((TUNED / f"{file_name(device)}.json").read_text())
    assert len(rows) > 50
    fields = {field.name for field in dataclasses.fields(GemmConfig)}
    for row in rows:
        keys = {k: row[k] for k in ("variant", "m", "n", "k", "g", "scales", "out")}
        problem = Problem(**keys, device=device)
        config = GemmConfig(**{name: row[name] for name in fields})
        assert why_illegal(problem, config) is None, row
        assert select(problem) == config, row


def test_a_tuned_row_serves_its_neighbours_and_no_more():
    row = Problem("dense", 4096, 4096, 7168)
    near = dataclasses.replace(row, m=4000)  # as many blocks of 256 rows, not of 128
    assert select(near) == select(row)
    far = dataclasses.replace(row, m=2400)
    best = ranked(far, candidates(far))[0]
    assert select(far) == best


def test_an_unknown_hopper_gpu_gets_the_nearest_table():
    problem = Problem("dense", 4096, 4096, 7168)
    assert select(problem) == select(dataclasses.replace(problem, device="x"))


@pytest.mark.parametrize(
    "config, reason",
    [
        (GemmConfig("wide", 128, 128, 4), "persistent or few_rows"),
        (GemmConfig("persistent", 128, 128, 9), "227 KiB of shared memory"),
        (GemmConfig("few_rows", 64, 64, 4, split_k=4), "more than the steps of k"),
    ],
)
def test_illegal_configs_are_named(config, reason):  # every reason: test_plan.py
    assert reason in why_illegal(Problem("dense", 64, 256, 384), config)


def test_grouped_variants_refuse_what_their_groups_forbid():
    wide, split = (
        GemmConfig("persistent", 256, 128, 3),
        GemmConfig("few_rows", 64, 64, 4, split_k=2),
    )
    assert "block_m 128" in why_illegal(Problem("contiguous", 512, 256, 256, 4), wide)
    assert "number of blocks" in why_illegal(Problem("ragged", 512, 256, 256, 4), split)


def test_casting_kernels_have_blocks_as_wide_as_those_of_scales():
    few = Problem("ragged", 8192, 4096, 7168, 32, rhs="bf16_transposed")
    assert select(few).block_m == 256  # which reads and casts the weights least often
    assert "needs block_n 128" in why_illegal(few, GemmConfig("persistent", 128, 192, 2))
    dense = dataclasses.replace(few, variant="dense", g=1)
    assert "must have groups" in why_illegal(dense, GemmConfig("persistent", 128, 128, 2))


def test_blocks_of_groups_are_those_to_expect_of_uneven_sizes():
    even = Problem("batched", 128, 128, 256, 8)
    config = GemmConfig("persistent", 128, 128, 4)
    assert blocks(even, config) == 8
    uneven = dataclasses.replace(even, variant="masked")  # half of the groups need a second block
    assert 10 <= blocks(uneven, config) <= 14
    assert blocks(dataclasses.replace(uneven, m=20), config) == 8


def test_predictions_are_positive_and_grow_with_the_work():
    for variant in VARIANTS:
        scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
        small = Problem(variant, 512, 1024, 1024, 4, scales)
        large = dataclasses.replace(small, n=64 * 1024)
        for config in candidates(large):
            times = [predicted_microseconds(p, [config])[0] for p in (small, large)]
            assert 0 < times[0] < times[1] < math.inf


def test_the_choice_can_be_printed(monkeypatch, capsys):
    monkeypatch.setenv("JAX_FP8GEMM_PRINT_CONFIGS", "1")
    select(Problem("dense", 64, 2112, 7168))
    printed = capsys.readouterr().err
    assert "jax_fp8gemm: Problem(variant='dense'" in printed and "(tuned)" in printed


def test_the_model_chooses_well_where_it_was_not_fitted():
    """Timings of an H200: the fitted half of the GEMMs, and the other one."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
    try:
        fit_cost = importlib.import_module("fit_cost")
    finally:
        sys.path.pop()
    data = fit_cost.read()
    assert len(data.family) > 400 and len(data.us) > 10_000
    found = fit_cost.summary(data, H200)
    for half in ("fitted half", "other half"):
        assert found[half].mean < 0.02 and found[half].above < 0.07 * found[half].count, half
    bad = dataclasses.replace(H200, arrival=H200.arrival * 100)  # a model that likes deep rings
    assert fit_cost.summary(data, bad)["other half"].mean > 0.05


def test_the_model_prefers_shared_copies_where_rows_straddle_lines():
    """k no multiple of 128: twice the lines of L2, which a multicast saves."""
    straddling = ranked(p := Problem("dense", 8192, 8192, 2160), candidates(p))[0]
    assert straddling.multicast != "none"
