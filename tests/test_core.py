"""The core's small parts: layouts of scales, groups of rows, rows of the table, words."""

import dataclasses
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import clamped

import jax_fp8gemm as fp8
from jax_fp8gemm._core import types
from jax_fp8gemm._core.extension import extension
from jax_fp8gemm._core.groups import (
    group_ends,
    group_of_row,
    group_of_step,
    grouped_tokens,
    place_by_groups,
)
from jax_fp8gemm._core.layout import (
    BLOCKS,
    K_MULTIPLE,
    K_STEP,
    ROW_BLOCKS,
    ROWS,
    SCALE_BLOCK,
    SCALE_MULTIPLE,
    TENSOR,
    TILE_NAMES,
    TILES,
    TOKEN_MULTIPLE,
    ceil_div,
    round_up,
    scale_from_kernel,
    scale_shape,
    scale_shape_in_kernel,
    scale_to_kernel,
)
from jax_fp8gemm._core.qarray import FP8, FP8_MAX, exportable
from jax_fp8gemm._core.variants import SCALES, VARIANTS

ends_of = jax.jit(group_ends, static_argnums=1)
rows_of = jax.jit(group_of_row, static_argnums=1)
steps_of = jax.jit(group_of_step, static_argnums=1)
placed = jax.jit(place_by_groups)

# ---- Layouts of scales ---------------------------------------------------------------------------

# Tile: shape of the scales of [3, 130, 300], and in the kernel's layout.
LAYOUTS = {
    (1, 128): ((3, 130, 3), (3, 3, 132)),
    (128, 128): ((3, 2, 3), (3, 2, 4)),
    (1, None): ((3, 130, 1), (3, 1, 132)),
    (None, None): ((3, 1, 1), (3, 1, 4)),
}


def test_the_four_tiles():
    assert (*LAYOUTS,) == TILES == (ROW_BLOCKS, BLOCKS, ROWS, TENSOR)
    assert [TILE_NAMES[tile] for tile in LAYOUTS] == ["1x128", "128x128", "1xk", "tensor"]


def test_the_hardware_s_multiples():
    """A copy has whole 16 bytes: 16 FP8 numbers, 4 float32 scales."""
    assert K_MULTIPLE * jnp.dtype(FP8).itemsize == 16 == SCALE_MULTIPLE * 4
    assert SCALE_BLOCK == K_STEP == TOKEN_MULTIPLE == 128
    assert jnp.finfo(FP8).max == FP8_MAX


@pytest.mark.parametrize("a, b, up", [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8), (9, 3, 9)])
def test_ceil_div_and_round_up(a, b, up):
    assert round_up(a, b) == up and ceil_div(a, b) == up // b


@pytest.mark.parametrize("tile", LAYOUTS, ids=str)
def test_scales_in_the_kernel_s_layout(tile):
    """Rows of scales become columns, and the last dim is filled with zeros."""
    shape = (3, 130, 300)
    logical, kernel = LAYOUTS[tile]
    assert scale_shape(shape, tile) == logical
    assert scale_shape_in_kernel(shape, tile) == kernel
    scale = 1 + np.arange(np.prod(logical), dtype=np.float32).reshape(logical)
    turned = np.swapaxes(scale, -1, -2) if tile[0] == 1 else scale
    expected = np.zeros(kernel, np.float32)
    expected[..., : turned.shape[-1]] = turned
    got = scale_to_kernel(jnp.asarray(scale), tile)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(scale_from_kernel(got, shape, tile), scale)


def test_scales_of_whole_16_bytes_are_not_padded():
    assert scale_shape_in_kernel((8, 512), (1, 128)) == (4, 8)
    assert scale_to_kernel(np.ones((8, 4)), (1, 128)).shape == (4, 8)


# ---- QArray --------------------------------------------------------------------------------------


def test_the_tile_of_a_qarray_is_the_first_that_fits():
    values = np.zeros((130, 300), FP8)
    for tile in TILES:
        q = fp8.QArray(values, np.ones(scale_shape(values.shape, tile)))
        assert q.tile == tile
        assert [q.has_tile(other) for other in TILES] == [other == tile for other in TILES]
    small = fp8.QArray(np.zeros((1, 100), FP8), np.ones((1, 1)))
    assert small.tile == (1, 128) and all(map(small.has_tile, TILES))
    assert small.shape == (1, 100) and small.ndim == 2


def test_scales_that_fit_no_tile_are_named_with_those_that_would():
    with pytest.raises(ValueError) as info:
        fp8.QArray(np.zeros((130, 300), FP8), np.ones((3, 130))).tile  # noqa: B018
    text = str(info.value)
    assert text.startswith("QArray: the shape of scale fits no tile of qvalue.")
    assert "qvalue [130, 300], scale [3, 130]" in text
    assert "scale [130, 3] or [2, 3] or [130, 1] or [1, 1]" in text
    assert "\n  fix       " in text


