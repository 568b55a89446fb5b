"""Activations and biases of current models against plain float32 ones, forward and backward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import place
from dense_moe import FORWARD, GRADIENT, dot, make_kernels
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import calc_diff
from test_experts import choices, tokens
from test_fp8_experts import held

import jax_fp8gemm as fp8
from jax_fp8gemm import linen as fp8_linen
from jax_fp8gemm import nnx as fp8_nnx

T, H, F, E = 24, 128, 128, 3
GPT_OSS = fp8.ClampedSwiglu(limit=7.0, alpha=1.702, up_offset=1.0)
TIGHT = fp8.ClampedSwiglu(limit=1.5)  # many numbers are clamped


def model(activation, gate, up):
    """The activations as their papers write them."""
    if activation == "squared_relu":
        return jnp.where(gate > 0, gate, 0) ** 2
    if activation == "geglu":
        inner = (2 / jnp.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + jnp.tanh(inner)) * up
    if activation == "swiglu":
        return gate / (1 + jnp.exp(-gate)) * up
    gate = jnp.where(gate > activation.limit, activation.limit, gate)
    up = jnp.where(abs(up) > activation.limit, jnp.sign(up) * activation.limit, up)
    return gate / (1 + jnp.exp(-activation.alpha * gate)) * (up + activation.up_offset)


def dense(x, experts, weights, kernels, activation):
    """Every token through every expert, in float32."""
    y = jnp.zeros_like(x)
    bias = lambda name, i: 0 if (b := getattr(kernels, name)) is None else b[i]  # noqa: E731
    for i in range(kernels.wo.shape[0]):
        gate, up = dot(x, kernels.wi_0[i]) + bias("wi_0_bias", i), None
        if kernels.wi_1 is not None:
            up = dot(x, kernels.wi_1[i]) + bias("wi_1_bias", i)
        out = dot(model(activation, gate, up), kernels.wo[i]) + bias("wo_bias", i)
        y += jnp.where(experts == i, weights, 0).sum(1, keepdims=True) * out
    return y


def parameters(key, activation, biases, e=E, f=F):
    kernels = make_kernels(key, e, H, f)
    sizes = {"wi_0_bias": f, "wi_1_bias": f, "wo_bias": H}
    if activation == "squared_relu":
        kernels, sizes = dataclasses.replace(kernels, wi_1=None), {"wi_0_bias": f, "wo_bias": H}
    keys = jax.random.split(key, 3)
    found = {
        n: jax.random.normal(k, (e, s)) for k, (n, s) in zip(keys, sizes.items(), strict=False)
    }
    return dataclasses.replace(kernels, **found) if biases else kernels


def with_gradients(function, experts):
    @jax.jit
    def run(x, weights, kernels, dy):
        y, pull = jax.vjp(lambda x, w, k: function(x, experts, w, k), x, weights, kernels)
        return y, *pull(dy)

    return run


def check(got, expected, forward=FORWARD, gradient=GRADIENT):
    for i, pair in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)):
        a, b = pair
        assert a.shape == b.shape and np.isfinite(np.asarray(a)).all() and np.asarray(b).any()
        assert calc_diff(a, b) < (gradient if i else forward), (i, a.shape, calc_diff(a, b))


CASES = {
    "gpt_oss": (GPT_OSS, True, {}),
    "clamped": (TIGHT, False, {"capacity": T}),
    "geglu": ("geglu", False, {}),
    "squared_relu": ("squared_relu", True, {}),
    "swiglu_with_biases": ("swiglu", True, {"capacity": T}),
    "bf16": (GPT_OSS, True, {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_against_float32_with_all_gradients(key, case):
    activation, biases, options = CASES[case]
    kernels = parameters(key, activation, biases)
    experts, weights = choices(key, T, 2, E)
    experts = experts.at[:3, 1].set(E)  # no expert: rows past the groups
    x, dy = tokens(key, T, H)
    run = functools.partial(fp8.expert_ffn, activation=activation, **options)
    got = with_gradients(run, experts)(x, weights, kernels, dy)
    reference = functools.partial(dense, activation=activation)
    expected = with_gradients(reference, experts)(x, weights, kernels, dy)
    # A clamp's slope is a step: numbers whose FP8 error takes them over the limit change theirs.
    check(got, expected, gradient=2 * GRADIENT if activation == TIGHT else GRADIENT)


def test_fp8_weights_and_biases_as_one(key):
    """Bits of float kernels, f filled with zeros, by slots or not; gate and up as one array."""
    kernels = parameters(key, GPT_OSS, True, f=72)
    experts, weights = choices(key, T, 2, E)
    x, _ = tokens(key, T, H)
    run = jax.jit(functools.partial(fp8.expert_ffn, activation=GPT_OSS))
    expected = run(x, experts, weights, kernels)
    wi_bias = jnp.concatenate((kernels.wi_0_bias, kernels.wi_1_bias), -1)
    q = dataclasses.replace(held(kernels), wi_bias=wi_bias, wo_bias=kernels.wo_bias)
    for given in (q, fp8.prepare_experts(q)):
        np.testing.assert_array_equal(run(x, experts, weights, given), expected)


def test_fp8_weights_without_a_gate_and_biases(key):
    """Biases are filled with zeros as f is."""
    kernels = parameters(key, "squared_relu", True, f=72)
    experts, weights = choices(key, T, 2, E)
    x, _ = tokens(key, T, H)
    run = jax.jit(functools.partial(fp8.expert_ffn, activation="squared_relu"))
    expected = run(x, experts, weights, kernels)
    of = lambda w: fp8.quantize(jnp.swapaxes(w, -1, -2), (128, 128))  # noqa: E731
    q = dataclasses.replace(kernels, wi_0=of(kernels.wi_0), wo=of(kernels.wo))
    for given in (q, fp8.prepare_experts(q)):
        np.testing.assert_array_equal(run(x, experts, weights, given), expected)


@pytest.mark.parametrize("activation", [GPT_OSS, "geglu", "squared_relu"], ids=str)
def test_over_a_mesh(key, activation):
    """Router, routed and shared experts with biases on eight devices, all gradients, as on one."""
    x, dy = tokens(key, 16, H)
    gate = jax.random.normal(key, (H, 4)) / H**0.5, jax.random.normal(key, (4,))
    kernels = parameters(key, activation, True, e=4)
    shared = jax.tree.map(lambda w: w[0], kernels)
    call = functools.partial(fp8.moe, top_k=2, activation=activation)

    def run(x, gate, kernels, shared, **options):
        def y(x, gate, kernels, shared):
            gate, bias = gate
            return call(x, gate, kernels, gate_bias=bias, shared=shared, **options)[0]

        y, pull = jax.vjp(y, x, gate, kernels, shared)
        return y, *pull(dy)

    expected = jax.jit(run)(x, gate, kernels, shared)
    mesh = jax.make_mesh((2, 2, 2), ("d", "e", "m"), axis_types=(AxisType.Auto,) * 3)
    options = {"expert_axis": "e", "tensor_axis": "m", "mesh": mesh}
    arrays = place(mesh, (x, gate, kernels, shared), P(("d", "e")), P(), P("e"), P())
    got = jax.jit(functools.partial(run, **options))(*arrays)
    check(got, expected, 1e-4, 1e-3)


def test_flax_layers_without_a_gate(key):
    x, _ = tokens(key, 8, H)
    options = {"top_k": 1, "activation": "squared_relu", "shared_features": F}
    layer = fp8_linen.Fp8MoE(E, F, **options)
    variables = jax.jit(layer.init)(key, x)
    params = variables["params"]
    assert sorted(params) == ["gate_kernel", "shared_wi_0", "shared_wo", "wi_0", "wo"]
    y, _ = jax.jit(layer.apply)(variables, x)
    quantized = fp8_linen.quantize_kernels(params)
    np.testing.assert_array_equal(jax.jit(layer.clone(quantized=True).apply)(quantized, x)[0], y)
    made = fp8_nnx.Fp8MoE(H, F, E, **options, rngs=nnx.Rngs(0))
    assert sorted(nnx.state(made)) == sorted(params)
    for name, value in params.items():
        setattr(made, name, nnx.Param(value))
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x)[0])(made, x), y)


@pytest.mark.parametrize(
    "error, options, changed, text",
    [
        (ValueError, {"activation": "relu"}, {}, "activation is unknown"),
        (ValueError, {"activation": fp8.ClampedSwiglu(limit=0.0)}, {}, "limit is not a positive"),
        (ValueError, {"activation": "squared_relu"}, {}, "lack matrices, or have too many"),
        (ValueError, {}, {"wi_1": None}, "lack matrices, or have too many"),
        (ValueError, {}, {"wo_bias": jnp.ones((E, F + 1))}, "wo_bias does not fit kernels"),
        (
            ValueError,
            {"activation": "squared_relu"},
            {"wi_1": None, "wi_1_bias": jnp.ones((E, F))},
            "a bias of a matrix that is not there",
        ),
    ],
)
def test_errors(key, error, options, changed, text):
    kernels = dataclasses.replace(make_kernels(key, E, H, F), **changed)
    x, experts, weights = jnp.ones((8, H)), jnp.zeros((8, 2), int), jnp.ones((8, 2))
    with pytest.raises(error, match=text) as info:
        fp8.expert_ffn(x, experts, weights, kernels, **options)
    assert all(part in str(info.value) for part in ("\n  got ", "\n  expected ", "\n  fix "))
