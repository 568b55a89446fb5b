"""The cost model by hand: each term alone, in clocks and bytes."""

import dataclasses
import functools

import pytest

from jax_fp8gemm._select import cost
from jax_fp8gemm._select.cost import CostModel, predicted_seconds
from jax_fp8gemm._select.problem import GemmConfig, Problem

CLOCK = 1.8e9  # Hz
LAUNCH, FEW_ROWS_LAUNCH = 4.5e-6, 4.1e-6  # s
LARGE = Problem("dense", 4096, 4096, 7168)  # 56 steps of k
SQUARE = GemmConfig("persistent", 128, 128, 4)  # 32 × 32 blocks of LARGE: 8 waves on 132 SMs
TALL = GemmConfig("persistent", 256, 128, 4)  # 16 × 32 blocks: 4 waves
SMALL = GemmConfig("few_rows", 64, 64, 4)


def same(seconds: float):
    return pytest.approx(seconds, rel=1e-9)


def model(monkeypatch, **constants) -> None:
    """Puts other constants into the model, so that one term decides."""
    monkeypatch.setattr(cost, "CostModel", functools.partial(CostModel, **constants))


def test_nobody_changes_the_constants():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CostModel().clock = 1.0


def test_a_step_takes_as_long_as_its_bytes_from_l2():
    step = 128 * (128 + 128) / 46  # 712 clocks; the tensor core: 640
    cycles = 8 * (56 * step + 1400 + 128 * 128 * 2 / 27)
    assert predicted_seconds(LARGE, SQUARE) == same(cycles / CLOCK + LAUNCH)


def test_or_as_long_as_the_tensor_core():
    step = 256 * 128 * 128 * 2 / 8192 * 1.25  # 1280 clocks; L2: 1068
    cycles = 4 * (56 * step + 1400 + 256 * 128 * 2 / 27)
    assert predicted_seconds(LARGE, TALL) == same(cycles / CLOCK + LAUNCH)


def test_the_few_rows_kernel_has_its_own_rates():
    many = dataclasses.replace(LARGE, m=1024)
    tensor = 64 * 64 * 128 * 2 / 8192 * 2.5  # 320 clocks; L2: 278
    cycles = 8 * (56 * tensor + 1600 + 64 * 64 * 2 / 27)
    assert predicted_seconds(many, SMALL) == same(cycles / CLOCK + FEW_ROWS_LAUNCH)
    narrow = dataclasses.replace(SMALL, block_n=8)
    loads = 128 * (64 + 8) / 59  # 156 clocks; the tensor core: 40
    cycles = 63 * (56 * loads + 1600 + 64 * 8 * 2 / 27)
    assert predicted_seconds(many, narrow) == same(cycles / CLOCK + FEW_ROWS_LAUNCH)


def test_rows_that_are_not_there_are_not_read_and_not_written(monkeypatch):
    model(monkeypatch, bandwidth=1e30, few_rows_l2_bytes=1.0, l2_bytes=1.0)
    one = dataclasses.replace(LARGE, m=1)
    cycles = 56 * 128 * (1 + 64) + 1600 + 64 * 2 / 27  # 64 blocks: one wave
    assert predicted_seconds(one, SMALL) == same(cycles / CLOCK + FEW_ROWS_LAUNCH)
    cycles = 56 * 128 * (1 + 128) + 1400 + 128 * 2 / 27
    assert predicted_seconds(one, SQUARE) == same(cycles / CLOCK + LAUNCH)


def test_scales_that_columns_share_have_tensor_clocks_of_their_own(monkeypatch):
    model(monkeypatch, shared_columns=4.0, l2_bytes=1e9)
    rest = 1400 + 256 * 128 * 2 / 27
    for scales, factor in {
        "1x128_128x128": 1.25,
        "tensor_tensor": 1.25,
        "1x128_1x128": 4.0,
        "row_row": 1.25,
    }.items():
        problem = dataclasses.replace(LARGE, scales=scales)
        cycles = 4 * (56 * 1024 * factor + rest)
        assert predicted_seconds(problem, TALL) == same(cycles / CLOCK + LAUNCH), scales


def test_few_rows_cost_the_same_with_any_scales(monkeypatch):
    model(monkeypatch, shared_columns=4.0)
    columns = dataclasses.replace(LARGE, scales="1x128_1x128")
    assert predicted_seconds(columns, SMALL) == predicted_seconds(LARGE, SMALL)


def test_the_pipeline_has_at_least_two_steps():
    few = [predicted_seconds(dataclasses.replace(LARGE, k=k), SQUARE) for k in (128, 256, 384)]
    assert few[0] == few[1] < few[2]


def test_part_of_a_step_is_a_step(monkeypatch):
    model(monkeypatch, bandwidth=1e30)
    part, whole = (dataclasses.replace(LARGE, k=k) for k in (7168 - 112, 7168))
    assert predicted_seconds(part, SQUARE) == predicted_seconds(whole, SQUARE)


