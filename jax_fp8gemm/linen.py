"""Flax linen layers in FP8, with the parameters of the layers they stand in for."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.linen.dtypes as dtypes
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.sharding import AbstractMesh, Mesh

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._core.errors import fail, message
from jax_fp8gemm._core.layout import BLOCKS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding, ScoreFunction, Wire
from jax_fp8gemm._moe.activations import Activation, is_gated
from jax_fp8gemm._moe.kernels import ExpertKernels
from jax_fp8gemm._moe.layer import OPTIONS, moe
from jax_fp8gemm._moe.placement import (
    AxisNames,
    TokenAxes,
    are_manual,
    axes_of,
    sharding_names,
    size_of,
)
from jax_fp8gemm._moe.routing import Routing
from jax_fp8gemm._ops.dot_general import dot_general_like_lhs, named_precision
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.quantize import quantize
from jax_fp8gemm._ops.weights import prepare_weight

__all__ = ["Fp8Dense", "Fp8DenseGeneral", "Fp8MoE", "quantize_kernels"]


kernel_init = nn.initializers.lecun_normal()


expert_init = nn.initializers.lecun_normal(batch_axis=(0,))  # fan-in of one expert


def cast_inputs(inputs, kernel, bias, *, dtype: Dtype | None = None):
    """A `promote_dtype` that leaves the kernel as it is: FP8 is its one cast.

    So its gradient leaves the product in the kernel's own dtype, unrounded. Inputs and bias become
    `dtype`, or without one what Flax would infer.
    """
    dtype = dtypes.canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
    inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=dtype)
    return inputs, kernel, bias


class Fp8Dense(nn.Dense):
    """nn.Dense in FP8: same arguments, same parameters, same initial values.

    Unnamed layers are numbered as nn.Dense's are ("Dense_0"), so checkpoints of either load into
    the other. With `dtype=jnp.bfloat16` and float32 parameters gradients are float32, unrounded.

    Attributes:
      precision: "bf16" multiplies in bf16, see `fp8_matmul`; anything else, and the default None,
        in FP8.
      quantized: for inference. In place of the parameter `kernel` [in, out] there are, in the
        collection "quantized", `qvalue` e4m3 [out, in] and `scale` f32 [out/128, in/128], rounded
        up, as block-FP8 checkpoints hold them. `quantize_kernels` makes them of a float kernel.
        They have no gradient, and no optimizer sees them.

    Example:
      y = Fp8Dense(512, dtype=jnp.bfloat16)(x)
    """

    promote_dtype: Callable = cast_inputs
    dot_general: Callable | None = dot_general_like_lhs
    quantized: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.quantized:
            return super().__call__(inputs)
        if self.dot_general is not dot_general_like_lhs:
            what = "dot_general is not called for a kernel in FP8."
            got, fix = f"quantized=True, dot_general={self.dot_general}", "leave one of the two out"
            fail("Fp8Dense", what, got, "dot_general as it is by default", fix)
        shape = (self.features, jnp.shape(inputs)[-1])
        scales = scale_shape(shape, BLOCKS)
        qvalue = self.variable("quantized", "qvalue", lambda: jnp.zeros(shape, FP8)).value
        scale = self.variable("quantized", "scale", lambda: jnp.ones(scales, jnp.float32)).value
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[:1], self.param_dtype)
        inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=self.dtype)
        weight = prepare_weight(QArray(qvalue, scale))
        dtype, precision = inputs.dtype, named_precision(self.precision)
        y = fp8_matmul(inputs, weight, preferred_element_type=dtype, precision=precision)
        return y if bias is None else y + bias


class Fp8DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral in FP8: same arguments, same parameters, same initial values.

    The dims of `axis` are one k, `features` one n; scales are of blocks of those. As `Fp8Dense`,
    but for `quantized`.

    Example:
      heads = Fp8DenseGeneral((num_heads, head_dim), dtype=jnp.bfloat16)(x)
    """

    promote_dtype: Callable = cast_inputs
    dot_general: Callable | None = dot_general_like_lhs


# NOTE: linen names unnamed layers by their class, and draws initial values by their names.
Fp8Dense.__name__ = nn.Dense.__name__


Fp8DenseGeneral.__name__ = nn.DenseGeneral.__name__


