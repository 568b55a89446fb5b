"""What has no kernel of its own: other activations than plain SwiGLU, and biases of experts.

Plain JAX in float32 between the GEMMs' results and the casts, which read bf16.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._core.layout import K_MULTIPLE, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._moe.activations import activate, is_gated
from jax_fp8gemm._moe.block import ExpertSpec
from jax_fp8gemm._moe.kernels import ExpertKernels, of_rows
from jax_fp8gemm._ops.casts import cast_rows, cast_transposed
from jax_fp8gemm._ops.quantize import dequantize


class Biases(NamedTuple):
    """Of the GEMMs' results: f32 [e, 2f] and [e, h], as wide as these; or None."""

    up: jax.Array | None
    down: jax.Array | None


class Gradients(NamedTuple):
    """As SwigluGradients, with gate's and up's copies in a list, and the gradient to a bias."""

    h: QArray
    transposed: list[QArray]
    activation_transposed: QArray
    row_weight: jax.Array
    bias: jax.Array | None


def biases_of(kernels: ExpertKernels, spec: ExpertSpec) -> Biases:
    """Returns the biases filled with zeros as the matrices are."""

    def padded(bias, multiple):
        return jnp.pad(bias.astype(jnp.float32), [(0, 0), (0, -bias.shape[-1] % multiple)])

    up, down = None, kernels.wo_bias
    given = (kernels.wi_0_bias, kernels.wi_1_bias)[: 1 + is_gated(spec.activation)]
    one = next((bias for bias in given if bias is not None), None)
    if one is not None:
        full = [jnp.zeros_like(one) if bias is None else bias for bias in given]
        up = jnp.concatenate([padded(bias, SCALE_BLOCK) for bias in full], -1)
    return Biases(up, None if down is None else padded(down, K_MULTIPLE))


def is_fused(spec: ExpertSpec, biases: Biases) -> bool:
    """Whether the kernels of SwiGLU do what is asked for."""
    return spec.activation == "swiglu" and biases.up is None


def activated(
    h: jax.Array,
    row_weight: jax.Array,
    bias: jax.Array | None,
    group: jax.Array,
    spec: ExpertSpec,
) -> jax.Array:
    """Returns row_weight · activation(h + bias of the row's group), f32 [m, f]."""
    h = h.astype(jnp.float32)
    h = h if bias is None else h + of_rows(bias, group)
    parts = jnp.split(h, 2, axis=-1) if is_gated(spec.activation) else [h]
    return row_weight[:, None] * activate(parts, spec.activation)


def activated_backward(
    h: QArray,
    da: jax.Array,
    row_weight: jax.Array,
    bias: jax.Array | None,
    sizes: jax.Array,
    spec: ExpertSpec,
) -> Gradients:
    """The gradients of `activated` for rows by groups, cast for the GEMMs; as swiglu_backward."""
    group = group_of_row(sizes, da.shape[0])
    inside = (group < sizes.shape[0])[:, None]
    real, da = jnp.where(inside, dequantize(h), 0), jnp.where(inside, da.astype(jnp.float32), 0)
    run = lambda h, weight, bias: activated(h, weight, bias, group, spec)  # noqa: E731
    a, pull = jax.vjp(run, real, row_weight, bias)
    d_h, d_weight, d_bias = pull(da)
    d_h, a = d_h.astype(jnp.bfloat16), a.astype(jnp.bfloat16)
    options: dict[str, Any] = {
        "scale_rounding": spec.scale_rounding,
        "group_sizes": sizes,
        "share": spec.share(da.shape[0]),
    }
    parts = jnp.split(d_h, 2, axis=-1) if is_gated(spec.activation) else [d_h]
    shared = spec.shared_columns
    transposed = [cast_transposed(part, **options, shared_columns=shared) for part in parts]
    d_hq, at = cast_rows(d_h, **options), cast_transposed(a, **options)
    return Gradients(d_hq, transposed, at, d_weight, d_bias)


def add_bias(
    y: jax.Array, row_weight: jax.Array, bias: jax.Array | None, sizes: jax.Array
) -> jax.Array:
    """Returns rows y [m, h] + row_weight · bias of the row's group."""
    if bias is None:
        return y
    added = row_weight[:, None] * of_rows(bias, group_of_row(sizes, y.shape[0]))
    return (y.astype(jnp.float32) + added[:, : y.shape[1]]).astype(y.dtype)


def add_bias_backward(
    dyq: QArray, row_weight: jax.Array, bias: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns what add_bias adds to the gradient to row_weight, and the gradient to bias."""
    group = group_of_row(sizes, row_weight.shape[0])
    dy = jnp.where((group < sizes.shape[0])[:, None], dequantize(dyq), 0)
    run = lambda weight, bias: weight[:, None] * of_rows(bias, group)  # noqa: E731
    return jax.vjp(run, row_weight, bias)[1](dy)
