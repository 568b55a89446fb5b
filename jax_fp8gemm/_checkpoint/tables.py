"""Tables of names: which tensors of a published model are which parameters."""

import dataclasses
from typing import Literal

Part = Literal["all", "first half", "second half", "even", "odd"]
Layout = Literal["as stored", "kernel", "kernel [in, out]", "bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a parameter, and the tensor of a checkpoint where it lies.

    Attributes:
      parameter: its name, as in "layers.{layer}.experts.wi_0"; dots part the levels of a tree.
      stored: the tensor's name. `{layer}` is any number, the same in both. A number that only
        `stored` has, `{expert}`, counts tensors that are stacked along dim 0 of the parameter.
      layout: "kernel": stored [..., out, in]. In floats the parameter is [..., in, out], as layers
        have kernels; in FP8 it is a QArray [..., out, in], which prepare_weight takes for that.
        "kernel [in, out]": stored like this in floats, and like "kernel" in FP8.
        "bias": stored [..., out]. "as stored": anything else.
      part: what of `out` it is, where one tensor holds gate and up: a half, or every other number.
      fp8: whether `save_parameters` quantizes it where it is in floats.

    Example:
      Row(parameter="layers.{layer}.up", stored="h.{layer}.up.weight", layout="kernel", fp8=True)
    """

    parameter: str
    stored: str
    layout: Layout = "as stored"
    part: Part = "all"
    fp8: bool = False


Table = tuple[Row, ...]

_LAYER, _OURS = "model.layers.{layer}.", "layers.{layer}."


def _row(parameter: str, stored: str, layout: Layout = "as stored", *, fp8: bool = False) -> Row:
    return Row(parameter=_OURS + parameter, stored=_LAYER + stored, layout=layout, fp8=fp8)


def _linear(parameter: str, stored: str) -> Row:
    """A matrix in FP8."""
    return _row(parameter, f"{stored}.weight", "kernel", fp8=True)


def _ffn(parameter: str, stored: str) -> Table:
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    return tuple(_linear(f"{parameter}.{ours}", f"{stored}.{name}") for ours, name in names.items())


def _gate_up(stored: str, layout: Layout, parts: tuple[Part, Part], fp8: bool = True) -> Table:
    """Gate and up of all experts in one tensor."""
    return tuple(
        Row(
            parameter=f"{_OURS}experts.{ours}{'_bias' if layout == 'bias' else ''}",
            stored=_LAYER + stored,
            layout=layout,
            part=part,
            fp8=fp8,
        )
        for ours, part in zip(("wi_0", "wi_1"), parts, strict=True)
    )


_ENDS: Table = (
    Row(parameter="embed_tokens", stored="model.embed_tokens.weight"),
    Row(parameter="norm", stored="model.norm.weight"),
    Row(parameter="lm_head", stored="lm_head.weight", layout="kernel"),
    _row("attention_norm", "input_layernorm.weight"),
    _row("mlp_norm", "post_attention_layernorm.weight"),
)
_QKVO: Table = (
    *(_linear(f"attention.{x}", f"self_attn.{x}_proj") for x in "qkvo"),
    *(_row(f"attention.{x}_bias", f"self_attn.{x}_proj.bias", "bias") for x in "qkvo"),
    *(_row(f"attention.{x}_norm", f"self_attn.{x}_norm.weight") for x in "qk"),
)
# What runs the experts, one by one as published, or stacked as newer versions of transformers save.
_EXPERTS: Table = (
    _row("gate_kernel", "mlp.gate.weight", "kernel"),
    *_ffn("experts", "mlp.experts.{expert}"),
    *_gate_up("mlp.experts.gate_up_proj", "kernel", ("first half", "second half")),
    _row("experts.wo", "mlp.experts.down_proj", "kernel", fp8=True),
)
_DENSE_AND_SHARED: Table = (
    _row("correction_bias", "mlp.gate.e_score_correction_bias"),
    *_ffn("shared", "mlp.shared_experts"),
    *_ffn("mlp", "mlp"),
)
_NEXT_TOKEN: Table = (
    _row("mtp.embed_norm", "enorm.weight"),
    _row("mtp.hidden_norm", "hnorm.weight"),
    _row("mtp.projection", "eh_proj.weight", "kernel"),
    _row("mtp.embed_tokens", "embed_tokens.weight"),
    _row("mtp.head_norm", "shared_head.norm.weight"),
    _row("mtp.head", "shared_head.head.weight", "kernel"),
)
_LATENT: Table = (
    _linear("attention.q", "self_attn.q_proj"),  # of models that do not compress queries
    _linear("attention.q_a", "self_attn.q_a_proj"),
    _row("attention.q_a_norm", "self_attn.q_a_layernorm.weight"),
    _linear("attention.q_b", "self_attn.q_b_proj"),
    _linear("attention.kv_a", "self_attn.kv_a_proj_with_mqa"),
    _row("attention.kv_a_norm", "self_attn.kv_a_layernorm.weight"),
    _linear("attention.kv_b", "self_attn.kv_b_proj"),
    _linear("attention.o", "self_attn.o_proj"),
)

DEEPSEEK_V3: Table = (*_ENDS, *_LATENT, *_EXPERTS, *_DENSE_AND_SHARED, *_NEXT_TOKEN)
QWEN3_MOE: Table = (*_ENDS, *_QKVO, *_EXPERTS, *_ffn("mlp", "mlp"))
GLM_4_5: Table = (*_ENDS, *_QKVO, *_EXPERTS, *_DENSE_AND_SHARED, *_NEXT_TOKEN)
GPT_OSS: Table = (
    *_ENDS,
    *(dataclasses.replace(row, fp8=False) for row in _QKVO),
    _row("attention.sinks", "self_attn.sinks"),
    _row("gate_kernel", "mlp.router.weight", "kernel"),
    _row("gate_bias", "mlp.router.bias", "bias"),
    *_gate_up("mlp.experts.gate_up_proj", "kernel [in, out]", ("even", "odd")),
    *_gate_up("mlp.experts.gate_up_proj_bias", "bias", ("even", "odd"), fp8=False),
    _row("experts.wo", "mlp.experts.down_proj", "kernel [in, out]", fp8=True),
    _row("experts.wo_bias", "mlp.experts.down_proj_bias", "bias"),
)
