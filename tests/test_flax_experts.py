"""Fp8MoE over a mesh, in training steps as the Flax guides write them, and its experts' biases."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import gathered
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import calc_diff

import jax_fp8gemm as fp8
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
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "data", None))
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
    init = {
        "wo": nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, "data"), mesh)
    }
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


# ---- biases -------------------------------------------------------------------------------------

GPT_OSS = fp8.ClampedSwiglu(limit=7.0, alpha=1.702, up_offset=1.0)
WIDTHS = {"wi_0_bias": (E, F), "wi_1_bias": (E, F), "wo_bias": (E, H)}
WIDTHS |= {f"shared_{name}": shape[1:] for name, shape in WIDTHS.items()}


def biased(key, params: dict) -> dict:
    """Returns parameters of a layer without biases, and biases."""
    keys = jax.random.split(key, len(WIDTHS))
    return params | {
        name: jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, WIDTHS.items(), strict=True)
    }


def of_layer(params: dict, prefix: str = "") -> fp8.ExpertKernels:
    names = [f"{w}{end}" for w in ("wi_0", "wi_1", "wo") for end in ("", "_bias")]
    return fp8.ExpertKernels(**{name: params[prefix + name] for name in names})


def by_moe(params, x):
    experts = of_layer(params), of_layer(params, "shared_")
    options = {"top_k": 2, "activation": GPT_OSS}
    return fp8.moe(x, params["gate_kernel"], experts[0], shared=experts[1], **options)


def run(layer, params, x):
    """Returns y, and gradients to all parameters."""
    grad = jax.value_and_grad(lambda params: objective(*layer(params, x)), has_aux=False)
    return jax.jit(lambda params: (layer(params, x)[0], grad(params)[1]))(params)


def same(got, expected):
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert np.asarray(b).any()
        np.testing.assert_array_equal(a, b)


def test_biases_are_parameters_and_do_what_those_of_moe_do(key, x):
    sizes = {"top_k": 2, "shared_features": F, "activation": GPT_OSS}
    layer = fp8_linen.Fp8MoE(E, F, use_bias=True, **sizes)
    made = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    plain = jax.jit(layer.clone(use_bias=False).init)(jax.random.key(0), x)["params"]
    assert {name: made[name].shape for name in made if name not in plain} == WIDTHS
    assert not any(made[name].any() for name in WIDTHS)
    same({name: made[name] for name in plain}, plain)
    params = biased(key, plain)
    expected = run(by_moe, params, x)
    same(run(lambda params, x: layer.apply({"params": params}, x), params, x), expected)

    model = fp8_nnx.Fp8MoE(H, F, E, use_bias=True, **sizes, rngs=nnx.Rngs(0))
    first = fp8_nnx.Fp8MoE(H, F, E, **sizes, rngs=nnx.Rngs(0))
    assert nnx.to_pure_dict(nnx.state(first)).keys() == plain.keys()
    same(model.shared_wo[...], first.shared_wo[...])
    assert not any(getattr(model, name)[...].any() for name in WIDTHS)
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)
    call = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    y, gradients = run(call, state, x)
    same((y, nnx.to_pure_dict(gradients)), expected)


def test_a_bias_of_the_router_is_a_parameter(key, x):
    """After all others, whose initial values stay; beside FP8 weights too."""
    sizes = {"top_k": 2, "activation": GPT_OSS}
    layer = fp8_linen.Fp8MoE(E, F, use_gate_bias=True, **sizes)
    plain = layer.clone(use_gate_bias=False)
    params = jax.jit(plain.init)(jax.random.key(0), x)["params"]
    made = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    same({name: made.pop(name) for name in params}, params)
    assert list(made) == ["gate_bias"] and made["gate_bias"].shape == (E,)
    assert not made["gate_bias"].any()
    params = params | {"gate_bias": jax.random.normal(key, (E,))}

    def by_moe(params, x):
        kernels = fp8.ExpertKernels(**{name: params[name] for name in ("wi_0", "wi_1", "wo")})
        gate = params["gate_kernel"]
        return fp8.moe(x, gate, kernels, gate_bias=params["gate_bias"], **sizes)

    expected = run(by_moe, params, x)
    same(run(lambda params, x: layer.apply({"params": params}, x), params, x), expected)
    held = fp8_linen.quantize_kernels(params)
    assert sorted(held["params"]) == ["gate_bias", "gate_kernel"]
    same(jax.jit(layer.clone(quantized=True).apply)(held, x)[0], expected[0])

    model = fp8_nnx.Fp8MoE(H, F, E, use_gate_bias=True, **sizes, rngs=nnx.Rngs(0))
    first = fp8_nnx.Fp8MoE(H, F, E, **sizes, rngs=nnx.Rngs(0))
    assert "gate_bias" not in nnx.state(first)
    same(model.wo[...], first.wo[...])
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    y, gradients = run(lambda params, x: nnx.merge(graph, params)(x), state, x)
    same((y, nnx.to_pure_dict(gradients)), expected)
    names = ("wi_0", "wi_1", "wo")
    parts = {n: [held["quantized"][f"{n}_{end}"] for end in ("qvalue", "scale")] for n in names}
    kernels = fp8.ExpertKernels(**{n: fp8.QArray(*p) for n, p in parts.items()})
    gate = {"gate_bias": params["gate_bias"]}
    model = fp8_nnx.Fp8MoE.from_quantized(params["gate_kernel"], kernels, **gate, **sizes)
    same(nnx.jit(lambda model, x: model(x)[0])(model, x), expected[0])


def test_logits_and_routing_made_elsewhere(key, x):
    """In place of the layer's own router, of which linen then makes no parameter."""
    layer = fp8_linen.Fp8MoE(E, F, 2, n_group=2, topk_group=1, use_gate_bias=True)
    logits = jax.random.normal(key, (T, E))
    routing = fp8.route(logits, 2)  # without the groups
    model = fp8_nnx.Fp8MoE(H, F, E, top_k=2, n_group=2, topk_group=1, rngs=nnx.Rngs(0))
    for given, of_layer in (({"logits": logits}, {"n_group": 2, "topk_group": 1, "top_k": 2}),
                            ({"routing": routing}, {})):  # fmt: skip
        params = jax.jit(lambda key, x, given=given: layer.init(key, x, **given))(key, x)["params"]
        assert sorted(params) == ["wi_0", "wi_1", "wo"]
        call = jax.jit(lambda kernels, x, a=given, b=of_layer: fp8.moe(x, None, kernels, **a, **b))
        y, expected = call(fp8.ExpertKernels(**params), x)
        got, found = jax.jit(layer.apply)({"params": params}, x, **given)
        same(got, y)
        np.testing.assert_array_equal(found.expert_index, expected.expert_index)
        for name, value in params.items():
            setattr(model, name, nnx.Param(value))
        same(nnx.jit(lambda model, x, given: model(x, **given)[0])(model, x, given), y)
    with pytest.raises(ValueError, match="routing has another top_k than the layer"):
        model(x, routing=fp8.route(logits, 1))
    with pytest.raises(ValueError, match="gate_kernel, logits and routing exclude each other"):
        model(x, routing=routing, logits=logits)


