"""fp8_dot_general: jax.lax.dot_general in FP8, for the hooks of Flax and the like."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jax_fp8gemm._bind.meshes import shard_result
from jax_fp8gemm._core.checks import as_float, check_bool
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.types import Precision
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.recipe import result_dtype
from jax_fp8gemm._ops.weights import PreparedWeight, Weight

Dims = Sequence[int]
OP = "fp8_dot_general"


def fp8_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: tuple[tuple[Dims, Dims], tuple[Dims, Dims]],
    precision: object = None,
    preferred_element_type: jnp.dtype | None = None,
    *,
    out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
    shared_columns: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies as jax.lax.dot_general does, in FP8: what `dot_general=` of a Flax layer takes.

    lhs is scaled by 1x128 along what is contracted, rhs by 128x128, gradients as in `fp8_matmul`:
    pass activations as lhs and weights as rhs.

    Args:
      lhs: bf16, f16 or f32, of any rank.
      rhs: likewise.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)). Several
        contracting dims are one k in the order given.
      precision: "bf16" multiplies in bf16, see `fp8_matmul`. Anything else is not looked at,
        because FP8 GEMMs have one precision. Layers always pass theirs.
      preferred_element_type: bf16, f16 or f32, of the result; default: the promoted dtype.
      out_sharding: of the result, as in jax.lax.dot_general: a PartitionSpec of the mesh in use, or
        a NamedSharding. On meshes without Explicit axes a constraint.
      shared_columns: of the gradient to rhs, as in `fp8_matmul`.
      batch_invariant: of the result, as in `fp8_matmul`.

    Returns:
      The batch dims, lhs's other dims, rhs's other dims. Gradients have the dtypes of lhs and rhs.

    Raises:
      ValueError: dims that repeat, are out of range or differ in size; nothing to contract over.
      TypeError: integers, complex numbers, FP8 or float64.
      NotImplementedError: a second derivative.

    Source: jax.lax.dot_general.

    Example:
      layer = nnx.Linear(256, 512, dot_general=fp8_dot_general, rngs=rngs)
    """
    check_bool(OP, "shared_columns", shared_columns)
    check_bool(OP, "batch_invariant", batch_invariant)
    lhs, rhs = as_float(OP, "lhs", jnp.asarray(lhs)), as_float(OP, "rhs", jnp.asarray(rhs))
    (contract, rhs_contract), (batch, rhs_batch) = dimension_numbers
    contract, batch = _normal(contract, lhs.ndim), _normal(batch, lhs.ndim)
    rhs_contract, rhs_batch = _normal(rhs_contract, rhs.ndim), _normal(rhs_batch, rhs.ndim)
    _check(lhs, rhs, (contract, rhs_contract), (batch, rhs_batch))
    dtype = result_dtype(OP, lhs, rhs, preferred_element_type)
    free, rhs_free = _others(lhs, contract, batch), _others(rhs, rhs_contract, rhs_batch)
    numbers = (contract, rhs_contract), (batch, rhs_batch)
    matmul = functools.partial(
        fp8_matmul,
        preferred_element_type=dtype,
        shared_columns=shared_columns,
        precision=named_precision(precision),
        batch_invariant=batch_invariant,
    )

    def run(lhs, rhs):
        x, w = (
            _ordered(lhs, batch, free, contract),
            _ordered(rhs, rhs_batch, rhs_contract, rhs_free),
        )
        shape = _sizes(lhs, batch) + _sizes(lhs, free) + _sizes(rhs, rhs_free)
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        y = _multiply(x, w, len(batch), len(contract), matmul)
        return y.reshape(shape)

    return _sharded(run, lhs, rhs, numbers, out_sharding)


def named_precision(precision: object) -> Precision:
    """Returns the precision that a layer's own argument asks for: FP8 unless it is "bf16"."""
    return "bf16" if isinstance(precision, str) and precision == "bf16" else "fp8"


def dot_general_like_lhs(
    lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None
):
    """fp8_dot_general with a result of lhs's dtype by default: for layers that cast activations to
    the dtype they compute in, and leave weights as they are."""
    dtype = preferred_element_type or lhs.dtype
    return fp8_dot_general(lhs, rhs, dimension_numbers, precision, dtype, out_sharding=out_sharding)


def dot_general_prepared(
    lhs: jax.Array,
    weight: PreparedWeight,
    contract: Dims,
    batch: Dims,
    features: Dims,
    precision: Precision = "fp8",
) -> jax.Array:
    """Multiplies as dot_general_like_lhs does, by a weight that is in FP8.

    On Explicit axes the result is sharded as lhs is, and its first dim of `features` as n is, as
    far as this divides it.

    Args:
      lhs: bf16, f16 or f32, of any rank.
      weight: [*batch, k, n], k of the sizes of `contract` in their order, n of `features`.
      contract, batch: dims of lhs.
      features: sizes.

    Returns:
      The batch dims, lhs's other dims, `features`; of lhs's dtype.
    """
    contract, batch = _normal(contract, lhs.ndim), _normal(batch, lhs.ndim)
    dims = batch + _others(lhs, contract, batch)
    matmul = functools.partial(fp8_matmul, preferred_element_type=lhs.dtype, precision=precision)

    def run(lhs, weight):
        shape = (*_sizes(lhs, dims), *features)
        if 0 in shape:
            return jnp.zeros(shape, lhs.dtype)
        x = lhs.transpose(*dims, *contract)
        return _multiply(x, weight, len(batch), len(contract), matmul).reshape(shape)

    if not _is_explicit():
        return run(lhs, weight)
    kept = _spec_of(lhs, dims)
    spec = PartitionSpec(*kept, _free_axes(weight.nk[0], features[0], kept))
    inside: Callable = jax.sharding.auto_axes(run, out_sharding=spec)
    return inside(lhs, weight)


