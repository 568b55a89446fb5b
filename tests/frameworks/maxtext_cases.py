"""MaxText trains small Mixtral and DeepSeek models, with its own products and with the adapter's.

Each model is MaxText's Transformer of a published config, made small. Its training loop is not run:
the steps are Adam's, with the same weights and tokens on both sides.
"""

import functools
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.models import models
from maxtext.utils import maxtext_utils

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples/adapters"))
import maxtext_fp8

BASE = pathlib.Path(pyconfig.__file__).with_name("base.yml")
STEPS, BATCH, LENGTH = 4, 2, 64
SMALL = {
    "run_name": "small", "override_model_config": True, "enable_checkpointing": False,
    "skip_jax_distributed_system": True, "log_config": False, "hardware": "cpu",
    "attention": "dot_product", "scan_layers": False, "sparse_matmul": True, "dtype": "bfloat16",
    "base_emb_dim": 128, "base_num_query_heads": 2, "base_num_kv_heads": 2, "head_dim": 64,
    "base_mlp_dim": 128, "base_moe_mlp_dim": 128, "base_num_decoder_layers": 2, "vocab_size": 256,
    "num_experts": 4, "num_experts_per_tok": 2,
    "max_target_length": LENGTH, "per_device_batch_size": BATCH,
}  # fmt: skip
LATENT = {  # DeepSeek's: one dense layer, then one with a shared expert
    "first_num_dense_layers": 1, "shared_experts": 1, "kv_lora_rank": 64, "v_head_dim": 64,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
}  # fmt: skip
GROUPED = {"q_lora_rank": 64, "num_experts": 8, "n_routing_groups": 4, "topk_routing_group": 2}
MODELS = {"mixtral-8x7b": {}, "deepseek2-16b": LATENT, "deepseek3-671b": LATENT | GROUPED}


def train(name: str, quant, folder: pathlib.Path, weights=None, **how) -> tuple[dict, np.ndarray]:
    """Trains STEPS steps. Returns the weights before the first, and the loss before each.

    Give the weights of another model to start from them. The same seed is not enough: MaxText draws
    random keys for a quantization, so the weights that follow are others.
    """
    jax.clear_caches()  # what was traced before has other products
    settings = SMALL | MODELS[name] | {"model_name": name, "base_output_directory": str(folder)}
    config = pyconfig.initialize(["", str(BASE)], **settings, **how)
    mesh = maxtext_utils.get_mesh_from_config(config)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        model = models.Transformer(config, mesh, quant, rngs=nnx.Rngs(params=0, dropout=1, aqt=2))
        state = nnx.state(model, nnx.Not(nnx.RngState))
        own = jax.tree.map(np.asarray, nnx.to_pure_dict(state))  # on no mesh
        if weights is not None:
            assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, weights)
            nnx.replace_by_pure_dict(state, weights)
            nnx.update(model, state)
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        return own, np.array([step(model, optimizer) for _ in range(STEPS)])


@nnx.jit
def step(model, optimizer):
    tokens = jax.random.randint(jax.random.key(3), (BATCH, LENGTH + 1), 0, 256)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))

    def loss(model):
        segments = jnp.ones_like(positions)
        logits = model(tokens[:, :-1], positions, segments, enable_dropout=False)
        nnx.pop(model, nnx.Intermediate)
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@pytest.fixture(scope="module", params=MODELS)
def own(request, tmp_path_factory):
    """A model's name, its weights before training, and its losses without a quantization."""
    folder = tmp_path_factory.mktemp("own")
    # NOTE: without megablox its experts are lax.ragged_dot.
    return request.param, *train(request.param, None, folder, megablox=False)


@pytest.fixture
def adapted(own, monkeypatch, tmp_path, record_property):
    """Trains the model with the adapter from the same weights, and keeps the losses of both."""
    return functools.partial(train_adapted, own, monkeypatch, tmp_path, record_property)


def train_adapted(own, monkeypatch, folder, record_property, products: str) -> np.ndarray:
    name, weights, _ = own
    offsets = []

    def gmm(*args, group_offset, **kw):
        offsets.append(group_offset)
        return maxtext_fp8.gmm(*args, group_offset=group_offset, **kw)

    monkeypatch.setattr(moe, "mblx", types.SimpleNamespace(gmm=gmm))
    _, losses = train(name, maxtext_fp8.Fp8BlockQuantization(), folder, weights, megablox=True)
    layers = SMALL["base_num_decoder_layers"] - MODELS[name].get("first_num_dense_layers", 0)
    assert len(offsets) >= 3 * layers  # gate, up and down of each layer with experts
    both = {"own": own[2].tolist(), "adapter": losses.tolist()}
    record_property(f"{name}, {products}", json.dumps(both))
    return losses


def matmul(x, w, preferred_element_type):
    y = jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32))
    return y.astype(preferred_element_type or jnp.result_type(x, w))


def ragged_dot(x, w, sizes, precision, dtype, offset):
    assert offset is None or int(offset) == 0  # one device has all experts
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=dtype)


def test_the_adapter_alone_changes_nothing(own, adapted, monkeypatch):
    """With products of float32 in place of FP8's: what is left is rounding to bf16."""
    plain = types.SimpleNamespace(fp8_matmul=matmul, fp8_ragged_dot=ragged_dot)
    monkeypatch.setattr(maxtext_fp8, "fp8", plain)
    np.testing.assert_allclose(adapted("float32 products"), own[2], rtol=3e-3)


def test_training_stays_near_maxtexts_own(own, adapted):
    plain, ours = own[2], adapted("FP8 products")
    assert np.isfinite(ours).all() and ours[-1] < 0.8 * ours[0]
    assert (ours != plain).all()
    assert abs(ours[0] / plain[0] - 1) < 3e-3  # before the first step
    np.testing.assert_allclose(ours, plain, rtol=0, atol=0.02 * plain[0])
