"""The table of variants, their pairs of scales, and the words that options may be."""

import dataclasses
import typing

import pytest

from jax_fp8gemm._core import types
from jax_fp8gemm._core.extension import extension
from jax_fp8gemm._core.variants import SCALES, VARIANTS


def test_the_table_of_variants():
    rows = {
        row.name: f"{row.lhs} {row.rhs} {row.out} {row.groups} {row.group_operand}"
        for row in VARIANTS.values()
    }
    assert rows == {
        "dense": "mk nk mn None None",
        "batched": "gmk gnk gmn None None",
        "ragged": "mk gnk mn m g",
        "contiguous": "mk gnk mn m m",
        "masked": "gmk gnk gmn m g",
        "ragged_contracting": "mk nk gmn k g",
    }
    assert (*VARIANTS,) == typing.get_args(types.VariantName)


def test_the_pairs_of_scales():
    assert SCALES == {
        "1x128_128x128": ((1, 128), (128, 128)),
        "1x128_1x128": ((1, 128), (1, 128)),
        "row_row": ((1, None), (1, None)),
        "tensor_tensor": ((None, None), (None, None)),
    }
    assert (*SCALES,) == typing.get_args(types.ScalesName)


@pytest.mark.parametrize(
    "lhs, rhs, dims",
    [
        (2, 2, ("mk", "nk", "mn")),
        (4, 2, ("ABmk", "nk", "ABmn")),
        (3, 3, ("mAk", "nAk", "mn")),
        (5, 4, ("AmBCk", "nBCk", "Amn")),
        (13, 13, ("mABCDEFGHIJKk", "nABCDEFGHIJKk", "mn")),
        (2, 3, ("mk", "nk", "mn")),  # not one: the check of ranks names it
        (1, 1, ("mk", "nk", "mn")),
        (2, 1, ("mk", "nk", "mn")),
        (14, 13, ("mk", "nk", "mn")),  # more dims than letters
    ],
)
def test_dims_of_dense_gemms(lhs, rhs, dims):
    row = VARIANTS["dense"].with_ranks(lhs, rhs)
    assert (row.lhs, row.rhs, row.out) == dims
    assert row.name == "dense" and row.groups is None


def test_rows_of_the_table_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["dense"].groups = None


def test_only_dense_has_other_ranks():
    assert VARIANTS["ragged"].with_ranks(4, 2) is VARIANTS["ragged"]


@pytest.mark.parametrize(
    "variant, lhs, rhs, count, out",
    [
        ("dense", (5, 256), (7, 256), None, (5, 7)),
        ("batched", (3, 5, 256), (3, 7, 256), None, (3, 5, 7)),
        ("ragged", (5, 256), (3, 7, 256), 3, (5, 7)),
        ("contiguous", (5, 256), (3, 7, 256), 5, (5, 7)),
        ("masked", (3, 5, 256), (3, 7, 256), 3, (3, 5, 7)),
        ("ragged_contracting", (5, 256), (7, 256), 4, (4, 5, 7)),
        ("ragged_contracting", (5, 256), (7, 256), 0, (0, 5, 7)),
    ],
)
def test_shapes_of_results(variant, lhs, rhs, count, out):
    row = VARIANTS[variant]
    assert row.out_shape(lhs, rhs, count) == out
    sizes = row.sizes(lhs, rhs, count)
    assert sizes["k"] == 256 and sizes["m"] == 5 and sizes["n"] == 7
    assert ("g" in sizes) == (variant != "dense")


def test_other_ranks_than_the_row_s_have_no_sizes():
    row = VARIANTS["batched"]
    assert row.out_shape((3, 5, 256), (3, 7, 256)) == (3, 5, 7)
    for lhs, rhs in (((5, 256), (3, 7, 256)), ((3, 5, 256), (3, 7, 256, 1))):
        with pytest.raises(ValueError, match="zip"):
            row.sizes(lhs, rhs, None)


def test_a_size_of_an_operand_wins_over_the_group_operand_s():
    """The check of the group operand names the difference."""
    assert VARIANTS["ragged"].sizes((5, 256), (3, 7, 256), 4)["g"] == 3


# ---- Words ---------------------------------------------------------------------------------------


def test_words_that_the_extension_knows():
    problem = {"variant": "batched", "lhs_scale": "1x128", "rhs_scale": "128x128", "rhs": "fp8",
               "out": "bf16", "accumulate": 0, "aligned": 1}  # fmt: skip
    config = ["persistent", 128, 128, 4, "none", 1, 8]

    def legal(i: int | None = None, word: str = "", **changes) -> bool:
        own = list(config)
        if i is not None:
            own[i] = word
        if word == "few_rows":
            own[1:3] = [64, 64]
        return extension.plan(problem | changes, [tuple(own)])[0][0] is None

    assert legal() and not legal(0, "wide")
    assert all(legal(0, name) for name in typing.get_args(types.KernelName))
    assert all(legal(4, name) for name in typing.get_args(types.MulticastName))
    assert all(legal(variant=name) for name in VARIANTS)
    assert all(legal(out=name) for name in typing.get_args(types.OutName))
    for name in typing.get_args(types.RhsName):
        computed = {**problem, "variant": "ragged", "rhs": name}
        stages = (*config[:3], 2, *config[4:])
        assert extension.plan(computed, [stages])[0][0] is None, name
    cast = {"source": "float", "type": "bf16", "tile": "1x128", "pow2": 1, "rows": 1,
            "transposed": 1, "grouped": 0, "gather": 0, "pair": 0, "aligned": 1}  # fmt: skip
    for name in typing.get_args(types.SourceName):
        assert extension.cast_plan(cast | {"source": name})


def test_words_that_users_write():
    assert typing.get_args(types.ScaleRounding) == ("pow2", "none")
    assert typing.get_args(types.ScoreFunction) == ("softmax", "sigmoid")
    assert typing.get_args(types.Residuals) == ("fp8_t", "fp8", "input")
    assert typing.get_args(types.ExchangeKind) == ("all_gather", "all_to_all")
    assert typing.get_args(types.Wire) == ("fp8", "bf16")