def test_an_exportable_container_keeps_its_name_and_its_fields():
    @exportable("pair_of_this_test")
    @dataclasses.dataclass(frozen=True)
    class Pair:
        left: jax.Array
        right: jax.Array

    run = jax.jit(lambda pair: Pair(pair.right, pair.left))
    exported = jax.export.export(run)(Pair(np.ones(2), np.zeros(3)))
    data = exported.serialize()
    assert b"jax_fp8gemm.pair_of_this_test" in data
    back = jax.export.deserialize(data).call(Pair(np.ones(2), np.zeros(3)))
    assert isinstance(back, Pair) and back.left.shape == (3,) and back.right.all()
    q = fp8.QArray(np.zeros((4, 128), FP8), np.ones((4, 1)))
    assert b"jax_fp8gemm.QArray" in jax.export.export(jax.jit(lambda q: q))(q).serialize()


# ---- Groups --------------------------------------------------------------------------------------

SIZES = [
    [20, 0, 30, 10],  # ends at 60
    [-5, 70, 0, 90],  # the last is cut off at 100
    [0, 0, 0, 0],
    [100, 1, 2**31 - 1, 5],
    [2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1],  # whose sum is beyond 32 bits
    [1, 1, 1, 96],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_end_where_the_loop_says(sizes):
    limit = 100
    ranges = clamped(sizes, limit)
    operand = jnp.array(sizes, jnp.int32)
    ends = ends_of(operand, limit)
    assert ends.dtype == jnp.int32
    np.testing.assert_array_equal(ends, [end for _, end in ranges])
    rows = np.full(limit, len(sizes))
    for index, (start, end) in enumerate(ranges):
        rows[start:end] = index
    found = rows_of(operand, limit)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, rows)


def test_every_group_begins_a_step_of_its_own():
    sizes = jnp.array([1, 0, 128, 129, -7, 2**31 - 1], jnp.int32)
    found = steps_of(sizes, 6)
    np.testing.assert_array_equal(found, [0, 2, 3, 3, 5, 5])
    np.testing.assert_array_equal(steps_of(jnp.array([0, 1, 0, 256, 0, 0]), 6), [1, 3, 3, 6, 6, 6])


@pytest.mark.parametrize("m, g", [(1, 1), (5, 3), (128, 1), (129, 2), (300, 3), (2, 5), (0, 4)])
def test_any_sizes_fit_into_grouped_tokens_and_some_need_all(m, g):
    def needed(cuts) -> int:
        ends = [0, *cuts, m]
        return sum(round_up(b - a, 128) for a, b in itertools.pairwise(ends))

    near = {i for i in range(m + 1) if i % 128 in (0, 1, 2) or i < 6 or m - i < 6}
    cuts = itertools.combinations_with_replacement(sorted(near), g - 1)
    assert max(map(needed, cuts)) == grouped_tokens(m, g)


@pytest.mark.parametrize("sizes", [[3, 0, 130, 5], [0, 0, 0, 0], [-1, 200, 7, 9], [1, 1, 1, 1]])
def test_groups_are_placed_at_multiples_of_128(sizes):
    m = 150
    x = 1 + np.arange(m * 2, dtype=np.float32).reshape(m, 2)
    expected, place = np.zeros((grouped_tokens(m, 4), 2), np.float32), 0
    for start, end in clamped(sizes, m):
        expected[place : place + end - start] = x[start:end]
        place += round_up(end - start, 128)
    got = placed(jnp.asarray(x), jnp.array(sizes, jnp.int32))
    np.testing.assert_array_equal(got, expected)


def test_nan_past_the_groups_is_not_placed():
    x = np.where(np.arange(10)[:, None] < 6, np.ones((10, 2), np.float32), np.nan)
    got = np.asarray(placed(x, jnp.array([2, 4])))
    assert got.shape == (256, 2) and got.sum() == 12


# ---- Variants ------------------------------------------------------------------------------------


def test_the_table_of_variants():
    rows = {
        row.name: f"{row.lhs} {row.rhs} {row.out} {row.groups} {row.group_operand} {row.vmap}"
        for row in VARIANTS.values()
    }
    assert rows == {
        "dense": "mk nk mn None None batched",
        "batched": "gmk gnk gmn None None None",
        "ragged": "mk gnk mn m g None",
        "contiguous": "mk gnk mn m m None",
        "masked": "gmk gnk gmn m g None",
        "ragged_contracting": "mk nk gmn k g None",
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
        (14, 13, ("mk", "nk", "mn")),  # more dims than letters
    ],
)
def test_dims_of_dense_gemms(lhs, rhs, dims):
    row = VARIANTS["dense"].with_ranks(lhs, rhs)
    assert (row.lhs, row.rhs, row.out) == dims
    assert row.name == "dense" and row.vmap == "batched"


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
    assert types.options_of(types.ScaleRounding) == ("pow2", "none")
    assert types.options_of(types.ScoreFunction) == ("softmax", "sigmoid")
    assert types.options_of(types.Residuals) == ("fp8_t", "fp8", "input")
    assert types.options_of(types.ExchangeKind) == ("all_gather", "all_to_all")
    assert types.options_of(types.Wire) == ("fp8", "bf16")
