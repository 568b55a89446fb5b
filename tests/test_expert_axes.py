"""moe and expert_ffn that divide themselves over a mesh: values of one device, no weight moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count, gathered, place
from dense_moe import make_kernels, make_shared
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import calc_diff
from test_moe import of_router

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.gathered import _said as said

T, H, F, E, TOP_K = 64, 128, 256, 8, 3
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXES = ("data", "expert", "model")


def mesh_of(kinds=(AUTO, AUTO, AUTO), sizes=(2, 2, 2), axes=AXES):
    return jax.make_mesh(sizes, axes, axis_types=tuple(kinds))


@pytest.fixture(scope="module")
def parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (T, H), jnp.bfloat16)
    gate_kernel = jax.random.normal(keys[1], (H, E)) * 2 / H**0.5
    return x, gate_kernel, make_kernels(keys[2], E, H, F), make_shared(keys[3], H, F)


def step(x, gate_kernel, kernels, shared, **options):
    """Returns y, the losses, and all gradients."""

    def loss(x, gate_kernel, kernels, shared):
        y, routing = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K, shared=shared, **options)
        towards = jax.random.normal(
            jax.random.key(9), y.shape
        )  # linear: gradients meet no rounding
        extra = routing.aux_loss + routing.z_loss
        return (y * towards).sum() + 3 * extra, (y, extra)

    found = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(x, gate_kernel, kernels, shared)
    (_, (y, extra)), gradients = found
    return y, extra, gradients


@pytest.fixture(scope="module")
def alone(parameters):
    return jax.jit(step)(*parameters)


def assert_same(got, expected, y_bound: float = 2e-5):
    """As in test_expert_parallel: results travel as bf16, which costs 2⁻¹⁸ for each rounding."""
    (y, extra, gradients), (expected_y, expected_extra, expected_gradients) = got, expected
    assert y.dtype == expected_y.dtype and calc_diff(y, expected_y) < y_bound
    assert abs(float(extra - expected_extra)) < 1e-5 * float(expected_extra)
    names = ("x", "gate_kernel", "wi_0", "wi_1", "wo", "shared_0", "shared_1", "shared_o")
    pairs = jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)
    for name, a, b in zip(names, *pairs, strict=True):
        assert calc_diff(a, b) < 1e-4, (name, calc_diff(a, b))


def weights_gathered(text: str) -> list:
    """Returns the gathered or exchanged arrays of three dims; tokens and choices have two."""
    return [array for array in gathered(text) if sum(size > 1 for size in array[1]) > 2]


SPECS = {  # of x, gate_kernel, kernels' wi and wo, shared wi and wo
    "data_expert": (P(("data", "expert")), P("expert"), P("expert"), P(), P()),
    "data_expert_model": (
        P(("data", "expert")),
        P("expert", None, "model"),
        P("expert", "model"),
        P(None, "model"),
        P("model"),
    ),
}


def placed(parameters, mesh, specs):
    x, gate_kernel, kernels, shared = parameters
    tokens, wi, wo, shared_wi, shared_wo = specs
    trees = (x, gate_kernel, kernels, shared)
    trees = jax.tree.leaves(trees)
    specs = (tokens, P(), wi, wi, wo, shared_wi, shared_wi, shared_wo)
    leaves = place(mesh, trees, *specs)
    return jax.tree.unflatten(jax.tree.structure(parameters), leaves)


CONTEXTS = {
    "auto": ((AUTO, AUTO, AUTO), False),
    "set_mesh": ((AUTO, AUTO, AUTO), True),
    "explicit": ((EXPLICIT, EXPLICIT, EXPLICIT), True),
    "explicit types": ((EXPLICIT, EXPLICIT, EXPLICIT), False),
    "mixed": ((EXPLICIT, AUTO, AUTO), True),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", SPECS)
def test_a_training_step(parameters, alone, name, context):
    kinds, in_use = CONTEXTS[context]
    mesh = mesh_of(kinds)
    options = {"expert_axis": "expert"}
    if "model" in name:
        options["tensor_axis"] = "model"
    elif context != "set_mesh":
        options["token_axes"] = ("data", "expert")
    arrays = placed(parameters, mesh, SPECS[name])
    run = jax.jit(functools.partial(step, **options))
    if in_use:
        with jax.set_mesh(mesh):
            made = run.lower(*arrays).compile()
    else:
        made = run.lower(*arrays).compile()
    text = made.as_text()
    assert not weights_gathered(text)
    # x and dy are gathered; y, dx and gradients of gate weights scattered; gradients added up.
    sums = 3 + ("model" in name)
    assert count(text) == {"all-gather": 2, "reduce-scatter": 3, "all-reduce": sums}
    assert_same(made(*arrays), alone)


def run_on(mesh, parameters, specs, **options):
    """Returns the step's results on a mesh, and its program."""
    arrays = placed(parameters, mesh, specs)
    made = jax.jit(functools.partial(step, **options)).lower(*arrays).compile()
    return made(*arrays), made.as_text()


