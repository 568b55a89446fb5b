"""examples/deepseek: a checkpoint in the published layout gives the logits of a float32 run."""

import dataclasses
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / "deepseek"))
        yield {name: importlib.import_module(name) for name in ("model", "files", "serve", "train")}


@pytest.fixture(scope="module")
def config(example):
    return example["model"].Config(
        hidden_size=128, layers=2, heads=2, q_rank=128, kv_rank=64, dense_features=128,
        expert_features=128, experts=8, top_k=2, groups=4, top_groups=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(example, config, tmp_path_factory):
    """A checkpoint of a model with random weights."""
    folder = tmp_path_factory.mktemp("deepseek")
    example["files"].save(example["model"].Model(config, nnx.Rngs(0)), folder)
    return folder


TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)


# ---- the same model in float32, written from the paper ------------------------------------------


def real(x):
    """A matrix [..., in, out] in float32, of what the checkpoint has."""
    if isinstance(x, fp8.QArray):
        return jnp.swapaxes(fp8.dequantize(x), -1, -2).astype(jnp.float32)
    return x.astype(jnp.float32)


def as_fp8(x):
    """x after a cast to FP8, as each product of the model makes of its left operand."""
    rows = x.reshape(-1, x.shape[-1])
    return fp8.dequantize(fp8.quantize(rows)).astype(jnp.float32).reshape(x.shape)


def norm(x, weight):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight.astype(jnp.float32)


def rotated(x):
    """Neighbours as complex numbers, turned by their position."""
    half = x.shape[-1] // 2
    pairs = x.reshape(*x.shape[:-1], half, 2)
    angle = jnp.arange(x.shape[1])[:, None, None] * 1e4 ** (-jnp.arange(half) / half)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * jnp.exp(1j * angle)
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attention(c, p, x, cast):
    b, s, _ = x.shape
    q = cast(norm(cast(x) @ real(p["q_a"]), p["q_a_norm"])) @ real(p["q_b"])
    q = q.reshape(b, s, c.heads, -1)
    q = jnp.concatenate([q[..., : c.nope_dim], rotated(q[..., c.nope_dim :])], -1)
    both = cast(x) @ real(p["kv_a"])
    key = rotated(both[:, :, None, c.kv_rank :])
    latent = cast(norm(both[..., : c.kv_rank], p["kv_a_norm"]))
    kv = (latent @ real(p["kv_b"])).reshape(b, s, c.heads, -1)
    shared = jnp.broadcast_to(key, (b, s, c.heads, c.rope_dim))
    k = jnp.concatenate([kv[..., : c.nope_dim], shared], -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (c.nope_dim + c.rope_dim) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), kv[..., c.nope_dim :])
    return cast(mixed.reshape(b, s, -1)) @ real(p["o"])


def swiglu(p, x, cast, e=...):
    wi_0, wi_1, wo = (real(p[name])[e] for name in ("wi_0", "wi_1", "wo"))
    return cast(jax.nn.silu(cast(x) @ wi_0) * (cast(x) @ wi_1)) @ wo


