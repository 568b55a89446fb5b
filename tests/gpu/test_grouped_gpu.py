"""The grouped kernels against a loop over groups in float64, on poisoned memory, twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import random_operands
from numerics import by_name, calc_diff, exact
from test_gemm_gpu import BOUND, bits, poison
from test_grouped import operands

import jax_fp8gemm as fp8
from jax_fp8gemm._bind import gemm_op
from jax_fp8gemm._bind.gemm_op import GemmSpec
from jax_fp8gemm._core.groups import clamped_sizes
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.problem import GemmConfig, Problem, why_illegal
from jax_fp8gemm._tools import operands as on_device
from jax_fp8gemm._tools.operands import compiled, sample_error
from jax_fp8gemm._tools.shapes import GROUPED, GROUPS

CONFIGS = {
    "ragged": [
        None,
        GemmConfig("persistent", 256, 128, 3, "lhs"),
        GemmConfig("persistent", 128, 192, 4, "rhs"),
        GemmConfig("persistent", 192, 128, 4),
        GemmConfig("persistent", 192, 96, 4, "rhs"),
        GemmConfig("persistent", 128, 16, 4),
        GemmConfig("few_rows", 64, 56, 8),
        GemmConfig("few_rows", 128, 64, 4),
    ],
    "contiguous": [
        None,
        GemmConfig("persistent", 128, 128, 5, "lhs"),
        GemmConfig("persistent", 128, 144, 4),
    ],
    "masked": [
        None,
        GemmConfig("persistent", 256, 128, 3, "lhs"),
        GemmConfig("persistent", 128, 96, 4, "rhs"),
        GemmConfig("persistent", 192, 112, 4, "rhs"),
        GemmConfig("persistent", 192, 64, 4),
        GemmConfig("few_rows", 64, 64, 8),
    ],
    "ragged_contracting": [
        None,
        GemmConfig("persistent", 256, 128, 3, "lhs"),
        GemmConfig("persistent", 128, 192, 3, "rhs"),
        GemmConfig("persistent", 192, 128, 3),
    ],
}
CASES = [(variant, config) for variant, found in CONFIGS.items() for config in found]


def compare(variant, operands, tiles, out_dtype, config=None, init=None):
    lhs, rhs, sizes = operands
    run = jax.jit(
        lambda lhs, rhs, sizes, init: fp8.gemm(
            lhs,
            rhs,
            **by_name(variant, sizes),
            variant=variant,
            out_dtype=out_dtype,
            config=config,
            init=init,
        )
    )
    poison()
    out = run(lhs, rhs, sizes, init)
    expected = exact(variant, lhs, rhs, sizes, tiles)
    defined = ~np.isnan(expected)
    assert np.array_equal(bits(out), bits(run(lhs, rhs, sizes, init))) or variant == "masked"
    with np.errstate(invalid="ignore"):  # rows without meaning may hold a signalling NaN
        got = np.asarray(out, np.float64)
    if init is not None:
        expected = expected + np.asarray(init, np.float64)
    bound = BOUND["f32" if out_dtype == jnp.float32 else "bf16"]
    assert calc_diff(got[defined], expected[defined]) < bound
    if variant != "masked" and init is None:
        empty = ~expected.any(axis=-1)  # rows past the groups, groups without any k
        assert not got[empty].any()


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: g.name)
@pytest.mark.parametrize("variant, config", CASES, ids=str)
def test_every_kind_of_groups(variant, config, groups):
    if variant == "masked" and len(groups.sizes) > 100:
        pytest.skip("512 matrices of float64: tested on fewer")
    *made, tiles = operands(variant, groups)
    f32 = variant == "ragged_contracting"
    compare(variant, made, tiles, jnp.float32 if f32 else jnp.bfloat16, config)


@pytest.mark.parametrize("groups", GROUPS, ids=lambda g: g.name)
@pytest.mark.parametrize("config", CONFIGS["ragged"], ids=str)
def test_rows_past_the_groups_that_are_left(config, groups):
    """The real rows are the same to the bit."""
    lhs, rhs, sizes, _ = operands("ragged", groups)
    spec = GemmSpec(variant=VARIANTS["ragged"], scales="1x128_128x128", out="bf16", config=config)

    def run(spec):
        arrays = lhs.qvalue, rhs.qvalue, lhs.scale, rhs.scale, sizes
        return bits(jax.jit(functools.partial(gemm_op.gemm, spec))(*arrays))

    expected = run(spec)
    poison()
    out = run(dataclasses.replace(spec, leave_rest=True))
    real = int(clamped_sizes(sizes, len(out)).sum())
    assert np.array_equal(out[:real], expected[:real])
    assert not expected[real:].any()


@pytest.mark.parametrize("scales", ["1x128_1x128", "row_row", "tensor_tensor"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_other_scale_modes_in_float32(variant, scales):
    *made, tiles = operands(variant, GROUPS[3], scales)
    compare(variant, made, tiles, jnp.float32)


@pytest.mark.parametrize("variant", ["ragged", "contiguous", "ragged_contracting"])
def test_init_is_added(variant):
    lhs, rhs, sizes, tiles = operands(variant, GROUPS[3])
    shape = exact(variant, lhs, rhs, sizes, tiles).shape
    init = jax.random.normal(jax.random.key(1), shape)
    compare(variant, (lhs, rhs, sizes), tiles, jnp.float32, init=init)


@pytest.mark.parametrize(
    "m, n, blocks",
    [(192, 3072, (1, 2)), (1408, 1408, (3, 2)), (768, 256, (1,) * 128), (256, 768, (0, 1) * 64)],
)
def test_odd_numbers_of_blocks_along_k(m, n, blocks):
    """Known failures of others."""
    sizes = jnp.array(blocks, jnp.int32) * 128
    problem = Problem("dense", m, n, 128 * sum(blocks), 1, "1x128_1x128", "f32")
    lhs, rhs = random_operands(problem)
    compare("ragged_contracting", (lhs, rhs, sizes), problem.tiles, jnp.float32)


@pytest.mark.parametrize("m", [1, 8, 16, 32, 96, 130])
def test_masked_with_any_capacity(m):
    lhs, rhs = random_operands(Problem("batched", m, 136, 256, 5))
    sizes = jnp.array([m, 0, 1, max(m - 1, 0), m + 9], jnp.int32)
    for config in CONFIGS["masked"]:
        clipped = jnp.clip(sizes, 0, m)
        compare("masked", (lhs, rhs, clipped), (None, None), jnp.bfloat16, config)
        compare("masked", (lhs, rhs, sizes), (None, None), jnp.bfloat16, config)


def test_masked_with_a_few_huge_groups():
    lhs, rhs = random_operands(Problem("batched", 4096, 256, 256, 9))
    sizes = jnp.array([4001, 1425, 0, 0, 1232, 0, 0, 224, 0], jnp.int32)
    compare("masked", (lhs, rhs, sizes), (None, None), jnp.bfloat16)


def test_nan_past_the_groups_and_in_one_group_reaches_nothing_else():
    lhs, rhs, _, _ = operands("ragged", GROUPS[3])
    lhs = fp8.QArray(lhs.qvalue, lhs.scale.at[100:].set(jnp.nan))
    rhs = fp8.QArray(rhs.qvalue, rhs.scale.at[4].set(jnp.nan))
    sizes = jnp.array([0, 40, 0, 0, 30, 30])
    for config in CONFIGS["ragged"]:
        out = np.asarray(fp8.gemm(lhs, rhs, sizes, variant="ragged", config=config), np.float32)
        assert np.isnan(out[40:70]).all() and np.isfinite(np.delete(out, np.s_[40:70], 0)).all()
        assert not out[100:].any()


def test_new_group_sizes_between_two_runs_of_one_program():
    """Eight GEMMs, captured into a CUDA graph by default; the sizes are read on the device."""
    lhs, rhs, _, tiles = operands("ragged", GROUPS[3])
    run = jax.jit(lambda lhs, rhs, sizes: [
        fp8.gemm(lhs, rhs, jnp.roll(sizes, i), variant="ragged") for i in range(8)
    ])  # fmt: skip
    for turn in range(4):
        sizes = jnp.array([turn, 100 - turn, 0, 5 * turn, 30, 7], jnp.int32)
        for i, out in enumerate(run(lhs, rhs, sizes)):
            expected = exact("ragged", lhs, rhs, np.roll(np.asarray(sizes), i), tiles)
            assert calc_diff(np.asarray(out, np.float32), expected) < 1e-5


@pytest.mark.parametrize("shape", GROUPED, ids=lambda s: s.name)
def test_model_shapes(shape):
    problem, operands = shape.problem(), shape.operands()
    run = compiled(problem, None, operands)
    assert sample_error(problem, run(), operands) < BOUND[problem.out]


def test_outputs_past_two_to_the_31():
    """131072 × 24576 outputs in three groups: the last rows are right."""
    problem = Problem("ragged", 131072, 24576, 128, 3)
    operands = on_device.random_operands(problem)
    assert sample_error(problem, compiled(problem, None, operands)(), operands) < 1e-5


def test_gradients_of_ragged_dot_are_those_of_the_reference():
    keys = jax.random.split(jax.random.key(0), 3)
    lhs, rhs = jax.random.normal(keys[0], (897, 160)), jax.random.normal(keys[1], (6, 160, 136))
    dy, sizes = jax.random.normal(keys[2], (897, 136)), jnp.array(GROUPS[2].sizes)

    @jax.jit
    def both(lhs, rhs, dy, sizes):
        y, pull = jax.vjp(lambda a, b: fp8.fp8_ragged_dot(a, b, sizes), lhs, rhs)
        return (y, *pull(dy))

    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        expected = both(*jax.device_put((lhs, rhs, dy, sizes), cpu))
    for got, right in zip(both(lhs, rhs, dy, sizes), expected, strict=True):
        assert calc_diff(got, right) < 2e-6


def test_configs_are_legal():
    for variant, config in CASES:
        problem = Problem(variant, 300, 72, 272, 6, out="bf16")
        if variant == "ragged_contracting":
            problem = dataclasses.replace(problem, scales="1x128_1x128", out="f32")
        assert config is None or why_illegal(problem, config) is None, config
