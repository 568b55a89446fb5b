"""How an operation on blocks is cut up over the devices of a mesh.

A `Rule` names every dim of every operand and result by a letter. From it follow the Shardy rule,
which says how shardings travel through the operation, and the partition callback, which states
the sharding that each operand must have: one letter for each mesh axis, whatever was offered. What
is computed on each device is the operation itself, on shards, with a sum over the axes of a
contracted letter behind it.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import string
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_fp8gemm._bind.gathered import Gathered
from jax_fp8gemm._bind.shared_blocks import Share, Shares
from jax_fp8gemm._core.errors import describe
from jax_fp8gemm._core.layout import SCALE_BLOCK, Tile
from jax_fp8gemm._core.version import __version__


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dim of an array.

    Attributes:
      letter: what it counts.
      per: how many of them one entry stands for: 1, SCALE_BLOCK (a dim of scales), or None for all
        (size 1).
    """

    letter: str
    per: int | None = 1


Dims = tuple[Dim, ...]


def scale_dims(letters: str, tile: Tile) -> Dims:
    """Returns the dims of the scales of an array with these dims, tiled in its last two."""
    *lead, rows, columns = tuple(letters)
    return (*map(Dim, lead), Dim(rows, tile[0]), Dim(columns, tile[1]))


def blocked_letters(*arrays: Dims) -> frozenset[str]:
    """Returns the letters that some array has a dim of scales for, one for 128."""
    return frozenset(dim.letter for dims in arrays for dim in dims if dim.per == SCALE_BLOCK)


@dataclasses.dataclass(frozen=True)
class Rule:
    """An operation's dims, and what may be cut.

    Attributes:
      op: its name, for warnings.
      operands, results: the dims of each.
      names: of the operands, for warnings.
      voters: (operand, votes): whose shardings decide. The other operands follow. A result has one
        vote.
      summed: letters that are contracted; where one is cut, results are summed over its axes.
      whole: letters that are never cut.
      blocked: letters that are cut into whole blocks of 128 only.
      shared: those of them that may be cut anywhere: devices agree on the scales of blocks.
      added: index of the operand that is added to the sum; it follows result 0.
    """

    op: str
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    voters: tuple[tuple[int, int], ...]
    summed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    blocked: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    added: int | None = None
    names: tuple[str, ...] = ()

    def letters(self) -> tuple[str, ...]:
        """In order of appearance."""
        dims = itertools.chain.from_iterable(self.operands + self.results)
        return tuple(dict.fromkeys(dim.letter for dim in dims))

    def sizes(self, shapes) -> dict[str, int]:
        """Returns the size of every letter, from the operands' shapes."""
        arrays = zip(self.operands, shapes, strict=True)
        pairs = ((dim, size) for dims, shape in arrays for dim, size in zip(dims, shape))  # noqa: B905
        return {dim.letter: size for dim, size in pairs if dim.per == 1}


# Which operands have the leading dim of each vmap, the outermost first.
Batch = tuple[tuple[bool, ...], ...]


def with_batch(rule: Rule, batch: Batch) -> Rule:
    """Returns the rule for operands with the leading dims of vmaps; each may be cut."""
    names = string.ascii_uppercase[::-1]  # rules count their own leading dims from A on

    def lead(index: int) -> Dims:
        return tuple(Dim(name) for name, own in zip(names, batch) if own[index])  # noqa: B905

    every = tuple(map(Dim, names[: len(batch)]))
    return dataclasses.replace(
        rule,
        operands=tuple((*lead(i), *dims) for i, dims in enumerate(rule.operands)),
        results=tuple((*every, *dims) for dims in rule.results),
    )