def experts(c, p, x, cast):
    """Returns y, and the choice of each token in the order of experts [b, s, top_k]."""
    choices = np.zeros((*x.shape[:2], c.top_k), int)
    score = jax.nn.sigmoid(x @ real(p["gate_kernel"]))
    y = swiglu(p["shared"], x, cast)
    size = c.experts // c.groups
    for place in np.ndindex(x.shape[:2]):
        steered = np.asarray(score[place] + p["correction_bias"])
        two = np.sort(steered.reshape(c.groups, size))[:, -2:].sum(1)
        allowed = np.isin(np.arange(c.experts) // size, np.argsort(-two)[: c.top_groups])
        chosen = np.argsort(-np.where(allowed, steered, -np.inf))[: c.top_k]
        weights = c.scaling * score[place][chosen] / score[place][chosen].sum()
        for e, weight in zip(chosen, weights, strict=True):
            y = y.at[place].add(weight * swiglu(p["experts"], x[place], cast, e))
        choices[place] = np.sort(chosen)
    return y, choices


def in_float32(c, tree, tokens, cast=lambda x: x):
    x = tree["embed_tokens"].astype(jnp.float32)[tokens]
    for index in range(c.layers):
        p = tree["layers"][str(index)]
        x = x + attention(c, p["attention"], norm(x, p["attention_norm"]), cast)
        inner = norm(x, p["mlp_norm"])
        if "mlp" in p:
            y, choices = swiglu(p["mlp"], inner, cast), None
        else:
            y, choices = experts(c, p, inner, cast)
        x = x + y
    return norm(x, tree["norm"]) @ real(tree["lm_head"]), choices


def error(got, right) -> float:
    got, right = np.asarray(got, np.float64), np.asarray(right, np.float64)
    return float(np.linalg.norm(got - right) / np.linalg.norm(right))


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(example, folder):
    """Logits and routings of the loaded model, without a cache."""
    return nnx.jit(lambda model: model(TOKENS)[::2])(example["files"].load(folder))


@pytest.fixture(scope="module")
def logits(found):
    return found[0]


def test_the_files_have_the_published_names_and_types(folder, config):
    tensors = checkpoint.load(folder)
    last = "model.layers.1.mlp."
    for name in ("experts.7.down_proj", "experts.0.gate_proj", "shared_experts.up_proj"):
        assert isinstance(tensors[f"{last}{name}.weight"], fp8.QArray)
    assert tensors[f"{last}gate.weight"].shape == (8, 128)
    assert tensors[f"{last}gate.e_score_correction_bias"].dtype == jnp.float32
    assert tensors["model.layers.0.self_attn.kv_a_layernorm.weight"].dtype == jnp.bfloat16
    stored = json.loads((folder / "config.json").read_text())
    assert stored["n_group"] == config.groups
    assert stored["quantization_config"]["weight_block_size"] == [128, 128]


def same_choice(one, other):
    """Whether a token goes to the same experts. Of two nearly equal ones either may be chosen."""
    return (np.sort(one, -1) == np.sort(other, -1)).all(-1)


def test_logits_are_those_of_float32_within_the_error_of_fp8(folder, config, found):
    logits, routings = found
    tree = checkpoint.load_parameters(folder, checkpoint.DEEPSEEK_V3)
    right, choices = in_float32(config, tree, TOKENS)
    casts, with_casts = in_float32(config, tree, TOKENS, as_fp8)
    # What casts alone do to a float32 run, ten of them one behind the other.
    same = same_choice(with_casts, choices)
    of_fp8 = error(casts[same], right[same])
    same = same_choice(np.asarray(routings[-1].expert_index).reshape(choices.shape), choices)
    assert same.mean() > 0.7
    assert error(logits[same], right[same]) < 1.3 * of_fp8 < 0.2


def test_the_cache_gives_the_same_logits(example, config, folder, logits):
    """A token alone multiplies by latents as they are, which others first cast to FP8."""
    model, cache = example["files"].load(folder), example["model"].Cache.empty(config, 2, 16)
    run = nnx.jit(lambda model, tokens, cache: model(tokens, cache))
    first, cache, _ = run(model, TOKENS[:, :10], cache)
    two, _, _ = run(model, TOKENS[:, 10:], cache)
    assert error(jnp.concatenate([first, two], 1), logits) < 0.02
    third, cache, _ = run(model, TOKENS[:, 10:11], cache)
    last, cache, routings = run(model, TOKENS[:, 11:], cache)
    assert int(cache.length) == 12
    tree = checkpoint.load_parameters(folder, checkpoint.DEEPSEEK_V3)
    right, choices = in_float32(config, tree, TOKENS)
    same = same_choice(np.asarray(routings[-1].expert_index), choices[:, -1])
    assert same.any()
    assert error(last[same, 0], right[same, -1]) < 0.12
    assert error(jnp.concatenate([third, last], 1), logits[:, 10:]) < 0.12


def test_experts_over_a_mesh(example, folder, found):
    mesh = jax.make_mesh((4,), ("expert",))
    with jax.set_mesh(mesh):
        model = example["files"].load(folder, mesh)
        held = model.layers[1].mlp.moe.kernels.get_value()
        assert jax.tree.leaves(held)[0].sharding.spec[0] == "expert"
        got, routings = nnx.jit(lambda model: model(TOKENS)[::2])(model)
    chosen = [np.asarray(r[-1].expert_index) for r in (routings, found[1])]
    same = same_choice(*chosen).reshape(TOKENS.shape)
    assert same.mean() > 0.7
    # Another order of bf16 sums, and so other roundings to FP8.
    assert error(got[same], found[0][same]) < 0.12


@pytest.fixture(scope="module")
def trained(example, config):
    return example["train"].train(config, 12, batch=8, context=32)


def test_it_trains(trained):
    model, losses = trained
    assert losses[-1] < losses[0] - 0.5
    assert np.abs(np.asarray(model.layers[1].mlp.bias[...])).max() > 0  # balance was kept


def test_it_trains_over_a_mesh(example, config, trained):
    """The same steps. The first one has the rate 0, so the third loss is of new numbers."""
    over = dataclasses.replace(config, expert_axis="expert")
    with jax.set_mesh(jax.make_mesh((4,), ("expert",))):
        model, losses = example["train"].train(over, 3, batch=8, context=32)
    np.testing.assert_allclose(losses, trained[1][:3], atol=0.02)
    assert losses[2] < losses[0]
    assert model.layers[1].mlp.moe.wi_0[...].sharding.spec[0] == "expert"
