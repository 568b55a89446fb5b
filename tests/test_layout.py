"""Scale tiles and how scales lie in memory, and the arrays that have them."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._core.layout import (
    BLOCKS,
    K_MULTIPLE,
    K_STEP,
    MOST_COUNT,
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


def test_counts_are_those_of_the_kernels():
    """A block that begins at the last row ends past it, and the end is an int too."""
    plan = pathlib.Path(__file__).parent.parent / "csrc" / "kernels" / "plan.cuh"
    found = re.search(r"kMostCount = (0x\w+) - (\d+);", plan.read_text())
    assert found and MOST_COUNT == int(found[1], 16) - int(found[2])
    assert MOST_COUNT + 2047 == 2**31 - 1


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


def test_fp8_arrays_compare_by_identity():
    """As arrays do not answer with one bool."""
    one = fp8.QArray(np.zeros((1, 1), FP8), np.ones((1, 1)))
    assert one == one != fp8.QArray(one.qvalue, one.scale)
    assert len({one, one}) == 1


def test_a_qarray_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fp8.QArray(np.zeros((1, 1), FP8), np.ones((1, 1))).scale = None


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
