"""Rows past the groups that nobody reads: gemm's internal option, and the layers that ask for it.

A kernel leaves in them what was in memory. The reference writes NaN there, so that every test of
the layers notices who reads them.
"""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.gemm_op import EXPORT_CHECKS, GEMM, problem_of
from jax_fp8gemm._bind.op import recording
from jax_fp8gemm._ops.gemm import multiply, multiply_casting
from jax_fp8gemm._select.problem import DEFAULT_DEVICE

M, N, K, G = 37, 24, 144, 3
SIZES = jnp.array([5, 0, 11])
REAL = 16


@pytest.fixture
def operands(key) -> tuple:
    lhs, rhs = jax.random.normal(key, (M, K)), jax.random.normal(key, (G, N, K))
    return fp8.quantize(lhs), fp8.quantize(rhs, (128, 128))


def leave(lhs, rhs, sizes, dtype=jnp.bfloat16):
    return multiply(lhs, rhs, dtype, sizes, variant="ragged", leave_rest=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_reference_spoils_them(operands, dtype):
    got = leave(*operands, SIZES, dtype)
    expected = fp8.gemm(*operands, SIZES, variant="ragged", out_dtype=dtype)
    np.testing.assert_array_equal(got[:REAL], expected[:REAL])
    assert jnp.isnan(got[REAL:]).all() and not jnp.any(expected[REAL:])
    # Sizes that fill the matrix leave none, and what does not fit is cut off.
    assert not jnp.isnan(leave(*operands, jnp.array([30, -4, 900]), dtype)).any()


def test_of_weights_that_the_gemm_casts(key, operands):
    w = jax.random.normal(key, (G, K, N), jnp.bfloat16)
    run = functools.partial(multiply_casting, operands[0], (w,), SIZES, transposed=True)
    got, expected = run(leave_rest=True), run()
    np.testing.assert_array_equal(got[:REAL], expected[:REAL])
    assert jnp.isnan(got[REAL:]).all() and not jnp.any(expected[REAL:])


@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap_the_rows_of_each_element_are_right(operands, shared):
    lhs, rhs = operands
    sizes = jnp.array([[5, 0, 11], [0, 0, 0], [9, 9, 40]])
    lhs = jax.tree.map(lambda x: jnp.stack([x, x[::-1], x]), lhs)
    if not shared:
        rhs = jax.tree.map(lambda x: jnp.stack([x, x[::-1], x]), rhs)
    axes = (0, None if shared else 0, 0)
    got = jax.vmap(leave, axes)(lhs, rhs, sizes)
    run = functools.partial(fp8.gemm, variant="ragged")
    expected = jax.vmap(run, axes)(lhs, rhs, sizes)
    for one, other, real in zip(got, expected, (16, 0, M), strict=True):
        np.testing.assert_array_equal(one[:real], other[:real])


@pytest.mark.parametrize("context", [jax.debug_nans, jax.debug_infs])
def test_where_jax_looks_for_nan_or_inf_they_are_zeros(operands, context):
    with context(True):
        got = leave(*operands, SIZES)
    np.testing.assert_array_equal(got, fp8.gemm(*operands, SIZES, variant="ragged"))


# ---- programs -----------------------------------------------------------------------------------


def lowered(function, *arrays) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def ragged(text: str) -> list[str]:
    """Returns the lines of custom calls of ragged GEMMs."""
    lines = [line for line in text.splitlines() if "@jax_fp8gemm_gemm_v1(" in line]
    return [line for line in lines if 'variant = "ragged"' in line]


def test_only_who_asks_gets_it(operands):
    gemm = functools.partial(fp8.gemm, variant="ragged")
    (left,), (zeros,) = (ragged(lowered(f, *operands, SIZES)) for f in (leave, gemm))
    option = "leave_rest = 1 : i64, "
    assert option in left and left.replace(option, "") == zeros


def test_an_exported_program_keeps_it(operands):
    export = jax.export.export(
        jax.jit(leave), platforms=("cpu", "cuda"), disabled_checks=EXPORT_CHECKS
    )
    made = jax.export.deserialize(export(*operands, SIZES).serialize())
    assert made.mlir_module().count("leave_rest = 1") == 1
    np.testing.assert_array_equal(made.call(*operands, SIZES), leave(*operands, SIZES))


def layer(x, experts, weights, kernels, **options):
    run = lambda x, kernels: fp8.expert_ffn(x, experts, weights, kernels, **options)  # noqa: E731
    y, pull = jax.vjp(run, x, kernels)
    return y, pull(y)


def made_up(key, t=32, h=128, f=128, e=8, top_k=2) -> tuple:
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (t, h), jnp.bfloat16)
    experts = jax.random.randint(keys[1], (t, top_k), 0, e)
    weights = jax.random.uniform(keys[2], (t, top_k))
    wi = jax.random.normal(keys[3], (2, e, h, f), jnp.bfloat16) / 11
    wo = jax.random.normal(keys[4], (e, f, h), jnp.bfloat16) / 11
    return x, experts, weights, fp8.ExpertKernels(wi_0=wi[0], wi_1=wi[1], wo=wo)


