"""Flax nnx layers in FP8, with the parameters of the layers they stand in for."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype

from jax_fp8gemm._bind.meshes import shard_result
from jax_fp8gemm._core.checks import check_quantized
from jax_fp8gemm._core.errors import describe, fail, message
from jax_fp8gemm._core.layout import BLOCKS
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import Precision
from jax_fp8gemm._flax.nnx_moe import Fp8MoE, Quantized
from jax_fp8gemm._ops.dot_general import (
    dot_general_like_lhs,
    dot_general_prepared,
    named_precision,
)
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.weights import PreparedWeight, prepare_weight

__all__ = ["Fp8Linear", "Fp8LinearGeneral", "Fp8MoE", "Quantized", "convert"]


def cast_inputs(args, /, *, dtype: Dtype | None = None):
    """A `promote_dtype` that leaves the kernel as it is: FP8 is its one cast.

    So its gradient leaves the product in the kernel's own dtype, unrounded. Inputs and bias become
    `dtype`, or without one what Flax would infer.
    """
    inputs, kernel, bias = args
    dtype = dtypes.canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
    inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=dtype)
    return inputs, kernel, bias


class _HoldsFp8(nnx.Module):
    """What FP8 layers add to those they stand in for: casts, and a weight that is held in FP8.

    A subclass names the layer of Flax after this class.
    """

    kernel: Any
    bias: Any
    dtype: Dtype | None
    precision: Any

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        promote_dtype: Callable = cast_inputs,
        dot_general: Callable = dot_general_like_lhs,
        **kwargs,
    ):
        super().__init__(  # type: ignore[call-arg]
            in_features,  # type: ignore[call-arg]
            out_features,
            promote_dtype=promote_dtype,
            dot_general=dot_general,
            **kwargs,
        )
        self.qvalue: Quantized | None = nnx.data(None)
        self.scale: Quantized | None = nnx.data(None)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Multiplies inputs by the kernel, as the layer of Flax does, and adds the bias."""
        if self.qvalue is None or self.scale is None:
            return super().__call__(inputs, out_sharding)  # type: ignore[misc]
        bias = None if self.bias is None else self.bias[...]
        inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=self.dtype)
        weight = prepare_weight(QArray(self.qvalue[...], self.scale[...]))
        y = self._product(inputs, weight, named_precision(self.precision))
        y = shard_result(y, out_sharding)
        return y if bias is None else y + bias

    def _product(
        self, inputs: jax.Array, weight: PreparedWeight, precision: Precision
    ) -> jax.Array:
        """Returns inputs · weight, of the dtype of inputs."""
        raise NotImplementedError

    def _hold(self, q: QArray, bias: jax.Array | None) -> None:
        """Puts an FP8 weight in the place of the kernel."""
        self.kernel = nnx.data(None)
        self.qvalue, self.scale = Quantized(q.qvalue), Quantized(q.scale)
        if bias is not None:
            self.bias, self.use_bias = nnx.Param(bias), True


class Fp8Linear(_HoldsFp8, nnx.Linear):
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

    def _product(
        self, inputs: jax.Array, weight: PreparedWeight, precision: Precision
    ) -> jax.Array:
        dtype = inputs.dtype
        return fp8_matmul(inputs, weight, preferred_element_type=dtype, precision=precision)

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
        cls,
        q: QArray,
        bias: jax.Array | None = None,
        *,
        dtype: Dtype = jnp.bfloat16,
        precision: Precision = "fp8",
    ) -> Self:
        """Returns a layer for inference that holds its weight in FP8.

        Args:
          q: QArray [out, in] with scales of 128x128: `quantize(kernel.T, (128, 128))`, or
            weight and weight_scale_inv of a block-FP8 checkpoint as they are.
          bias: [out].
          dtype: of the computation.
          precision: "fp8", or "bf16" to multiply by the dequantized weight.

        Raises:
          ValueError: a rank other than 2, other scales, a bias that does not fit.
        """
        op = "Fp8Linear.from_quantized"
        out, k = _checked(op, q).shape
        if bias is not None and bias.shape != (out,):
            got = f"{describe('q', q.qvalue)}, {describe('bias', bias)}"
            fail(op, "bias does not fit q.", got, f"bias [{out}]", "is q transposed?")
        layer = cls(
            k,
            out,
            use_bias=False,
            dtype=dtype,
            precision=precision,
            kernel_init=lambda *_: q.qvalue,
            rngs=nnx.Rngs(0),
        )
        layer._hold(q, bias)
        return layer