def shardy_rule(rule: Rule, shapes, axis_sizes: Iterable[int] = ()) -> tuple[str, dict]:
    """Returns the rule in Shardy's notation, and its keyword arguments.

    A blocked letter k becomes kb blocks of ki = 128: qvalue (kb ki), scale kb. What cannot be cut,
    one block included, gets a factor of its own in every array: no sharding travels through it.
    Where devices may share blocks, only scales get one, if an axis of the mesh would split blocks.

    Args:
      axis_sizes: of the mesh.
    """
    sizes, numbers = rule.sizes(shapes), itertools.count()

    def is_compound(letter: str) -> bool:
        count, rest = divmod(sizes[letter], SCALE_BLOCK)
        splits = letter in rule.shared and any(count % size for size in axis_sizes)
        return not rest and count > 1 and not splits

    compound = {letter for letter in rule.blocked - rule.whole if is_compound(letter)}
    factors: dict[str, int | None] = {}  # in order of appearance, with the size of inner ones

    def factor(dim: Dim) -> str:
        letter = dim.letter
        alone = letter in rule.whole or (letter in rule.blocked and letter not in compound)
        if letter in rule.shared and dim.per == 1:
            alone = False
        if alone or dim.per is None:
            return f"only{next(numbers)}"
        if letter not in compound:
            factors[letter] = None
            return letter
        if dim.per == SCALE_BLOCK:
            factors[f"{letter}b"] = None
            return f"{letter}b"
        factors.setdefault(f"{letter}b", sizes[letter] // SCALE_BLOCK)
        factors[f"{letter}i"] = SCALE_BLOCK
        return f"({letter}b {letter}i)"

    def text(arrays) -> str:
        return ", ".join(" ".join(factor(dim) for dim in dims) for dims in arrays)

    notation = f"{text(rule.operands)} -> {text(rule.results)}"
    summed = tuple(name for name in factors if name[:1] in rule.summed)
    inner = {name: size for name, size in factors.items() if size is not None}
    return notation, {"reduction_factors": summed, **inner}


Axes = tuple[str, ...]


def _axes(entry) -> Axes:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def elect(rule: Rule, offered) -> dict[str, Axes]:
    """Returns the mesh axes that each letter gets by votes: each axis cuts one letter.

    Arrays vote with their shardings. Of letters with as many votes the first to appear wins, so
    rows of the activations stay where they are and weights are gathered.

    Args:
      offered: (dims, PartitionSpec, votes) of the arrays that vote.
    """
    votes: dict[str, dict[str, int]] = {}
    for dims, spec, weight in offered:
        for dim, entry in zip(dims, spec):  # noqa: B905 (a spec may be shorter)
            for axis in _axes(entry):
                count = votes.setdefault(axis, {})
                own = weight * (dim.letter not in rule.whole)
                count[dim.letter] = count.get(dim.letter, 0) + own
    order = rule.letters()
    elected: dict[str, Axes] = {}
    for axis, count in votes.items():
        letter = max(count, key=lambda letter: (count[letter], -order.index(letter)))
        if count[letter]:
            elected[letter] = (*elected.get(letter, ()), axis)
    return elected


def fitted(rule: Rule, elected: dict[str, Axes], sizes: dict[str, int], mesh) -> dict[str, Axes]:
    """Returns as many of the axes as cut each letter into equal shards, and into whole blocks
    unless devices share them.

    Args:
      mesh: with `shape`, the size of each axis.
    """
    plan = {}
    for letter, axes in elected.items():
        step = SCALE_BLOCK if letter in rule.blocked - rule.shared else 1
        while axes and sizes[letter] % (step * math.prod(mesh.shape[axis] for axis in axes)):
            axes = axes[:-1]
        plan[letter] = axes
    return plan


def assign(rule: Rule, offered, sizes: dict[str, int], mesh) -> dict[str, Axes]:
    """Returns the mesh axes over which each letter is cut, see `elect` and `fitted`."""
    return fitted(rule, elect(rule, offered), sizes, mesh)


def shares(rule: Rule, plan: dict[str, Axes], sizes: dict[str, int], mesh) -> Shares:
    """Returns of which letters the plan splits blocks."""
    found = {}
    for letter in sorted(rule.shared):
        axes = plan.get(letter, ())
        if axes and sizes[letter] % (SCALE_BLOCK * math.prod(mesh.shape[a] for a in axes)):
            found[letter] = Share(axes, sizes[letter])
    return found


def spec_of(dims: Dims, plan: dict[str, Axes], shared: Iterable[str] = ()) -> PartitionSpec:
    """Returns the sharding of an array with these dims.

    shared: letters whose blocks are split; every device has all of their scales.
    """

    def cut(dim: Dim) -> Axes:
        whole = dim.per is None or (dim.per == SCALE_BLOCK and dim.letter in shared)
        return () if whole else plan.get(dim.letter, ())

    return PartitionSpec(*(cut(dim) or None for dim in dims))


@dataclasses.dataclass(frozen=True)
class Total:
    """The sum over devices behind a contraction: scattered along dims where that is wanted.

    Attributes:
      scattered: pairs (mesh axis, dim of result 0).
      axes: the other axes to sum over.
    """

    scattered: tuple[tuple[str, int], ...]
    axes: Axes

    def __call__(self, partial: jax.Array) -> jax.Array:
        for axis, dim in self.scattered:
            partial = jax.lax.psum_scatter(partial, axis, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(partial, self.axes) if self.axes else partial


def _total(rule: Rule, plan, wanted: PartitionSpec, sizes, mesh) -> tuple[Total | None, dict]:
    """Returns the sum over a contracted letter's axes and the plan of the summed result."""
    axes = tuple(itertools.chain.from_iterable(plan.get(k, ()) for k in sorted(rule.summed)))
    after = {letter: cut for letter, cut in plan.items() if letter not in rule.summed}
    scattered = []
    for place, (dim, entry) in enumerate(zip(rule.results[0], wanted)):  # noqa: B905
        for axis in _axes(entry):
            now = after.get(dim.letter, ())
            cut = (*now, axis)
            fits = sizes[dim.letter] % math.prod(mesh.shape[a] for a in cut) == 0
            if axis in axes and cut == _axes(entry)[: len(cut)] and fits:
                after[dim.letter] = cut
                scattered.append((axis, place))
    rest = tuple(axis for axis in axes if axis not in dict(scattered))
    return (Total(tuple(scattered), rest) if axes else None), after


def partitioned(local: Callable, rule: Rule, static) -> Callable:
    """Returns `local`, jitted, with its rule for partitioning on meshes whose axes are Auto.

    What runs on a device is not in the program that JAX's persistent cache looks at, so all that
    it depends on goes into the name of a function there.

    Args:
      static: what `local` depends on beside its operands; its repr says all of it.
      local: called as local(*operands) on whole arrays or shards; as local(*operands, total=f) on
        shards of a contracted letter, where results are to be passed through f; and as
        local(*operands, shares=s) where devices share blocks of scales.
    """
    call = custom_partitioning(lambda *operands: local(*operands))

    def notation(mesh, operand_types, result_types):
        return shardy_rule(rule, [tuple(t.shape) for t in operand_types], mesh.shape.values())

    def infer(mesh, operands, results):  # asked where Shardy is turned off
        mesh, plan, _ = _plan(rule, mesh, operands, ())
        kept = {letter: axes for letter, axes in plan.items() if letter not in rule.summed}
        shared = shares(rule, plan, rule.sizes([x.shape for x in operands]), mesh)
        out = [NamedSharding(mesh, spec_of(dims, kept, shared)) for dims in rule.results]
        return jax.tree.unflatten(jax.tree.structure(results), out)

    def partition(mesh, operands, results):
        leaves, tree = jax.tree.flatten(results)
        mesh, plan, wanted = _plan(rule, mesh, operands, leaves)
        sizes = rule.sizes([x.shape for x in operands])
        total, after = _total(rule, plan, wanted[0], sizes, mesh)
        at = [
            NamedSharding(mesh, spec_of(dims, after if i == rule.added else plan))
            for i, dims in enumerate(rule.operands)
        ]
        shared = shares(rule, plan, sizes, mesh)
        out = [NamedSharding(mesh, spec_of(dims, after, shared)) for dims in rule.results]
        body = _on_one_device(local, total=total, shares=shared)
        return mesh, body, jax.tree.unflatten(tree, out), tuple(at)

    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=notation,
        decode_shardings=False,  # JAX cannot name a part of an axis, which Shardy may offer
    )

    def run(*operands):
        return call(*operands)

    identity = f"{static} {__version__}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    run.__name__ = run.__qualname__ = f"{rule.op.replace(' ', '_')}_{digest}"
    return jax.jit(run)


def _on_one_device(local: Callable, **together: Any) -> Callable:
    """Returns `local` for the shards of a device, whatever mesh is in use around the program.

    together: what it does with other devices, if anything.
    """
    body = functools.partial(local, **{name: way for name, way in together.items() if way})

    def run(*shards):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return body(*shards)

    return run


def _plan(rule: Rule, mesh, operands, results) -> tuple[Mesh, dict[str, Axes], list]:
    """Returns the mesh, which axes cut which letter, and the shardings offered for the results."""
    if mesh.empty:  # nothing in the program is on a mesh: there is nothing to cut
        mesh = Mesh(np.array(list(operands[0].sharding.device_set)), ("devices",))
        return mesh, {}, [PartitionSpec()] * len(results)
    given = [_offered(x, mesh) for x in operands]
    wanted = [_offered(x, mesh) for x in results]
    voters = [(rule.operands[i], given[i], votes) for i, votes in rule.voters]
    # Results may not be known yet.
    voters += [(dims, spec, 1) for dims, spec in zip(rule.results, wanted)]  # noqa: B905
    elected = elect(rule, voters)
    plan = fitted(rule, elected, rule.sizes([x.shape for x in operands]), mesh)
    for gathered in find_gathered(rule, elected, plan, mesh, zip(operands, given, strict=True)):
        gathered.warn()
    return mesh, plan, wanted


def find_gathered(rule: Rule, elected: dict[str, Axes], plan, mesh, given) -> list[Gathered]:
    """Returns what the rule gathers although it was sharded; only matrices, not their scales.

    What travels because its axis cuts another letter is no such case: weights do so in FSDP.

    Args:
      given: of each operand the array and the PartitionSpec that it has.
    """
    given = list(given)
    sizes = rule.sizes([x.shape for x, _ in given])
    found: dict[tuple[str, Axes], list[str]] = {}
    for index, (dims, (x, spec)) in enumerate(zip(rule.operands, given, strict=True)):
        if len(dims) < 2 or any(dim.per != 1 for dim in dims):
            continue
        name = rule.names[index] if rule.names else f"operand {index}"
        for dim, entry in zip(dims, spec, strict=True):
            letter, axes = dim.letter, _axes(entry)
            lost = elected.get(letter, ())[len(plan.get(letter, ())) :]
            splits_blocks = letter in rule.blocked and set(axes) & set(lost)
            if axes and (letter in rule.whole or splits_blocks):
                size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
                found.setdefault((letter, axes), []).append(f"{describe(name, x)}, {size} bytes")
    return [
        Gathered(
            op=rule.op,
            letter=letter,
            size=sizes[letter],
            axes=axes,
            devices=math.prod(mesh.shape[axis] for axis in axes),
            arrays=tuple(arrays),
            whole=letter in rule.whole,
        )
        for (letter, axes), arrays in found.items()
    ]


def _offered(x, mesh: Mesh) -> PartitionSpec:
    """Returns the axes that cut each dim of x, outer ones first; parts of an axis do not count."""
    try:
        places = x.sharding.devices_indices_map(x.shape)
    except ValueError:  # shards of unequal size
        return PartitionSpec()
    corner = (0,) * (mesh.devices.ndim - 1)
    lines = {
        axis: np.moveaxis(mesh.devices, i, -1)[corner] for i, axis in enumerate(mesh.axis_names)
    }
    entries = []
    for dim in range(len(x.shape)):
        starts = {axis: [places[d][dim].start or 0 for d in line] for axis, line in lines.items()}
        cutting = [axis for axis, at in starts.items() if len(set(at)) == len(at) > 1]
        entries.append(tuple(sorted(cutting, key=lambda axis: -max(starts[axis]))) or None)
    return PartitionSpec(*entries)