@pytest.mark.parametrize("cast_in_gemm", [True, False])
def test_all_four_ragged_gemms_of_a_layer_leave_them(key, cast_in_gemm):
    text = lowered(functools.partial(layer, cast_in_gemm=cast_in_gemm), *made_up(key))
    assert len(ragged(text)) == 4 and all("leave_rest = 1" in line for line in ragged(text))
    dot = lambda x, w, sizes: fp8.fp8_ragged_dot(x, w, sizes).sum()  # noqa: E731
    x, _, _, kernels = made_up(key)
    text = lowered(jax.value_and_grad(dot, (0, 1)), x, kernels.wi_0, jnp.full(8, 4))
    assert len(ragged(text)) == 2 and "leave_rest" not in text


def test_a_layer_runs_under_debug_nans_without_jit(key):
    """Also with rows past the groups, and with NaN-free results that are the same."""
    x, experts, weights, kernels = made_up(key)
    experts = experts.at[::3, 1].set(-1)
    expected = layer(x, experts, weights, kernels)
    with jax.debug_nans(True):
        got = layer(x, experts, weights, kernels)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- how many rows are expected -----------------------------------------------------------------


def test_a_device_plans_for_the_rows_that_it_expects(key):
    """Of 8 devices each gets all tokens' rows, and an eighth of them is its own."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        functools.partial(layer, expert_axis="x", cast_in_gemm=False),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    with recording() as calls:
        text = lowered(run, *made_up(key, t=1024, e=16))
    assert all(re.search(r"tensor<2048x\d+xf8E4M3FN>", line) for line in ragged(text))
    gemms = [call for call in calls if call.op is GEMM]
    problems = [problem_of(call.spec, call.operands, DEFAULT_DEVICE) for call in gemms]
    assert {p.m for p in problems if p.variant == "ragged"} == {256}
    assert {p.k for p in problems if p.variant == "ragged_contracting"} == {256}
    assert all(p.g == 2 for p in problems)
    # So do casts, as far as XLA's scheduler is told.
    grouped = [call for call in calls if call.op is not GEMM and call.spec.grouped]
    assert len(grouped) >= 4 and all(call.spec.share == 1 / 8 for call in grouped)
    for call in grouped:
        whole = dataclasses.replace(call.spec, share=1.0)
        seconds = [call.op.seconds(spec, call.operands) for spec in (call.spec, whole)]
        assert seconds[0] < seconds[1]
    # Where all tokens are one device's own, all rows are expected.
    with recording() as calls:
        lowered(functools.partial(layer, cast_in_gemm=False), *made_up(key, t=1024, e=16))
    assert all(call.spec.expected_rows == 0 for call in calls if call.op is GEMM)
    assert all(call.spec.share == 1 for call in calls if call.op is not GEMM)