def test_a_limit_of_sms_makes_more_waves():
    per_wave = 56 * 128 * 256 / 46 + 1400 + 128 * 128 * 2 / 27
    for num_sms, waves in {0: 8, 64: 16, 63: 17, 132: 8, 1000: 8, 1: 1024}.items():
        problem = dataclasses.replace(LARGE, num_sms=num_sms)
        expected = waves * per_wave / CLOCK + LAUNCH
        assert predicted_seconds(problem, SQUARE) == same(expected), num_sms


def test_where_rhs_is_cast_a_step_takes_as_long_as_the_cast():
    problem = Problem("ragged", 8192, 4096, 7168, 8, rhs="bf16")
    waves = 9  # of 8 groups × 4.5 × 32 blocks: groups of about 1024 rows have 4.5 of 256 on average
    step = 1800  # L2: 128 · (256 + 2 · 128) / 46 = 1425; the tensor core: 1280
    cycles = waves * (56 * step + 1400 + 256 * 128 * 2 / 27)
    assert predicted_seconds(problem, TALL) == same(cycles / CLOCK + LAUNCH)


def test_a_rhs_that_is_cast_has_twice_the_bytes(monkeypatch):
    model(monkeypatch, cast_step=0.0, l2_bytes=10.0)
    problem = Problem("ragged", 8192, 4096, 7168, 8, rhs="bf16")
    cycles = 9 * (56 * 128 * (256 + 2 * 128) / 10 + 1400 + 256 * 128 * 2 / 27)
    assert predicted_seconds(problem, TALL) == same(cycles / CLOCK + LAUNCH)
    model(monkeypatch, bandwidth=1e9)
    traffic = 8 * (1024 * 7168 + 2 * 4096 * 7168 + 2 * 1024 * 4096)
    assert predicted_seconds(problem, TALL) == same(traffic / 1e9 + LAUNCH)


def test_no_faster_than_the_bytes_from_device_memory():
    problem = Problem("dense", 64, 132 * 64, 7168)  # a block for each SM
    traffic = 64 * 7168 + 132 * 64 * 7168 + 2 * 64 * 132 * 64
    expected = traffic / 4.7e12 + FEW_ROWS_LAUNCH
    assert predicted_seconds(problem, SMALL) == same(expected)


def test_sms_without_a_block_ask_for_no_bytes(monkeypatch):
    model(monkeypatch, bandwidth=1e9)
    for n, share in {33: 0.25, 132: 1.0, 264: 1.0}.items():
        problem = Problem("dense", 64, n * 64, 7168)
        traffic = 64 * 7168 + n * 64 * 7168 + 2 * 64 * n * 64
        expected = traffic / (1e9 * share) + FEW_ROWS_LAUNCH
        assert predicted_seconds(problem, SMALL) == same(expected), n


def test_every_group_has_bytes_of_its_own(monkeypatch):
    model(monkeypatch, bandwidth=1e9)
    problem = Problem("batched", 128, 4096, 1024, 8, out="f32")
    traffic = 8 * (128 * 1024 + 4096 * 1024 + 4 * 128 * 4096)
    assert predicted_seconds(problem, SQUARE) == same(traffic / 1e9 + LAUNCH)


def test_f32_results_take_twice_the_time_to_leave():
    halves, floats = (
        predicted_seconds(dataclasses.replace(LARGE, out=out), SQUARE) for out in ("bf16", "f32")
    )
    assert floats - halves == pytest.approx(8 * 128 * 128 * 2 / 27 / CLOCK, rel=1e-6)


@pytest.mark.parametrize("split_k, n", [(2, 64 * 64), (4, 30 * 64)])
def test_ctas_of_a_split_share_steps_and_results(monkeypatch, split_k, n):
    model(monkeypatch, bandwidth=1e30)
    config = dataclasses.replace(SMALL, split_k=split_k)
    cycles = 56 / split_k * 320 + 1600 + 64 * 64 * 2 / split_k / 27 + 3000
    got = predicted_seconds(Problem("dense", 64, n, 7168), config)
    assert got == same(cycles / CLOCK + FEW_ROWS_LAUNCH)


def test_thirty_clusters_of_four_run_at_once_and_66_of_two(monkeypatch):
    """Of 132 SMs, 120 find a place in a cluster of four; pairs find all."""
    model(monkeypatch, bandwidth=1e30)
    for split_k, most in {1: 132, 2: 66, 4: 30}.items():
        config = dataclasses.replace(SMALL, split_k=split_k)
        fits, fits_not = (
            predicted_seconds(Problem("dense", 64, 64 * blocks, 7168), config)
            for blocks in (most, most + 1)
        )
        again = fits_not - FEW_ROWS_LAUNCH
        assert again == same(2 * (fits - FEW_ROWS_LAUNCH)), split_k  # a second wave
