"""Training on eight devices: forward and gradients of one, and no collective that need not be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count, gathered, mesh_of, near, place
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(AxisType.Auto)


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


@pytest.mark.filterwarnings("ignore:.*a mesh axis splits a dim")  # so it is gathered
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


@pytest.mark.filterwarnings("ignore:.*a mesh axis splits a dim")  # so it is gathered
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


@pytest.mark.filterwarnings("ignore:.*a mesh axis splits a dim")  # so it is gathered
@pytest.mark.parametrize("spec", [("data",), (None, "model")])
def test_moe_on_explicit_axes(key, spec):
    mesh = mesh_of(AxisType.Explicit)
    sizes = ((64, 256), (256, 4), (4, 256, 128), (4, 256, 128), (4, 128, 256))
    keys = jax.random.split(key, len(sizes))
    made = (jax.random.normal(k, s) / 8 for k, s in zip(keys, sizes, strict=True))
    x, gate_kernel, wi_0, wi_1, wo = made
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)

    def loss(x, gate_kernel, kernels):
        y, routing = fp8.moe(x, gate_kernel, kernels, top_k=2)
        return (y**2).sum() + routing.aux_loss, y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    expected = run(x, gate_kernel, kernels)
    with jax.set_mesh(mesh):
        placed = place(mesh, (x, gate_kernel, kernels), spec, (), ())
        got = run(*placed)
    assert near(got, expected, 1e-3)
    assert got[0][1].sharding.is_equivalent_to(placed[0].sharding, 2)
    for gradient, like in zip(jax.tree.leaves(got[1]), jax.tree.leaves(placed), strict=True):
        assert gradient.sharding.is_equivalent_to(like.sharding, gradient.ndim)


def test_no_rows_inside_shard_map(mesh, key):
    x, w = jnp.zeros((0, 64)), jax.random.normal(key, (64, 48))
    run = jax.shard_map(
        lambda x, w: fp8.fp8_matmul(x, w), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    gradients = jax.grad(lambda x, w: run(x, w).sum(), (0, 1))(x, w)
    assert gradients[0].shape == x.shape and not gradients[1].any()