def test_biases_beside_fp8_weights_are_parameters(key, x):
    """An f that is no multiple of 128, which prepare_experts fills with zeros."""
    f = 72
    init = nn.initializers.normal(1.0)
    layer = fp8_linen.Fp8MoE(
        E, f, 2, shared_features=F, activation=GPT_OSS, use_bias=True, bias_init=init
    )
    params = jax.jit(layer.init)(key, x)["params"]
    expected = jax.jit(layer.apply)({"params": params}, x)[0]
    held = fp8_linen.quantize_kernels(params)
    assert sorted(held["params"]) == ["gate_kernel", *sorted(WIDTHS)]
    same(jax.jit(layer.clone(quantized=True).apply)(held, x)[0], expected)
    abstract = jax.eval_shape(layer.clone(quantized=True).init, key, x)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, held)

    def kernels(prefix=""):
        names = ("wi_0", "wi_1", "wo")
        ends, all_held = ("qvalue", "scale"), held["quantized"]
        parts = {n: [all_held[f"{prefix}{n}_{end}"] for end in ends] for n in names}
        biases = {f"{n}_bias": params[f"{prefix}{n}_bias"] for n in names}
        return fp8.ExpertKernels(**{n: fp8.QArray(*p) for n, p in parts.items()}, **biases)

    for given in (kernels(), fp8.prepare_experts(kernels())):
        model = fp8_nnx.Fp8MoE.from_quantized(
            params["gate_kernel"], given, top_k=2, shared=kernels("shared_"), activation=GPT_OSS
        )
        assert sorted(nnx.state(model, nnx.Param)) == ["gate_kernel", *sorted(WIDTHS)]
        same(nnx.jit(lambda model, x: model(x)[0])(model, x), expected)
        model.wo_bias[...] = jnp.zeros((E, H))
        assert (nnx.jit(lambda model, x: model(x)[0])(model, x) != expected).any()


def test_biases_over_a_mesh(mesh, key, x):
    """They are split as what they are added to: of `wo` every device of a tensor axis has them."""
    sizes = {"shared_features": F, "use_bias": True, "use_gate_bias": True}
    layer = fp8_linen.Fp8MoE(E, F, 2, activation=GPT_OSS, **sizes, **OPTIONS)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
    specs = nn.get_partition_spec(boxed)["params"]
    split = P("expert", "model"), P("expert", None), P("model"), P()
    names = "wi_1_bias", "wo_bias", "shared_wi_0_bias", "shared_wo_bias"
    assert tuple(specs[name] for name in names) == split and specs["gate_bias"] == P()
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(
            lambda: fp8_nnx.Fp8MoE(H, F, E, top_k=2, **sizes, **OPTIONS, rngs=nnx.Rngs(0))
        )
    found = nnx.get_partition_spec(nnx.state(model))
    assert tuple(found[name].get_value() for name in names[:3]) == split[:3]

    plain = layer.clone(expert_axis=None, tensor_axis=None)
    params = biased(key, jax.jit(plain.clone(use_bias=False).init)(jax.random.key(0), x)["params"])
    params["gate_bias"] = jax.random.normal(key, (E,))
    expected = run(lambda params, x: plain.apply({"params": params}, x), params, x)
    at = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, at)
        got = run(lambda params, x: layer.apply({"params": params}, x), placed, x)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert calc_diff(a, b) < 1e-3
    spread = jax.shard_map(
        lambda params, x: layer.apply({"params": params}, x)[0],
        mesh=mesh,
        in_specs=(specs, P("expert")),
        out_specs=P("expert"),
    )
    assert calc_diff(jax.jit(spread)(params, x), expected[0]) < 1e-4
