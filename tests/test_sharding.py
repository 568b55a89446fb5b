"""On eight devices: the values of one, and no collective that need not be."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count, gathered, mesh_of, near, place
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from made_up import random_operands
from numerics import by_name

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.gathered import _said as said
from jax_fp8gemm._bind.gemm_op import sharding_rule
from jax_fp8gemm._core.variants import SCALES, VARIANTS
from jax_fp8gemm._select.problem import Problem


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(AxisType.Auto)


# ---- GEMMs of FP8 operands ----------------------------------------------------------------------

multiply = functools.partial(fp8.gemm, out_dtype=jnp.float32)

GEMMS = {
    "data": (("data",), (), {}),
    "columns": ((), ("model",), {}),
    "rows_of_w": ((None, "model"), (None, "model"), {"all-reduce": 1}),
    "fsdp": (("data",), (None, "data"), {"all-gather": 2}),
    "fsdp_columns": (("data",), ("model", "data"), {"all-gather": 2}),
    "all_three": (("data", "seq"), ("model", "seq"), {"all-reduce": 1}),
}


@pytest.mark.parametrize("name", GEMMS)
def test_a_gemm_costs_these_collectives(mesh, name):
    lhs_spec, rhs_spec, expected = GEMMS[name]
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512))
    run = jax.jit(multiply).lower(*place(mesh, (lhs, rhs), lhs_spec, rhs_spec)).compile()
    assert count(run.as_text()) == expected
    assert all(32 not in shape for _, shape in gathered(run.as_text()))  # rows of lhs stay
    assert near(run(*place(mesh, (lhs, rhs), lhs_spec, rhs_spec)), multiply(lhs, rhs))


def test_every_combination_of_input_shardings(mesh):
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512))
    expected = multiply(lhs, rhs)
    arrays = (lhs.qvalue, lhs.scale, rhs.qvalue, rhs.scale)
    choices = ((), ("data", "model"), ("model", "data"))

    @jax.jit
    def run(a, b, c, d):
        return multiply(fp8.QArray(a, b), fp8.QArray(c, d))

    for specs in itertools.product(choices, repeat=4):
        assert near(run(*place(mesh, arrays, *specs)), expected), specs


def test_a_sum_over_devices_is_scattered_where_the_result_is_sharded(mesh):
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512))
    for spec in (P("model"), P(None, "model")):
        run = jax.jit(multiply, out_shardings=NamedSharding(mesh, spec))
        placed = place(mesh, (lhs, rhs), (None, "model"), (None, "model"))
        assert count(run.lower(*placed).compile().as_text()) == {"reduce-scatter": 1}
        assert near(run(*placed), multiply(lhs, rhs))


def test_init_is_added_once_and_bfloat16_is_rounded_once(mesh, key):
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512))
    init = jax.random.normal(key, (32, 256))
    placed = place(mesh, (lhs, rhs, init), (None, "model"), (None, "model"), ())
    run = jax.jit(lambda lhs, rhs, init: multiply(lhs, rhs, init=init))
    assert near(run(*placed), run(lhs, rhs, init))
    half = jax.jit(fp8.gemm)(*placed[:2])
    assert half.dtype == jnp.bfloat16
    whole = np.asarray(multiply(lhs, rhs), np.float64)
    # One rounding to 8 bits, and float32 sums in another order.
    assert (np.abs(np.asarray(half, np.float64) - whole) <= 2**-8 * np.abs(whole) + 1e-3).all()


# Which dims each variant may cut, and what that costs.
CUTS = [
    ("batched", ("data", None, "model"), ("data", None, "model"), {"all-reduce": 1}),
    ("batched", ("data", "model"), ("data",), {}),
    ("masked", ("data", None, "model"), ("data", None, "model"), {"all-reduce": 1}),
    ("masked", ("data",), ("data", "model"), {}),
    ("ragged", (), (None, "model"), {}),
    ("ragged", (None, "model"), (None, None, "model"), {"all-reduce": 1}),
    ("contiguous", (), (None, "model"), {}),
    ("ragged_contracting", ("data",), ("model",), {}),
]


@pytest.mark.parametrize("variant, lhs_spec, rhs_spec, expected", CUTS)
def test_grouped_gemms(mesh, variant, lhs_spec, rhs_spec, expected):
    scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
    lhs, rhs, *groups = random_operands(Problem(variant, 256, 256, 512, 2, scales))

    @jax.jit
    def run(lhs, rhs, *groups):
        named = by_name(variant, *groups) if groups else {}
        return multiply(lhs, rhs, **named, variant=variant)

    placed = place(mesh, (lhs, rhs), lhs_spec, rhs_spec)
    assert count(run.lower(*placed, *groups).compile().as_text()) == expected
    got, want = run(*placed, *groups), run(lhs, rhs, *groups)
    if variant == "masked":  # rows past a group hold anything
        rows = np.arange(lhs.shape[1])[:, None] < np.asarray(groups[0])[:, None, None]
        got, want = np.where(rows, got, 0), np.where(rows, want, 0)
    assert near(got, want)


def test_what_groups_cut_up_stays_whole(mesh):
    lhs, rhs, _ = random_operands(Problem("ragged", 256, 256, 512, 2))
    run, sizes = jax.jit(functools.partial(multiply, variant="ragged")), jnp.array([100, 150])
    placed = place(mesh, (lhs, rhs), ("data", "model"), ("seq", None, "model"))
    said.clear()
    with pytest.warns(UserWarning) as seen:
        got = run(*placed, sizes)
    assert near(got, run(lhs, rhs, sizes))
    rows, experts = sorted((str(one.message) for one in seen), key=len)
    assert rows == (
        "gemm ragged: a mesh axis splits a dim that this operation cannot split.\n"
        "  got       m=256 over data of 2 devices: shards of 128; every device gathers "
        "lhs e4m3[256, 512], 131072 bytes\n"
        "  expected  m that is whole on every device\n"
        "  fix       shard another dim over data, or call this in jax.shard_map; for a mixture of "
        "experts pass token_axes to moe, expert_ffn or Fp8MoE"
    )
    assert experts == (
        "gemm ragged: a mesh axis splits the experts, and no expert_axis was given: every device "
        "computes the rows of all experts.\n"
        "  got       g=2 over seq of 2 devices: shards of 1; every device gathers "
        "rhs e4m3[2, 256, 512], 262144 bytes\n"
        "  expected  experts that stay where they are\n"
        "  fix       pass expert_axis='seq' to moe, expert_ffn or Fp8MoE; call others in "
        "jax.shard_map"
    )
    for name, row in VARIANTS.items():
        rule = sharding_rule(row, SCALES["1x128_1x128"], False)
        assert rule.summed == {"k"} and row.groups in (None, *rule.whole), name
        assert ("g" in rule.whole) == (row.groups is not None and name != "masked"), name


@pytest.mark.parametrize("scales", SCALES)
def test_every_mode_of_scales(mesh, scales):
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512, 1, scales))
    for specs in ((("data",), ("model",)), ((None, "model"), (None, "model"))):
        qvalues = place(mesh, (lhs.qvalue, rhs.qvalue), *specs)
        operands = [fp8.QArray(q, x.scale) for q, x in zip(qvalues, (lhs, rhs), strict=True)]
        run = jax.jit(multiply).lower(*operands).compile()
        assert count(run.as_text()) == ({} if specs[0][0] else {"all-reduce": 1})
        assert near(jax.jit(multiply)(*operands), multiply(lhs, rhs))


def test_a_split_block_is_replicated_with_one_warning(mesh):
    said.clear()
    lhs, rhs = random_operands(Problem("dense", 32, 256, 384))
    qvalues = place(mesh, (lhs.qvalue, rhs.qvalue), (None, "model"), (None, "model"))
    placed = [fp8.QArray(q, x.scale) for q, x in zip(qvalues, (lhs, rhs), strict=True)]
    with pytest.warns(UserWarning, match=r"k=384 over model of 2 devices: shards of 192") as seen:
        out = jax.jit(multiply)(*placed)
    assert len(seen) == 1
    np.testing.assert_array_equal(out, multiply(lhs, rhs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda lhs, rhs: multiply(lhs, rhs) + 1)(*placed)


def test_a_part_of_an_axis_is_no_sharding():
    """768 rows are 6 blocks: over 4 devices Shardy offers to cut them in 2."""
    said.clear()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = jnp.sin(jnp.arange(768.0 * 256).reshape(768, 256)), jnp.ones((256, 256))
    run = jax.jit(jax.value_and_grad(lambda w, x: (fp8.fp8_matmul(x, w) ** 2).sum()))
    with pytest.warns(UserWarning, match=r"m=768 over data of 4 devices: shards of 192") as seen:
        got = run(*place(mesh, (w, x), (None, "model"), ("data",)))
    assert len(seen) == 1 and near(got, run(w, x))


def test_vmap_over_a_sharded_axis_moves_nothing(mesh):
    lhs, rhs = random_operands(Problem("batched", 32, 256, 512, 4))
    one = jax.tree.map(lambda x: x[0], rhs)
    for run, other in ((jax.vmap(multiply), rhs), (jax.vmap(multiply, (0, None)), one)):
        placed = place(mesh, (lhs, other), ("data", "seq"), ("data",) if other is rhs else ())
        assert count(jax.jit(run).lower(*placed).compile().as_text()) == {}
        assert near(jax.jit(run)(*placed), run(lhs, other))


# ---- Quantizing ---------------------------------------------------------------------------------


def test_quantizing_moves_nothing(mesh, key):
    x = jax.random.normal(key, (4, 256, 512))
    w, sizes = x[0], jnp.array([100, 150])
    calls = {
        "rows": (lambda x: fp8.quantize(x), x, ("data", "seq", "model")),
        "both": (lambda x: fp8.quantize_both(x), x, ("data", "seq", "model")),
        "tokens": (lambda x: fp8.quantize_both(x, token_dims=2), x, ("data", "seq", "model")),
        "shared": (
            lambda x: fp8.quantize_both(x, shared_columns=True, token_dims=2),
            x,
            ("data", "seq", "model"),
        ),
        "weight": (lambda x: fp8.quantize_both(x, (128, 128)), w, ("data", "model")),
        "grouped": (lambda x: fp8.quantize_both(x, group_sizes=sizes), w, (None, "model")),
    }
    for name, (call, x, spec) in calls.items():
        (placed,) = place(mesh, (x,), spec)
        assert count(jax.jit(call).lower(placed).compile().as_text()) == {}, name
        assert near(jax.jit(call)(placed), jax.jit(call)(x), 0), name


def test_shared_columns_of_narrow_shards_are_those_of_one_device(mesh, key):
    """64 columns a device: the array is gathered, since a block of 128 has one scale."""
    x = jax.random.normal(key, (256, 128)) * jnp.exp2(jnp.arange(128) % 5)
    call = jax.jit(lambda x: fp8.quantize_transposed(x, shared_columns=True))
    (placed,) = place(mesh, (x,), (None, "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call(placed)
    assert near(found, call(x), 0)
    assert len(np.unique(np.asarray(found.scale[:, 0]))) == 1


def test_without_shardy(mesh):
    lhs, rhs = random_operands(Problem("dense", 32, 256, 512))
    placed = place(mesh, (lhs, rhs), ("data",), (None, "data"))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        run = jax.jit(multiply).lower(*placed).compile()
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert count(run.as_text()) == {"all-gather": 2}
    assert near(run(*placed), multiply(lhs, rhs))
