"""Flax linen layers in FP8, with the parameters of the layers they stand in for."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.linen.dtypes as dtypes
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jax_fp8gemm._core.errors import describe, fail, message
from jax_fp8gemm._core.layout import BLOCKS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._flax.linen_moe import Fp8MoE
from jax_fp8gemm._ops.dot_general import (
    dot_general_like_lhs,
    dot_general_prepared,
    named_precision,
)
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.quantize import quantize
from jax_fp8gemm._ops.weights import PreparedWeight, prepare_weight

__all__ = ["Fp8Dense", "Fp8DenseGeneral", "Fp8MoE", "quantize_kernels"]


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
        weight = _held_weight(self, (self.features, jnp.shape(inputs)[-1]))
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=self.dtype)
        dtype, precision = inputs.dtype, named_precision(self.precision)
        y = fp8_matmul(inputs, weight, preferred_element_type=dtype, precision=precision)
        return y if bias is None else y + bias


class Fp8DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral in FP8: same arguments, same parameters, same initial values.

    The dims of `axis` are one k, `features` one n; scales are of blocks of those. As `Fp8Dense`.

    Attributes:
      quantized: for inference, as of `Fp8Dense`: `qvalue` e4m3 [*batch, n, k] and `scale` f32
        [*batch, n/128, k/128], rounded up. So a projection to heads takes the matrix
        [heads · head_dim, in] of a checkpoint, one from heads [out, heads · head_dim].

    Example:
      heads = Fp8DenseGeneral((num_heads, head_dim), dtype=jnp.bfloat16)(x)
    """

    promote_dtype: Callable = cast_inputs
    dot_general: Callable | None = dot_general_like_lhs
    quantized: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.quantized:
            return super().__call__(inputs)
        features, axis, batch = map(_as_tuple, (self.features, self.axis, self.batch_dims))
        axis = tuple(sorted(d % inputs.ndim for d in axis))  # as nn.DenseGeneral orders them
        if batch != tuple(range(len(batch))):
            got, fix = f"batch_dims={self.batch_dims}", "transpose the inputs"
            fail("Fp8DenseGeneral", "batch_dims are not the first dims.", got, "0, 1, …", fix)
        lead = inputs.shape[: len(batch)]
        k = math.prod(inputs.shape[d] for d in axis)
        weight = _held_weight(self, (*lead, math.prod(features), k))
        bias = None
        if self.use_bias:
            shape = (*lead, *features)
            bias = self.param("bias", _flat(self.bias_init), shape, self.param_dtype)
        inputs, bias = dtypes.promote_dtype(inputs, bias, dtype=self.dtype)
        precision = named_precision(self.precision)
        y = dot_general_prepared(inputs, weight, axis, batch, features, precision)
        if bias is None:
            return y
        between = [1] * (y.ndim - len(batch) - len(features))
        return y + bias.reshape(*lead, *between, *features)


def _held_weight(layer: Any, shape: tuple[int, ...]) -> PreparedWeight:
    """Returns the weight [..., n, k] that a layer holds in FP8."""
    if layer.dot_general is not dot_general_like_lhs or layer.dot_general_cls is not None:
        given = {name: getattr(layer, name) for name in ("dot_general", "dot_general_cls")}
        what = "dot_general is not called for a kernel in FP8."
        got, fix = f"quantized=True, {given}", "leave one of the two out"
        fail(f"Fp8{type(layer).__name__}", what, got, "dot_general as it is by default", fix)
    scales = scale_shape(shape, BLOCKS)
    qvalue = layer.variable("quantized", "qvalue", lambda: jnp.zeros(shape, FP8)).value
    scale = layer.variable("quantized", "scale", lambda: jnp.ones(scales, jnp.float32)).value
    return prepare_weight(QArray(qvalue, scale))


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _flat(init: Callable) -> Callable:
    """Returns an initializer that sees one dim, as nn.DenseGeneral's do."""

    def make(rng, shape, dtype):
        value = init(rng, (math.prod(shape),), dtype)
        if isinstance(value, nn.meta.AxisMetadata):
            return nn.meta.replace_boxed(value, value.unbox().reshape(shape))
        return value.reshape(shape)

    return make


# NOTE: linen names unnamed layers by their class, and draws initial values by their names.
Fp8Dense.__name__ = nn.Dense.__name__


Fp8DenseGeneral.__name__ = nn.DenseGeneral.__name__


