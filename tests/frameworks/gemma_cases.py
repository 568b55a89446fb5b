"""A small Gemma 3 of the package gemma, through the provider for qwix, beside the plain one."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from common import FP8_DIFF
from gemma.gm.nn import _config, _modules, _transformer  # gemma.gm.nn needs an older kauldron

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples/adapters"))
import qwix_provider

STEPS, SHAPE = 4, (2, 64)
SMALL = _config.TransformerConfig(
    num_embed=256, embed_dim=128, hidden_dim=256, num_heads=4, num_kv_heads=2, head_dim=32,
    final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
    attention_types=(_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL),
    sliding_window_size=16, transpose_gating_einsum=True,
)  # fmt: skip
LAYER = (
    "attn/q_einsum [4, 128, 32]", "attn/kv_einsum [2, 2, 128, 32]",
    "attn/attn_vec_einsum [4, 32, 128]", "mlp [2, 256, 128]", "mlp [256, 128]",
)  # fmt: skip


def model(**config):
    changed = dataclasses.replace(SMALL, **config)
    return _transformer.Transformer(config=changed, tokens="tokens")


def tokens():
    return jax.random.randint(jax.random.key(3), (SHAPE[0], SHAPE[1] + 1), 0, SMALL.num_embed)


def train(model, params) -> np.ndarray:
    """Returns the loss before each of STEPS steps of Adam."""
    data, optimizer = tokens(), optax.adam(3e-3)

    def loss(params):
        logits = model.apply(params, data[:, :-1]).logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return value, optax.apply_updates(params, updates), state

    state, losses = optimizer.init(params), []
    for _ in range(STEPS):
        value, params, state = step(params, state)
        losses.append(value)
    return np.array(losses)


@pytest.fixture(scope="module")
def params():
    made = model().init(jax.random.key(0), tokens()[:, :-1])
    return jax.tree.map(lambda x: x.astype(jnp.float32), made)


def through_qwix(module_path=".*", **config):
    provider = qwix_provider.Fp8Provider([qwix.QuantizationRule(module_path=module_path)])
    return provider, qwix.quantize_model(model(**config), provider)


def diff(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.sum((a - b) ** 2) / np.sum(a * a + b * b)


def test_every_layers_products_are_converted_and_reported(params, monkeypatch):
    provider, chosen = through_qwix()
    logits = chosen.apply(params, tokens()[:, :-1]).logits
    layers = {f"layer_{i}/{name}": "FP8" for i in range(SMALL.num_layers) for name in LAYER}
    # Logits multiply by the table transposed, in which qwix finds no weight.
    assert provider.report == layers | {"embedder [128, 256]": "no weight is found in it"}
    plain = model().apply(params, tokens()[:, :-1]).logits
    assert (logits != plain).any()
    # Errors of products behind each other add up; FP8_DIFF is the bound of one.
    assert diff(logits, plain) < SMALL.num_layers * len(LAYER) * FP8_DIFF
    monkeypatch.setattr(qwix_provider.fp8, "fp8_dot_general", jax.lax.dot_general)
    jax.clear_caches()  # what was traced before has FP8's products
    same = through_qwix()[1].apply(params, tokens()[:, :-1]).logits
    assert diff(same, plain) < 1e-6  # so nothing but FP8 differs


def test_training_stays_near_the_plain_one(params, record_property):
    plain = train(model(), params)
    ours = train(through_qwix()[1], params)
    both = {"own": plain.tolist(), "adapter": ours.tolist()}
    record_property("gemma 3, FP8 products", json.dumps(both))
    assert np.isfinite(ours).all() and ours[-1] < 0.9 * ours[0]
    assert (ours != plain).all()
    np.testing.assert_allclose(ours, plain, rtol=0, atol=0.02 * plain[0])


def test_a_rule_for_some_modules(params):
    provider, chosen = through_qwix(module_path=".*mlp.*")
    chosen.apply(params, tokens()[:, :-1])
    assert provider.report and all("mlp" in name for name in provider.report)
