"""The mixture of experts as a layer of nnx."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._moe.activations import is_gated
from jax_fp8gemm._moe.kernels import ExpertKernels, as_kernels, describe_kernels, without_biases
from jax_fp8gemm._moe.layer import FORMER_NAMES, OPTIONS, moe
from jax_fp8gemm._moe.placement import axes_of, sharding_names
from jax_fp8gemm._moe.router import options_beside
from jax_fp8gemm._moe.routing import Routing

kernel_init = nnx.initializers.lecun_normal()
expert_init = nnx.initializers.lecun_normal(batch_axis=(0,))  # fan-in of one expert

MATRICES_APART = ("wi_0", "wi_1", "wo")
BIASES_APART = ("wi_0_bias", "wi_1_bias", "wo_bias")


class Quantized(nnx.Variable):
    """An FP8 weight or its scales: no nnx.Param, so it has no gradient and no optimizer state."""


class Fp8MoE(nnx.Module):
    """A mixture of experts: `jax_fp8gemm.moe` with its parameters.

    Attributes:
      gate_kernel: Param [h, e], the router, which computes in float32.
      gate_bias: Param [e] with use_gate_bias, else None; it is added to the router's logits.
      wi_0, wi_1, wo: Params [e, h, f], [e, h, f], [e, f, h].
      shared_wi_0, shared_wi_1, shared_wo: Params [h, fs], [h, fs], [fs, h] of an expert that sees
        every token; None without.
      wi_0_bias, wi_1_bias, wo_bias: Params [e, f], [e, f], [e, h] with use_bias, else None;
        shared_wi_0_bias and so on likewise, without the dim e.
      kernels, shared_kernels: Quantized ExpertKernels of a layer that `from_quantized` made, in
        place of the Params but for gate_kernel; else None.
      options: what `moe` is called with, as pairs.

    Args:
      in_features: h, the width of x.
      hidden_features: f, the width of an expert.
      num_experts: e.
      top_k: experts of a token.
      shared_features: fs; 0 for none.
      dtype: of the computation; default: the input's.
      param_dtype: of the parameters.
      use_bias: whether the experts have biases, the shared one too.
      use_gate_bias: whether the router's logits have a bias.
      init: initializers by the name of the parameter, `nnx.with_partitioning` ones too. Biases
        are zeros by default.
      options: score_function, normalize, routed_scaling_factor, n_group, topk_group,
        capacity_factor, device_capacity_factor, expert_axis, tensor_axis, token_axes, mesh,
        exchange, wire, scale_rounding, shared_columns, cast_in_gemm, precision, activation and
        batch_invariant of `moe`.
        With expert_axis the parameters have sharding metadata (`out_sharding`) with it and
        tensor_axis, unless their initializers say otherwise. Where a mesh with these axes is in use
        (`jax.set_mesh`), they are made as shards.

    Example:
      y, routing = Fp8MoE(256, 1024, 8, top_k=2, rngs=nnx.Rngs(0))(x)
      loss = task_loss(y) + 0.01 * routing.aux_loss
    """

    gate_kernel: nnx.Param[jax.Array]
    gate_bias: nnx.Param[jax.Array] | None
    wi_0: nnx.Param[jax.Array]
    wi_1: nnx.Param[jax.Array]
    wo: nnx.Param[jax.Array]
    shared_wi_0: nnx.Param[jax.Array]
    shared_wi_1: nnx.Param[jax.Array]
    shared_wo: nnx.Param[jax.Array]
    wi_0_bias: nnx.Param[jax.Array] | None
    wi_1_bias: nnx.Param[jax.Array] | None
    wo_bias: nnx.Param[jax.Array] | None
    shared_wi_0_bias: nnx.Param[jax.Array] | None
    shared_wi_1_bias: nnx.Param[jax.Array] | None
    shared_wo_bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        *,
        top_k: int,
        shared_features: int = 0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = False,
        use_gate_bias: bool = False,
        init: Mapping[str, Initializer] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        shapes = _shapes(num_experts, in_features, hidden_features, shared_features)
        _check_names("init", init, shapes)
        _check_names("options", options, {*OPTIONS} - {"top_k"})
        expert_axis, tensor_axis = options.get("expert_axis"), options.get("tensor_axis")
        axes = axes_of("Fp8MoE", expert_axis, tensor_axis, options.get("token_axes"))
        gated = is_gated(options.get("activation", "swiglu"))
        for name, shape in shapes.items():
            matrix, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
            unused = name.startswith("shared_") and 0 in shapes[matrix]
            has_bias = use_gate_bias if name == "gate_bias" else use_bias
            if unused or (matrix.endswith("wi_1") and not gated) or (is_bias and not has_bias):
                setattr(self, name, nnx.data(None))
                continue
            default = expert_init if len(shape) == 3 else kernel_init
            make = init.get(name, nnx.initializers.zeros_init() if is_bias else default)
            value = make(rngs.params(), shape, param_dtype)
            setattr(self, name, _param(value, sharding_names(axes, name)))
        self.kernels: Quantized | None = nnx.data(None)
        self.shared_kernels: Quantized | None = nnx.data(None)
        self.dtype = dtype
        self.options = tuple(sorted({"top_k": top_k, **options}.items()))  # hashable

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        *,
        logits: jax.Array | None = None,
        routing: Routing | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Sends x [..., h] through the experts.

        Args:
          x: bf16, f16 or f32 [..., h].
          bias: f32 [e], steers the choice of experts; no parameter, because it has no gradient.
          logits: f32 [..., e], made elsewhere in place of `gate_kernel`.
          routing: likewise, the Routing of the tokens. The layer's own options of routing then do
            nothing, but for top_k, which it must have.

        Returns:
          y [..., h] of the layer's dtype, and the Routing of the tokens with its losses.
        """
        kernels, shared = self._matrices()
        has_gate = logits is None and routing is None
        return moe(
            x.astype(self.dtype or x.dtype),
            self.gate_kernel[...] if has_gate else None,
            kernels,
            shared=shared,
            bias=bias,
            gate_bias=self.gate_bias[...] if has_gate and self.gate_bias is not None else None,
            logits=logits,
            routing=routing,
            **options_beside("Fp8MoE", dict(self.options), routing),
        )

    def _matrices(self) -> tuple[ExpertKernels, ExpertKernels | None]:
        def made(prefix: str, held: Quantized | None) -> ExpertKernels:
            names = BIASES_APART if held is not None else (*MATRICES_APART, *BIASES_APART)
            params = ((name, getattr(self, prefix + name)) for name in names)
            found = {name: p[...] for name, p in params if p is not None}
            if held is None:
                return ExpertKernels(**found)
            return dataclasses.replace(held.get_value(), **found)

        has_shared = self.shared_wo is not None or self.shared_kernels is not None
        return made("", self.kernels), made("shared_", self.shared_kernels) if has_shared else None

    @classmethod
    def from_quantized(
        cls,
        gate_kernel: jax.Array,
        kernels: ExpertKernels,
        *,
        top_k: int,
        gate_bias: jax.Array | None = None,
        shared: ExpertKernels | None = None,
        dtype: Dtype | None = jnp.bfloat16,
        **options: Any,
    ) -> Self:
        """Returns a layer for inference that holds its experts in FP8; their biases are Params.

        Args:
          gate_kernel: [h, e].
          kernels: ExpertKernels of QArrays, see there; best as `prepare_experts` returns them.
          top_k: experts of a token.
          gate_bias: [e], added to the router's logits.
          shared: as kernels, of an expert that sees every token.
          dtype: of the computation; None: the input's.
          options: as of the class.

        Raises:
          ValueError: shapes or scales do not fit.
          TypeError: kernels are not in FP8.

        Example:
          layer = Fp8MoE.from_quantized(gate_kernel, prepare_experts(kernels), top_k=8)
        """
        op = "Fp8MoE.from_quantized"
        gated = is_gated(options.get("activation", "swiglu"))
        kernels = _checked_fp8(op, "kernels", kernels, 3, gated)
        if shared is not None:
            shared = _checked_fp8(op, "shared", shared, 2, gated)
        unused = {n: lambda *_: jnp.zeros(()) for n in ("gate_kernel", *MATRICES_APART)}
        e, h, f = kernels.sizes
        layer = cls(h, f, e, top_k=top_k, dtype=dtype, init=unused, rngs=nnx.Rngs(0))
        _check_names("options", options, {*OPTIONS} - {"top_k"})
        layer.options = tuple(sorted({"top_k": top_k, **options}.items()))
        layer.gate_kernel = nnx.Param(gate_kernel)
        if gate_bias is not None:
            layer.gate_bias = nnx.Param(gate_bias)
        for name in MATRICES_APART:
            setattr(layer, name, nnx.data(None))
        layer._hold("", kernels)
        if shared is not None:
            layer._hold("shared_", shared)
        return layer

    def _hold(self, prefix: str, kernels: ExpertKernels) -> None:
        """Holds matrices in FP8, and biases as Params."""
        setattr(self, f"{prefix}kernels", Quantized(without_biases(kernels)))
        for name in BIASES_APART:
            bias = getattr(kernels, name)
            setattr(self, prefix + name, nnx.data(None) if bias is None else nnx.Param(bias))


