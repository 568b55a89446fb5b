"""The one stack of every custom call, from arrays under any transformation to the primitive.

bind            nothing to compute? Explicit mesh axes made Auto; inside shard_map, types alike
  custom_vmap   a batch becomes more rows or columns (Op.vmap), or one more leading dim
    custom_jvp  an error: FP8 numbers have no derivative
      custom_partitioning   every device gets its shards, of leading dims too: partition.py
        Op.local            one device: leading dims merged or looped over, layouts of the kernel
          primitive         lowered to the kernel on CUDA, to the reference elsewhere
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm._bind import meshes, native
from jax_fp8gemm._bind.partition import Batch, Rule, Total, partitioned, with_batch
from jax_fp8gemm._bind.shared_blocks import Shares
from jax_fp8gemm._core.errors import describe, fail, message
from jax_fp8gemm._core.layout import MOST_COUNT

SYMBOLIC_SIZE = 4096  # what an exported program that takes any size is planned for
Arrays = Sequence[jax.Array]
Shape = tuple[int, ...]
Results = list[tuple[Shape, Any]]  # shape and dtype of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One custom call. Each function gets the call's spec: frozen, hashable, all that is static.

    Attributes:
      name: in errors, and of the primitive.
      target: of the XLA custom call.
      results: (spec, operands) -> shape and dtype of the kernel's results. Here and in
        `reference` and `attributes` operands are the kernel's: scales in its layout.
      reference: (spec, operands) -> results, in plain jnp.
      attributes: (spec, operands' types) -> attributes of the custom call: all of the kernel's
        specification.
      seconds: (spec, operands' types) -> how long the kernel takes, about; for XLA's scheduler.
      aliases: spec -> {operand: result} that share memory.
      empty: (spec, operands) -> results where there is nothing to compute, else None. Here and
        below operands have any leading dims, and scales have their logical layout.
      rule: (spec, operands) -> how the call is cut up over a mesh.
      local: (spec, operands, batch, total) -> results on one device. `batch` says which operands
        have which leading dims of vmaps, see `run_batch`; `total` sums a cut contraction.
      local_part: (spec, operands, shares) -> results on one device, where devices share blocks of
        scales; None where the rule has no such letters.
      vmap: (spec, axis size, which operands are batched, operands) -> results, batch first; or None
        where the batch stays a leading dim, which `local` then gets.
    """

    name: str
    target: str
    results: Callable[[Any, Arrays], Results]
    reference: Callable[[Any, Arrays], Arrays]
    attributes: Callable[[Any, Arrays], Mapping[str, Any]]
    seconds: Callable[[Any, Arrays], float]
    aliases: Callable[[Any], dict[int, int]]
    empty: Callable[[Any, Arrays], Arrays | None]
    rule: Callable[[Any, Arrays], Rule]
    local: Callable[[Any, Arrays, Batch, Total | None], Arrays]
    vmap: Callable[[Any, int, Sequence[bool], Arrays], Arrays | None]
    local_part: Callable[[Any, Arrays, Shares], Arrays] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """A custom call of a program that was lowered, as one device runs it."""

    op: Op
    spec: Any
    operands: tuple[jax.ShapeDtypeStruct, ...]


