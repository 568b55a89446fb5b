"""DeepSeek-V3 in Flax nnx: latent attention, dense and mixture-of-experts layers, all GEMMs in FP8.

What stays out of FP8 is what DeepSeek-V3 leaves out: embedding, norms, attention scores, router
and head (arXiv 2412.19437, section 3.3.1). Names of parts follow the published checkpoint.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import jax_fp8gemm as fp8
from jax_fp8gemm.nnx import Fp8Linear, Fp8MoE

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes; the defaults are a model that trains on a CPU, `V3` is the published one."""

    vocabulary: int = 256
    hidden_size: int = 256
    layers: int = 3
    dense_layers: int = 1  # the first ones have no experts
    heads: int = 4
    q_rank: int = 128  # of the latent that queries are made of
    kv_rank: int = 128  # of the latent that keys and values are made of, which the cache holds
    nope_dim: int = 32  # of a head's query and key, without rotary embedding
    rope_dim: int = 32  # with it; one key for all heads
    value_dim: int = 32
    dense_features: int = 512
    expert_features: int = 128
    experts: int = 16
    top_k: int = 4
    groups: int = 4
    top_groups: int = 2
    shared_experts: int = 1
    scaling: float = 2.5  # of the gate weights
    expert_axis: str | None = None  # the mesh axis over which experts are split


V3 = Config(
    vocabulary=129280, hidden_size=7168, layers=61, dense_layers=3, heads=128, q_rank=1536,
    kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, dense_features=18432,
    expert_features=2048, experts=256, top_k=8, groups=8, top_groups=4,
)  # fmt: skip


class Balance(nnx.Variable):
    """What steers the choice of experts: no parameter, for it has no gradient."""


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> Fp8Linear:
    return Fp8Linear(inputs, outputs, use_bias=False, dtype=BF16, rngs=rngs)


def scores_of(how: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns einsum of bf16 operands in float32."""
    return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of neighbours (2i, 2i+1) of x [b, s, heads, d] at positions [s]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What attention keeps of the tokens it saw, for every layer.

    Attributes:
      latent: bf16 [layers, b, room, kv_rank].
      key: bf16 [layers, b, room, rope_dim], with its rotary embedding.
      length: int32 [], the tokens that are in it.
    """

    latent: jax.Array
    key: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int, room: int) -> "Cache":
        lead = (config.layers, batch, room)
        return cls(
            jnp.zeros((*lead, config.kv_rank), BF16),
            jnp.zeros((*lead, config.rope_dim), BF16),
            jnp.zeros((), jnp.int32),
        )