class Fp8LinearGeneral(_HoldsFp8, nnx.LinearGeneral):
    """nnx.LinearGeneral in FP8: same arguments, same parameters, same initial values.

    The dims of `in_features` are one k, `out_features` one n; scales are of blocks of those. As
    `Fp8Linear`. To have the projections of an nnx.MultiHeadAttention in FP8, assign such layers to
    its query, key, value and out.

    Attributes:
      kernel: Param [*batch, *in, *out]; None where the weight is held in FP8.
      qvalue, scale: Quantized e4m3 [n, k] and f32 [n/128, k/128], rounded up, or None.
      bias: Param [*batch, *out], or None.

    Example:
      layer = Fp8LinearGeneral(256, (4, 64), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    """

    def _product(
        self, inputs: jax.Array, weight: PreparedWeight, precision: Precision
    ) -> jax.Array:
        axis = sorted(d % inputs.ndim for d in self.axis)  # as nnx.LinearGeneral orders them
        return dot_general_prepared(inputs, weight, axis, (), self.out_features, precision)

    @classmethod
    def from_quantized(
        cls,
        q: QArray,
        bias: jax.Array | None = None,
        *,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        axis: int | Sequence[int] = -1,
        dtype: Dtype = jnp.bfloat16,
        precision: Precision = "fp8",
    ) -> Self:
        """Returns a layer for inference that holds its weight in FP8.

        Args:
          q: QArray [n, k] with scales of 128x128, as of `Fp8Linear.from_quantized`.
          bias: [*out_features], or [n] as checkpoints have it.
          in_features: a size or several, whose product is k.
          out_features: likewise n.
          axis: the dims of inputs that in_features are.
          dtype: of the computation.
          precision: as of `Fp8Linear.from_quantized`.

        Raises:
          ValueError: sizes or scales do not fit.

        Example:
          attention.query = Fp8LinearGeneral.from_quantized(
              q, in_features=hidden, out_features=(num_heads, head_dim))
        """
        op = "Fp8LinearGeneral.from_quantized"
        n, k = _product(out_features), _product(in_features)
        if _checked(op, q).shape != (n, k):
            got = f"{describe('q', q.qvalue)}, in_features={in_features}, "
            got += f"out_features={out_features}"
            fail(op, "q does not fit the features.", got, f"q [{n}, {k}]", "is q transposed?")
        layer = cls(
            in_features,
            out_features,
            axis=axis,
            use_bias=False,
            dtype=dtype,
            precision=precision,
            kernel_init=lambda *_: q.qvalue,
            rngs=nnx.Rngs(0),
        )
        if bias is not None and bias.shape not in ((n,), layer.out_features):
            got, expected = describe("bias", bias), f"bias {[*layer.out_features]}"
            fail(op, "bias does not fit q.", got, expected, "is q transposed?")
        layer._hold(q, None if bias is None else bias.reshape(layer.out_features))
        return layer


def _checked(op: str, q: QArray) -> QArray:
    """Returns q, checked to be a matrix scaled by 128x128."""
    check_quantized(op, "q", q)
    if q.ndim != 2 or not q.has_tile(BLOCKS):
        got = f"{describe('q', q.qvalue)}, {describe('scale', q.scale)}"
        expected, fix = "q [out, in], scales of 128x128", "quantize(kernel.T, (128, 128))"
        fail(op, "q is not a matrix scaled by 128x128.", got, expected, fix)
    return q


def _product(features: int | Sequence[int]) -> int:
    return features if isinstance(features, int) else math.prod(features)


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