_recorders: list[list[Call]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Yields a list that gets every call that is lowered meanwhile, by any thread."""
    calls: list[Call] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders[:] = [other for other in _recorders if other is not calls]


def _record(op: Op, spec: Any, operands: Arrays) -> None:
    types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
    for calls in _recorders:
        calls.append(Call(op, spec, types))


def bind(
    op: Op, spec: Hashable, operands: Arrays, out_sharding: NamedSharding | None = None
) -> Arrays:
    """Returns the results of a call, under every transformation. Arguments have been checked.

    Args:
      out_sharding: of the only result, where mesh axes are Explicit.
    """
    nothing = op.empty(spec, operands)
    if nothing is not None:
        return nothing
    rule = op.rule(spec, operands)
    make = functools.partial(_vmappable, op, spec, rule)
    return meshes.enter(rule, make, operands, out_sharding)


def rebind(op: Op, spec: Hashable, operands: Arrays) -> Arrays:
    """As bind, from within a rule for vmap: what the batch became may be batched again."""
    return _vmappable(op, spec, op.rule(spec, operands), meshes.is_manual())(*operands)


def bind_primitive(op: Op, spec: Hashable, operands: Arrays) -> list[jax.Array]:
    """Calls the kernel, or off CUDA the reference; for Op.local."""
    return primitive(op).bind(*operands, spec=spec)


@functools.cache
def _vmappable(
    op: Op, spec: Hashable, rule: Rule, manual: bool, batch: Batch = ()
) -> Callable[..., Arrays]:
    """Returns the call with its rules for vmap, derivatives and meshes.

    manual: inside a shard_map operands are shards already.
    """
    local = functools.partial(_local, op, spec, batch)
    static = (spec, batch) if batch else spec
    on_devices = jax.custom_jvp(
        local if manual else partitioned(local, with_batch(rule, batch), static)
    )
    on_devices.defjvp(functools.partial(_no_derivative, op.name))

    @custom_vmap
    def call(*operands):
        return on_devices(*operands)

    @call.def_vmap
    def batch_rule(size, batched, *operands):
        if size == 0:
            out = _empty_batch(call, batched, operands)
        else:
            out = None if batch else op.vmap(spec, size, batched, operands)
        if out is None:
            more = _vmappable(op, spec, rule, manual, (tuple(batched), *batch))
            out = more(*operands)
        return out, [True] * len(out)

    return call


def _local(
    op: Op,
    spec: Hashable,
    batch: Batch,
    *operands: jax.Array,
    total: Total | None = None,
    shares: Shares | None = None,
) -> Arrays:
    if shares:
        assert op.local_part and not batch  # a batch of such casts became more matrices
        return op.local_part(spec, operands, shares)
    return op.local(spec, operands, batch, total)


def _no_derivative(op: str, primals, tangents):
    raise NotImplementedError(
        message(
            op,
            "FP8 numbers have no derivative.",
            got=f"jax.grad (or a second derivative) through {op}",
            expected="first derivatives, through fp8_matmul or fp8_ragged_dot",
            fix="differentiate these once; for a second derivative use jnp.dot, for a metric "
            "jax.lax.stop_gradient",
        )
    )


def _empty_batch(call, batched, operands) -> list[jax.Array]:
    """Returns what a vmap of size 0 gives, of as many dims as any other."""
    one = [
        jax.ShapeDtypeStruct(x.shape[own:], x.dtype)
        for x, own in zip(operands, batched, strict=True)
    ]
    return [jnp.zeros((0, *y.shape), y.dtype) for y in jax.eval_shape(call, *one)]


def typical(size) -> int:
    """Returns a size to plan for; that of an exported program may not be known yet."""
    return SYMBOLIC_SIZE if jax.export.is_symbolic_dim(size) else size


def spread(size: int, batched: Sequence[bool], operands: Arrays) -> list[jax.Array]:
    """Returns the operands of a vmap, each with the batch as its first dim."""
    pairs = zip(operands, batched, strict=True)
    return [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in pairs]


def _check_counts(op: str, arrays: Arrays) -> None:
    """Checks that kernels can count rows and columns of what they read and write."""
    for x in arrays:
        sizes = [size for size in x.shape if not jax.export.is_symbolic_dim(size)]
        if max((math.prod(sizes[:-1]), *sizes[-1:]), default=0) > MOST_COUNT:
            got, expected = describe("an array", x), f"at most {MOST_COUNT} rows and columns"
            fix = "split the rows, or shard them over devices"
            fail(op, "there are too many rows or columns.", got, expected, fix)


One = Callable[[Arrays], Arrays]
Many = Callable[[int, Sequence[bool], Arrays], Arrays]


def run_batch(one: One, many: Many, batch: Batch, operands: Arrays) -> Arrays:
    """Runs an operation on one device, under any number of vmaps; for Op.local.

    Vmaps of the same operands are merged, others looped over. A shard of one element is no batch.

    Args:
      one: operands -> results.
      many: (size, which operands are batched, operands) -> results, both with the batch first.
    """
    if not batch:
        return one(operands)
    batched = batch[0]
    depth = sum(1 for _ in itertools.takewhile(lambda level: level == batched, batch))
    sizes = next(x.shape[:depth] for x, own in zip(operands, batched, strict=True) if own)
    size = math.prod(sizes)
    merged = [
        x.reshape(size, *x.shape[depth:]) if own else x
        for x, own in zip(operands, batched, strict=True)
    ]
    inner = functools.partial(run_batch, one, many, batch[depth:])
    if size == 1:
        firsts = [x[0] if own else x for x, own in zip(merged, batched, strict=True)]
        out: Arrays = [y[None] for y in inner(firsts)]
    elif batch[depth:]:
        out = loop(inner, batched, merged)
    else:
        out = many(size, batched, merged)
    return [y.reshape(*sizes, *y.shape[1:]) for y in out]


def loop(one: One, batched: Sequence[bool], operands: Arrays) -> Arrays:
    """Runs an operation for one element of the batch after the other."""

    def step(own):
        rest = iter(own)
        return one([next(rest) if b else x for x, b in zip(operands, batched, strict=True)])

    return jax.lax.map(step, [x for x, own in zip(operands, batched, strict=True) if own])


@functools.cache
def primitive(op: Op) -> Primitive:
    """Makes the primitive. It runs under jax.disable_jit() too: it brings its own jit."""
    made = Primitive(f"jax_fp8gemm_{op.name}")
    made.multiple_results = True
    jitted = jax.jit(made.bind, static_argnames="spec")

    @made.def_impl
    def run(*operands, spec):
        with jax.disable_jit(False):
            return jitted(*operands, spec=spec)

    @made.def_abstract_eval
    def types(*operands, spec):
        like = operands[0]

        def like_it(shape, dtype):
            # The update carries the manual axes of a shard_map along; the mesh too, unsharded.
            at = NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(shape)))
            dtype = jnp.dtype(dtype)
            return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=at)

        return [like_it(*result) for result in op.results(spec, operands)]

    # Inlined, so that programs do not show it. jit traces it once, not at every lowering, and knows
    # which of JAX's settings that depends on.
    reference = jax.jit(op.reference, static_argnums=0, inline=True)

    def meaning(*operands, spec):
        _record(op, spec, operands)
        return reference(spec, operands)

    def lower_cuda(ctx, *operands, spec):
        native.check_plugin()
        _record(op, spec, ctx.avals_in)
        _check_counts(op.name, (*ctx.avals_in, *ctx.avals_out))
        attributes = tuple(op.attributes(spec, ctx.avals_in).items())
        ns = round(1e9 * op.seconds(spec, ctx.avals_in))

        def call(*operands):  # XLA's scheduler takes 10 µs for any custom call, unless it is told
            with set_xla_metadata(latency_metadata=ns):
                return kernel.bind(*operands, spec=spec, attributes=attributes)

        return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)

    kernel = Primitive(f"{made.name}_call")  # the custom call alone, for what is said about it
    kernel.multiple_results = True
    kernel.def_abstract_eval(lambda *operands, spec, attributes: types(*operands, spec=spec))

    def lower_call(ctx, *operands, spec, attributes):
        aliases = op.aliases(spec) or None
        rule = jax.ffi.ffi_lowering(op.target, operand_output_aliases=aliases)
        return rule(ctx, *operands, **dict(attributes))

    mlir.register_lowering(kernel, lower_call, platform="cuda")
    mlir.register_lowering(made, mlir.lower_fun(meaning, multiple_results=True))
    mlir.register_lowering(made, lower_cuda, platform="cuda")
    return made
