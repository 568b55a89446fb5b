"""fp8_dot_general: jax.lax.dot_general in FP8, for the hooks of Flax and the like."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jax_fp8gemm._bind.meshes import shard_result
from jax_fp8gemm._core.checks import as_float, check_bool
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.types import Precision
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.recipe import result_dtype

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


def _multiply(x: jax.Array, w: jax.Array, batch: int, contract: int, matmul: Callable) -> jax.Array:
    """[*batch, *rows, *k] times [*batch, *k, *n] to [batch, *rows, n].

    Rows stay apart, since a mesh may cut each of their dims. One batch is none: then k and n keep
    their scale blocks whole.
    """
    sizes, rows = x.shape[:batch], x.shape[batch : x.ndim - contract]
    k, n = math.prod(x.shape[-contract:]), math.prod(w.shape[batch + contract :])
    if math.prod(sizes) == 1:
        return matmul(x.reshape(*rows, k), w.reshape(k, n))
    return jax.vmap(matmul)(x.reshape(-1, *rows, k), w.reshape(-1, k, n))


def _sharded(run, lhs, rhs, numbers, out_sharding) -> jax.Array:
    """Calls `run` and shards its result. On Explicit axes what merges dims, or is to be sharded
    otherwise than fp8_matmul does, is left to the partitioner: JAX types no such reshapes."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types
    dense = numbers == (((lhs.ndim - 1,), (0,)), ((), ())) and rhs.ndim == 2
    if explicit and not (dense and out_sharding is None):
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
