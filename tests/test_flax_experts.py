"""Fp8MoE over a mesh, in training steps as the Flax guides write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from collectives import gathered
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import calc_diff

from jax_fp8gemm import linen as fp8_linen
from jax_fp8gemm import nnx as fp8_nnx

T, H, F, E = 64, 128, 256, 4
AXES = ("data", "expert", "model")
OPTIONS = {"expert_axis": "expert", "tensor_axis": "model"}
WI, WO = P("expert", None, "model"), P("expert", "model", None)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (T, H), jnp.bfloat16)


def weights_gathered(text: str) -> list:
    return [shape for _, shape in gathered(text) if sum(size > 1 for size in shape) > 2]


def objective(y, routing):
    towards = jax.random.normal(jax.random.key(9), y.shape)
    return (y * towards).sum() + routing.aux_loss


def assert_moved_alike(before, got, expected):
    """Compares what a step added to each parameter."""
    for old, a, b in zip(*map(jax.tree.leaves, (before, got, expected)), strict=True):
        assert calc_diff(a - old, b - old) < 1e-4


def test_linen_as_in_its_guide(mesh, x):
    """flax.readthedocs.io, "Scale up Flax Modules on multiple devices"."""
    layer = fp8_linen.Fp8MoE(E, F, 2, shared_features=F, **OPTIONS)
    tokens = NamedSharding(mesh, P(("data", "expert")))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(layer.init, jax.random.key(0), x)
        shardings = nn.get_sharding(abstract, mesh)
        spec = nn.get_partition_spec(abstract)["params"]
        assert (spec["wi_0"], spec["wo"], spec["gate_kernel"]) == (WI, WO, P())
        assert (spec["shared_wi_1"], spec["shared_wo"]) == (P(None, "model"), P("model", None))
        init = jax.jit(layer.init, in_shardings=(None, tokens), out_shardings=shardings)
        variables = init(jax.random.key(0), x)

        def step(layer, variables, x):
            def loss(variables):
                return objective(*layer.apply(variables, x))

            value, gradients = jax.value_and_grad(loss)(variables)
            return value, jax.tree.map(lambda w, g: w - 0.1 * g, variables, gradients)

        placed = jax.device_put(x, tokens)
        run = jax.jit(
            lambda variables, x: step(layer, variables, x),
            in_shardings=(shardings, tokens),
            out_shardings=(None, shardings),
            donate_argnums=0,
        )
        made = run.lower(variables, placed).compile()
    assert not weights_gathered(made.as_text())
    plain = layer.clone(expert_axis=None, tensor_axis=None)
    whole = jax.tree.map(jnp.asarray, jax.device_get(nn.meta.unbox(variables)))
    expected, updated = jax.jit(lambda variables, x: step(plain, variables, x))(whole, x)
    value, got = made(variables, placed)
    assert abs(float(value - expected)) < 1  # of 8192 products whose y was rounded to bf16
    assert_moved_alike(whole, jax.device_get(got), updated)
    assert nn.meta.unbox(got)["params"]["wo"].sharding.spec == WO


def test_linen_initializers_of_the_user_and_layers_in_a_scan(mesh, x):
    init = nn.with_partitioning(fp8_linen.expert_init, (None, "data", None))
    layer = fp8_linen.Fp8MoE(E, F, 2, wi_init=init, **OPTIONS)
    spec = nn.get_partition_spec(jax.eval_shape(layer.init, jax.random.key(0), x))["params"]
    assert (spec["wi_0"], spec["wo"]) == (P(None, "data", None), WO)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                lambda layer, x, _: (layer(x)[0], None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
                metadata_params={nn.PARTITION_NAME: None},
            )
            return stack(fp8_linen.Fp8MoE(E, F, 2, **OPTIONS), x, None)[0]

    model = Two()
    with jax.set_mesh(mesh):
        variables = jax.jit(model.init)(jax.random.key(0), x)
        (box,) = {
            w.names
            for w in jax.tree.leaves(variables, is_leaf=nn.meta.is_axis_metadata)
            if isinstance(w, nn.Partitioned) and w.names[2] == "model"
        }
        assert box == (None, *WO)
        assert jax.jit(model.apply)(variables, x).shape == x.shape


def test_nnx_as_in_its_guide(mesh, x):
    """flax.readthedocs.io, "Scale up on multiple devices": made as shards, and one step."""
    sizes = {"top_k": 2, "shared_features": F}
    plain = fp8_nnx.Fp8MoE(H, F, E, **sizes, rngs=nnx.Rngs(0))
    before = jax.device_get(nnx.to_pure_dict(nnx.state(plain)))

    def step(model, x):
        value, gradients = nnx.value_and_grad(lambda model: objective(*model(x)))(model)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - 0.1 * g, state, gradients))
        return value

    with jax.set_mesh(mesh):
        model = fp8_nnx.Fp8MoE(H, F, E, **sizes, **OPTIONS, rngs=nnx.Rngs(0))
        assert model.wi_0[...].sharding.spec == WI and model.wo[...].sharding.spec == WO
        placed = jax.device_put(x, NamedSharding(mesh, P(("data", "expert"))))
        value = nnx.jit(step)(model, placed)
    expected = nnx.jit(step)(plain, x)
    assert abs(float(value - expected)) < 1
    at = NamedSharding(mesh, WO)
    assert model.wo[...].sharding.is_equivalent_to(at, 3)
    after = (jax.device_get(nnx.to_pure_dict(nnx.state(one))) for one in (model, plain))
    assert_moved_alike(before, *after)


def test_nnx_metadata_without_a_mesh_and_of_the_user(mesh, x):
    init = {"wo": nnx.with_partitioning(fp8_nnx.expert_init, (None, None, "data"), mesh)}
    made = fp8_nnx.Fp8MoE(H, F, E, top_k=2, init=init, **OPTIONS, rngs=nnx.Rngs(0))
    spec = nnx.get_partition_spec(nnx.state(made))
    assert spec["wi_0"].get_value() == WI and spec["wo"].get_value() == P(None, None, "data")

    @nnx.jit
    def create():
        model = fp8_nnx.Fp8MoE(H, F, E, top_k=2, **OPTIONS, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), nnx.get_partition_spec(state))
        nnx.update(model, jax.lax.with_sharding_constraint(state, at))
        return model

    model = create()
    assert model.wi_1[...].sharding.spec == WI
    y, _ = nnx.jit(lambda model, x: model(x))(model, x)  # the mesh is that of the parameters
    assert y.shape == x.shape
