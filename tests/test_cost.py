"""The cost model by hand: each term alone, in clocks and bytes."""

import dataclasses

import numpy as np
import pytest

from jax_fp8gemm._select import cost
from jax_fp8gemm._select.cost import H100, H200, Constants, Kernel, features, microseconds
from jax_fp8gemm._select.problem import GemmConfig, Problem

# Nothing costs anything. Exponents so high that the largest of several terms decides.
FREE = Kernel(
    tensor=0.0, apart=0.0, step=0.0, loads=1e30, sharp=40, block=0.0, latency=0.0, overlap=40
)
NOTHING = Constants(
    blocks=FREE,
    columns=FREE,
    few_rows=FREE,
    clock=1.0,
    bandwidth=1e30,
    alone=1.0,
    l2=1e30,
    arrival=0.0,
    loads_straddling=1.0,
    loads_misaligned=1.0,
    l2_straddling=1.0,
    l2_misaligned=1.0,
    memory_misaligned=1.0,
    spread=0.0,
    multicast=0.0,
    store_64=1e30,
    store_32=1e30,
    store_16=1e30,
    store_direct=1e30,
    store_direct_f32=1e30,
    store_few_rows=1e30,
    drain=1e30,
    rows_192=1.0,
    rows_256=1.0,
    columns_256=1.0,
    few_rows_128=1.0,
    split=0.0,
    split_element=0.0,
    clusters_of_four=10 / 11,
    cast_step=0.0,
)
LARGE = Problem("dense", 4096, 4096, 7168)  # 56 steps of k
SQUARE = GemmConfig("persistent", 128, 128, 4)  # 32 × 32 blocks of LARGE: 8 waves on 132 SMs
TALL = GemmConfig("persistent", 256, 128, 4)  # 16 × 32 blocks: 4 waves
SMALL = GemmConfig("few_rows", 64, 64, 4)


def us(problem: Problem, config: GemmConfig, kernels=("blocks", "columns", "few_rows"), **terms):
    """Returns the time where nothing but these terms costs anything."""
    names = {field.name for field in dataclasses.fields(Kernel)}
    own = dataclasses.replace(FREE, **{name: x for name, x in terms.items() if name in names})
    shared = {name: x for name, x in terms.items() if name not in names}
    constants = dataclasses.replace(NOTHING, **dict.fromkeys(kernels, own), **shared)
    return microseconds(features(problem, [config]), constants)[0]


def same(expected: float):
    return pytest.approx(expected, rel=1e-9)


def test_nobody_changes_the_constants():
    with pytest.raises(dataclasses.FrozenInstanceError):
        H200.clock = 1.0
    assert H100 == dataclasses.replace(H200, bandwidth=H200.bandwidth * 3.35 / 4.8)


def test_all_configs_at_once_give_what_each_gives_alone():
    problem = Problem("ragged", 1000, 1000, 1000, 8)
    configs = [SQUARE, TALL, SMALL, dataclasses.replace(SMALL, split_k=2)]
    alone = [microseconds(features(problem, [config]), H200)[0] for config in configs]
    np.testing.assert_array_equal(microseconds(features(problem, configs), H200), alone)
    assert len(set(alone)) == 4
    assert cost.ranked(problem, configs) == [configs[i] for i in np.argsort(alone)]


def test_an_h100_has_less_bandwidth():
    streaming = Problem("dense", 64, 64 * 1024, 7168)
    slow, fast = (
        cost.predicted_microseconds(dataclasses.replace(streaming, device=device), [SMALL])[0]
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    )
    assert slow > fast


def test_the_tensor_core():
    clocks = 128 * 128 * 128 * 2 / 8192  # of a step
    assert us(LARGE, SQUARE, tensor=1.25) == same(8 * 56 * clocks * 1.25)
    assert us(LARGE, SQUARE, tensor=1.25, clock=1800.0) == same(8 * 56 * clocks * 1.25 / 1800)
    assert us(LARGE, TALL, tensor=1.0) == same(4 * 56 * 2 * clocks)


