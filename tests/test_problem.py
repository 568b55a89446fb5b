"""What a config is chosen for, and the specification that goes into the program."""

import dataclasses

import numpy as np
import pytest

from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.problem import (
    GemmConfig,
    Problem,
    attributes,
    blocks,
    computed,
    deepest,
    why_illegal,
)

DENSE = Problem("dense", 64, 256, 384)
CONFIG = GemmConfig("persistent", 128, 64, 4)
FEW_ROWS = GemmConfig("few_rows", 64, 64, 4)


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("dense", (1001, 1001)),
        ("batched", (1001, 1001)),
        ("masked", (1001, 1001)),
        ("ragged", (126, 1001)),
        ("contiguous", (126, 1001)),
        ("ragged_contracting", (1001, 126)),
    ],
)
def test_rows_and_depth_of_one_group(variant, expected):
    """1001 rows, or 1001 of k, of eight groups together: 126 and a little less each."""
    assert Problem(variant, 1001, 64, 1001, 8).one_group == expected


def test_steps_are_whole():
    assert [dataclasses.replace(DENSE, k=k).steps for k in (1, 128, 129, 384)] == [1, 1, 2, 3]


def test_problems_and_configs_are_keys_of_caches():
    for one in (DENSE, CONFIG):
        assert hash(one) == hash(dataclasses.replace(one))
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.m = 1


def test_only_a_bf16_rhs_is_cast():
    for rhs, casts in {"fp8": False, "bf16": True, "bf16_transposed": True}.items():
        assert Problem("ragged", 1, 1, 1, rhs=rhs).casts == casts


def test_defaults_are_the_plain_gemm():
    """bf16 out of activations × weights, one group, all SMs, nothing added."""
    assert computed(DENSE) == {
        "variant": "dense", "lhs_scale": "1x128", "rhs_scale": "128x128", "rhs": "fp8",
        "out": "bf16", "accumulate": 0, "aligned": 1,
    }  # fmt: skip
    assert DENSE.g == 1 and DENSE.num_sms == 0
    assert (CONFIG.multicast, CONFIG.split_k, CONFIG.group_m) == ("none", 1, 8)


@pytest.mark.parametrize("out, n", [("bf16", 8), ("f32", 4)])
def test_rows_of_16_bytes_are_aligned(out, n):
    for columns in (n, 3 * n):
        assert computed(dataclasses.replace(DENSE, n=columns, out=out))["aligned"] == 1
    for columns in (n - 1, n + 1, n // 2):
        assert computed(dataclasses.replace(DENSE, n=columns, out=out))["aligned"] == 0


def test_every_choice_is_in_the_attributes():
    problem = Problem("dense", 64, 256, 384, 1, "row_row", "f32", accumulate=True)
    config = GemmConfig("few_rows", 64, 32, 6, "lhs", 2, 16)
    assert attributes(problem, config) == {
        "variant": "dense", "lhs_scale": "1xk", "rhs_scale": "1xk", "rhs": "fp8", "out": "f32",
        "accumulate": 1, "aligned": 1, "kernel": "few_rows", "block_m": 64, "block_n": 32,
        "stages": 6, "multicast": "lhs", "split_k": 2, "group_m": 16,
    }  # fmt: skip
    assert all(isinstance(x, str | np.int64) for x in attributes(problem, config).values())


def test_what_is_usual_is_no_attribute():
    """So that programs exported before an attribute was there stay as they are."""
    usual = attributes(DENSE, CONFIG)
    limited = attributes(dataclasses.replace(DENSE, num_sms=20), CONFIG, pair=True)
    assert limited == {**usual, "num_sms": 20, "pair": 1}
    assert attributes(DENSE, CONFIG, leave_rest=True) == {**usual, "leave_rest": 1}
    assert not {"num_sms", "pair", "leave_rest"} & usual.keys()
    assert isinstance(limited["pair"], np.int64)


def test_each_cta_of_a_cluster_of_four_has_a_step():
    split = dataclasses.replace(FEW_ROWS, split_k=4)
    reasons = [why_illegal(dataclasses.replace(DENSE, k=k), split) for k in (384, 385, 512)]
    assert reasons == ["split_k is more than the steps of k", None, None]
    two = dataclasses.replace(split, split_k=2)  # the kernel has two steps at least
    assert why_illegal(dataclasses.replace(DENSE, k=128), two) is None


def test_group_m_is_a_number_of_blocks():
    for group_m, legal in {-1: False, 0: False, 1: True, 65536: True, 65537: False}.items():
        reason = why_illegal(DENSE, dataclasses.replace(CONFIG, group_m=group_m))
        assert (reason is None) == legal and (legal or "group_m" in reason), group_m


def test_deepest_keeps_what_fits_and_drops_what_cannot_be():
    fits, deep = CONFIG, dataclasses.replace(CONFIG, stages=64)
    never = dataclasses.replace(CONFIG, block_n=12)
    split = dataclasses.replace(FEW_ROWS, split_k=4)  # more than the three steps
    found = deepest(DENSE, [fits, never, deep, split])
    assert found[0] is fits and len(found) == 2
    most = found[1].stages
    assert found[1] == dataclasses.replace(deep, stages=most) and 4 < most < 64
    assert why_illegal(DENSE, dataclasses.replace(deep, stages=most + 1)) is not None


def test_blocks_are_counted_with_those_in_vain():
    """A cluster that shares an operand has two blocks side by side, wanted or not."""
    problem = Problem("batched", 130, 130, 256, 3)
    for multicast, expected in {"none": 2 * 3, "lhs": 2 * 4, "rhs": 2 * 3}.items():
        config = GemmConfig("persistent", 128, 64, 4, multicast)
        assert blocks(problem, config) == 3 * expected, multicast
    config = GemmConfig("persistent", 128, 64, 4, "rhs")
    assert blocks(dataclasses.replace(problem, m=257), config) == 3 * 4 * 3


def test_blocks_to_expect_are_the_mean_over_sizes_from_0_7_to_1_3():
    """13 sizes of groups of 100 rows: 70, 75, ... 130. One needs two blocks of 128: the last."""
    problem = Problem("ragged", 1300, 64, 256, 13)
    config = GemmConfig("persistent", 128, 64, 4)
    assert blocks(problem, config) == 14
    many = dataclasses.replace(problem, m=130_000, g=1300)
    assert blocks(many, config) == 1400
    shared = dataclasses.replace(config, multicast="rhs")  # 256 rows at once: two blocks a group
    assert blocks(problem, shared) == 26
    assert blocks(dataclasses.replace(problem, variant="contiguous"), config) == 11  # no row more
    assert blocks(dataclasses.replace(problem, variant="masked", m=100), config) == 14
    assert blocks(dataclasses.replace(problem, n=65), config) == 28


def test_every_variant_has_blocks():
    for variant in VARIANTS:
        assert blocks(Problem(variant, 1, 1, 128, 1), CONFIG) == 1, variant