def quantize_kernels(
    params: Mapping[str, Any], where: Callable[[tuple[str, ...]], bool] = lambda path: True
) -> dict[str, dict[str, Any]]:
    """Returns the variables of a model that holds FP8 weights where it had float kernels [in, out].

    Args:
      params: nested dicts of arrays, boxes taken off (`nn.meta.unbox`).
      where: of the path to a layer, whether to convert it. Say no to what is not an
        `Fp8Dense` or `Fp8MoE` with `quantized=True`. Kernels of other ranks stay.

    Returns:
      {"params": what stays, "quantized": for each `kernel` [in, out] its `qvalue` e4m3 [out, in]
      and its `scale` f32 of 128x128}, for `model.apply`. Of an `Fp8MoE` likewise: its matrices
      `wi_0` become `wi_0_qvalue` and `wi_0_scale`, and so on. FP8 weights are not parameters, so
      no optimizer touches them.

    Raises:
      TypeError: params is not a dict. A warning says if nothing was converted.

    Example:
      y = Fp8Dense(512, quantized=True).apply(quantize_kernels(params), x)
    """
    if not isinstance(params, Mapping):
        got, fix = type(params).__name__, 'pass variables["params"]'
        op = "quantize_kernels"
        fail(op, "params is not a dict.", got, "nested dicts of arrays", fix, TypeError)
    left: list[str] = []

    def split(node, path):
        """Returns what stays of a dict, and its FP8 weights."""
        stays, held = {}, {}
        experts = _experts(node) if where(path) else ()
        for name, value in node.items():
            if name in experts:
                q = quantize(jnp.swapaxes(value, -1, -2), BLOCKS)
                held |= {f"{name}_qvalue": q.qvalue, f"{name}_scale": q.scale}
            elif isinstance(value, Mapping):
                stays[name], below = split(value, (*path, name))
                held |= {name: below} if below else {}
            elif name == "kernel" and jnp.ndim(value) == 2 and where(path):
                q = quantize(value.T, BLOCKS)
                held |= {"qvalue": q.qvalue, "scale": q.scale}
            else:
                stays[name] = value
                left.extend(["/".join((*path, name))] * (name == "kernel"))
        return stays, held

    stays, held = split(params, ())
    if not held:
        got = f"kernels that stay: {', '.join(left) or 'none'}"
        expected, fix = "a kernel [in, out] that `where` says yes to", "look at the paths of params"
        text = message(
            "quantize_kernels", "nothing was quantized.", got=got, expected=expected, fix=fix
        )
        warnings.warn(text, stacklevel=2)
    return {"params": stays, "quantized": held}


def _experts(node: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of an Fp8MoE's matrices, none if these are another layer's parameters."""
    routed = all(jnp.ndim(node.get(name, 0)) == 3 for name in ("wi_0", "wo"))
    return tuple(n for n in node if n.removeprefix("shared_") in ("wi_0", "wi_1", "wo")) * routed


class Fp8MoE(nn.Module):
    """A mixture of experts: `jax_fp8gemm.moe` with its parameters.

    Parameters: `gate_kernel` [h, e], `wi_0` and `wi_1` [e, h, f], `wo` [e, f, h], and with
    shared_features `shared_wi_0` and `shared_wi_1` [h, fs], `shared_wo` [fs, h].

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
        makes them of the parameters.

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

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """Sends x [..., h] through the experts.

        Args:
          x: bf16, f16 or f32 [..., h].
          bias: f32 [e], steers the choice of experts; no parameter, because it has no gradient.

        Returns:
          y [..., h] of the layer's dtype, and the Routing of the tokens with its losses.
        """
        gate_kernel, kernels, shared = self._parameters(x.shape[-1])
        options = {name: getattr(self, name) for name in OPTIONS}
        if self.is_initializing():  # x may be too short to be split
            options |= dict.fromkeys(("expert_axis", "tensor_axis", "token_axes"))
        return moe(
            x.astype(self.dtype or x.dtype),
            gate_kernel,
            kernels,
            shared=shared,
            bias=bias,
            **options,
        )

    def _parameters(self, h: int):
        axes = axes_of("Fp8MoE", self.expert_axis, self.tensor_axis, self.token_axes)
        e, f, fs = self.num_experts, self.hidden_features, self.shared_features
        spread = axes.any and not self.is_initializing()
        if spread and are_manual("Fp8MoE", axes):  # a device's shards
            e, tensor = e // size_of(axes.experts), size_of(axes.tensor)
            f, fs = f // tensor, fs // tensor

        def param(name, init, *shape) -> Any:
            names = sharding_names(axes, name)
            if self.quantized and name != "gate_kernel":
                return self._held(name, names, shape)
            value = self.param(name, _boxed(init, names), shape, self.param_dtype, unbox=False)
            return _unboxed(value)

        gated = is_gated(self.activation)
        gate_kernel = param("gate_kernel", self.gate_init, h, self.num_experts)
        kernels = ExpertKernels(
            wi_0=param("wi_0", self.wi_init, e, h, f),
            wi_1=param("wi_1", self.wi_init, e, h, f) if gated else None,
            wo=param("wo", self.wo_init, e, f, h),
        )
        if not fs:
            return gate_kernel, kernels, None
        shared = ExpertKernels(
            wi_0=param("shared_wi_0", self.shared_wi_init, h, fs),
            wi_1=param("shared_wi_1", self.shared_wi_init, h, fs) if gated else None,
            wo=param("shared_wo", self.shared_wo_init, fs, h),
        )
        return gate_kernel, kernels, shared

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
