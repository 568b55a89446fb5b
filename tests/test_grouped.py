"""The grouped variants of gemm against a loop over groups in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import random_operand
from numerics import by_name, calc_diff, clamped, exact

import jax_fp8gemm as fp8
from jax_fp8gemm._core.groups import group_of_row, group_of_step
from jax_fp8gemm._core.variants import SCALES, VARIANTS
from jax_fp8gemm._tools.shapes import GROUPS

N, K = 72, 272
GROUPED = [name for name, row in VARIANTS.items() if row.group_operand]


def operands(variant: str, groups, scales: str = "1x128_128x128"):
    """Returns lhs, rhs and the group operand of a case, small."""
    sizes = np.asarray(groups.sizes)
    g, m = len(sizes), groups.m
    tiles = SCALES[scales]
    group_operand = sizes.astype(np.int32)
    shapes = {"m": m, "n": N, "k": K, "g": g}
    if variant == "masked":
        shapes["m"] = min(max(int(sizes.max()), 1), 300)
    if variant == "contiguous":
        own = [end - start for start, end in clamped(sizes, m)]
        rows = [np.repeat([i, -1], [size, -size % 128]) for i, size in enumerate(own)]
        group_operand = np.concatenate([*rows, np.full(128, -1)]).astype(np.int32)
        shapes["m"] = len(group_operand)
    if variant == "ragged_contracting":
        shapes["m"], shapes["k"] = 40, max(-(-m // 128) + g // 8, 1) * 128
        tiles = (tiles[0], tiles[0])
    row = VARIANTS[variant]
    made = [
        random_operand((g, i), tuple(shapes[c] for c in dims), tile)
        for i, (dims, tile) in enumerate(zip((row.lhs, row.rhs), tiles, strict=True))
    ]
    return made[0], made[1], jnp.asarray(group_operand), tiles


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: g.name)
@pytest.mark.parametrize("variant", GROUPED)
def test_against_the_loop(variant, groups):
    if variant == "masked" and len(groups.sizes) > 100:
        pytest.skip("512 matrices of float64: tested on fewer")
    lhs, rhs, sizes, tiles = operands(variant, groups)
    given = by_name(variant, sizes)
    out = fp8.gemm(lhs, rhs, **given, variant=variant, out_dtype=jnp.float32)
    expected = exact(variant, lhs, rhs, sizes, tiles)
    defined = ~np.isnan(expected)
    assert calc_diff(np.asarray(out)[defined], expected[defined]) < 1e-12
    assert defined.all() or variant == "masked"


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("variant", GROUPED)
def test_every_scale_mode(variant, scales):
    if variant == "ragged_contracting" and scales == "1x128_128x128":
        return
    lhs, rhs, sizes, tiles = operands(variant, GROUPS[3], scales)
    given = by_name(variant, sizes)
    out = np.asarray(fp8.gemm(lhs, rhs, **given, variant=variant, out_dtype=jnp.float32))
    expected = exact(variant, lhs, rhs, sizes, tiles)
    defined = ~np.isnan(expected)
    assert calc_diff(out[defined], expected[defined]) < 1e-12


def test_all_patterns_of_empty_groups():
    """Every one of the 2⁸ ways in which eight groups can be empty or not."""
    rows = jax.jit(group_of_row, static_argnums=1)
    steps = jax.jit(group_of_step, static_argnums=1)
    for pattern in itertools.product((0, 3), repeat=8):
        sizes = jnp.array(pattern, jnp.int32)
        expected = np.full(30, 8)
        for index, (start, end) in enumerate(clamped(pattern, 30)):
            expected[start:end] = index
        np.testing.assert_array_equal(rows(sizes, 30), expected)
        one_each = np.full(9, 8)
        alive = np.flatnonzero(pattern)
        one_each[: len(alive)] = alive
        np.testing.assert_array_equal(steps(sizes, 9), one_each)


def test_ragged_means_what_lax_ragged_dot_means(key):
    lhs = jax.random.normal(key, (60, 128))
    rhs = jax.random.normal(key, (4, 128, 24))
    q, w = fp8.quantize(lhs), fp8.quantize(jnp.swapaxes(rhs, 1, 2), (128, 128))
    for sizes in ([20, 0, 30, 10], [5, 5, 5, 5], [0, 0, 0, 0]):
        sizes = jnp.array(sizes, jnp.int32)
        plain = jax.lax.ragged_dot(
            fp8.dequantize(q), jnp.swapaxes(fp8.dequantize(w), 1, 2), sizes, precision="highest"
        )
        out = fp8.gemm(q, w, sizes, variant="ragged", out_dtype=jnp.float32)
        np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)


def test_nan_past_the_groups_reaches_nothing():
    lhs, rhs, _, _ = operands("ragged", GROUPS[3])
    lhs = fp8.QArray(lhs.qvalue, lhs.scale.at[100:].set(jnp.nan))
    out = fp8.gemm(lhs, rhs, jnp.array([0, 40, 0, 0, 60, 0]), variant="ragged")
    assert np.isfinite(np.asarray(out, np.float32)).all() and not np.asarray(out[100:]).any()


def test_init_is_added_and_empty_groups_leave_it(key):
    lhs, rhs, sizes, tiles = operands("ragged_contracting", GROUPS[3])
    init = jax.random.normal(key, (6, 40, N))
    out = fp8.gemm(lhs, rhs, sizes, variant="ragged_contracting", out_dtype=jnp.float32, init=init)
    expected = exact("ragged_contracting", lhs, rhs, sizes, tiles) + np.asarray(init, np.float64)
    assert calc_diff(out, expected) < 1e-12
    np.testing.assert_array_equal(out[0], init[0])


def test_vmap_of_masked_is_more_groups():
    lhs, rhs, sizes, _ = operands("masked", GROUPS[0])
    stack = lambda x: jnp.stack([x, x])  # noqa: E731
    many = jax.vmap(lambda a, b, s: fp8.gemm(a, b, s, variant="masked"), (None, 0, None))
    out = many(lhs, jax.tree.map(stack, rhs), sizes)
    one = fp8.gemm(lhs, rhs, sizes, variant="masked")
    np.testing.assert_array_equal(out, stack(one))


def test_sizes_may_come_from_the_host_in_any_integer_type():
    lhs, rhs, sizes, _ = operands("ragged", GROUPS[3])
    expected = fp8.gemm(lhs, rhs, sizes, variant="ragged")
    for dtype in (np.int64, np.int8, np.uint16, np.uint32):
        host = np.asarray(sizes).astype(dtype)
        run = jax.jit(lambda a, b, host=host: fp8.gemm(a, b, host, variant="ragged"))
        if np.array_equal(host, sizes):
            np.testing.assert_array_equal(run(lhs, rhs), expected)


# ---- fp8_ragged_dot -----------------------------------------------------------------------------


def test_ragged_dot_without_groups_is_zero():
    lhs, rhs, sizes = jnp.ones((8, 32)), jnp.ones((0, 32, 16)), jnp.zeros(0, jnp.int32)
    value, gradient = jax.value_and_grad(lambda x: fp8.fp8_ragged_dot(x, rhs, sizes).sum())(lhs)
    assert value == 0 and gradient.shape == lhs.shape and not gradient.any()


@pytest.mark.parametrize("groups", GROUPS[:-2], ids=lambda g: g.name)
def test_ragged_dot_and_its_gradients(groups, key):
    """Against float32 ragged_dot, up to what quantizing costs."""
    m, g, k, n = groups.m, len(groups.sizes), 96, 40
    keys = jax.random.split(key, 3)
    lhs, rhs = jax.random.normal(keys[0], (m, k)), jax.random.normal(keys[1], (g, k, n))
    dy = jax.random.normal(keys[2], (m, n))
    sizes = jnp.array(groups.sizes)
    own = jnp.array([end - start for start, end in clamped(groups.sizes, m)])
    y, pull = jax.vjp(lambda a, b: fp8.fp8_ragged_dot(a, b, sizes), lhs, rhs)
    plain, plain_pull = jax.vjp(lambda a, b: jax.lax.ragged_dot(a, b, own), lhs, rhs)
    for got, expected in zip((y, *pull(dy)), (plain, *plain_pull(dy)), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert calc_diff(got, expected) < 2e-3
    empty = [i for i, (start, end) in enumerate(clamped(groups.sizes, m)) if start == end]
    assert not np.asarray(pull(dy)[1])[empty].any()


def test_garbage_past_the_groups_reaches_no_gradient(key):
    lhs, rhs = jax.random.normal(key, (50, 32)), jax.random.normal(key, (3, 32, 16))
    dirty = lhs.at[30:].set(jnp.nan)
    sizes = jnp.array([10, 0, 20])

    def both(lhs):
        y, pull = jax.vjp(lambda a, b: fp8.fp8_ragged_dot(a, b, sizes), lhs, rhs)
        return y, *pull(jnp.ones_like(y).at[30:].set(jnp.inf))

    for got, expected in zip(both(dirty), both(lhs), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert np.isfinite(np.asarray(got)).all()


def test_ragged_dot_in_jit_scan_and_remat(key):
    lhs = jax.random.normal(key, (64, 32), jnp.bfloat16)
    rhs = jax.random.normal(key, (4, 32, 32), jnp.bfloat16)
    sizes = jnp.array([10, 20, 0, 30])

    def loss(rhs, wrap):
        layer = wrap(lambda x, _: (fp8.fp8_ragged_dot(x, rhs, sizes), None))
        return jax.lax.scan(layer, lhs, None, length=3)[0].astype(jnp.float32).sum()

    plain = jax.jit(jax.grad(lambda w: loss(w, lambda f: f)))(rhs)
    remat = jax.jit(jax.grad(lambda w: loss(w, jax.checkpoint)))(rhs)
    np.testing.assert_array_equal(plain, remat)


def test_group_sizes_are_an_operand_of_the_program():
    lhs, rhs = jnp.ones((64, 128)), jnp.ones((4, 128, 128))
    traced = jax.jit(jax.grad(lambda w, x, s: fp8.fp8_ragged_dot(x, w, s).sum()))
    text = traced.trace(rhs, lhs, jnp.ones(4, jnp.int32)).lower(lowering_platforms=("cuda",))
    calls = [line for line in text.as_text().splitlines() if "@jax_fp8gemm_gemm_v1" in line]
    assert any('"ragged_contracting"' in call for call in calls)
    assert all("tensor<4xi32>" in call for call in calls)