def with_tokens(name: str, tokens: P):
    return (tokens, *SPECS[name][1:])


LAYOUTS = {  # specs, and options beside expert_axis="expert"
    "all_to_all": (SPECS["data_expert"], {"exchange": "all_to_all"}),
    "all_to_all, tensor": (
        SPECS["data_expert_model"],
        {"exchange": "all_to_all", "tensor_axis": "model", "wire": "bf16"},
    ),
    "all_to_all, tokens over the tensor axis too": (
        with_tokens("data_expert_model", P(AXES)),
        {"exchange": "all_to_all", "tensor_axis": "model", "token_axes": AXES},
    ),
    "tokens over the tensor axis too": (
        with_tokens("data_expert_model", P(AXES)),
        {"tensor_axis": "model", "token_axes": AXES},
    ),
    "tokens over data alone": (
        with_tokens("data_expert_model", P("data")),
        {"tensor_axis": "model", "token_axes": "data"},
    ),
    "tokens everywhere": (with_tokens("data_expert", P()), {"token_axes": ()}),
    "experts over two axes": (
        (P(AXES), P(("expert", "model")), P(("expert", "model")), P(), P()),
        {"expert_axis": ("expert", "model"), "exchange": "all_to_all"},
    ),
    "experts everywhere": (
        (P("data"), P(None, None, "model"), P(None, "model"), P(None, "model"), P("model")),
        {"expert_axis": None, "token_axes": ("data", "expert"), "tensor_axis": "model"},
    ),
    "tokens alone": ((P(AXES), P(), P(), P(), P()), {"expert_axis": None, "token_axes": AXES}),
    "experts over every axis": ((P(AXES), P(AXES), P(AXES), P(), P()), {"expert_axis": AXES}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(parameters, alone, name):
    specs, options = LAYOUTS[name]
    got, text = run_on(mesh_of(), parameters, specs, **{"expert_axis": "expert", **options})
    assert not weights_gathered(text)
    assert_same(got, alone)


def test_tokens_of_two_dims_are_split_where_they_lie(parameters, alone):
    """Routing comes back in the order of the tokens."""
    x, *rest = parameters
    mesh, expected = mesh_of(), fp8.moe(*parameters[:3], top_k=TOP_K)[1]
    spec = P("data", "expert")
    (folded,) = place(mesh, (x.reshape(8, 8, H),), spec)
    for kinds in ((AUTO,) * 3, (EXPLICIT,) * 3):
        mesh = mesh_of(kinds)
        arrays = placed((folded, *rest), mesh, with_tokens("data_expert", spec))
        run = jax.jit(
            functools.partial(
                fp8.moe, top_k=TOP_K, expert_axis="expert", token_axes=spec, mesh=mesh
            )
        )
        y, routing = run(*arrays[:3])
        assert y.shape == (8, 8, H)
        for got, right in zip(jax.tree.leaves(routing), jax.tree.leaves(expected), strict=True):
            assert jnp.allclose(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", [None, ("moe_x", "moe_h")])
def test_layers_with_remat_in_a_scan(parameters, policy):
    """Two layers, and gradients added up over two microbatches."""
    x, gate_kernel, kernels, _ = parameters
    stacked = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), kernels)
    batches = jnp.stack([x, 2 * x])

    def train(batches, gate_kernel, stacked, **options):
        def layer(x, kernels):
            y, routing = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K, **options)
            return y, routing.aux_loss

        save = policy and jax.checkpoint_policies.save_only_these_names(*policy)
        layer = jax.checkpoint(layer, policy=save)

        def loss(kernels, x):
            y, extra = jax.lax.scan(layer, x, kernels)
            towards = jax.random.normal(jax.random.key(9), y.shape)
            return (y * towards).mean() + extra.sum()

        def accumulate(total, x):
            value, gradient = jax.value_and_grad(loss)(stacked, x)
            return jax.tree.map(jnp.add, total, (value, gradient)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), stacked))
        return jax.lax.scan(accumulate, zero, batches)[0]

    expected = jax.jit(train)(batches, gate_kernel, stacked)
    mesh = mesh_of()
    at = (None, ("data", "expert")), (), (None, "expert")
    arrays = place(mesh, (batches, gate_kernel, stacked), *at)
    options = {"expert_axis": "expert", "token_axes": ("data", "expert")}
    made = jax.jit(functools.partial(train, **options)).lower(*arrays).compile()
    assert not weights_gathered(made.as_text())
    got = made(*arrays)
    assert abs(float(got[0] - expected[0])) < 1e-4 * abs(float(expected[0]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        assert calc_diff(a, b) < 1e-3  # the second layer casts what the first one rounded


@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad"])
def test_vmap_over_the_stages_of_a_pipeline(parameters, order):
    x, gate_kernel, kernels, shared = parameters
    stages = jnp.stack([x, 2 * x])
    stacked = jax.tree.map(lambda w: jnp.stack([w, w[::-1]]), kernels)

    def loss(options, x, kernels):
        y, routing = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K, shared=shared, **options)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum() + routing.aux_loss

    def run(name, options, *operands):
        one = functools.partial(loss, options)
        if order == "vmap of grad":
            return jax.vmap(jax.grad(one, (0, 1)), spmd_axis_name=name)(*operands)
        every = jax.vmap(one, spmd_axis_name=name)
        return jax.grad(lambda *operands: every(*operands).sum(), (0, 1))(*operands)

    expected = jax.jit(functools.partial(run, None, {}))(stages, stacked)
    mesh = mesh_of(axes=("stage", "data", "expert"))
    spec = ("stage", ("data", "expert")), ("stage", "expert")
    arrays = place(mesh, (stages, stacked), *spec)
    options = {"expert_axis": "expert", "token_axes": ("data", "expert")}
    made = jax.jit(functools.partial(run, "stage", options)).lower(*arrays).compile()
    assert not [shape for _, shape in weights_gathered(made.as_text()) if E // 2 in shape]
    for a, b in zip(jax.tree.leaves(made(*arrays)), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 1e-4


FFN = {
    "expert": {"expert_axis": "expert", "token_axes": ("data", "expert")},
    "tensor": {"expert_axis": "expert", "tensor_axis": "model", "exchange": "all_to_all"},
}


@pytest.mark.parametrize("name", FFN)
def test_expert_ffn(parameters, name):
    x, gate_kernel, kernels, _ = parameters
    routing = fp8.route(x.astype(jnp.float32) @ gate_kernel, TOP_K)

    def run(x, gate_weights, kernels, **options):
        y = fp8.expert_ffn(x, routing.expert_index, gate_weights, kernels, **options)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), y

    gradient = lambda **options: jax.jit(  # noqa: E731
        jax.value_and_grad(functools.partial(run, **options), (0, 1, 2), has_aux=True)
    )
    expected = gradient()(x, routing.gate_weights, kernels)
    options = FFN[name]
    specs = SPECS["data_expert_model" if "tensor_axis" in options else "data_expert"]
    placed_kernels = placed(parameters, mesh_of(), specs)[2]
    made = gradient(**options).lower(x, routing.gate_weights, placed_kernels).compile()
    assert not weights_gathered(made.as_text())
    (_, y), got = made(x, routing.gate_weights, placed_kernels)
    assert calc_diff(y, expected[0][1]) < 2e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected[1]), strict=True):
        assert calc_diff(a, b) < 1e-4