def _shapes(e: int, h: int, f: int, fs: int) -> dict[str, tuple[int, ...]]:
    """Returns the parameters in the order in which they are drawn, biases last."""
    shapes = {"gate_kernel": (h, e), "wi_0": (e, h, f), "wi_1": (e, h, f), "wo": (e, f, h)}
    shapes |= {"shared_wi_0": (h, fs), "shared_wi_1": (h, fs), "shared_wo": (fs, h)}
    matrices = {name: shape for name, shape in shapes.items() if name != "gate_kernel"}
    biases = {f"{name}_bias": (*lead, n) for name, (*lead, _, n) in matrices.items()}
    return shapes | biases | {"gate_bias": (e,)}


def _checked_fp8(op: str, name: str, kernels: Any, ndim: int, gated: bool) -> ExpertKernels:
    kernels = as_kernels(op, name, kernels, ndim, gated=gated)
    if not kernels.is_fp8:
        fix = "quantize(jnp.swapaxes(w, -1, -2), (128, 128)) for each matrix w"
        got = describe_kernels(kernels)
        fail(op, f"{name} are not in FP8.", got, "ExpertKernels of QArrays", fix, TypeError)
    return kernels


def _param(value: Any, names: tuple) -> nnx.Param:
    """Returns a Param with sharding metadata; its initializer's own, where there is some."""
    if isinstance(value, nnx.VariableMetadata) or not any(names):
        return nnx.Param(value)
    mesh = jax.sharding.get_abstract_mesh()
    used = {
        axis for entry in names if entry for axis in ((entry,) if isinstance(entry, str) else entry)
    }
    if used <= set(mesh.axis_names) and not mesh.manual_axes and len(set(mesh.axis_types)) == 1:
        return nnx.Param(value, out_sharding=names)  # makes shards of it, or fails without a mesh
    param = nnx.Param(value)
    param.set_metadata(out_sharding=names)
    return param


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        expected = ", ".join(sorted(known))
        former = [f"{name} is {FORMER_NAMES[name]} now" for name in unknown if name in FORMER_NAMES]
        fix = "; ".join(former) or "rename them"
        fail("Fp8MoE", f"unknown names in {what}.", ", ".join(unknown), expected, fix)
