"""On eight devices: the values of one, and no collective that need not be."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count, gathered, near, place
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm import sharding
from jax_fp8gemm.config import Problem
from jax_fp8gemm.primitives import sharding_rule
from jax_fp8gemm.tuning import random_operands
from jax_fp8gemm.variants import SCALES, VARIANTS

AXES = ("data", "seq", "model")


def mesh_of(kind: AxisType):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(AxisType.Auto)


# ---- Products of FP8 operands -------------------------------------------------------------------

multiply = functools.partial(fp8.gemm, out_dtype=jnp.float32)

PRODUCTS = {
    "data": (("data",), (), {}),
    "columns": ((), ("model",), {}),
    "rows_of_w": ((None, "model"), (None, "model"), {"all-reduce": 1}),
    "fsdp": (("data",), (None, "data"), {"all-gather": 2}),
    "fsdp_columns": (("data",), ("model", "data"), {"all-gather": 2}),
    "all_three": (("data", "seq"), ("model", "seq"), {"all-reduce": 1}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_costs_these_collectives(mesh, name):
    lhs_spec, rhs_spec, expected = PRODUCTS[name]
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
def test_grouped_products(mesh, variant, lhs_spec, rhs_spec, expected):
    scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
    lhs, rhs, *groups = random_operands(Problem(variant, 256, 256, 512, 2, scales))
    run = jax.jit(functools.partial(multiply, variant=variant))
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
    assert near(run(*placed, sizes), run(lhs, rhs, sizes))
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
    sharding._warn_once.cache_clear()
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
    sharding._warn_once.cache_clear()
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


# ---- Quantising ---------------------------------------------------------------------------------


def test_quantising_moves_nothing(mesh, key):
    x = jax.random.normal(key, (4, 256, 512))
    w, sizes = x[0], jnp.array([100, 150])
    calls = {
        "rows": (lambda x: fp8.quantize(x), x, ("data", "seq", "model")),
        "both": (lambda x: fp8.quantize_both(x), x, ("data", "seq", "model")),
        "tokens": (lambda x: fp8.quantize_both(x, token_dims=2), x, ("data", "seq", "model")),
        "weight": (lambda x: fp8.quantize_both(x, (128, 128)), w, ("data", "model")),
        "grouped": (lambda x: fp8.quantize_both(x, group_sizes=sizes), w, (None, "model")),
    }
    for name, (call, x, spec) in calls.items():
        (placed,) = place(mesh, (x,), spec)
        assert count(jax.jit(call).lower(placed).compile().as_text()) == {}, name
        assert near(jax.jit(call)(placed), jax.jit(call)(x), 0), name


# ---- fp8_matmul: forward and both gradients -----------------------------------------------------

B, S, K, N = 4, 256, 768, 1024  # no shard of w has 128 or 256 rows or columns

# Shardings of x [b, s, k], w [k, n] and y [b, s, n]; collectives of forward and both gradients.
GATHER_W = {"all-gather": 4}  # FP8 numbers and scales of both copies
STRATEGIES = {
    "data": (("data",), (), ("data",), {"all-reduce": 1}),
    "batch_and_sequence": (("data", "seq"), (), ("data", "seq"), {"all-reduce": 1}),
    "columns": (("data",), (None, "model"), ("data", None, "model"), {"all-reduce": 2}),
    "rows": (("data", None, "model"), ("model",), ("data",), {"all-reduce": 2}),
    "fsdp": (("data",), ("data",), ("data",), GATHER_W | {"reduce-scatter": 1}),
    "fsdp_n": (("data",), (None, "data"), ("data",), GATHER_W | {"reduce-scatter": 1}),
    "fsdp_columns": (
        ("data", "seq"),
        ("data", "model"),
        ("data", "seq", "model"),
        GATHER_W | {"reduce-scatter": 1, "all-reduce": 2},
    ),
    "fsdp_rows": (
        ("data", None, "model"),
        ("model", "data"),
        ("data",),
        GATHER_W | {"reduce-scatter": 1, "all-reduce": 1},
    ),
}
# Sequence parallel: tokens are sharded between products, so they are gathered, in FP8, once as
# they lie and once transposed; plain programs gather them in bf16.
SEQUENCE = {
    "sequence_columns": (("data", "model"), (None, "model"), ("data", None, "model")),
    "sequence_rows": (("data", None, "model"), ("model",), ("data", "model")),
}


def step(x, w, dy):
    y, pull = jax.vjp(fp8.fp8_matmul, x, w)
    return (y, *pull(dy))


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, S, K), (K, N), (B, S, N)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.fixture(scope="module")
def reference(arrays):
    return jax.jit(step)(*arrays)


def compiled(mesh, function, arrays, specs):
    x, w, y = (NamedSharding(mesh, P(*spec)) for spec in specs)
    placed = place(mesh, arrays, *specs)
    return jax.jit(function, out_shardings=(y, x, w)).lower(*placed).compile(), placed


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_step_costs_these_collectives(mesh, arrays, reference, name):
    *specs, expected = STRATEGIES[name]
    run, placed = compiled(mesh, step, arrays, specs)
    found = count(run.as_text())
    assert found == expected
    assert near(run(*placed), reference)
    for _, shape in gathered(run.as_text()):  # of weights and their scales only
        assert not {S, S // 2} & set(shape), shape


@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_parallel_gathers_tokens_in_fp8(mesh, arrays, reference, name):
    run, placed = compiled(mesh, step, arrays, SEQUENCE[name])
    assert count(run.as_text()) == {"all-gather": 4, "reduce-scatter": 1, "all-reduce": 1}
    assert near(run(*placed), reference)


@pytest.mark.parametrize("residuals", ["fp8", "input"])
def test_other_residuals(mesh, arrays, reference, residuals):
    def step(x, w, dy):
        y, pull = jax.vjp(functools.partial(fp8.fp8_matmul, residuals=residuals), x, w)
        return (y, *pull(dy))

    *specs, expected = STRATEGIES["fsdp_columns"]
    run, placed = compiled(mesh, step, arrays, specs)
    assert count(run.as_text()) == expected
    assert near(run(*placed), jax.jit(step)(*arrays))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["data", "batch_and_sequence", "columns", "rows"])
def test_shard_map(mesh, arrays, reference, name, check_vma):
    x_spec, w_spec, y_spec, _ = STRATEGIES[name]

    def body(x, w):
        y = fp8.fp8_matmul(x, w)
        return jax.lax.psum(y, "model") if name == "rows" else y

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(*x_spec), P(*w_spec)),
        out_specs=P(*y_spec),
        check_vma=check_vma,
    )

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(mapped, x, w)
        return (y, *pull(dy))

    assert near(run(*place(mesh, arrays, x_spec, w_spec, y_spec)), reference)


def test_shard_map_over_some_axes_only(mesh, arrays):
    x, w, _ = arrays
    mapped = jax.shard_map(
        fp8.fp8_matmul,
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    run = jax.jit(jax.value_and_grad(lambda w, x: (mapped(x, w) ** 2).sum()))
    expected = jax.value_and_grad(lambda w: (fp8.fp8_matmul(x, w) ** 2).sum())(w)
    assert near(run(*place(mesh, (w, x), (None, "model"), ("data", "seq"))), expected)


@pytest.mark.parametrize("name", STRATEGIES)
def test_explicit_axes(arrays, reference, name):
    mesh = mesh_of(AxisType.Explicit)
    x_spec, w_spec, y_spec, expected = STRATEGIES[name]
    placed = place(mesh, arrays, x_spec, w_spec, y_spec)
    with jax.set_mesh(mesh):
        run = jax.jit(step).lower(*placed).compile()
    y, dx, dw = run(*placed)
    for got, like in zip((dx, dw, y), placed, strict=True):
        assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
    assert near((y, dx, dw), reference)
    assert count(run.as_text()) == expected


def test_explicit_axes_without_a_context_and_under_vmap(arrays):
    mesh = mesh_of(AxisType.Explicit)
    x, w = place(mesh, arrays[:2], ("data",), ())
    loss = lambda x, w: (fp8.fp8_matmul(x, w) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss, 1))
    assert near(gradient(x, w), gradient(*arrays[:2]))
    with jax.set_mesh(mesh):
        y = jax.jit(jax.vmap(fp8.fp8_matmul, (0, None)))(x, w)
    assert jax.typeof(y).sharding.spec[0] == "data"
    assert near(y, fp8.fp8_matmul(*arrays[:2]))


def test_a_program_without_arrays_on_the_mesh(mesh):
    with jax.set_mesh(mesh):
        out = jax.jit(lambda: fp8.fp8_matmul(jnp.ones((256, 128)), jnp.ones((128, 256))))()
    np.testing.assert_array_equal(out, np.full((256, 256), 128.0))


def test_layers_with_remat_in_a_scan(mesh, key):
    w = 0.05 * jax.random.normal(key, (3, 512, 512))
    x = jax.random.normal(key, (512, 512))

    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(fp8.fp8_matmul(x, w)), None))
        return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

    placed = place(mesh, (w, x), (None, "data"), ("data",))
    got = jax.jit(jax.grad(loss), out_shardings=placed[0].sharding)(*placed)
    assert near(got, jax.grad(loss)(w, x), 1e-3)  # FP8 roundings may fall either way


@pytest.mark.parametrize("w_spec", [(None, None, "model"), (None, "model"), (None, "data")])
def test_ragged_dot(mesh, key, w_spec):
    x, w = jax.random.normal(key, (256, 512)), jax.random.normal(key, (2, 512, 256))
    sizes = jnp.array([100, 140])

    def loss(x, w):
        return (fp8.fp8_ragged_dot(x, w, sizes) ** 2).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    placed = place(mesh, (x, w), (None, w_spec[1]) if w_spec[1] == "model" else (), w_spec)
    assert near(run(*placed), run(x, w), 1e-3)


def test_ragged_dot_on_explicit_axes(key):
    mesh = mesh_of(AxisType.Explicit)
    x, w = jax.random.normal(key, (256, 512)), jax.random.normal(key, (2, 512, 256))
    loss = lambda x, w: (fp8.fp8_ragged_dot(x, w, jnp.array([100, 140])) ** 2).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    expected = gradients(x, w)
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, w), ("data",), (None, "model", "data"))
        got = gradients(*placed)
    assert near(got, expected)
    for gradient, like in zip(got, placed, strict=True):
        assert gradient.sharding.is_equivalent_to(like.sharding, gradient.ndim)


def test_dequantize_on_explicit_axes(key):
    mesh = mesh_of(AxisType.Explicit)
    x = jax.random.normal(key, (256, 512))
    expected = fp8.dequantize(fp8.quantize(x))
    (placed,) = place(mesh, (x,), ("data", "model"))
    got = jax.jit(lambda x: fp8.dequantize(fp8.quantize(x)))(placed)
    np.testing.assert_array_equal(got, expected)
    assert got.sharding.is_equivalent_to(placed.sharding, 2)


def test_permuted_rows_on_explicit_axes(key):
    mesh, sizes = mesh_of(AxisType.Explicit), ((64, 256), (4, 256, 128))
    x, w = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key), sizes, strict=True))
    experts = jax.random.randint(key, (64, 2), 0, 4)

    def loss(x, w):
        rows, permutation = fp8.permute(x, experts, 4)
        y = fp8.fp8_ragged_dot(rows, w, permutation.group_sizes)
        return (fp8.unpermute(y, permutation, 2) ** 2).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    with jax.set_mesh(mesh):
        got = run(*place(mesh, (x,), ("data",)), *place(mesh, (w,), ()))
    assert near(got, run(x, w), 1e-3)
    assert got[1][0].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


@pytest.mark.parametrize("spec", [("data",), (None, "model")])
def test_moe_on_explicit_axes(key, spec):
    mesh = mesh_of(AxisType.Explicit)
    sizes = ((64, 256), (256, 4), (4, 256, 128), (4, 256, 128), (4, 128, 256))
    keys = jax.random.split(key, len(sizes))
    x, *kernels = (jax.random.normal(k, s) / 8 for k, s in zip(keys, sizes, strict=True))

    def loss(x, *kernels):
        y, routing = fp8.moe(x, *kernels, top_k=2)
        return (y**2).sum() + routing.aux_loss, y

    run = jax.jit(jax.value_and_grad(loss, tuple(range(len(sizes))), has_aux=True))
    expected = run(x, *kernels)
    with jax.set_mesh(mesh):
        placed = (*place(mesh, (x,), spec), *place(mesh, kernels, *[()] * len(kernels)))
        got = run(*placed)
    assert near(got, expected, 1e-3)
    assert got[0][1].sharding.is_equivalent_to(placed[0].sharding, 2)
    for gradient, like in zip(got[1], placed, strict=True):
        assert gradient.sharding.is_equivalent_to(like.sharding, gradient.ndim)


def test_no_rows_inside_shard_map(mesh, key):
    x, w = jnp.zeros((0, 64)), jax.random.normal(key, (64, 48))
    run = jax.shard_map(
        lambda x, w: fp8.fp8_matmul(x, w), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    gradients = jax.grad(lambda x, w: run(x, w).sum(), (0, 1))(x, w)
    assert gradients[0].shape == x.shape and not gradients[1].any()


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
