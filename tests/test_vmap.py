"""jax.vmap of everything, over any subset of the operands, against a loop over the elements."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import near
from numerics import by_name

import jax_fp8gemm as fp8
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._tools.operands import random_operand

B, G, N = 3, 4, 24
GROUPED = [name for name, row in VARIANTS.items() if row.group_operand]
BLOCKS, LINES, ROWS, TENSOR = "1x128_128x128", "1x128_1x128", "row_row", "tensor_tensor"
# What each variant's group operand is of three elements: rows past the groups, empty groups, no
# rows at all, sizes that are negative or too large.
SIZES = np.array([[7, 0, 20, 3], [0, 0, 0, 0], [-5, 31, 2, 90]], np.int32)
STEPS = np.array([[128, 0, 200, 3], [0, 0, 0, 0], [-5, 129, 900, 5]], np.int32)
MAP = np.array([[2] * 128 + [0] * 9 + [-1] * 5, [-1] * 142, [3] * 100 + [-1] * 28 + [1] * 14])
OPERANDS = {  # m, k and the group operand
    "ragged": (40, 144, SIZES),
    "contiguous": (142, 144, MAP.astype(np.int32)),
    "masked": (32, 144, SIZES),
    "ragged_contracting": (24, 528, STEPS),
}


def subsets(*names):
    """Returns every way to batch some of the operands, as in_axes."""
    found = itertools.product((0, None), repeat=len(names))
    cases = [axes for axes in found if any(axis == 0 for axis in axes)]
    ids = ["+".join(n for n, axis in zip(names, axes, strict=True) if axis == 0) for axes in cases]
    return [pytest.param(axes, id=name) for axes, name in zip(cases, ids, strict=True)]


def element(tree, axes, i):
    """Returns the operands of element i of a batch."""
    return [
        jax.tree.map(lambda x, i=i: x[i], one) if axis == 0 else one
        for one, axis in zip(tree, axes, strict=True)
    ]


def chosen(batch, axes):
    """Returns the batch of operands, but its last element alone where it is not batched."""
    return [
        one if axis == 0 else jax.tree.map(lambda x: x[-1], one)
        for one, axis in zip(batch, axes, strict=True)
    ]


def check(function, batch, axes, bound: float = 1e-5):
    """vmap of `function` is the loop."""
    operands = chosen(batch, axes)
    got = jax.jit(jax.vmap(function, axes))(*operands)
    run = jax.jit(function)
    each = [run(*element(operands, axes, i)) for i in range(B)]
    expected = jax.tree.map(lambda *ys: jnp.stack(ys), *each)
    types = [jax.tree.map(lambda y: (y.shape, y.dtype), tree) for tree in (got, expected)]
    assert types[0] == types[1]
    floats = [jax.tree.map(lambda y: y.astype(jnp.float32), tree) for tree in (got, expected)]
    for a, b in zip(*map(jax.tree.leaves, floats), strict=True):
        if np.asarray(b).any():
            assert near(a, b, bound)
        else:
            assert not np.asarray(a).any()


# ---- gemm ---------------------------------------------------------------------------------------


def gemms(variant: str, scales: str):
    """Returns `gemm` of a variant, zero where it is undefined, and a batch of its operands."""
    m, k, groups = OPERANDS[variant]
    row, tiles = VARIANTS[variant], fp8_tiles(scales)
    shapes = {"m": m, "n": N, "k": k, "g": G}
    keys = jax.random.split(jax.random.key(0), 3)
    made = [
        random_operand(key, (B, *(shapes[c] for c in dims)), tile)
        for key, dims, tile in zip(keys[:2], (row.lhs, row.rhs), tiles, strict=True)
    ]
    init = jax.random.normal(keys[2], (B, *(shapes[c] for c in row.out)))

    def run(lhs, rhs, groups, init=None):
        given = by_name(variant, groups)
        out = fp8.gemm(lhs, rhs, **given, variant=variant, out_dtype=jnp.float32, init=init)
        inside = jnp.arange(m)[None, :, None] < groups[:, None, None] if variant == "masked" else True
        return jnp.where(inside, out, 0)

    return run, (*made, jnp.asarray(groups), init)


def fp8_tiles(scales: str):
    from jax_fp8gemm._core.variants import SCALES

    return SCALES[scales]


@pytest.mark.parametrize("axes", subsets("lhs", "rhs", "groups"))
@pytest.mark.parametrize("variant", GROUPED)
def test_gemm(variant, axes):
    run, batch = gemms(variant, LINES if variant == "ragged_contracting" else BLOCKS)
    check(run, batch[:3], axes)


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize("scales", [LINES, ROWS, TENSOR])
def test_gemm_with_other_scales(variant, scales):
    run, batch = gemms(variant, scales)
    check(run, batch[:3], (0, 0, 0))
    check(run, batch[:3], (0, None, 0))


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (None, None, None, 0), (0, None, None, None)])
@pytest.mark.parametrize("variant", GROUPED)
def test_gemm_with_init(variant, axes):
    run, batch = gemms(variant, LINES)
    check(run, batch, axes)
