"""The mixture of experts as a layer of linen."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.sharding import AbstractMesh, Mesh

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._core.layout import BLOCKS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding, ScoreFunction, Wire
from jax_fp8gemm._moe.activations import Activation, is_gated
from jax_fp8gemm._moe.kernels import ExpertKernels
from jax_fp8gemm._moe.layer import OPTIONS, moe
from jax_fp8gemm._moe.placement import (
    AxisNames,
    ExpertAxes,
    TokenAxes,
    are_manual,
    axes_of,
    sharding_names,
    size_of,
)
from jax_fp8gemm._moe.router import options_beside
from jax_fp8gemm._moe.routing import Routing

kernel_init = nn.initializers.lecun_normal()
expert_init = nn.initializers.lecun_normal(batch_axis=(0,))  # fan-in of one expert


class Fp8MoE(nn.Module):
    """A mixture of experts: `jax_fp8gemm.moe` with its parameters.

    Parameters: `gate_kernel` [h, e], `wi_0` and `wi_1` [e, h, f], `wo` [e, f, h], and with
    shared_features `shared_wi_0` and `shared_wi_1` [h, fs], `shared_wo` [fs, h]. With use_bias a
    bias for each matrix, `wi_0_bias` [e, f] and so on, of the shared expert `shared_wi_0_bias`
    [fs]. With use_gate_bias `gate_bias` [e], which is added to the router's logits.

    Fields that are not listed here are arguments of `moe`. With expert_axis the parameters are
    `nn.Partitioned` over it and over tensor_axis, unless their initializers say otherwise. Inside
    jax.shard_map `apply` takes this device's shards, and `init` belongs outside.

    Attributes:
      num_experts: e.
      hidden_features: f, the width of an expert.
      shared_features: fs, the hidden width of an expert that sees every token; 0 for none.
      dtype: of the computation; default: the input's. The router is float32.
      param_dtype: of the parameters.
      gate_init: initializer of `gate_kernel`; likewise wi_init, wo_init, shared_wi_init and
        shared_wo_init.
      quantized: for inference. In place of each matrix there are, in the collection "quantized",
        its FP8 numbers and scales, as block-FP8 checkpoints hold them: `wi_0_qvalue` e4m3
        [e, f, h], `wi_0_scale` f32 [e, f/128, h/128], rounded up, and so on. `quantize_kernels`
        makes them of the parameters. Biases stay parameters.
      use_bias: whether the experts have biases, the shared one too.
      bias_init: initializer of all biases.
      use_gate_bias: whether the router's logits have a bias.

    Example:
      y, routing = Fp8MoE(num_experts=8, hidden_features=1024, top_k=2)(x)
      loss = task_loss(y) + 0.01 * routing.aux_loss
    """

    num_experts: int
    hidden_features: int
    top_k: int
    score_function: ScoreFunction = "softmax"
    normalize: bool = True
    routed_scaling_factor: float = 1.0
    capacity_factor: float | None = None
    shared_features: int = 0
    expert_axis: AxisNames | None = None
    exchange: ExchangeKind = "all_gather"
    wire: Wire = "fp8"
    scale_rounding: ScaleRounding = "pow2"
    shared_columns: bool = True
    cast_in_gemm: bool | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    gate_init: Initializer = kernel_init
    wi_init: Initializer = expert_init
    wo_init: Initializer = expert_init
    shared_wi_init: Initializer = kernel_init
    shared_wo_init: Initializer = kernel_init
    tensor_axis: AxisNames | None = None
    token_axes: TokenAxes | None = None
    mesh: Mesh | AbstractMesh | None = None
    device_capacity_factor: float | None = None
    n_group: int | None = None
    topk_group: int | None = None
    quantized: bool = False
    precision: Precision = "fp8"
    activation: Activation = "swiglu"
    batch_invariant: bool = False
    use_bias: bool = False
    bias_init: Initializer = nn.initializers.zeros_init()
    use_gate_bias: bool = False

    @nn.compact
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
          logits: f32 [..., e], made elsewhere in place of `gate_kernel`, which is
            then no parameter.
          routing: likewise, the Routing of the tokens. The layer's own options of routing then do
            nothing, but for top_k, which it must have.

        Returns:
          y [..., h] of the layer's dtype, and the Routing of the tokens with its losses.
        """
        options = {name: getattr(self, name) for name in OPTIONS}
        options = options_beside("Fp8MoE", options, routing)
        has_gate = logits is None and routing is None
        (gate_kernel, gate_bias), kernels, shared = self._parameters(x.shape[-1], has_gate)
        if self.is_initializing():  # x may be too short to be split
            options |= dict.fromkeys(("expert_axis", "tensor_axis", "token_axes"))
        return moe(
            x.astype(self.dtype or x.dtype),
            gate_kernel,
            kernels,
            shared=shared,
            bias=bias,
            gate_bias=gate_bias,
            logits=logits,
            routing=routing,
            **options,
        )

    def _parameters(self, h: int, has_gate: bool):
        axes = axes_of("Fp8MoE", self.expert_axis, self.tensor_axis, self.token_axes)
        e, f, fs = self.num_experts, self.hidden_features, self.shared_features
        spread = axes.any and not self.is_initializing()
        if spread and are_manual("Fp8MoE", axes):  # a device's shards
            e, tensor = e // size_of(axes.experts), size_of(axes.tensor)
            f, fs = f // tensor, fs // tensor

        gate_kernel = gate_bias = None
        if has_gate:
            gate_kernel = self._parameter(axes, "gate_kernel", self.gate_init, h, self.num_experts)
        kernels = self._matrices(axes, "", (e, h, f), (self.wi_init, self.wo_init))
        shared = None
        if fs:
            inits = self.shared_wi_init, self.shared_wo_init
            shared = self._matrices(axes, "shared_", (h, fs), inits)
        if self.use_bias:  # after all matrices, whose initial values are those without biases
            kernels = self._with_biases(axes, "", kernels)
            shared = self._with_biases(axes, "shared_", shared) if shared else None
        if has_gate and self.use_gate_bias:
            gate_bias = self._parameter(axes, "gate_bias", self.bias_init, self.num_experts)
        return (gate_kernel, gate_bias), kernels, shared

    def _matrices(self, axes: ExpertAxes, prefix: str, sizes: tuple, inits: tuple) -> ExpertKernels:
        """Returns matrices for `sizes` ([e], h, f); inits: of wi_0 and wi_1, and of wo."""
        (*lead, h, f), (wi_init, wo_init) = sizes, inits
        shapes = {"wi_0": (wi_init, h, f), "wi_1": (wi_init, h, f), "wo": (wo_init, f, h)}
        if not is_gated(self.activation):
            del shapes["wi_1"]
        made = {
            name: self._parameter(axes, prefix + name, init, *lead, rows, columns)
            for name, (init, rows, columns) in shapes.items()
        }
        return ExpertKernels(**made)

    def _with_biases(self, axes: ExpertAxes, prefix: str, kernels: ExpertKernels) -> ExpertKernels:
        *lead, h, f = kernels.sizes
        widths = {"wi_0_bias": f, "wi_1_bias": f, "wo_bias": h}
        if kernels.wi_1 is None:
            del widths["wi_1_bias"]
        made = {
            name: self._parameter(axes, prefix + name, self.bias_init, *lead, width)
            for name, width in widths.items()
        }
        return dataclasses.replace(kernels, **made)

    def _parameter(self, axes: ExpertAxes, name: str, init: Initializer, *shape: int) -> Any:
        names = sharding_names(axes, name)
        if self.quantized and name != "gate_kernel" and not name.endswith("_bias"):
            return self._held(name, names, shape)
        value = self.param(name, _boxed(init, names), shape, self.param_dtype, unbox=False)
        return _unboxed(value)

    def _held(self, name: str, names: tuple, shape: tuple[int, ...]) -> QArray:
        """Returns the FP8 form [..., out, in] of a matrix [..., in, out]."""
        *lead, rows, columns = shape
        names = (*names[:-2], names[-1], names[-2])
        shape = (*lead, columns, rows)

        def variable(part, value):
            init = _boxed(lambda: value, names)
            return _unboxed(self.variable("quantized", f"{name}_{part}", init, unbox=False).value)

        qvalue = variable("qvalue", jnp.zeros(shape, FP8))
        return QArray(qvalue, variable("scale", jnp.ones(scale_shape(shape, BLOCKS))))


def _boxed(init: Initializer, names: tuple) -> Initializer:
    """Returns an initializer with sharding metadata; init's own, where it has some."""

    def make(*args):
        value = init(*args)
        boxed = isinstance(value, nn.meta.AxisMetadata) or not any(names)
        return value if boxed else nn.Partitioned(value, names)

    return make


def _unboxed(value):
    if not isinstance(value, nn.meta.AxisMetadata):
        return value
    if isinstance(value, nn.Partitioned) and not meshes.is_automatic():
        return value.unbox(apply_constraint=False)  # moe shards it
    return value.unbox()