def test_capacity_is_that_of_all_tokens(parameters):
    """Every expert takes its first rows, whichever device they come from."""
    x, gate_kernel, kernels, _ = parameters
    run = functools.partial(fp8.moe, top_k=TOP_K, capacity_factor=0.7)
    expected, _ = run(x, gate_kernel, kernels)
    mesh = mesh_of(sizes=(1, 4, 2))
    options = {"expert_axis": "expert", "tensor_axis": "model", "mesh": mesh}
    got, _ = jax.jit(functools.partial(run, **options))(x, gate_kernel, kernels)
    assert calc_diff(got, expected) < 2e-5
    assert calc_diff(expected, fp8.moe(x, gate_kernel, kernels, top_k=TOP_K)[0]) > 1e-2


def test_kernels_that_fsdp_splits_too_travel_in_fp8(key):
    """Their copies are made of shards. XLA's CPU backend widens FP8 to f16 for the transfer."""
    x = jax.random.normal(key, (T, 256))
    kernels, mesh = make_kernels(key, E, 256, 256), mesh_of(axes=("fsdp", "expert", "rest"))
    gate_kernel = jax.random.normal(key, (256, E)) / 8
    up, down = P("expert", "fsdp"), P("expert", None, "fsdp")
    specs = fp8.ExpertKernels(wi_0=up, wi_1=up, wo=down)
    at = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)

    def loss(kernels, x, **options):
        y, _ = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K, **options)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum()

    run = jax.jit(
        jax.grad(functools.partial(loss, expert_axis="expert", token_axes=("fsdp", "expert"))),
        out_shardings=at,
    )
    arrays = jax.device_put(kernels, at), x
    made = run.lower(*arrays).compile()
    moved = weights_gathered(made.as_text())
    for a, b in zip(
        jax.tree.leaves(made(*arrays)), jax.tree.leaves(jax.grad(loss)(kernels, x)), strict=True
    ):
        assert calc_diff(a, b) < 1e-4
    assert {dtype for dtype, shape in moved if shape[-1] > 2} == {"f16"}


