"""Quantizing both ways, by groups, gathered, from FP8, and through SwiGLU: what the copies mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff, clamped, dequantized64

import jax_fp8gemm as fp8
from jax_fp8gemm._core.groups import grouped_tokens
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS
from jax_fp8gemm._tools.shapes import GROUPS


def assert_same(a: fp8.QArray, b: fp8.QArray) -> None:
    np.testing.assert_array_equal(a.scale, b.scale)
    bits = [np.asarray(q.qvalue).view(np.uint8) for q in (a, b)]
    np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
@pytest.mark.parametrize("shape", [(1, 16), (130, 300), (256, 128), (2, 5, 200)], ids=str)
def test_both_copies_are_those_of_two_passes(key, shape, scale_rounding):
    x = jax.random.normal(key, shape, jnp.bfloat16)
    rows, columns = fp8.quantize_both(x, scale_rounding=scale_rounding)
    assert_same(rows, fp8.quantize(x, scale_rounding=scale_rounding))
    lead = [(0, 0)] * (x.ndim - 2)
    padded = jnp.pad(x, [*lead, (0, -shape[-2] % 128), (0, 0)])
    assert_same(columns, fp8.quantize(jnp.swapaxes(padded, -1, -2), scale_rounding=scale_rounding))
    assert_same(columns, fp8.quantize_transposed(x, scale_rounding=scale_rounding))


def columns_apart(key, m: int, k: int) -> jax.Array:
    """Blocks of 128 columns that can share, cannot, and can again."""
    x = jax.random.normal(key, (m, k), jnp.bfloat16)
    far = jnp.arange(k) // 128 % 3 == 1
    return x * jnp.exp2(jnp.where(far, 20.0 * (jnp.arange(k) % 2), jnp.arange(k) % 4)).astype(
        x.dtype
    )


def test_shared_columns_are_the_rows_of_one_scale(key):
    x = columns_apart(key, 300, 400)
    rows, columns = fp8.quantize_both(x, shared_columns=True)
    assert_same(rows, fp8.quantize(x))
    assert_same(columns, fp8.quantize_transposed(x, shared_columns=True))
    scale, own = np.asarray(columns.scale), np.asarray(fp8.quantize_transposed(x).scale)
    for block, shares in enumerate((True, False, True, True)):  # the last one has 16 columns
        at = slice(128 * block, min(128 * block + 128, 400))
        right = np.broadcast_to(own[at].max(0), own[at].shape) if shares else own[at]
        np.testing.assert_array_equal(scale[at], right)
    for copy in (fp8.requantize(rows, shared_columns=True), columns):
        assert calc_diff(dequantized64(copy)[:, :300], np.asarray(x, np.float64).T) < 1e-3


def test_shared_columns_by_groups_and_under_vmap(key):
    x, sizes = columns_apart(key, 300, 256), jnp.array([100, 0, 150])
    columns = fp8.quantize_both(x, group_sizes=sizes, shared_columns=True)[1]
    placed = jnp.asarray(by_groups(x, sizes))
    assert_same(columns, fp8.quantize_transposed(placed, shared_columns=True))
    many = jnp.stack([x, x[::-1]])
    run = lambda x: fp8.quantize_transposed(x, shared_columns=True)  # noqa: E731
    for i, one in enumerate(many):
        assert_same(jax.tree.map(lambda a, i=i: a[i], jax.vmap(run)(many)), run(one))


def test_blocks_are_exact_transposes(key):
    x = jax.random.normal(key, (3, 200, 300))
    rows, columns = fp8.quantize_both(x, BLOCKS)
    assert_same(rows, fp8.quantize(x, BLOCKS))
    turned = fp8.QArray(jnp.swapaxes(rows.qvalue, 1, 2), jnp.swapaxes(rows.scale, 1, 2))
    assert_same(columns, turned)


@pytest.mark.parametrize("tile", [ROW_BLOCKS, BLOCKS], ids=str)
def test_a_pair_is_its_concatenation(key, tile):
    a, b = jax.random.normal(key, (2, 3, 70, 256))
    for got, right in zip(
        fp8.quantize_both((a, b), tile),
        fp8.quantize_both(jnp.concatenate([a, b], -1), tile),
        strict=True,
    ):
        assert_same(got, right)


def by_groups(x, sizes) -> np.ndarray:
    """Places rows by the plain loop: groups begin at multiples of 128, zeros between."""
    x = np.asarray(x)
    out = np.zeros((grouped_tokens(len(x), len(sizes)), x.shape[1]), np.float32)
    at = 0
    for start, end in clamped(sizes, len(x)):
        out[at : at + end - start] = x[start:end]
        at += -(-(end - start) // 128) * 128
    return out


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: g.name)
def test_groups_are_placed_as_the_plain_loop_does(key, groups):
    x = jax.random.normal(key, (groups.m, 96))
    end = clamped(groups.sizes, groups.m)[-1][1]
    x = x.at[end:].set(jnp.nan)  # rows past the groups are not looked at
    sizes = jnp.array(groups.sizes, jnp.int32)
    rows, columns = fp8.quantize_both(x, group_sizes=sizes)
    assert columns.shape == (96, grouped_tokens(groups.m, len(groups.sizes)))
    if not groups.m:
        return
    assert_same(columns, fp8.quantize(jnp.asarray(by_groups(x, groups.sizes)).T))
    own = fp8.QArray(rows.qvalue[:end], rows.scale[:end])
    assert_same(own, fp8.quantize(x[:end]))
    assert_same(fp8.quantize_transposed(x, group_sizes=sizes), columns)
    if end:
        again = fp8.requantize(rows, group_sizes=sizes)
        # Exact but for what falls below the smallest numbers of the finer scale.
        assert calc_diff(dequantized64(again), dequantized64(columns)) < 1e-3
        finest = np.abs(dequantized64(again) - by_groups(fp8.dequantize(rows), groups.sizes).T)
        assert finest.max() <= 2.0**-9 * np.asarray(again.scale).max()


def test_gathered_rows_are_those_of_the_index(key):
    x = jax.random.normal(key, (40, 200))
    index = jax.random.randint(key, (90,), -5, 50)  # out of range: clamped
    sizes = jnp.array([30, 0, 50], jnp.int32)
    moved = x[jnp.clip(index, 0, 39)]
    both = fp8.quantize_both(x, group_sizes=sizes, index=index)
    for got, right in zip(both, fp8.quantize_both(moved, group_sizes=sizes), strict=True):
        assert_same(got, right)
    assert_same(fp8.quantize_rows(x, group_sizes=sizes, index=index), both[0])
    q = fp8.quantize(x)
    own = fp8.QArray(*(part[jnp.clip(index, 0, 39)] for part in (q.qvalue, q.scale)))
    assert_same(
        fp8.requantize(q, group_sizes=sizes, index=index), fp8.requantize(own, group_sizes=sizes)
    )


def swiglu64(h, weight):
    gate, up = np.split(np.asarray(h, np.float64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up * np.asarray(weight, np.float64)[:, None]


def test_swiglu_is_that_of_float64(key):
    h = 3 * jax.random.normal(key, (70, 512), jnp.bfloat16)
    weight = jax.random.uniform(key, (70,))
    q = fp8.swiglu_quantize(h, weight)
    assert q.shape == (70, 256) and q.has_tile(ROW_BLOCKS)
    sizes = jnp.array([30, 0, 40])
    rows, columns = fp8.swiglu_quantize_both(h, weight, group_sizes=sizes)
    assert_same(rows, q)
    assert calc_diff(dequantized64(columns), by_groups(swiglu64(h, weight), sizes).T) < 1e-3
    expected = swiglu64(h.astype(jnp.float32), weight)
    scales = np.repeat(np.asarray(q.scale), 128, axis=1)
    assert np.all(np.abs(dequantized64(q) - expected) <= np.abs(expected) * 2**-4 + scales * 2**-10)


def test_swiglu_backward_is_autodiffs(key):
    m, f, sizes = 150, 256, jnp.array([60, 0, 80], jnp.int32)
    keys = jax.random.split(key, 3)
    h = fp8.quantize(jax.random.normal(keys[0], (m, 2 * f)))
    gradient = jax.random.normal(keys[1], (m, f), jnp.bfloat16)
    weight = jax.random.uniform(keys[2], (m,))

    def product(h, weight):
        gate, up = jnp.split(h, 2, axis=-1)
        return jax.nn.silu(gate) * up * weight[:, None]

    value, pull = jax.vjp(product, fp8.dequantize(h), weight)
    d_h, d_weight = pull(gradient.astype(jnp.float32))
    rows, gate, up, activation, got_weight = fp8.swiglu_backward(h, gradient, weight, sizes)
    assert calc_diff(dequantized64(rows)[:140], d_h[:140]) < 1e-3
    assert calc_diff(dequantized64(gate), by_groups(d_h[:, :f], sizes).T) < 1e-3
    assert calc_diff(dequantized64(up), by_groups(d_h[:, f:], sizes).T) < 1e-3
    assert calc_diff(dequantized64(activation), by_groups(value, sizes).T) < 1e-3
    np.testing.assert_allclose(got_weight[:140], d_weight[:140], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_is_the_loop(key, axis):
    x = jax.random.normal(key, (3, 40, 160))
    moved = jnp.moveaxis(x, 0, axis)
    sizes = jnp.array([[10, 30], [0, 40], [25, 3]])
    many = jax.vmap(fp8.quantize_both, axis)(moved)
    grouped = jax.vmap(lambda x, s: fp8.quantize_both(x, group_sizes=s)[1], (axis, 0))(moved, sizes)
    for i in range(3):
        for got, right in zip(many, fp8.quantize_both(x[i]), strict=True):
            assert_same(jax.tree.map(lambda a, i=i: a[i], got), right)
        alone = fp8.quantize_both(x[i], group_sizes=sizes[i])[1]
        assert_same(jax.tree.map(lambda a, i=i: a[i], grouped), alone)


def test_lowering_for_cuda_is_one_call_with_the_specification():
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    traced = jax.jit(lambda x: fp8.quantize_both(x, scale_rounding="none")).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @jax_fp8gemm_quantize_v1") == 1
    for attribute in (
        "pow2 = 0",
        "rows = 1",
        "transposed = 1",
        'source = "float"',
        'type = "bf16"',
    ):
        assert attribute in text
