"""Groups of rows that lie end to end, against the plain loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import clamped

from jax_fp8gemm._core.groups import (
    group_ends,
    group_of_row,
    group_of_step,
    grouped_tokens,
    place_by_groups,
)
from jax_fp8gemm._core.layout import round_up

ends_of = jax.jit(group_ends, static_argnums=1)
rows_of = jax.jit(group_of_row, static_argnums=1)
steps_of = jax.jit(group_of_step, static_argnums=1)
placed = jax.jit(place_by_groups)

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