def _spec_of(x: jax.Array, dims: tuple[int, ...]) -> tuple:
    spec = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
    return tuple(spec[d] for d in dims)


def _free_axes(nk: jax.Array, size: int, taken: tuple) -> tuple[str, ...] | None:
    """Returns the axes of n [..., n, k], or None if they do not divide a size or are taken."""

    def named(entry) -> tuple[str, ...]:
        return (entry,) if isinstance(entry, str) else entry or ()

    (axes,) = map(named, _spec_of(nk, (nk.ndim - 2,)))
    used = {axis for entry in taken for axis in named(entry)}
    shape = jax.sharding.get_abstract_mesh().shape
    divides = size % math.prod(shape[axis] for axis in axes) == 0
    return axes if axes and divides and not used & set(axes) else None


def _is_explicit() -> bool:
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return AxisType.Explicit in kinds and AxisType.Manual not in kinds


def _multiply(x: jax.Array, w: Weight, batch: int, contract: int, matmul: Callable) -> jax.Array:
    """[*batch, *rows, *k] times [*batch, *k, *n] to [batch, *rows, n]; prepared, [*batch, k, n].

    Rows stay apart, since a mesh may cut each of their dims. One batch is none: then k and n keep
    their scale blocks whole.
    """
    sizes, rows = x.shape[:batch], x.shape[batch : x.ndim - contract]
    k, several = math.prod(x.shape[-contract:]), math.prod(sizes) != 1
    lead = (math.prod(sizes),) if several else ()
    if isinstance(w, PreparedWeight):
        w = jax.tree.map(lambda part: part.reshape(*lead, *part.shape[-2:]), w)
    else:
        w = w.reshape(*lead, k, math.prod(w.shape[batch + contract :]))
    multiply = jax.vmap(matmul) if several else matmul
    return multiply(x.reshape(*lead, *rows, k), w)


def _sharded(run, lhs, rhs, numbers, out_sharding) -> jax.Array:
    """Calls `run` and shards its result. On Explicit axes what merges dims, or is to be sharded
    otherwise than fp8_matmul does, is left to the partitioner: JAX types no such reshapes."""
    dense = numbers == (((lhs.ndim - 1,), (0,)), ((), ())) and rhs.ndim == 2
    if _is_explicit() and not (dense and out_sharding is None):
        if out_sharding is None:
            like = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, numbers), lhs, rhs)
            out_sharding = like.sharding.spec
        inside: Callable = jax.sharding.auto_axes(run, out_sharding=out_sharding)
        return inside(lhs, rhs)
    return shard_result(run(lhs, rhs), out_sharding)


def _normal(dims: Dims, ndim: int) -> tuple[int, ...]:
    """Negative dims count from the end; those out of range stay so."""
    return tuple(int(d) + ndim if -ndim <= d < 0 else int(d) for d in dims)


def _others(x: jax.Array, *taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if not any(d in dims for dims in taken))


def _sizes(x: jax.Array, dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x.shape[d] for d in dims)


def _ordered(x: jax.Array, *dims: tuple[int, ...]) -> jax.Array:
    return x.transpose(*(d for group in dims for d in group))


def _check(lhs, rhs, contract, batch) -> None:
    got = f"{describe('lhs', lhs)}, {describe('rhs', rhs)}, dimension_numbers {(contract, batch)}"
    for index, (name, x) in enumerate((("lhs", lhs), ("rhs", rhs))):
        dims = contract[index] + batch[index]
        if len(set(dims)) != len(dims) or any(not 0 <= d < x.ndim for d in dims):
            expected = f"each of 0..{x.ndim - 1} once at most"
            fail(OP, f"dims of {name} repeat or do not exist.", got, expected, "name other dims")
    for kind, (left, right) in (("contracting", contract), ("batch", batch)):
        if _sizes(lhs, left) != _sizes(rhs, right):
            what = f"sizes of {kind} dims differ: {_sizes(lhs, left)} and {_sizes(rhs, right)}."
            fail(OP, what, got, "the same sizes in the same order", "name other dims")
    if 0 in _sizes(lhs, contract[0]) or not contract[0]:
        fix = "multiply outer products with jnp.multiply; FP8 has nothing to sum"
        fail(OP, "nothing to contract over.", got, "contracting dims of 1 or more", fix)
