"""DeepSeek-V3's recipe around a GEMM: what is kept of x, and what gradients are like."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_fp8gemm._bind.meshes import explicit_sharding
from jax_fp8gemm._core.bits import from_bits, named, save
from jax_fp8gemm._core.checks import FLOATS, check_bool, check_option
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import Residuals, ScaleRounding
from jax_fp8gemm._ops.casts import cast_both, cast_rows, cast_transposed, recast


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """Static description of one fp8_matmul or fp8_ragged_dot.

    Attributes:
      dtype: of the result.
      name: residuals are named after it for jax.checkpoint policies.
      cast_in_gemm: the GEMMs cast the weights themselves.
      batch_invariant: of the forward GEMM.
    """

    dtype: jnp.dtype
    scale_rounding: ScaleRounding
    residuals: Residuals
    shared_columns: bool
    name: str
    cast_in_gemm: bool = False
    batch_invariant: bool = False


def spec_of(
    op: str,
    lhs: Any,
    rhs: Any,
    preferred: DTypeLike | None,
    *,
    rounding: Any,
    residuals: Any,
    shared_columns: Any,
    batch_invariant: Any,
) -> MatmulSpec:
    """Checks the options of a matmul, and returns its spec."""
    check_option(op, "scale_rounding", rounding, ScaleRounding)
    check_option(op, "residuals", residuals, Residuals)
    check_bool(op, "shared_columns", shared_columns)
    check_bool(op, "batch_invariant", batch_invariant)
    return MatmulSpec(
        dtype=result_dtype(op, lhs, rhs, preferred),
        scale_rounding=rounding,
        residuals=residuals,
        shared_columns=shared_columns,
        name=op,
        batch_invariant=batch_invariant,
    )


def result_dtype(op: str, lhs: Any, rhs: Any, preferred: DTypeLike | None) -> jnp.dtype:
    with jax.numpy_dtype_promotion("standard"):  # floats go into FP8: nothing else is promoted
        dtype = jnp.dtype(preferred or jnp.result_type(lhs.dtype, rhs.dtype))
    if dtype not in FLOATS:
        got, fix = f"preferred_element_type {dtype}", "choose one of these, and cast the result"
        fail(op, "the result cannot have this dtype.", got, "bf16, f16 or f32", fix, TypeError)
    return dtype


def keep(x: jax.Array, spec: MatmulSpec, group_sizes: jax.Array | None = None):
    """Returns x's FP8 rows, and what is kept for the backward pass.

    Rows have the name, too: under jax.checkpoint the forward GEMM reads what the policy saved.
    """
    name, rounding = f"{spec.name}_x", spec.scale_rounding
    if spec.residuals == "fp8_t":
        rows, transposed = cast_both(
            x, scale_rounding=rounding, group_sizes=group_sizes, token_dims=x.ndim - 1
        )
        return named(rows, name)[0], save(transposed, name)
    rows = cast_rows(x, scale_rounding=rounding, group_sizes=group_sizes)
    if spec.residuals == "fp8":
        return named(rows, name)
    return rows, checkpoint_name(x, name)


def kept_transposed(saved: Any, spec: MatmulSpec, group_sizes: jax.Array | None = None) -> QArray:
    """Returns x's transposed copy, by groups where there are any, of what `keep` kept."""
    rounding = spec.scale_rounding
    if spec.residuals == "fp8_t":
        return from_bits(saved)
    if spec.residuals == "fp8":
        q = from_bits(saved)
        dims = q.ndim - 1
        return recast(q, scale_rounding=rounding, group_sizes=group_sizes, token_dims=dims)
    dims = saved.ndim - 1
    return cast_transposed(saved, scale_rounding=rounding, group_sizes=group_sizes, token_dims=dims)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Like:
    """What a gradient shares with its argument: the dtype, and the sharding on Explicit axes."""

    dtype: jnp.dtype
    sharding: NamedSharding | None

    @classmethod
    def of(cls, x: jax.Array | None) -> "Like | None":
        return None if x is None else cls(x.dtype, explicit_sharding(x))

    def match(self, gradient: jax.Array) -> jax.Array:
        gradient = gradient.astype(self.dtype)
        return gradient if self.sharding is None else jax.sharding.reshard(gradient, self.sharding)
