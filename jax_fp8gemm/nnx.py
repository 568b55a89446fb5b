"""Flax nnx layers in FP8, with the parameters of the layers they stand in for."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer

from jax_fp8gemm._core.checks import check_quantized
from jax_fp8gemm._core.errors import describe, fail, message
from jax_fp8gemm._core.layout import BLOCKS
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._moe.activations import is_gated
from jax_fp8gemm._moe.kernels import ExpertKernels, as_kernels, describe_kernels
from jax_fp8gemm._moe.layer import FORMER_NAMES, OPTIONS, moe
from jax_fp8gemm._moe.placement import axes_of, sharding_names
from jax_fp8gemm._moe.routing import Routing
from jax_fp8gemm._ops.dot_general import dot_general_like_lhs, named_precision
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.weights import prepare_weight

__all__ = ["Fp8Linear", "Fp8MoE", "Quantized", "convert"]


kernel_init = nnx.initializers.lecun_normal()


expert_init = nnx.initializers.lecun_normal(batch_axis=(0,))  # fan-in of one expert


class Quantized(nnx.Variable):
    """An FP8 weight or its scales: no nnx.Param, so it has no gradient and no optimizer state."""


def cast_inputs(args, /, *, dtype: Dtype | None = None):
    """A `promote_dtype` that leaves the kernel as it is: FP8 is its one cast.

    So its gradient leaves the product in the kernel's own dtype, unrounded. Inputs and bias become
    `dtype`, or without one what Flax would infer.
    """
    inputs, kernel, bias = args
    dtype = dtypes.canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
    inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=dtype)
    return inputs, kernel, bias


class Fp8Linear(nnx.Linear):
    """nnx.Linear in FP8: same arguments, same parameters, same initial values.

    With `dtype=jnp.bfloat16` and float32 parameters gradients are float32, unrounded.
    `precision="bf16"` multiplies in bf16, see `fp8_matmul`; any other is FP8.

    Attributes:
      kernel: Param [in, out]; None where the weight is held in FP8.
      qvalue, scale: Quantized e4m3 [out, in] and f32 [out/128, in/128], rounded up, or None.
      bias: Param [out], or None.

    Example:
      layer = Fp8Linear(256, 512, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        promote_dtype: Callable = cast_inputs,
        dot_general: Callable = dot_general_like_lhs,
        **kwargs,
    ):
        super().__init__(
            in_features,
            out_features,
            promote_dtype=promote_dtype,
            dot_general=dot_general,
            **kwargs,
        )
        self.qvalue: Quantized | None = nnx.data(None)
        self.scale: Quantized | None = nnx.data(None)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Multiplies [..., in] to [..., out]."""
        if self.qvalue is None or self.scale is None:
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=self.dtype)
        weight = prepare_weight(QArray(self.qvalue[...], self.scale[...]))
        dtype, precision = inputs.dtype, named_precision(self.precision)
        y = fp8_matmul(inputs, weight, preferred_element_type=dtype, precision=precision)
        return y if bias is None else y + bias

    @classmethod
    def from_linear(cls, linear: nnx.Linear) -> Self:
        """Returns an Fp8Linear that shares the Params of `linear`, metadata included."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            use_bias=False,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
            preferred_element_type=linear.preferred_element_type,
            kernel_init=lambda *_: jnp.zeros(()),  # makes room for:
            rngs=nnx.Rngs(0),
        )
        layer.kernel, layer.bias, layer.use_bias = linear.kernel, linear.bias, linear.use_bias
        return layer

    @classmethod
    def from_quantized(
        cls, q: QArray, bias: jax.Array | None = None, *, dtype: Dtype = jnp.bfloat16
    ) -> Self:
        """Returns a layer for inference that holds its weight in FP8.

        Args:
          q: QArray [out, in] with scales of 128x128: `quantize(kernel.T, (128, 128))`, or
            weight and weight_scale_inv of a block-FP8 checkpoint as they are.
          bias: [out].
          dtype: of the computation.

        Raises:
          ValueError: a rank other than 2, other scales, a bias that does not fit.
        """
        op = "Fp8Linear.from_quantized"
        check_quantized(op, "q", q)
        got = describe("q", q.qvalue)
        if q.ndim != 2 or not q.has_tile(BLOCKS):
            got += f", {describe('scale', q.scale)}"
            expected, fix = "q [out, in], scales of 128x128", "quantize(kernel.T, (128, 128))"
            fail(op, "q is not a matrix scaled by 128x128.", got, expected, fix)
        out, k = q.shape
        if bias is not None and bias.shape != (out,):
            got += f", {describe('bias', bias)}"
            fail(op, "bias does not fit q.", got, f"bias [{out}]", "is q transposed?")
        unused = nnx.Rngs(0)
        layer = cls(
            k, out, use_bias=False, dtype=dtype, kernel_init=lambda *_: q.qvalue, rngs=unused
        )
        layer.kernel = nnx.data(None)  # type: ignore[arg-type]
        layer.qvalue, layer.scale = Quantized(q.qvalue), Quantized(q.scale)
        if bias is not None:
            layer.bias, layer.use_bias = nnx.Param(bias), True
        return layer


