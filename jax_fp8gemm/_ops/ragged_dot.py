"""fp8_ragged_dot: jax.lax.ragged_dot in FP8, forward and backward."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_fp8gemm._bind.meshes import automatic, shard_result, vary_alike
from jax_fp8gemm._core.bits import from_bits, named, save
from jax_fp8gemm._core.checks import as_float, as_int32, check_bool, is_integer, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.groups import clamped_sizes, groups_from
from jax_fp8gemm._core.types import Precision, Residuals, ScaleRounding
from jax_fp8gemm._ops.bf16 import check_precision, float_weight, ragged_dot_bf16
from jax_fp8gemm._ops.casts import cast_both, cast_rows
from jax_fp8gemm._ops.gemm import multiply, multiply_casting
from jax_fp8gemm._ops.recipe import Like, MatmulSpec, keep, kept_transposed, spec_of
from jax_fp8gemm._ops.weights import (
    Weight,
    as_weight,
    both_copies,
    describe_weight,
    forward_copy,
    split,
)
from jax_fp8gemm._ops.weights import (
    cast_in_gemm as decide_cast,
)


@renamed(scale="scale_rounding")
def fp8_ragged_dot(
    lhs: jax.Array,
    rhs: Weight,
    group_sizes: ArrayLike,
    precision: object = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: ArrayLike | None = None,
    *,
    out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
    scale_rounding: ScaleRounding = "pow2",
    residuals: Residuals = "fp8_t",
    shared_columns: bool = True,
    cast_in_gemm: bool | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies groups of rows by a matrix each, as jax.lax.ragged_dot does, in FP8.

    out[i, n] = Σ_k lhs[i, k] · rhs[group of i, k, n]. Rows past the groups are zero.

    Args:
      lhs: bf16, f16 or f32 [m, k]. Rows past the groups are not read.
      rhs: bf16, f16 or f32 [g, k, n]; or what `prepare_weight` made of it.
      group_sizes: int [g], any sizes. It stays on the device. Negative sizes count as zero, and
        what does not fit into m is cut off.
      precision: "fp8" or "bf16", as in `fp8_matmul`; "bf16" is jax.lax.ragged_dot. Or as in
        jax.lax.ragged_dot: None and the default mean FP8, and higher ones are refused.
      preferred_element_type: dtype of the result; default: the promoted dtype of lhs and rhs.
      group_offset: int, or int [] or [1] on the device. rhs has the matrices of the groups from
        this one on, and group_sizes may have more groups, before and after. Rows of groups that
        rhs does not have are not read, and zero in the result. Other than the int 0, it costs one
        copy of lhs and one of the result.
      out_sharding: of the result, as in jax.lax.ragged_dot: a PartitionSpec of the mesh in use, or
        a NamedSharding. On meshes without Explicit axes a constraint.
      scale_rounding: "pow2" or "none", see `quantize`.
      residuals: what is kept of lhs, as in `fp8_matmul`.
      shared_columns: of the gradient to rhs, as in `fp8_matmul`.
      cast_in_gemm: whether the GEMMs cast bf16 weights themselves, without FP8 copies in memory:
        faster with few rows in a group, and the same numbers. None: where there are 512 rows or
        fewer in a group on average, everything is bf16, and neither a mesh in use nor the types of
        lhs and rhs name several devices; or inside shard_map. Pass False where only in_shardings
        of jax.jit name them.
      batch_invariant: of the result, see `gemm`. Gradients are made as ever.

    Returns:
      [m, n]. Gradients have the dtypes of lhs and rhs; that of a group without rows is zero.
      Residuals are named "fp8_ragged_dot_x" and "fp8_ragged_dot_w". Where the GEMMs cast rhs, it is
      kept as it is.

    Raises:
      ValueError: ranks, k or the number of groups do not fit, or an option is unknown or not
        possible.
      TypeError: lhs or rhs is not a float array, or group_sizes are not integers.
      NotImplementedError: a second derivative, or a precision above FP8's.

    Source: jax.lax.ragged_dot; megablox's gmm for group_offset; DeepSeek-V3 (arXiv 2412.19437),
    section 3.3.

    Example:
      y = fp8_ragged_dot(x, w, jnp.array([3, 0, 5]))
    """
    op = "fp8_ragged_dot"
    _check_precision(op, precision)
    lhs, rhs = as_float(op, "lhs", lhs), as_weight(op, "rhs", rhs)
    sizes = as_int32(op, "group_sizes", group_sizes)
    check_bool(op, "cast_in_gemm", cast_in_gemm, or_none=True)
    _check_ragged(op, lhs, rhs, sizes, group_offset)
    spec = spec_of(
        op,
        lhs,
        rhs,
        preferred_element_type,
        rounding=scale_rounding,
        residuals=residuals,
        shared_columns=shared_columns,
        batch_invariant=batch_invariant,
    )
    if not rhs.shape[0]:
        zeros = jnp.zeros_like(lhs, spec.dtype, shape=(lhs.shape[0], rhs.shape[2]))
        return shard_result(zeros, out_sharding)
    first, sizes = _own_groups(op, group_offset, sizes, rhs.shape[0], lhs.shape[0])
    lhs = lhs if first is None else _roll(lhs, -first)
    y: jax.Array
    if precision == "bf16":
        check_precision(op, precision, batch_invariant)
        lhs, w, sizes = vary_alike(lhs, float_weight(rhs), sizes)
        y = ragged_dot_bf16(lhs, w, sizes, spec.dtype)
    else:
        w, copies = split(rhs)
        spec = dataclasses.replace(spec, cast_in_gemm=_casts(lhs, w, copies, spec, cast_in_gemm))
        y = _ragged_dot(*vary_alike(lhs, w, copies, sizes), spec)
    return shard_result(y if first is None else _roll(y, first), out_sharding)


