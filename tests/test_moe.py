"""The whole layer against float32, and what the layer and its experts refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import (
    FORWARD,
    balance_in_sequences,
    cosine,
    dense_ffn,
    dense_moe,
    dot,
    grouped_route,
    make_kernels,
    make_shared,
)
from flax import nnx
from numerics import calc_diff
from test_experts import F, H, T, tokens

import jax_fp8gemm as fp8
from jax_fp8gemm import linen as fp8_linen
from jax_fp8gemm import nnx as fp8_nnx


def layer(key, e=4, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    x, dy = tokens(keys[0], dtype=dtype)
    gate_kernel = jax.random.normal(keys[1], (H, e)) * 2 / H**0.5
    return x, dy, (gate_kernel, make_kernels(keys[1], e, H, F), make_shared(keys[2], H, 96))


def test_whole_layer_against_float32(key):
    x, dy, parameters = layer(key)
    bias = jnp.array([0.3, 0, 0, -0.1])
    options = {"score_function": "sigmoid", "bias": bias, "routed_scaling_factor": 1.5}

    def run(function):
        def loss(x, gate_kernel, kernels, shared):
            y, routing = function(x, gate_kernel, kernels, top_k=2, shared=shared, **options)
            extra = 10 * routing.aux_loss + routing.z_loss
            return (y * dy).sum() + extra, (y, routing)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(x, *parameters)

    (_, (y, routing)), gradients = run(fp8.moe)
    (_, (expected_y, expected)), expected_gradients = run(dense_moe)
    np.testing.assert_array_equal(routing.expert_index, expected.expert_index)
    np.testing.assert_allclose(routing.aux_loss, expected.aux_loss, rtol=1e-5)
    assert calc_diff(y, expected_y) < FORWARD
    pairs = jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)
    for a, b in zip(*pairs, strict=True):
        assert cosine(a, b) >= 0.995, a.shape


GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def of_router(router: str, x, gate_kernel, kernels, bias, **options):
    """Calls moe with the logits x · gate_kernel, in one of its three ways."""
    how = {"bias": bias, "score_function": "sigmoid", **GROUPS}
    if router == "gate_kernel":
        return fp8.moe(x, gate_kernel, kernels, top_k=2, **how, **options)
    logits = dot(x.astype(jnp.float32), gate_kernel)
    if router == "logits":
        return fp8.moe(x, None, kernels, top_k=2, logits=logits, **how, **options)
    routing = fp8.route(logits.reshape(-1, logits.shape[-1]), 2, **how)
    return fp8.moe(x, None, kernels, routing=routing, **options)


@pytest.mark.parametrize("router", ["gate_kernel", "logits", "routing"])
def test_routers_with_groups_against_float32(key, router):
    """With the balance loss of sequences, whose gradient goes through the scores."""
    x, dy, (gate_kernel, kernels, _) = layer(key, e=8)
    bias, length = jax.random.normal(key, (8,)) / 4, T // 4

    def ours(x, gate_kernel, kernels):
        y, routing = of_router(router, x, gate_kernel, kernels, bias)
        return y, routing.expert_index, fp8.sequence_loss(routing, length)

    def plain(x, gate_kernel, kernels):
        index, weights, scores = grouped_route(dot(x, gate_kernel), 2, bias=bias, **GROUPS)
        y = dense_ffn(x, index, weights, kernels)
        return y, index, balance_in_sequences(index, scores, length)

    def run(function):
        def loss(*operands):
            y, index, balance = function(*operands)
            return (y * dy).sum() + 10 * balance, (y, index, balance)

        found = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, gate_kernel, kernels)
        return found[0][1], found[1]

    (y, index, balance), gradients = run(ours)
    (expected_y, expected_index, expected_balance), expected_gradients = run(plain)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(balance, expected_balance, rtol=1e-5)
    assert calc_diff(y, expected_y) < FORWARD
    pairs = jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)
    for a, b in zip(*pairs, strict=True):
        assert cosine(a, b) >= 0.995, a.shape


def test_a_bias_of_the_router_against_float32(key):
    """It is part of the logits: of choice, weights, losses and gradients. `bias` steers alone."""
    x, dy, (gate_kernel, kernels, _) = layer(key)
    gate_bias, bias = jax.random.normal(key, (2, 4))

    def run(function):
        def loss(x, gate_kernel, gate_bias, kernels):
            y, routing = function(x, gate_kernel, gate_bias, kernels)
            return (y * dy).sum() + routing.aux_loss + routing.z_loss, (y, routing)

        grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
        return jax.jit(grad)(x, gate_kernel, gate_bias, kernels)

    def ours(x, gate_kernel, gate_bias, kernels):
        return fp8.moe(x, gate_kernel, kernels, gate_bias=gate_bias, bias=bias, top_k=2)

    def expected(x, gate_kernel, gate_bias, kernels):
        logits = dot(x, gate_kernel) + gate_bias[None]
        scores = jax.nn.softmax(logits)
        chosen = jnp.argsort(-(scores + bias[None]), axis=1)[:, :2]
        weights = jnp.take_along_axis(scores, chosen, axis=1)
        weights = weights / weights.sum(1, keepdims=True)
        share = jax.nn.one_hot(chosen, 4).sum((0, 1)) / chosen.size
        losses = 4 * (share * scores.mean(0)).sum(), (jax.nn.logsumexp(logits, 1) ** 2).mean()
        return dense_ffn(x, chosen, weights, kernels), fp8.Routing(chosen, weights, scores, *losses)

    (_, (y, routing)), gradients = run(ours)
    (_, (right_y, right)), right_gradients = run(expected)
    np.testing.assert_array_equal(routing.expert_index, right.expert_index)
    np.testing.assert_allclose(routing.gate_weights, right.gate_weights, rtol=1e-5)
    assert calc_diff(y, right_y) < FORWARD
    pairs = jax.tree.leaves(gradients), jax.tree.leaves(right_gradients)
    for a, b in zip(*pairs, strict=True):
        assert a.dtype == b.dtype and cosine(a, b) >= 0.995, a.shape


def test_a_routing_made_elsewhere_beside_batch_invariant(key):
    """The option is of the GEMMs too; route has its own."""
    x, _, (gate_kernel, kernels, _) = layer(key)
    logits = dot(x, gate_kernel)
    routing = fp8.route(logits, 2, batch_invariant=True)
    y, _ = fp8.moe(x, None, kernels, routing=routing, batch_invariant=True)
    some = jax.tree.map(lambda a: a[:5] if a.ndim else a, routing)
    few, _ = fp8.moe(x[:5], None, kernels, routing=some, batch_invariant=True)
    np.testing.assert_array_equal(few, y[:5])


def test_no_tokens_from_elsewhere():
    x, logits = ones(2, 0, 32), ones(2, 0, 4)
    for how in ({"logits": logits, "top_k": 2}, {"routing": fp8.route(logits[0], 2)}):
        y, routing = fp8.moe(x, None, KERNELS, **how)
        assert y.shape == x.shape and routing.expert_index.shape == (0, 2)


def test_flax_layers_hand_groups_on():
    """Seen in what moe refuses, which shows what it was given."""
    linen = fp8_linen.Fp8MoE(8, 16, 2, n_group=3, topk_group=2)
    model = fp8_nnx.Fp8MoE(32, 16, 8, top_k=2, n_group=3, topk_group=2, rngs=nnx.Rngs(0))
    for call in (lambda x: linen.init(jax.random.key(0), x), model):
        with pytest.raises(ValueError, match="8 experts do not form 3 groups") as info:
            jax.eval_shape(call, ones(8, 32))
        assert "n_group=3, topk_group=2, top_k=2, gate_kernel f32[32, 8]" in str(info.value)


jitted_moe = jax.jit(fp8.moe, static_argnames=("top_k", "capacity_factor"))


def test_leading_dims_and_types_are_kept(key):
    x, _, parameters = layer(key, dtype=jnp.bfloat16)
    y, routing = jitted_moe(x.reshape(2, T // 2, H), *parameters[:2], top_k=2)
    flat, _ = jitted_moe(x, *parameters[:2], top_k=2)
    assert y.shape == (2, T // 2, H) and y.dtype == jnp.bfloat16
    assert routing.expert_index.shape == (T, 2)
    np.testing.assert_array_equal(y.reshape(T, H), flat)


def test_shared_experts_of_float32_answer_in_the_tokens_dtype(key):
    """bf16 tokens, float32 kernels: what layers with `dtype=` pass."""
    x, _, (gate_kernel, kernels, shared) = layer(key)
    y, _ = jax.eval_shape(
        lambda x: fp8.moe(x, gate_kernel, kernels, top_k=2, shared=shared), x.astype(jnp.bfloat16)
    )
    assert y.dtype == jnp.bfloat16


def test_capacity_factor_is_a_share_of_the_rows(key):
    x, _, (gate_kernel, kernels, _) = layer(key)
    y, routing = jitted_moe(x, gate_kernel, kernels, top_k=2, capacity_factor=0.5)
    # 40 tokens · 2 / 4 experts · 0.5
    chosen = routing.expert_index, routing.gate_weights
    ffn = jax.jit(fp8.expert_ffn, static_argnames="capacity")
    np.testing.assert_array_equal(y, ffn(x, *chosen, kernels, capacity=10))
    assert (y != ffn(x, *chosen, kernels)).any()


# ---- errors -------------------------------------------------------------------------------------


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def made(**changed):
    shapes = {"wi_0": ones(4, 32, 16), "wi_1": ones(4, 32, 16), "wo": ones(4, 16, 32)}
    return fp8.ExpertKernels(**{**shapes, **changed})


KERNELS = made()
CHOSEN = ones(8, 2, dtype=jnp.int32), ones(8, 2)
ROUTING = fp8.Routing(*CHOSEN, ones(8, 4), ones(), ones())


@pytest.mark.parametrize(
    "error, call, text",
    [
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 64), *CHOSEN, KERNELS),
            "dim h differs between x and wi_0.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(7, 32), *CHOSEN, KERNELS),
            "x and expert_index do not fit.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), CHOSEN[0], ones(8, 1), KERNELS),
            "expert_index and gate_weights differ in shape.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, made(wo=KERNELS.wi_0)),
            "kernels do not fit each other.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, made(wi_0=KERNELS.wi_0[0])),
            "kernels have the wrong rank.",
        ),
        (
            TypeError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, KERNELS.wi_0),
            "kernels is not an ExpertKernels.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(
                ones(8, 32), *CHOSEN, fp8.prepare_experts(KERNELS), cast_in_gemm=True
            ),
            "the GEMMs cannot cast prepared kernels.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, KERNELS, cast_in_gemm=True),
            "the GEMM cannot cast these weights: they are not bf16.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, KERNELS, capacity=0),
            "capacity is not a positive integer.",
        ),
        (
            ValueError,
            lambda: fp8.expert_ffn(ones(8, 32), *CHOSEN, KERNELS, capacity=2.5),
            "capacity is not a positive integer.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=2, capacity_factor=-1),
            "capacity_factor is not a positive number.",
        ),
        (
            TypeError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=2, shared=KERNELS.wi_0),
            "shared is not an ExpertKernels.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=2, shared=KERNELS),
            "shared have the wrong rank.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), jax.tree.map(fp8.quantize, KERNELS), top_k=2),
            "kernels have other scales.",
        ),
        (
            TypeError,
            lambda: fp8.expert_ffn(ones(8, 32), CHOSEN[1], CHOSEN[1], KERNELS),
            "expert_index must be integers.",
        ),
        (
            TypeError,
            lambda: fp8.expert_ffn(ones(8, 32, dtype=jnp.int32), *CHOSEN, KERNELS),
            "x has the wrong dtype.",
        ),
        (
            TypeError,
            lambda: fp8.prepare_experts(made(wi_1=ones(4, 32, 16, dtype=jnp.bfloat16))),
            "wi_0 and wi_1 differ in dtype.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=5),
            "top_k is 5, with 4 experts.",
        ),
        (
            TypeError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4, dtype=jnp.int32), KERNELS, top_k=2),
            "gate_kernel has the wrong dtype.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(4, 32), KERNELS, top_k=2),
            "x and gate_kernel do not fit.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, top_k=2),
            "gate_kernel, logits and routing exclude each other.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=2, gate_bias=ones(1)),
            "gate_kernel and gate_bias do not fit.",
        ),
        (
            TypeError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, top_k=2, gate_bias=CHOSEN[0][0]),
            "gate_bias has the wrong dtype.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, routing=ROUTING, gate_bias=ones(4)),
            "gate_bias has no gate_kernel.",
        ),
        (
            ValueError,
            lambda: fp8_linen.Fp8MoE(4, 16, 3).init(
                jax.random.key(0), ones(8, 32), routing=ROUTING
            ),
            "routing has another top_k than the layer.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS, routing=ROUTING),
            "gate_kernel, logits and routing exclude each other.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 4), KERNELS),
            "top_k is None, with 4 experts.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(2, 4, 32), None, KERNELS, top_k=2, logits=ones(8, 4)),
            "x and logits do not fit.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, top_k=2, logits=ones(8, 8)),
            "4 experts here, 8 in logits, over 1 devices.",
        ),
        (
            TypeError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, routing=CHOSEN),
            "routing is not a Routing.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(7, 32), None, KERNELS, routing=ROUTING),
            "x and routing do not fit.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, routing=ROUTING, top_k=2),
            "routing is made already.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), None, KERNELS, routing=ROUTING, score_function="sigmoid"),
            "routing is made already.",
        ),
        (
            ValueError,
            lambda: fp8.moe(ones(8, 32), ones(32, 8), KERNELS, top_k=2),
            "4 experts here, 8 in gate_kernel, over 1 devices.",
        ),
    ],
)
def test_errors(error, call, text):
    with pytest.raises(error, match=text) as info:
        call()
    assert all(part in str(info.value) for part in ("\n  got ", "\n  expected ", "\n  fix "))