def convert(
    model: nnx.Module,
    where: Callable[[tuple[Any, ...], nnx.Linear], bool] = lambda path, linear: True,
) -> nnx.Module:
    """Returns the model with an Fp8Linear in place of each nnx.Linear, and the same Params.

    Args:
      model: stays as it is, but shares its Params with the result. A layer used twice stays one.
        Subclasses of nnx.Linear, and nnx.LinearGeneral, are no nnx.Linear.
      where: of path and layer, whether to convert it. Heads are best left alone:
        `where=lambda path, linear: "head" not in path`.

    Returns:
      A new model. A warning says if nothing was converted, and which kinds of layers stay.

    Example:
      model = convert(model, lambda path, linear: "head" not in path)
    """
    converted: list[tuple] = []
    left: set[str] = set()

    def one(path, node):
        if type(node) is nnx.Linear and where(path, node):
            converted.append(path)
            return Fp8Linear.from_linear(node)
        if isinstance(node, nnx.Module) and node is not model:
            left.add(type(node).__name__)
        return node

    result = nnx.recursive_map(one, model)
    if not converted:
        got = f"{type(model).__name__} with {', '.join(sorted(left)) or 'no layers'}"
        fix = "let `where` say yes, or replace such layers by hand"
        text = message(
            "convert", "nothing was converted.", got=got, expected="an nnx.Linear", fix=fix
        )
        warnings.warn(text, stacklevel=2)
    return result


class Fp8MoE(nnx.Module):
    """A mixture of experts: `jax_fp8gemm.moe` with its parameters.

    Attributes:
      gate_kernel: Param [h, e], the router, which computes in float32.
      wi_0, wi_1, wo: Params [e, h, f], [e, h, f], [e, f, h].
      shared_wi_0, shared_wi_1, shared_wo: Params [h, fs], [h, fs], [fs, h] of an expert that sees
        every token; None without.
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
      init: initializers by the name of the parameter, `nnx.with_partitioning` ones too.
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
    wi_0: nnx.Param[jax.Array]
    wi_1: nnx.Param[jax.Array]
    wo: nnx.Param[jax.Array]
    shared_wi_0: nnx.Param[jax.Array]
    shared_wi_1: nnx.Param[jax.Array]
    shared_wo: nnx.Param[jax.Array]

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
        init: Mapping[str, Initializer] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **options: Any,
    ):
        e, h, f, fs = num_experts, in_features, hidden_features, shared_features
        shapes = {"gate_kernel": (h, e), "wi_0": (e, h, f), "wi_1": (e, h, f), "wo": (e, f, h)}
        shared = {"shared_wi_0": (h, fs), "shared_wi_1": (h, fs), "shared_wo": (fs, h)}
        _check_names("init", init, {**shapes, **shared})
        _check_names("options", options, {*OPTIONS} - {"top_k"})
        expert_axis, tensor_axis = options.get("expert_axis"), options.get("tensor_axis")
        axes = axes_of("Fp8MoE", expert_axis, tensor_axis, options.get("token_axes"))
        for name, shape in {**shapes, **shared}.items():
            absent = name.endswith("wi_1") and not is_gated(options.get("activation", "swiglu"))
            if (0 in shape and name in shared) or absent:
                setattr(self, name, nnx.data(None))
                continue
            make = init.get(name, expert_init if len(shape) == 3 else kernel_init)
            value = make(rngs.params(), shape, param_dtype)
            setattr(self, name, _param(value, sharding_names(axes, name)))
        self.kernels: Quantized | None = nnx.data(None)
        self.shared_kernels: Quantized | None = nnx.data(None)
        self.dtype = dtype
        self.options = tuple(sorted({"top_k": top_k, **options}.items()))  # hashable

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """Sends x [..., h] through the experts.

        Args:
          x: bf16, f16 or f32 [..., h].
          bias: f32 [e], steers the choice of experts; no parameter, because it has no gradient.

        Returns:
          y [..., h] of the layer's dtype, and the Routing of the tokens with its losses.
        """
        kernels, shared = self._matrices()
        return moe(
            x.astype(self.dtype or x.dtype),
            self.gate_kernel[...],
            kernels,
            shared=shared,
            bias=bias,
            **dict(self.options),
        )

    def _matrices(self) -> tuple[ExpertKernels, ExpertKernels | None]:
        if self.kernels is not None:
            held = self.shared_kernels
            return self.kernels.get_value(), None if held is None else held.get_value()

        def made(prefix: str) -> ExpertKernels:
            found = ((name, getattr(self, prefix + name)) for name in ("wi_0", "wi_1", "wo"))
            return ExpertKernels(**{name: None if w is None else w[...] for name, w in found})

        return made(""), None if self.shared_wo is None else made("shared_")

    @classmethod
    def from_quantized(
        cls,
        gate_kernel: jax.Array,
        kernels: ExpertKernels,
        *,
        top_k: int,
        shared: ExpertKernels | None = None,
        dtype: Dtype | None = jnp.bfloat16,
        **options: Any,
    ) -> Self:
        """Returns a layer for inference that holds its experts in FP8.

        Args:
          gate_kernel: [h, e].
          kernels: ExpertKernels of QArrays, see there; best as `prepare_experts` returns them.
          top_k: experts of a token.
          shared: likewise, of an expert that sees every token.
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
        unused = {n: lambda *_: jnp.zeros(()) for n in ("gate_kernel", "wi_0", "wi_1", "wo")}
        e, h, f = kernels.sizes
        layer = cls(h, f, e, top_k=top_k, dtype=dtype, init=unused, rngs=nnx.Rngs(0))
        _check_names("options", options, {*OPTIONS} - {"top_k"})
        layer.options = tuple(sorted({"top_k": top_k, **options}.items()))
        layer.gate_kernel = nnx.Param(gate_kernel)
        for name in ("wi_0", "wi_1", "wo"):
            setattr(layer, name, nnx.data(None))
        layer.kernels = Quantized(kernels)
        layer.shared_kernels = nnx.data(None) if shared is None else Quantized(shared)
        return layer


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
