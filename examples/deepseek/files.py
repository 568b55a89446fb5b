"""The model's parameters from and to a checkpoint in DeepSeek's published layout, in block FP8."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model import Balance, Config, Dense, Experts, Model

import jax_fp8gemm as fp8
from jax_fp8gemm import checkpoint
from jax_fp8gemm.nnx import Fp8Linear, Fp8MoE

# config.json's names of sizes.
SIZES = {
    "vocab_size": "vocabulary", "hidden_size": "hidden_size", "num_hidden_layers": "layers",
    "first_k_dense_replace": "dense_layers", "num_attention_heads": "heads",
    "q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank", "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim", "v_head_dim": "value_dim",
    "intermediate_size": "dense_features", "moe_intermediate_size": "expert_features",
    "n_routed_experts": "experts", "num_experts_per_tok": "top_k", "n_group": "groups",
    "topk_group": "top_groups", "n_shared_experts": "shared_experts",
    "routed_scaling_factor": "scaling",
}  # fmt: skip
# Parts of attention by their names in checkpoint.DEEPSEEK_V3.
PROJECTIONS = {
    "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj",
    "o": "o_proj",
}  # fmt: skip
NORMS = {"q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm"}
FFN = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}


def save(model: Model, folder: pathlib.Path) -> None:
    """Writes a trained model: its matrices in FP8, as published, the rest in bf16."""
    tree = jax.tree.map_with_path(_as_published, _tree_of(model))
    config = {name: getattr(model.config, ours) for name, ours in SIZES.items()}
    checkpoint.save_parameters(
        folder, tree, checkpoint.DEEPSEEK_V3, config={"model_type": "deepseek_v3", **config}
    )


def load(folder: pathlib.Path, mesh: Mesh | None = None) -> Model:
    """Returns a model for inference, in FP8 as stored; experts over the mesh's axis "expert"."""
    stored = json.loads((folder / "config.json").read_text())
    config = Config(**{ours: stored[name] for name, ours in SIZES.items()})
    sharding = None
    if mesh is not None:
        config = dataclasses.replace(config, expert_axis="expert")
        split = NamedSharding(mesh, PartitionSpec("expert"))
        whole = NamedSharding(mesh, PartitionSpec())

        def sharding(name: str) -> NamedSharding:
            return split if ".experts." in name else whole

    tree = checkpoint.load_parameters(folder, checkpoint.DEEPSEEK_V3, sharding=sharding)
    model = nnx.eval_shape(lambda: Model(config, nnx.Rngs(0)))
    model.embed_tokens.embedding = nnx.Param(tree["embed_tokens"])
    model.norm.scale = nnx.Param(tree["norm"])
    model.lm_head.kernel = nnx.Param(tree["lm_head"])
    for index, layer in enumerate(model.layers):
        _fill(layer, tree["layers"][str(index)], config)
    return model


def _tree_of(model: Model) -> dict:
    """Returns the parameters by the names of checkpoint.DEEPSEEK_V3."""
    layers = {}
    for index, layer in enumerate(model.layers):
        part, attention = layers.setdefault(str(index), {}), layer.self_attn
        part["attention"] = {n: getattr(attention, p).kernel[...] for n, p in PROJECTIONS.items()}
        part["attention"] |= {n: getattr(attention, p).scale[...] for n, p in NORMS.items()}
        part["attention_norm"] = layer.input_layernorm.scale[...]
        part["mlp_norm"] = layer.post_attention_layernorm.scale[...]
        if isinstance(layer.mlp, Dense):
            part["mlp"] = {n: getattr(layer.mlp, p).kernel[...] for n, p in FFN.items()}
            continue
        moe = layer.mlp.moe
        part |= {"gate_kernel": moe.gate_kernel[...], "correction_bias": layer.mlp.bias[...]}
        part["experts"] = {n: getattr(moe, n)[...] for n in FFN}
        part["shared"] = {n: getattr(moe, f"shared_{n}")[...] for n in FFN}
    return {
        "embed_tokens": model.embed_tokens.embedding[...],
        "norm": model.norm.scale[...],
        "lm_head": model.lm_head.kernel[...],
        "layers": layers,
    }


def _as_published(path: tuple, x: jax.Array) -> jax.Array:
    """bf16, but for what becomes FP8 and for the bias of the router."""
    names = [key.key for key in path]
    quantized = {"attention", "mlp", "experts", "shared"} & set(names) and x.ndim > 1
    return x if quantized or names[-1] == "correction_bias" else x.astype(jnp.bfloat16)


def _fill(layer: nnx.Module, part: dict, config: Config) -> None:
    """Puts stored arrays in the place of the shapes that a layer has."""
    attention = layer.self_attn
    for name, ours in PROJECTIONS.items():
        setattr(attention, ours, Fp8Linear.from_quantized(part["attention"][name]))
    for name, ours in NORMS.items():
        getattr(attention, ours).scale = nnx.Param(part["attention"][name])
    layer.input_layernorm.scale = nnx.Param(part["attention_norm"])
    layer.post_attention_layernorm.scale = nnx.Param(part["mlp_norm"])
    if isinstance(layer.mlp, Dense):
        for name, ours in FFN.items():
            setattr(layer.mlp, ours, Fp8Linear.from_quantized(part["mlp"][name]))
        return
    assert isinstance(layer.mlp, Experts)
    layer.mlp.bias = Balance(part["correction_bias"])
    layer.mlp.moe = Fp8MoE.from_quantized(
        part["gate_kernel"],
        fp8.prepare_experts(fp8.ExpertKernels(**part["experts"])),
        shared=fp8.ExpertKernels(**part["shared"]),
        **dict(layer.mlp.moe.options),
    )
