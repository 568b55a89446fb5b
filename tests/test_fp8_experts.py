"""Experts held in FP8, as in block-FP8 checkpoints: the bits of float kernels' FP8 copies."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import gathered
from dense_moe import make_kernels, make_shared
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import calc_diff
from test_experts import choices, tokens

import jax_fp8gemm as fp8
from jax_fp8gemm import linen as fp8_linen
from jax_fp8gemm import nnx as fp8_nnx

H, F, E = 128, 128, 4
BLOCKS = (128, 128)


def held(kernels: fp8.ExpertKernels) -> fp8.ExpertKernels:
    """Returns float kernels [in, out] as QArrays [out, in]."""
    of = lambda w: fp8.quantize(jnp.swapaxes(w, -1, -2), BLOCKS)  # noqa: E731
    return fp8.ExpertKernels(wi_0=of(kernels.wi_0), wi_1=of(kernels.wi_1), wo=of(kernels.wo))


def step(x, weights, kernels, experts, **options):
    """Returns y, and the gradients to x and the gate weights."""
    run = lambda x, weights: fp8.expert_ffn(x, experts, weights, kernels, **options)  # noqa: E731
    y, pull = jax.vjp(run, x, weights)
    return y, *pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


def equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(b).any()
        np.testing.assert_array_equal(a, b)


run = jax.jit(step, static_argnames="capacity")


@pytest.mark.parametrize("t, h, f", [(65, H, F), (8, 72, 200)])
def test_bits_are_those_of_float_kernels(key, t, h, f):
    """Also sizes that are no whole blocks."""
    kernels = make_kernels(key, E, h, f)
    experts, weights = choices(key, t, 2, E)
    x, _ = tokens(key, t, h)
    expected = run(x, weights, kernels, experts)
    for given in (held(kernels), fp8.prepare_experts(held(kernels))):
        equal(run(x, weights, given, experts), expected)


def test_gate_and_up_as_one_array(key):
    kernels = make_kernels(key, E, H, F)
    experts, weights = choices(key, 8, 2, E)
    x, _ = tokens(key, 8)
    expected = run(x, weights, kernels, experts)
    wi = jnp.concatenate((kernels.wi_0, kernels.wi_1), -1)
    joined = fp8.ExpertKernels(wi=wi, wo=kernels.wo)
    equal(run(x, weights, joined, experts), expected)
    q = fp8.quantize(jnp.swapaxes(wi, -1, -2), BLOCKS)
    equal(run(x, weights, fp8.ExpertKernels(wi=q, wo=held(kernels).wo), experts), expected)
    slope = jax.jit(jax.grad(lambda k: fp8.expert_ffn(x, experts, weights, k).sum()))
    apart = slope(kernels)
    equal(slope(joined).wi, jnp.concatenate((apart.wi_0, apart.wi_1), -1))


def test_no_gradient_flows_to_fp8_weights(key):
    kernels = held(make_kernels(key, E, H, F))
    experts, weights = choices(key, 8, 2, E)
    x, _ = tokens(key, 8)
    found = jax.jit(jax.grad(lambda k: fp8.expert_ffn(x, experts, weights, k).sum()))(kernels)
    assert not any(np.asarray(g, np.float32).any() for g in jax.tree.leaves(found))


@pytest.mark.parametrize("tensor_axis", [None, "model"])
def test_over_a_mesh(key, tensor_axis):
    """Routed and shared experts, gate and up as one and apart, give what one device gives."""
    floats, shared = make_kernels(key, 8, H, 2 * F), make_shared(key, H, 2 * F)
    x, _ = tokens(key, 16, dtype=jnp.bfloat16)
    gate = jax.random.normal(key, (H, 8)) / H**0.5
    kernels = held(floats)
    if tensor_axis is None:
        kernels = fp8.prepare_experts(kernels)
    call = functools.partial(fp8.moe, top_k=2)
    expected = jax.jit(call)(x, gate, floats, shared=shared)[0]
    mesh = jax.make_mesh((4, 2), ("expert", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = {"expert_axis": "expert", "tensor_axis": tensor_axis, "mesh": mesh}
    arguments = (x, gate, kernels, held(shared))
    run = jax.jit(lambda x, gate, kernels, shared: call(x, gate, kernels, shared=shared, **axes))
    made = run.lower(*arguments).compile()
    assert calc_diff(made(*arguments)[0], expected) < 5e-5
    assert not [shape for _, shape in gathered(made.as_text()) if len(shape) == 3]


def test_flax_layers(key):
    x, _ = tokens(key, 8)
    sizes = {"top_k": 2, "shared_features": F}
    variables = jax.jit(fp8_linen.Fp8MoE(E, F, **sizes).init)(key, x)
    expected = jax.jit(fp8_linen.Fp8MoE(E, F, **sizes).apply)(variables, x)[0]
    layer = fp8_linen.Fp8MoE(E, F, **sizes, quantized=True)
    quantized = fp8_linen.quantize_kernels(variables["params"])
    made, shapes = jax.eval_shape(layer.init, key, x), jax.tree.map(jnp.shape, quantized)
    assert shapes == jax.tree.map(jnp.shape, made) and list(quantized["params"]) == ["gate_kernel"]
    equal(jax.jit(layer.apply)(quantized, x)[0], expected)
    params = variables["params"]
    routed = held(fp8.ExpertKernels(**{name: params[name] for name in ("wi_0", "wi_1", "wo")}))
    shared = {name: params[f"shared_{name}"] for name in ("wi_0", "wi_1", "wo")}
    shared = held(fp8.ExpertKernels(**shared))
    for kernels in (routed, fp8.prepare_experts(routed)):
        model = fp8_nnx.Fp8MoE.from_quantized(
            params["gate_kernel"], kernels, top_k=2, shared=shared, dtype=None
        )
        equal(nnx.jit(lambda model, x: model(x)[0])(model, x), expected)
    assert list(nnx.state(model, nnx.Param)) == ["gate_kernel"]


def test_flax_layers_with_biases_over_a_mesh(key):
    """All of gpt-oss's layer: FP8 weights, biases of router and experts, clamps; by axes."""
    f = 2 * F
    activation = fp8.ClampedSwiglu(limit=7.0, alpha=1.702, up_offset=1.0)
    sizes = {"top_k": 2, "shared_features": f, "activation": activation}
    plain = fp8_linen.Fp8MoE(
        8, f, **sizes, use_bias=True, use_gate_bias=True, bias_init=nn.initializers.normal(1.0)
    )
    x, _ = tokens(key, 16, dtype=jnp.bfloat16)
    params = jax.jit(plain.init)(key, x)["params"]
    expected = jax.jit(plain.apply)({"params": params}, x)[0]
    mesh = jax.make_mesh((2, 2, 2), ("d", "e", "m"), axis_types=(AxisType.Auto,) * 3)
    axes = {"expert_axis": "e", "tensor_axis": "m"}
    layer = plain.clone(quantized=True, **axes)
    boxed = jax.eval_shape(layer.init, key, x)
    specs = nn.get_partition_spec(boxed)
    assert specs["quantized"]["wi_0_qvalue"] == P("e", "m", None)
    assert specs["quantized"]["wo_scale"] == P("e", None, "m")
    assert specs["params"]["wi_0_bias"] == P("e", "m") and specs["params"]["wo_bias"] == P(
        "e", None
    )
    variables = fp8_linen.quantize_kernels(params)
    placed = jax.device_put(variables, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    with jax.set_mesh(mesh):
        made = jax.jit(layer.apply).lower(placed, x).compile()
        assert calc_diff(made(placed, x)[0], expected) < 5e-5
    assert not [shape for _, shape in gathered(made.as_text()) if len(shape) == 3]
    spread = jax.shard_map(
        lambda variables, x: layer.apply(variables, x)[0],
        mesh=mesh,
        in_specs=(specs, P("e")),
        out_specs=P("e"),
    )
    assert calc_diff(jax.jit(spread)(variables, x), expected) < 5e-5

    names = [f"{w}{end}" for w in ("wi_0", "wi_1", "wo") for end in ("", "_bias")]
    given = [fp8.ExpertKernels(**{n: params[p + n] for n in names}) for p in ("", "shared_")]
    biases = [{n: getattr(k, n) for n in names if "bias" in n} for k in given]
    routed, shared = (dataclasses.replace(held(*k), **b) for *k, b in zip(given, biases))  # noqa: B905
    options = {"gate_bias": params["gate_bias"], "dtype": None, "mesh": mesh, **axes}
    options |= {"top_k": 2, "activation": activation, "shared": shared}
    model = fp8_nnx.Fp8MoE.from_quantized(params["gate_kernel"], routed, **options)
    assert calc_diff(nnx.jit(lambda model, x: model(x)[0])(model, x), expected) < 5e-5


def test_a_container_without_new_fields_is_the_one_that_old_programs_know(key):
    old = make_kernels(key, E, H, F)
    new = fp8.prepare_experts(held(old))
    assert len(jax.tree.structure(old).children()) == 4
    assert jax.tree.structure(old).node_data()[1] == ()
    for kernels in (old, new):
        exported = jax.export.export(jax.jit(lambda k: k.wo))(kernels)
        again = jax.export.deserialize(exported.serialize())
        equal(again.call(kernels), kernels.wo)


ONES = jnp.ones((E, H, 64))
TALL = fp8.QArray(jnp.zeros((E, 128, H), jnp.float8_e4m3fn), jnp.ones((E, 1, 1)))
ROWS = fp8.QArray(jnp.zeros((E, H, 64), jnp.float8_e4m3fn), jnp.ones((E, H, 1)))


@pytest.mark.parametrize(
    "error, changed, text",
    [
        (TypeError, {"wi_1": ONES}, "wi_1 is not in FP8, others are."),
        (ValueError, {"wi_1": TALL}, "kernels do not fit each other."),
        (ValueError, {"wi_1": None}, "kernels lack matrices, or have too many."),
        (ValueError, {"wo": ROWS}, "kernels have other scales."),
        (ValueError, {"wi_0": None, "wi_1": None, "wi": TALL}, "a block of scales has rows of"),
    ],
)
def test_errors(error, changed, text):
    kernels = held(make_kernels(jax.random.key(0), E, H, 64))
    x, experts, weights = jnp.ones((8, H)), jnp.zeros((8, 2), int), jnp.ones((8, 2))
    with pytest.raises(error, match=text) as info:
        fp8.expert_ffn(x, experts, weights, dataclasses.replace(kernels, **changed))
    assert all(part in str(info.value) for part in ("\n  got ", "\n  expected ", "\n  fix "))


def test_an_axis_that_splits_a_block_is_an_error():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    kernels = held(make_kernels(jax.random.key(0), E, H, 192))
    with pytest.raises(ValueError, match="would split a block of scales") as info:
        fp8.moe(
            jnp.ones((8, H)), jnp.ones((H, E)), kernels, top_k=2, tensor_axis="model", mesh=mesh
        )
    assert "f % 256 == 0" in str(info.value) and "pad f to 256" in str(info.value)