class Attention(nnx.Module):
    """Multi-head latent attention (section 2.1.1): keys and values come from one latent."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = self.config = config
        self.q_a_proj = linear(c.hidden_size, c.q_rank, rngs)
        self.q_a_layernorm = nnx.RMSNorm(c.q_rank, dtype=BF16, rngs=rngs)
        self.q_b_proj = linear(c.q_rank, c.heads * (c.nope_dim + c.rope_dim), rngs)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_rank + c.rope_dim, rngs)
        self.kv_a_layernorm = nnx.RMSNorm(c.kv_rank, dtype=BF16, rngs=rngs)
        self.kv_b_proj = linear(c.kv_rank, c.heads * (c.nope_dim + c.value_dim), rngs)
        self.o_proj = linear(c.heads * c.value_dim, c.hidden_size, rngs)

    def __call__(self, x, positions, kept=None):
        """Returns y [b, s, h], and latent and key of all tokens: `kept` with the new ones in it."""
        c, (b, s, _) = self.config, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).reshape(b, s, c.heads, -1)
        q_nope, q_rope = jnp.split(q, [c.nope_dim], -1)
        latent, key = jnp.split(self.kv_a_proj_with_mqa(x), [c.kv_rank], -1)
        latent, key = self.kv_a_layernorm(latent), rotate(key[:, :, None], positions)[:, :, 0]
        if kept is not None:
            at = (0, positions[0], 0)
            latent = jax.lax.dynamic_update_slice(kept[0], latent, at)
            key = jax.lax.dynamic_update_slice(kept[1], key, at)
        turned = scores_of("bqhd,bkd->bhqk", rotate(q_rope, positions), key)
        seen = jnp.arange(latent.shape[1]) <= positions[:, None]

        def shares(scores):
            scores = (scores + turned) * (c.nope_dim + c.rope_dim) ** -0.5
            return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1).astype(BF16)

        if s == 1:  # one token beside many: keys and values of the others stay latent
            to_key, to_value = jnp.split(self._kv_b(), [c.nope_dim], -1)
            asked = jnp.einsum("bqhd,chd->bqhc", q_nope, to_key)
            share = shares(scores_of("bqhc,bkc->bhqk", asked, latent))
            found = jnp.einsum("bhqk,bkc->bqhc", share, latent)
            mixed = jnp.einsum("bqhc,chd->bqhd", found, to_value)
        else:
            kv = self.kv_b_proj(latent).reshape(b, latent.shape[1], c.heads, -1)
            k_nope, value = jnp.split(kv, [c.nope_dim], -1)
            share = shares(scores_of("bqhd,bkhd->bhqk", q_nope, k_nope))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", share, value)
        return self.o_proj(mixed.reshape(b, s, -1)), (latent, key)

    def _kv_b(self) -> jax.Array:
        """Returns what kv_b_proj multiplies by, in bf16 [kv_rank, heads, nope_dim + value_dim]."""
        held = self.kv_b_proj
        if held.qvalue is None:
            kernel = held.kernel[...].astype(BF16)
        else:
            kernel = fp8.dequantize(fp8.QArray(held.qvalue[...], held.scale[...]), BF16).T
        return kernel.reshape(self.config.kv_rank, self.config.heads, -1)


class Dense(nnx.Module):
    """The feed-forward block of the first layers, SwiGLU."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        h, f = config.hidden_size, config.dense_features
        self.gate_proj, self.up_proj = linear(h, f, rngs), linear(h, f, rngs)
        self.down_proj = linear(f, h, rngs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Experts(nnx.Module):
    """The feed-forward block of the others: a shared expert, and top_k of many in groups."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = config
        self.moe = Fp8MoE(
            c.hidden_size, c.expert_features, c.experts, top_k=c.top_k, dtype=BF16, rngs=rngs,
            shared_features=c.shared_experts * c.expert_features, score_function="sigmoid",
            routed_scaling_factor=c.scaling, n_group=c.groups, topk_group=c.top_groups,
            expert_axis=c.expert_axis,
        )  # fmt: skip
        self.bias = Balance(jnp.zeros(c.experts))

    def __call__(self, x):
        return self.moe(x, bias=self.bias[...])


class Layer(nnx.Module):
    def __init__(self, config: Config, index: int, rngs: nnx.Rngs):
        self.input_layernorm = nnx.RMSNorm(config.hidden_size, dtype=BF16, rngs=rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(config.hidden_size, dtype=BF16, rngs=rngs)
        self.mlp = (Dense if index < config.dense_layers else Experts)(config, rngs)

    def __call__(self, x, positions, kept=None):
        y, kept = self.self_attn(self.input_layernorm(x), positions, kept)
        x = x + y
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + y, kept, routing


class Model(nnx.Module):
    """Tokens to logits.

    Example:
      logits, _, routings = Model(Config(), nnx.Rngs(0))(tokens)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocabulary, config.hidden_size, dtype=BF16, rngs=rngs)
        self.layers = nnx.List([Layer(config, i, rngs) for i in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, dtype=BF16, rngs=rngs)
        self.lm_head = nnx.Linear(
            config.hidden_size, config.vocabulary, use_bias=False, dtype=BF16, rngs=rngs
        )

    def __call__(
        self, tokens: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, list[fp8.Routing]]:
        """Args: tokens int32 [b, s], and the cache of those before them.

        Returns f32 logits [b, s, vocabulary], the cache with these tokens, and the routing of each
        layer with experts.
        """
        start = 0 if cache is None else cache.length
        positions = start + jnp.arange(tokens.shape[1])
        x, routings, all_kept = self.embed_tokens(tokens), [], []
        for index, layer in enumerate(self.layers):
            kept = None if cache is None else (cache.latent[index], cache.key[index])
            x, kept, routing = layer(x, positions, kept)
            all_kept.append(kept)
            routings += [routing] if routing is not None else []
        logits = self.lm_head(self.norm(x)).astype(jnp.float32)
        if cache is not None:
            latent, key = (jnp.stack(parts) for parts in zip(*all_kept, strict=True))
            cache = Cache(latent, key, cache.length + tokens.shape[1])
        return logits, cache, routings