def test_columns_in_two_scale_blocks_take_longer():
    for block_n, apart in {128: 0, 64: 0, 32: 0, 96: 1, 112: 1, 144: 1, 192: 1}.items():
        config = dataclasses.replace(SQUARE, block_n=block_n)
        clocks = 56 * 128 * block_n / 32
        blocks = 32 * -(-4096 // block_n)
        assert us(LARGE, config, apart=1.0) == same(apart * -(-blocks // 132) * clocks), block_n


def test_each_kernel_has_its_own_constants():
    columns = dataclasses.replace(LARGE, scales="1x128_1x128")
    wanted = {"blocks": (LARGE, SQUARE), "columns": (columns, SQUARE), "few_rows": (LARGE, SMALL)}
    for name in wanted:
        for other, (problem, config) in wanted.items():
            assert us(problem, config, (name,), latency=3.0) == (3.0 if name == other else 0.0)
    for scales in ("tensor_tensor", "row_row"):
        problem = dataclasses.replace(LARGE, scales=scales)
        assert us(problem, SQUARE, ("blocks",), latency=3.0) == 3.0
    assert us(columns, SMALL, ("few_rows",), latency=3.0) == 3.0


def test_blocks_of_more_rows_have_factors_of_their_own():
    columns = dataclasses.replace(LARGE, scales="1x128_1x128")
    middle = dataclasses.replace(SQUARE, block_m=192)
    wide = dataclasses.replace(SMALL, block_m=128)
    cases = {
        "rows_192": [(LARGE, middle)],
        "rows_256": [(LARGE, TALL)],
        "columns_256": [(columns, TALL)],
        "few_rows_128": [(LARGE, wide), (columns, wide)],
    }
    for name in cases:
        for other, some in {**cases, "": [(LARGE, SQUARE), (columns, SQUARE)]}.items():
            for problem, config in some:
                factor = 1.5 if name == other else 1.0
                plain = us(problem, config, tensor=1.0)
                assert us(problem, config, tensor=1.0, **{name: 1.5}) == same(factor * plain)


def test_a_step_takes_as_long_as_its_bytes_from_l2():
    assert us(LARGE, SQUARE, loads=46.0) == same(8 * 56 * 128 * (128 + 128) / 46)
    both = us(LARGE, SQUARE, loads=46.0, tensor=1.0)  # 512 clocks of 712
    assert both == pytest.approx(us(LARGE, SQUARE, loads=46.0), rel=1e-6)
    assert us(LARGE, SQUARE, loads=46.0, tensor=1.0, sharp=1.0) == same(
        us(LARGE, SQUARE, loads=46.0) + us(LARGE, SQUARE, tensor=1.0)
    )
    assert us(LARGE, SQUARE, step=100.0) == same(8 * 56 * 100)


def test_rows_that_are_not_there_are_not_read_and_not_written():
    one = dataclasses.replace(LARGE, m=1)
    assert us(one, SMALL, loads=1.0) == same(56 * 128 * (1 + 64))  # 64 blocks: one wave
    assert us(one, SMALL, store_few_rows=1.0) == same(64 * 2)
    ragged = Problem("ragged", 8, 4096, 7168, 8)  # next to a group's rows lie the next one's
    assert us(ragged, SMALL, loads=1.0) == same(4 * 56 * 128 * (64 + 64))


def test_the_ring_hides_the_latency_of_memory():
    for stages in (2, 4, 8):
        config = dataclasses.replace(SQUARE, stages=stages)
        assert us(LARGE, config, arrival=800.0) == same(8 * 56 * 800 / stages)


def test_rows_that_begin_inside_a_line_or_a_sector():
    terms = {
        "loads": ("loads_straddling", "loads_misaligned", 46.0),
        "l2": ("l2_straddling", "l2_misaligned", 1e5),
        "bandwidth": ("memory_misaligned", "memory_misaligned", 1e4),
    }
    for term, (straddling, misaligned, rate) in terms.items():
        for k, name in {7168: None, 7168 - 32: straddling, 7168 - 16: misaligned}.items():
            problem = dataclasses.replace(LARGE, k=k)
            plain = us(problem, SQUARE, **{term: rate})
            assert us(problem, SQUARE, **{term: rate, straddling: 3.0, misaligned: 3.0}) >= plain
            if name is None:
                assert us(problem, SQUARE, **{term: rate, straddling: 3.0}) == plain
            elif term != "bandwidth":
                assert us(problem, SQUARE, **{term: rate, name: 3.0}) == same(3 * plain), (term, k)


def test_a_multicast_halves_what_l2_gives_and_costs_clocks():
    everything = 32 * 32 * 56 * 128
    for which, columns in {"none": 256, "lhs": 192, "rhs": 192}.items():
        config = dataclasses.replace(SQUARE, multicast=which)
        assert us(LARGE, config, l2=1e3) == same(everything * columns / 1e3), which
        assert us(LARGE, config, multicast=10.0) == same(8 * 56 * 10 * (which != "none"))
    wide, tall = (
        us(LARGE, GemmConfig("persistent", 256, 64, 4, which), l2=1e3) for which in ("rhs", "lhs")
    )
    assert wide == same(16 * 64 * 56 * 128 * (256 + 32) / 1e3)
    assert tall == same(16 * 64 * 56 * 128 * (128 + 64) / 1e3)


def test_no_faster_than_the_bytes_from_device_memory():
    problem = Problem("dense", 64, 132 * 64, 7168)  # a block for each SM
    traffic = 64 * 7168 + 132 * 64 * 7168 + 2 * 64 * 132 * 64
    assert us(problem, SMALL, bandwidth=1e3) == same(traffic / 1e3)
    batched = Problem("batched", 128, 4096, 1024, 8, out="f32")
    traffic = 8 * (128 * 1024 + 4096 * 1024 + 4 * 128 * 4096)
    assert us(batched, SQUARE, bandwidth=1e3) == same(traffic / 1e3)


def test_sms_without_a_block_ask_for_no_bytes():
    for n, share in {33: 0.25, 132: 1.0, 264: 1.0}.items():
        problem = Problem("dense", 64, n * 64, 7168)
        traffic = 64 * 7168 + n * 64 * 7168 + 2 * 64 * n * 64
        assert us(problem, SMALL, bandwidth=1e3) == same(traffic / 1e3 / share), n
        assert us(problem, SMALL, bandwidth=1e3, alone=0.5) == same(traffic / 1e3 / share**0.5)


def test_what_overlaps_and_what_does_not():
    terms = {"tensor": 1.0, "bandwidth": 1e3, "l2": 1e4}
    parts = [us(LARGE, SQUARE, **{name: x}) for name, x in terms.items()]
    assert us(LARGE, SQUARE, **terms, overlap=1.0, latency=5.0) == same(sum(parts) + 5)
    assert us(LARGE, SQUARE, **terms, overlap=2.0) == same(sum(x * x for x in parts) ** 0.5)


def test_every_block_costs_something_and_its_results_leave():
    assert us(LARGE, SQUARE, block=1000.0) == same(8 * 1000)
    bytes_of = 128 * 128 * 2
    assert us(LARGE, SQUARE, store_64=10.0) == same(8 * bytes_of / 10)
    floats = dataclasses.replace(LARGE, out="f32")
    assert us(floats, SQUARE, store_32=10.0) == same(8 * 2 * bytes_of / 10)
    narrow = dataclasses.replace(SQUARE, block_n=112)  # 37 × 32 blocks: nine waves
    assert us(LARGE, narrow, store_16=10.0) == same(9 * 128 * 112 * 2 / 10)
    odd = dataclasses.replace(LARGE, n=4095)
    assert us(odd, SQUARE, store_direct=10.0) == same(8 * bytes_of / 10)
    for problem, config in (
        (dataclasses.replace(floats, n=4095), SQUARE),
        (floats, dataclasses.replace(SQUARE, block_n=160)),
        (Problem("ragged", 4096, 4096, 7168, 1, out="f32"), SQUARE),
    ):
        assert us(problem, config, store_direct_f32=10.0) > 0
        assert us(problem, config, store_32=10.0, store_direct=10.0) == 0


def test_results_drain_beside_the_next_blocks_steps():
    drains = 128 * 128 * 2 / 4  # clocks of a block
    assert us(LARGE, SQUARE, drain=4.0) == same(8 * drains)
    short = dataclasses.replace(LARGE, k=256)  # two steps
    assert us(short, SQUARE, drain=4.0, step=1000.0) == same(8 * drains)  # of which 2000 multiply
    assert us(short, SQUARE, drain=4.0, step=9000.0) == same(8 * 2 * 9000)
    one_wave = Problem("dense", 128, 4096, 256)
    assert us(one_wave, SQUARE, drain=4.0) == us(LARGE, SMALL, drain=4.0) == 0


def test_the_pipeline_has_at_least_two_steps():
    few = [us(dataclasses.replace(LARGE, k=k), SQUARE, step=1.0) for k in (100, 256, 257)]
    assert few == [same(8 * 2), same(8 * 2), same(8 * 3)]


def test_groups_along_k_have_steps_of_their_own():
    """Groups of 128 · (0.7 to 1.3): one step up to the mean, two above."""
    problem = Problem("ragged_contracting", 128, 128, 128 * 8, 8, "1x128_1x128", "f32")
    assert us(problem, SQUARE, step=1.0) == same(np.mean([1] * 7 + [2] * 6))


def test_a_limit_of_sms_makes_more_waves():
    for num_sms, waves in {0: 8, 64: 16, 63: 17, 132: 8, 1000: 8, 1: 1024}.items():
        problem = dataclasses.replace(LARGE, num_sms=num_sms)
        assert us(problem, SQUARE, block=1.0) == same(waves), num_sms


def test_sizes_of_groups_may_make_another_wave():
    """131 blocks are one wave; a hundredth more are two. Without groups of any size, one."""
    problem = Problem("masked", 128, 131 * 128, 128, 1)
    wide = dataclasses.replace(SQUARE, block_m=256)  # a group's sizes fit one block
    assert us(problem, wide, block=1.0) == 1
    assert us(problem, wide, block=1.0, spread=0.08) == same((5 * 1 + 4 * 2) / 9)
    dense = dataclasses.replace(problem, variant="dense")
    assert us(dense, wide, block=1.0, spread=0.08) == 1


def test_where_rhs_is_cast_a_step_takes_as_long_as_the_cast_and_has_twice_the_bytes():
    problem = Problem("ragged", 8192, 4096, 7168, 8, rhs="bf16")
    waves = 9  # of 8 groups × 4.5 × 32 blocks: groups of about 1024 rows have 4.5 of 256 on average
    assert us(problem, TALL, cast_step=1800.0) == same(waves * 56 * 1800)
    assert us(problem, TALL, loads=10.0) == same(waves * 56 * 128 * (256 + 2 * 128) / 10)
    traffic = 8 * (1024 * 7168 + 2 * 4096 * 7168 + 2 * 1024 * 4096)
    assert us(problem, TALL, bandwidth=1e3) == same(traffic / 1e3)
    fp8 = dataclasses.replace(problem, rhs="fp8")
    assert us(fp8, TALL, cast_step=1800.0) == 0


@pytest.mark.parametrize("split_k, n", [(2, 64 * 64), (4, 30 * 64)])
def test_ctas_of_a_split_share_steps_and_results(split_k, n):
    config = dataclasses.replace(SMALL, split_k=split_k)
    problem = Problem("dense", 64, n, 7168)
    assert us(problem, config, step=10.0) == same(560 / split_k)
    assert us(problem, config, store_few_rows=2.0) == same(64 * 64 / split_k)
    assert us(problem, config, split=300.0, split_element=2.0) == same(300 + 2 * 64 * 64)
    assert us(problem, SMALL, split=300.0, split_element=2.0) == 0


def test_thirty_clusters_of_four_run_at_once_and_66_of_two():
    """Of 132 SMs, 120 find a place in a cluster of four; pairs find all."""
    for split_k, most in {1: 132, 2: 66, 4: 30}.items():
        config = dataclasses.replace(SMALL, split_k=split_k)
        waves = [
            us(Problem("dense", 64, 64 * n, 7168), config, block=1.0) for n in (most, most + 1)
        ]
        assert waves == [1, 2], split_k


def test_a_cast_takes_the_time_of_its_bytes():
    assert cost.streaming_microseconds(39_000_000) == same(10 + H200.blocks.latency)