def test_prepared_kernels_without_jit(parameters):
    x, gate_kernel, kernels, _ = parameters
    run = functools.partial(fp8.moe, top_k=TOP_K, expert_axis="expert")
    expected, _ = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K)
    x, _, kernels, _ = placed(parameters, mesh_of(), SPECS["data_expert"])
    y, _ = run(x, gate_kernel, fp8.prepare_experts(kernels))
    assert calc_diff(y, expected) < 2e-5


def test_shards_below_a_block_of_scales(parameters):
    """f of 64 on a device, filled with zeros: scales are those of a device's own shard."""
    x, gate_kernel, kernels, _ = parameters
    kernels = jax.tree.map(lambda w: w[:, :, :128] if w.shape[1] == H else w[:, :128], kernels)
    expected, _ = fp8.moe(x, gate_kernel, kernels, top_k=TOP_K)
    options = {"expert_axis": "expert", "tensor_axis": "model", "mesh": mesh_of()}
    run = jax.jit(functools.partial(fp8.moe, top_k=TOP_K, **options))
    made = run.lower(x, gate_kernel, kernels).compile()
    assert not weights_gathered(made.as_text())
    assert calc_diff(made(x, gate_kernel, kernels)[0], expected) < 1e-3


def test_tokens_that_do_not_split_are_routed_everywhere_with_a_warning(parameters):
    x, gate_kernel, kernels, _ = parameters
    run = functools.partial(fp8.moe, top_k=TOP_K)
    expected, _ = run(x[:2], gate_kernel, kernels)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AUTO,))
    spread = jax.jit(functools.partial(run, expert_axis="expert", mesh=mesh))
    with pytest.warns(UserWarning, match="tokens do not split over mesh axis 'expert'") as seen:
        y, _ = spread(x[:2], gate_kernel, kernels)
    assert len(seen) == 1 and calc_diff(y, expected) < 2e-5


def grouped_step(router, x, gate_kernel, kernels, **options):
    """Returns y, choices, the next bias, the loss within sequences, and gradients."""
    bias = jnp.linspace(-0.2, 0.2, E)

    def loss(x, gate_kernel, kernels):
        y, routing = of_router(router, x, gate_kernel, kernels, bias, **options)
        towards = jax.random.normal(jax.random.key(9), (T, H)).reshape(y.shape)
        balance = fp8.sequence_loss(routing, 8)
        new = fp8.update_bias(bias, routing)
        return (y * towards).sum() + 10 * balance, (y, routing.expert_index, new, balance)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, gate_kernel, kernels)


@pytest.fixture(scope="module")
def grouped_alone(parameters):
    return jax.jit(functools.partial(grouped_step, "gate_kernel"))(*parameters[:3])