def quantize_kernels(
    params: Mapping[str, Any],
    where: Callable[[tuple[str, ...]], bool] | None = None,
    *,
    like: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns the variables of a model that holds FP8 weights where it had float kernels [in, out].

    Args:
      params: nested dicts of arrays, boxes taken off (`nn.meta.unbox`).
      where: of the path to a layer, whether to convert it; None: always. Say no to what is not
        an `Fp8Dense` or `Fp8MoE` with `quantized=True`. Kernels of other ranks stay.
      like: in place of `where`, the variables of the model with `quantized=True`, as
        `jax.eval_shape(model.init, key, x)` returns them. Needed for `Fp8DenseGeneral`, whose
        kernel does not show what is contracted, and for layers in nn.scan along dim 0.

    Returns:
      {"params": what stays, "quantized": for each `kernel` [in, out] its `qvalue` e4m3 [out, in]
      and its `scale` f32 of 128x128}, for `model.apply`. Of an `Fp8MoE` likewise: its matrices
      `wi_0` become `wi_0_qvalue` and `wi_0_scale`, and so on. FP8 weights are not parameters, so
      no optimizer touches them.

    Raises:
      TypeError: params is not a dict. A warning says if nothing was converted.
      ValueError: a kernel does not fit `like`, or `where` and `like` are both given.

    Example:
      y = Fp8Dense(512, quantized=True).apply(quantize_kernels(params), x)
    """
    op = "quantize_kernels"
    if not isinstance(params, Mapping):
        got, fix = type(params).__name__, 'pass variables["params"]'
        fail(op, "params is not a dict.", got, "nested dicts of arrays", fix, TypeError)
    if where is not None and like is not None:
        fail(op, "two arguments say what to convert.", "where, like", "one", "leave where out")
    left: list[str] = []

    def split(node, path, like):
        """Returns what stays of a dict, and its FP8 weights."""
        stays, held = {}, {}
        shapes = _by_rule(node, path, where) if like is None else _by_model(node, like)
        for name, value in node.items():
            if name in shapes:
                q = _in_fp8("/".join((*path, name)), value, shapes[name])
                held |= {_part(name, "qvalue"): q.qvalue, _part(name, "scale"): q.scale}
            elif isinstance(value, Mapping):
                below = None if like is None else like.get(name, {})
                rest, below = split(value, (*path, name), below)
                stays |= {name: rest} if rest or not value else {}
                held |= {name: below} if below else {}
            else:
                stays[name] = value
                left.extend(["/".join((*path, name))] * (name == "kernel"))
        return stays, held

    stays, held = split(params, (), None if like is None else like.get("quantized", {}))
    if not held:
        got = f"kernels that stay: {', '.join(left) or 'none'}"
        expected, fix = "a kernel [in, out] that `where` says yes to", "look at the paths of params"
        text = message(op, "nothing was quantized.", got=got, expected=expected, fix=fix)
        warnings.warn(text, stacklevel=2)
    return {"params": stays, "quantized": held}


Shapes = dict[str, tuple[int, ...]]  # of the FP8 forms [..., n, k] of a layer's kernels


def _part(name: str, end: str) -> str:
    """Returns the name of the numbers or scales of a kernel."""
    return end if name == "kernel" else f"{name}_{end}"


def _by_rule(node: Mapping[str, Any], path: tuple[str, ...], where: Callable | None) -> Shapes:
    """Returns what an Fp8Dense or an Fp8MoE would have of a layer's parameters."""
    if where is not None and not where(path):
        return {}
    routed = all(jnp.ndim(node.get(name, 0)) == 3 for name in ("wi_0", "wo"))
    experts = ("wi_0", "wi_1", "wo") if routed else ()
    found = {name for name in node if name.removeprefix("shared_") in experts}
    found |= {"kernel"} if jnp.ndim(node.get("kernel", 0)) == 2 else set()
    shapes = {name: jnp.shape(node[name]) for name in found}
    return {name: (*lead, n, k) for name, (*lead, k, n) in shapes.items()}


def _by_model(node: Mapping[str, Any], like: Mapping[str, Any]) -> Shapes:
    """Returns what a model holds in FP8 of a layer's parameters."""
    found = {name: like[part] for name in node if (part := _part(name, "qvalue")) in like}
    return {name: jax.tree.leaves(leaf)[0].shape for name, leaf in found.items()}  # also in a box


def _in_fp8(name: str, kernel: Any, shape: tuple[int, ...]) -> QArray:
    """Returns a kernel [*lead, *in, *out] as a QArray of shape [*lead, n, k]."""
    *lead, n, k = shape
    own = jnp.shape(kernel)
    rest = own[len(lead) :]
    splits = [(math.prod(rest[:i]), math.prod(rest[i:])) for i in range(len(rest) + 1)]
    if list(own[: len(lead)]) != lead or (k, n) not in splits:
        got, expected = describe(name, kernel), f"{lead} before dims of in {k} and of out {n}"
        fix = "let `like` come from the model that params are of"
        fail("quantize_kernels", f"{name} does not fit like.", got, expected, fix)
    matrix = jnp.reshape(kernel, (*lead, k, n))
    return quantize(jnp.swapaxes(matrix, -1, -2), BLOCKS)
