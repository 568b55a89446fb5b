"""The casts as the library's own code calls them: arguments have been checked by a public door.

share: of the rows that are expected to lie in groups, see CastSpec.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.quantize_op import CastSpec, cast
from jax_fp8gemm._core.layout import ROW_BLOCKS, Tile
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ScaleRounding

Matrices = jax.Array | tuple[jax.Array, jax.Array]


class BothCopies(NamedTuple):
    """A matrix in FP8 as it lies, and its transposed copy.

    Attributes:
      rows: QArray [..., m, k].
      transposed: QArray [..., k, tokens].
    """

    rows: QArray
    transposed: QArray


class SwigluGradients(NamedTuple):
    """What follows from the gradient to row_weight · silu(gate) · up.

    Attributes:
      h: QArray [m, 2f], the gradient to gate and up, side by side.
      gate_transposed, up_transposed: QArray [f, tokens], the gradient to each.
      activation_transposed: QArray [f, tokens], row_weight · silu(gate) · up itself.
      row_weight: f32 [m], the gradient to the row weights. Past the groups it holds anything.
    """

    h: QArray
    gate_transposed: QArray
    up_transposed: QArray
    activation_transposed: QArray
    row_weight: jax.Array


def cast_rows(
    x: jax.Array,
    tile: Tile = ROW_BLOCKS,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
    share: float = 1.0,
) -> QArray:
    """See `quantize` and `quantize_rows`."""
    spec = CastSpec(
        tile=tile,
        scale_rounding=scale_rounding,
        grouped=group_sizes is not None,
        gather=index is not None,
        share=share,
    )
    qvalue, scale = cast(spec, x, *_given(index, group_sizes))
    return QArray(qvalue, scale)


def cast_transposed(
    x: jax.Array,
    tile: Tile = ROW_BLOCKS,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
    share: float = 1.0,
) -> QArray:
    """See `quantize_transposed`."""
    spec = CastSpec(
        tile=tile,
        scale_rounding=scale_rounding,
        rows=False,
        transposed=True,
        grouped=group_sizes is not None,
        shared_columns=shared_columns,
        token_dims=token_dims,
        share=share,
    )
    qvalue, scale = cast(spec, x, *_given(group_sizes))
    return QArray(qvalue, scale)


def cast_both(
    x: Matrices,
    tile: Tile = ROW_BLOCKS,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
    share: float = 1.0,
) -> BothCopies:
    """See `quantize_both`."""
    matrices = x if isinstance(x, tuple) else (x,)
    spec = CastSpec(
        tile=tile,
        scale_rounding=scale_rounding,
        transposed=True,
        grouped=group_sizes is not None,
        gather=index is not None,
        pair=len(matrices) == 2,
        shared_columns=shared_columns,
        token_dims=token_dims,
        share=share,
    )
    found = cast(spec, *matrices, *_given(index, group_sizes))
    return BothCopies(QArray(*found[:2]), QArray(*found[2:]))


def recast(
    q: QArray,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    index: jax.Array | None = None,
    shared_columns: bool = False,
    token_dims: int = 1,
    share: float = 1.0,
) -> QArray:
    """See `requantize`."""
    spec = CastSpec(
        source="fp8",
        scale_rounding=scale_rounding,
        rows=False,
        transposed=True,
        grouped=group_sizes is not None,
        gather=index is not None,
        shared_columns=shared_columns,
        token_dims=token_dims,
        share=share,
    )
    qvalue, scale = cast(spec, q.qvalue, q.scale, *_given(index, group_sizes))
    return QArray(qvalue, scale)


def cast_swiglu(
    h: jax.Array,
    row_weight: jax.Array,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    transposed: bool = False,
    share: float = 1.0,
) -> list[QArray]:
    """See `swiglu_quantize`; the second copy, where it is asked for, is the transposed one."""
    spec = CastSpec(
        source="swiglu",
        scale_rounding=scale_rounding,
        transposed=transposed,
        grouped=group_sizes is not None,
        share=share,
    )
    found = cast(spec, h, row_weight.astype(jnp.float32), *_given(group_sizes))
    return [QArray(*found[i : i + 2]) for i in range(0, len(found), 2)]


def cast_swiglu_backward(
    h: QArray,
    gradient: jax.Array,
    row_weight: jax.Array,
    *,
    scale_rounding: ScaleRounding,
    group_sizes: jax.Array | None = None,
    shared_columns: bool = False,
    share: float = 1.0,
) -> SwigluGradients:
    """See `swiglu_backward`."""
    spec = CastSpec(
        source="swiglu_backward",
        scale_rounding=scale_rounding,
        transposed=True,
        grouped=group_sizes is not None,
        shared_columns=shared_columns,
        share=share,
    )
    floats = gradient.astype(jnp.bfloat16), row_weight.astype(jnp.float32)
    *copies, parts = cast(spec, h.qvalue, h.scale, *floats, *_given(group_sizes))
    d_h, gate, up, activation = (QArray(*copies[i : i + 2]) for i in range(0, 8, 2))
    return SwigluGradients(d_h, gate, up, activation, parts.sum(0))


def _given(*operands: jax.Array | None) -> list[jax.Array]:
    return [x for x in operands if x is not None]