ROUTERS = {  # kind of the axes, and whether tokens have two dims
    "gate_kernel": (AUTO, False),
    "logits": (EXPLICIT, True),
    "routing": (EXPLICIT, True),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_with_groups(parameters, grouped_alone, name):
    """Choices, next bias, balance and gradients are those of all tokens on one device."""
    kind, folded = ROUTERS[name]
    x, *rest = parameters
    spec = P("data", "expert") if folded else P(("data", "expert"))
    if folded:
        x = x.reshape(8, 8, H)
    mesh = mesh_of((kind,) * 3)
    arrays = placed((x, *rest), mesh, with_tokens("data_expert", spec))[:3]
    options = {"expert_axis": "expert", "token_axes": spec}
    run = jax.jit(functools.partial(grouped_step, name, **options))
    with jax.set_mesh(mesh):
        made = run.lower(*arrays).compile()
        (_, (y, index, bias, balance)), gradients = made(*arrays)
    # Scores and choices of tokens of two dims are moved into the flat order of a Routing.
    assert not [shape for _, shape in weights_gathered(made.as_text()) if {H, F} & {*shape}]
    (_, (right_y, right_index, right_bias, right_balance)), right = grouped_alone
    assert calc_diff(y.reshape(T, H), right_y) < 2e-5
    np.testing.assert_array_equal(index, right_index)
    np.testing.assert_array_equal(bias, right_bias)
    np.testing.assert_allclose(balance, right_balance, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(right), strict=True):
        assert calc_diff(a.reshape(b.shape), b) < 1e-4


def inside_another_shard_map(run, x, *rest):
    """A user's own shard_map over "data" alone."""
    mapped = jax.shard_map(
        lambda x: run(x, *rest)[0],
        mesh=mesh_of(),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    return mapped(x)


ERRORS = {
    "no mesh axis 'expert' here": {"expert_axis": "expert"},
    "no mesh axis 'rows' here": {"expert_axis": "rows", "mesh": mesh_of},
    "mesh is not a mesh": {"expert_axis": "expert", "mesh": lambda: "data"},
    "expert_axis is not a name": {"expert_axis": 3},
    "splits experts and hidden dims twice": {"expert_axis": "model", "tensor_axis": "model"},
    "splits tokens twice": {"expert_axis": "expert", "token_axes": P("data", "data")},
    "token_axes has too many dims": {
        "expert_axis": "expert",
        "token_axes": P("data", "model"),
        "mesh": mesh_of,
    },
    "all_to_all needs tokens": {
        "expert_axis": "expert",
        "token_axes": "data",
        "mesh": mesh_of,
        "exchange": "all_to_all",
    },
    "8 experts do not split over 3 devices": {
        "expert_axis": "expert",
        "token_axes": (),
        "mesh": lambda: jax.sharding.Mesh(jax.devices()[:3], ("expert",)),
    },
    "64 tokens do not split over 3 devices": {
        "expert_axis": "data",
        "token_axes": "expert",
        "mesh": lambda: mesh_of(sizes=(2, 3, 1)),
    },
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(parameters, text):
    options = dict(ERRORS[text])
    if "mesh" in options:
        options["mesh"] = options["mesh"]()
    with pytest.raises((ValueError, TypeError), match=text) as info:
        fp8.moe(*parameters[:3], top_k=TOP_K, **options)
    assert all(
        part in str(info.value) for part in ("moe: ", "\n  got ", "\n  expected ", "\n  fix ")
    )


def test_a_shard_map_of_the_user_over_other_axes(parameters):
    run = functools.partial(fp8.moe, top_k=TOP_K, expert_axis="expert")
    with pytest.raises(ValueError) as info:
        inside_another_shard_map(run, *parameters[:3])
    assert str(info.value) == (
        "moe: there is no mesh axis 'expert' here.\n"
        "  got       a shard_map over 'data', not over 'expert'\n"
        "  expected  a shard_map over 'expert' too, or none around moe\n"
        "  fix       add 'expert' to axis_names of jax.shard_map, or call moe outside of it"
    )


def test_prepared_kernels_do_not_split_over_a_tensor_axis(parameters):
    x, gate_kernel, kernels, _ = parameters
    options = {"expert_axis": "expert", "tensor_axis": "model", "mesh": mesh_of()}
    with pytest.raises(ValueError, match="a tensor axis cannot split prepared kernels"):
        fp8.moe(x, gate_kernel, fp8.prepare_experts(kernels), top_k=TOP_K, **options)


def test_experts_that_nobody_is_told_to_split_give_one_warning(parameters):
    """Nothing but expert_axis is missing: every device computes all rows, and the values hold."""
    said.clear()
    x, gate_kernel, kernels, _ = placed(parameters, mesh_of(), SPECS["data_expert"])
    run = jax.jit(jax.grad(lambda k: fp8.moe(x, gate_kernel, k, top_k=TOP_K)[0].sum()))
    with pytest.warns(UserWarning) as seen:
        got = run(kernels)
    texts = [str(one.message) for one in seen]
    (experts,) = [text for text in texts if "no expert_axis was given" in text]
    assert "g=8 over expert of 2 devices" in experts and "every device gathers rhs e4m3" in experts
    assert "pass expert_axis='expert' to moe, expert_ffn or Fp8MoE" in experts
    print(texts)
    expected = jax.grad(lambda k: fp8.moe(*parameters[:2], k, top_k=TOP_K)[0].sum())(parameters[2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 1e-4