def _own_groups(
    op: str, group_offset: ArrayLike | None, sizes: jax.Array, count: int, m: int
) -> tuple[jax.Array | None, jax.Array]:
    """Returns the first row of rhs's groups, None where it is row 0, and the sizes of these."""
    if group_offset is None or (is_integer(group_offset) and group_offset == 0):
        return None, sizes[:count]
    offset = as_int32(op, "group_offset", group_offset).reshape(())
    sizes, offset = vary_alike(sizes, offset)
    return groups_from(sizes, offset, count, m)


def _roll(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Moves rows down, in a circle."""
    x, rows = vary_alike(x, rows)
    return automatic(lambda x, rows: jnp.roll(x, rows, 0), x)(x, rows)


def _casts(lhs: jax.Array, w: Any, copies: Any, spec: MatmulSpec, wanted: bool | None) -> bool:
    """Whether the GEMMs cast the weights; the kernel that does has results in bf16."""
    everything_is_bf16 = {spec.dtype, lhs.dtype} == {jnp.dtype(jnp.bfloat16)}
    if copies is not None or not everything_is_bf16:
        if wanted:
            got = f"{describe('lhs', lhs)}, a result of {spec.dtype}"
            got += ", a prepared weight" if copies is not None else ""
            expected, fix = "bf16 for lhs, rhs and the result", "leave cast_in_gemm out"
            fail(spec.name, "the GEMM cannot cast this rhs.", got, expected, fix)
        return False
    rows, rounding = lhs.shape[0], spec.scale_rounding
    return decide_cast(
        spec.name, [(w,)], rows=rows, rounding=rounding, others=(lhs,), wanted=wanted
    )


# What lax.ragged_dot may be asked for and FP8 gives: E4M3 products, added up in float32.
PRECISIONS = (
    None,
    jax.lax.Precision.DEFAULT,
    jax.lax.DotAlgorithmPreset.DEFAULT,
    jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32,
)


def _check_precision(op: str, precision: Any) -> None:
    if isinstance(precision, str) and precision in get_args(Precision):
        return
    for part in precision if isinstance(precision, tuple | list) else (precision,):
        if part not in (*PRECISIONS, "default", "fastest"):
            got, expected = f"precision={precision!r}", '"fp8", "bf16", None or the default'
            fix = 'leave precision out, pass precision="bf16", or call jax.lax.ragged_dot'
            fail(op, "FP8 has one precision.", got, expected, fix, NotImplementedError)


def _check_ragged(
    op: str, lhs: jax.Array, rhs: Weight, group_sizes: jax.Array, group_offset: ArrayLike | None
) -> None:
    got = f"{describe('lhs', lhs)}, {describe_weight('rhs', rhs)}, "
    got += describe("group_sizes", group_sizes)
    if (lhs.ndim, rhs.ndim, group_sizes.ndim) != (2, 3, 1):
        expected = "lhs [m, k], rhs [g, k, n], group_sizes [g]"
        fail(op, "an operand has the wrong rank.", got, expected, "reshape it")
    if lhs.shape[1] != rhs.shape[1]:
        expected, fix = f"rhs [g, {lhs.shape[1]}, n]", "if rhs is [g, n, k], swap its last dims"
        fail(op, "dim k differs between lhs and rhs.", got, expected, fix)
    g = rhs.shape[0]
    if group_offset is None and g != group_sizes.shape[0]:
        expected, fix = f"group_sizes [{g}]", "pass one size for each matrix, or a group_offset"
        fail(op, "the number of groups differs.", got, expected, fix)
    if group_offset is not None and (g > group_sizes.shape[0] or np.size(group_offset) != 1):
        got += f", {describe('group_offset', group_offset)}"
        expected = f"{g} or more group_sizes, and one group_offset"
        fix = "pass the sizes of all groups, and the index of rhs's first"
        fail(op, "group_offset does not fit.", got, expected, fix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ragged_dot(lhs, rhs, copies, group_sizes, spec: MatmulSpec):
    rows = cast_rows(lhs, scale_rounding=spec.scale_rounding, group_sizes=group_sizes)
    if spec.cast_in_gemm:
        return _casting(rows, rhs, group_sizes, spec)
    return _multiply(rows, forward_copy(rhs, copies, spec.scale_rounding), group_sizes, spec)


def _casting(rows, rhs, group_sizes, spec: MatmulSpec):
    same = spec.batch_invariant
    return multiply_casting(rows, (rhs,), group_sizes, transposed=True, batch_invariant=same)


def _multiply(rows, nk, group_sizes, spec: MatmulSpec):
    same = spec.batch_invariant
    return multiply(rows, nk, spec.dtype, group_sizes, variant="ragged", batch_invariant=same)


def _forward(lhs, rhs, copies, group_sizes, spec: MatmulSpec):
    """Residuals: lhs as `spec` says, rhs's FP8 copy or itself, what gradients are to be like."""
    rows, saved = keep(lhs, spec, group_sizes)
    like = group_sizes, Like.of(lhs), Like.of(rhs)
    if spec.cast_in_gemm:
        y = _casting(rows, rhs, group_sizes, spec)
        return y, (saved, rhs, *like)
    kn, nk = both_copies(rhs, copies, spec.scale_rounding)
    nk, _ = named(nk, f"{spec.name}_w")
    y = _multiply(rows, nk, group_sizes, spec)
    return y, (saved, save(kn, f"{spec.name}_w"), *like)


@functools.partial(jax.jit, static_argnums=0)  # see _moe/experts.py
def _backward(spec: MatmulSpec, residuals, dy):
    saved, saved_rhs, group_sizes, like_lhs, like_rhs = residuals
    rows, transposed = cast_both(
        dy,
        scale_rounding=spec.scale_rounding,
        shared_columns=spec.shared_columns,
        group_sizes=group_sizes,
    )
    if spec.cast_in_gemm:
        dlhs = multiply_casting(rows, (saved_rhs,), group_sizes, transposed=False)
    else:
        kn = from_bits(saved_rhs)
        dlhs = multiply(rows, kn, like_lhs.dtype, group_sizes, variant="ragged")
    if like_rhs is None:
        return like_lhs.match(dlhs), None, None, None
    own = clamped_sizes(group_sizes, dy.shape[0])  # as rows were placed
    x = kept_transposed(saved, spec, group_sizes)
    drhs = multiply(
        x, transposed, like_rhs.dtype, own, variant="ragged_contracting", scales="1x128_1x128"
    )
    return like_lhs.match(dlhs), like_rhs.match(drhs), None, None


_ragged_dot.defvjp(_forward, _backward)
