"""Experts over the devices of a mesh: which axes split what, and the shard_map of the layer."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._bind.partition import Axes
from jax_fp8gemm._core.errors import describe, fail, message
from jax_fp8gemm._core.types import ExchangeKind, Precision, ScaleRounding, Wire
from jax_fp8gemm._moe.exchange import TokenExchange
from jax_fp8gemm._moe.kernels import (
    ExpertKernels,
    check_shards,
    describe_kernels,
    fp8_halves,
)
from jax_fp8gemm._moe.weights import ready

AxisNames = str | tuple[str, ...]
TokenAxes = AxisNames | PartitionSpec
Entries = tuple[Axes, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertAxes:
    """Which mesh axes split what.

    Attributes:
      experts: the experts.
      tensor: the hidden dim of every expert.
      tokens: the tokens.
    """

    experts: Axes = ()
    tensor: Axes = ()
    tokens: Axes = ()

    @property
    def any(self) -> bool:
        return bool(self.experts or self.tensor or self.tokens)

    @property
    def exchanged(self) -> Axes:
        """The axes of experts over which tokens travel: those that split tokens too."""
        return tuple(axis for axis in self.experts if axis in self.tokens)

    @property
    def gathered(self) -> Axes:
        """The tensor axes that split tokens too: every device of theirs needs all tokens."""
        return tuple(axis for axis in self.tensor if axis in self.tokens)

    @property
    def summed(self) -> Axes:
        """The axes whose devices have the same tokens, and each a part of their results."""
        return tuple(axis for axis in (*self.experts, *self.tensor) if axis not in self.tokens)


def axes_of(
    op: str, expert_axis: AxisNames | None, tensor_axis: AxisNames | None, token_axes: Any
) -> ExpertAxes:
    """Returns the axes of a call, checked; for shard_map, where the default splits tokens.

    Raises:
      ValueError: an axis splits two dims of a kernel, or two of the tokens.
      TypeError: not names of axes.
    """
    experts = _names(op, "expert_axis", expert_axis)
    tensor = _names(op, "tensor_axis", tensor_axis)
    tokens = experts if token_axes is None else _flat(_entries(op, token_axes))
    got = f"expert_axis={expert_axis!r}, tensor_axis={tensor_axis!r}, token_axes={token_axes!r}"
    for what, axes in (("experts and hidden dims", experts + tensor), ("tokens", tokens)):
        if len(set(axes)) < len(axes):
            fix = "name each axis once"
            fail(op, f"a mesh axis splits {what} twice.", got, "different axes", fix)
    return ExpertAxes(experts=experts, tensor=tensor, tokens=tokens)


def sharding_names(axes: ExpertAxes, parameter: str) -> tuple[AxisNames | None, ...]:
    """Returns the axes of each dim of a layer's parameter, as Flax's metadata has them."""
    if parameter in ("gate_kernel", "gate_bias"):
        return (None, None) if parameter == "gate_kernel" else (None,)
    lead = () if parameter.startswith("shared_") else (_name(axes.experts),)
    tensor = _name(axes.tensor)
    if parameter.endswith("_bias"):  # as wide as the results of its matrix
        return (*lead, None if parameter.endswith("wo_bias") else tensor)
    return (*lead, tensor, None) if parameter.endswith("wo") else (*lead, None, tensor)


def _name(axes: Axes) -> AxisNames | None:
    return axes[0] if len(axes) == 1 else axes or None


def _names(op: str, argument: str, value: Any) -> Axes:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        got, expected = f"{argument}={value!r}", "the name of a mesh axis, or a tuple of names"
        fail(op, f"{argument} is not a name.", got, expected, f"pass {expected}", TypeError)
    return tuple(names)


def _entries(op: str, token_axes: Any) -> Entries:
    """Returns the axes of each leading dim of x; of the first one, where there is no spec."""
    if isinstance(token_axes, PartitionSpec):
        return tuple(_names(op, "token_axes", entry) for entry in token_axes)
    return (_names(op, "token_axes", token_axes),)


def _flat(entries: Iterable[Axes]) -> Axes:
    return tuple(axis for entry in entries for axis in entry)


def are_manual(op: str, axes: ExpertAxes) -> bool:
    """Whether this is inside a shard_map over the axes that split kernels.

    Raises:
      ValueError: this is inside a shard_map over other axes. A shard_map of the layer's own inside
        of that has no gradient in JAX.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    missing = [axis for axis in (*axes.experts, *axes.tensor, *axes.tokens) if axis not in manual]
    if manual and missing:
        name = missing[0]
        fail(
            op,
            f"there is no mesh axis {name!r} here.",
            f"a shard_map over {', '.join(map(repr, manual))}, not over {name!r}",
            f"a shard_map over {name!r} too, or none around {op}",
            f"add {name!r} to axis_names of jax.shard_map, or call {op} outside of it",
        )
    return bool(manual)


def size_of(axes: Axes) -> int:
    """Returns the number of devices of manual axes."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def received_rows(axes: ExpertAxes, tokens: int, top_k: int) -> int:
    """Returns how many choices of experts a device hears of, from all that send it tokens."""
    devices = size_of((*axes.exchanged, *axes.gathered))
    return tokens * top_k * devices


def exchange_of(op: str, axes: ExpertAxes, kind: ExchangeKind, wire: Wire) -> TokenExchange | None:
    """Returns how tokens travel, None where every device has those it needs.

    Raises:
      ValueError: all_to_all is to move tokens that an expert axis does not split.
    """
    if kind == "all_to_all" and axes.exchanged != axes.experts:
        got = f"tokens over {axes.tokens}, experts over {axes.experts}"
        fix = 'name the axes of the experts in token_axes too, or pass exchange="all_gather"'
        what = "all_to_all needs tokens that are split as the experts are."
        fail(op, what, got, "tokens over all axes of the experts", fix)
    if not axes.exchanged and not axes.gathered:
        return None
    return TokenExchange(axes=axes.exchanged, gathered=axes.gathered, kind=kind, wire=wire)


# ---- where nothing is manual yet ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where tokens and kernels of one call lie on a mesh.

    Attributes:
      mesh: of the shard_map.
      entries: the axes of each leading dim of x.
      axes: those of the kernels, and all of the tokens'.
    """

    mesh: Mesh | AbstractMesh
    entries: Entries
    axes: ExpertAxes

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(*(entry or None for entry in self.entries))

    def kernels(self, kernels: ExpertKernels) -> ExpertKernels:
        """Returns the specs of experts' matrices; of two dims, of an expert on every device."""
        lead = () if kernels.wo.ndim == 2 else (self.axes.experts or None,)
        tensor = self.axes.tensor or None
        up, down = PartitionSpec(*lead, None, tensor), PartitionSpec(*lead, tensor)
        specs: dict[str, Any] = {"wi_0": up, "wi_1": up, "wo": down}
        if kernels.is_fp8:  # [out, in]; a QArray's numbers and scales have the same spec
            specs = {"wi_0": down, "wi_1": down, "wi": down, "wo": up}
        specs |= dict.fromkeys(("wi_0_bias", "wi_1_bias"), PartitionSpec(*lead, tensor))
        specs |= {"wo_bias": PartitionSpec(*lead), "copies": PartitionSpec(*lead)}
        absent = dict.fromkeys(n for n in specs if getattr(kernels, n) is None)
        return ExpertKernels(**(specs | absent))

    def halves(self, op: str, name: str, kernels: ExpertKernels) -> ExpertKernels:
        """Returns kernels that tensor axes can split: of FP8 ones gate and up are apart.

        Raises:
          ValueError: a shard would be no multiple of 128.
        """
        devices = math.prod(self.mesh.shape[axis] for axis in self.axes.tensor)
        check_shards(op, name, kernels, devices)
        return fp8_halves(kernels) if kernels.is_fp8 and devices > 1 else kernels

    def run(self, function: Callable, operands: tuple, in_specs: tuple, out_specs: Any) -> Any:
        """Calls a function in a shard_map over all axes of the mesh; a spec may stand for a tree.

        On Explicit axes, operands are first sharded as their specs say.
        """
        explicit = meshes.explicit_axes(self.mesh)
        if explicit:

            def put(spec, tree):
                at = NamedSharding(self.mesh, _only(explicit, spec))
                return jax.tree.map(lambda x: jax.sharding.reshard(x, at), tree)

            operands = jax.tree.map(put, in_specs, operands)
        mesh = self.mesh
        given = mesh if isinstance(mesh, Mesh) else None
        mapped = jax.shard_map(function, mesh=given, in_specs=in_specs, out_specs=out_specs)
        if isinstance(mesh, Mesh) or not jax.sharding.get_abstract_mesh().empty:
            return mapped(*operands)
        with jax.sharding.use_abstract_mesh(mesh):
            return mapped(*operands)

    def like(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """Returns y, on Explicit axes sharded as x."""
        if not meshes.explicit_axes(self.mesh):
            return y
        return jax.sharding.reshard(y, jax.typeof(x).sharding)

    def fold(self, x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
        """Makes the leading dims of tokens of one dim; the inverse of flat."""
        shape, explicit = (*lead, *x.shape[1:]), meshes.explicit_axes(self.mesh)
        if len(lead) == 1 or not explicit:
            return x.reshape(shape)
        one = _only(explicit, PartitionSpec(_flat(self.entries) or None))
        x = jax.sharding.reshard(x, NamedSharding(self.mesh, one))
        at = NamedSharding(self.mesh, _only(explicit, self.tokens))
        return jax.lax.reshape(x, shape, out_sharding=at)

    def flat(self, x: jax.Array) -> jax.Array:
        """Makes one dim of the leading dims of tokens."""
        count = len(self.entries)
        shape = (math.prod(x.shape[:count]), *x.shape[count:])
        explicit = meshes.explicit_axes(self.mesh)
        if count == 1 or not explicit:
            return x.reshape(shape)
        spec = _only(explicit, PartitionSpec(_flat(self.entries) or None))
        return jax.lax.reshape(x, shape, out_sharding=NamedSharding(self.mesh, spec))


def _only(names: Axes, spec: PartitionSpec) -> PartitionSpec:
    """Returns a spec without the other axes."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    kept = [tuple(axis for axis in entry if axis in names) for entry in entries]
    return PartitionSpec(*(entry or None for entry in kept))


def place(
    op: str, x: jax.Array, kernels: ExpertKernels, axes: ExpertAxes, token_axes: Any, mesh: Any
) -> Placement:
    """Returns where the tokens x [..., h] and the kernels of a call go.

    Args:
      token_axes: the user's; None: as x's type says, and over every axis of which types say
        nothing, but for tensor axes.
      mesh: the user's; None: the one in use, or that of the arrays' types.

    Raises:
      ValueError: there is no mesh, it lacks an axis, or a dim does not split evenly.
      TypeError: mesh is not one.
    """
    mesh = _mesh(op, axes, (x, *jax.tree.leaves(kernels)), mesh)
    if token_axes is None:
        entries = _default_entries(op, x, axes, mesh)
    else:
        entries = _entries(op, token_axes)
        if any(entries[x.ndim - 1 :]):
            got, fix = f"token_axes={token_axes!r}, {describe('x', x)}", "leave the last dim whole"
            fail(op, "token_axes has too many dims.", got, "a spec of the dims before h", fix)
    entries = (*entries, *[()] * x.ndim)[: x.ndim - 1]
    axes = dataclasses.replace(axes, tokens=_flat(entries))
    for dim, entry in enumerate(entries):
        _check_split(op, mesh, "tokens", describe("x", x), x.shape[dim], entry)
    got, (count, _, f) = describe_kernels(kernels), kernels.sizes
    _check_split(op, mesh, "experts", got, count, axes.experts)
    _check_split(op, mesh, "hidden features", got, f, axes.tensor)
    return Placement(mesh=mesh, entries=entries, axes=axes)


def _mesh(op: str, axes: ExpertAxes, arrays: tuple, given: Any) -> Mesh | AbstractMesh:
    mesh = meshes.mesh_of(*arrays) if given is None else given
    if not isinstance(mesh, Mesh | AbstractMesh):
        got, fix = f"mesh {type(mesh).__name__}", "pass what jax.make_mesh returned"
        fail(op, "mesh is not a mesh.", got, "a jax.sharding.Mesh", fix, TypeError)
    for axis in (*axes.experts, *axes.tensor, *axes.tokens):
        if axis not in mesh.axis_names:
            names = ", ".join(map(repr, mesh.axis_names))
            got = f"a mesh with the axes {names}" if names else "no mesh"
            fix = "call this inside `with jax.set_mesh(mesh):`, or pass mesh="
            if names:
                fix = f"name an axis of the mesh, or make one with an axis {axis!r}"
            fail(op, f"there is no mesh axis {axis!r} here.", got, f"a mesh axis {axis!r}", fix)
    return mesh


def _default_entries(op: str, x: jax.Array, axes: ExpertAxes, mesh: Mesh | AbstractMesh) -> Entries:
    explicit = meshes.explicit_axes(mesh)
    typed = jax.typeof(x).sharding.spec if explicit else ()
    entries = [*_entries(op, PartitionSpec(*typed))[: x.ndim - 1]]
    entries += [()] * (x.ndim - 1 - len(entries))
    for axis in mesh.axis_names:
        if axis in explicit or axis in axes.tensor:
            continue
        for dim, entry in enumerate(entries):
            if x.shape[dim] % math.prod(mesh.shape[name] for name in (*entry, axis)) == 0:
                entries[dim] = (*entry, axis)
                break
        else:
            _warn_replicated(op, describe("x", x), axis, mesh.shape[axis])
    return tuple(entries)


@functools.cache
def _warn_replicated(op: str, got: str, axis: str, size: int) -> None:
    text = message(
        op,
        f"tokens do not split over mesh axis {axis!r}; each of its devices routes all of them.",
        got=f"{got}, axis {axis!r} of {size} devices",
        expected=f"a leading dim of x that is a multiple of {size}",
        fix=f"pad the tokens, or pass token_axes without {axis!r} to have no warning",
    )
    warnings.warn(text, stacklevel=2)


def _check_split(op: str, mesh, what: str, got: str, size: int, axes: Axes) -> None:
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if size % devices:
        names = ", ".join(map(repr, axes))
        got = f"{got}, mesh axis {names} of {devices} devices"
        fix = f"use a multiple of {devices} {what}, or fewer devices for them"
        what = f"{size} {what} do not split over {devices} devices."
        fail(op, what, got, f"{size} % {devices} == 0", fix)


def ready_outside(
    op: str,
    kernels: ExpertKernels,
    where: Placement,
    *,
    rows: int,
    x: jax.Array,
    rounding: ScaleRounding,
    wanted: bool | None,
    precision: Precision,
) -> ExpertKernels:
    """Returns kernels with FP8 copies, so that what is gathered of them is FP8.

    As they are where the GEMMs cast them, and where a tensor axis splits them: gate and up lie in
    one copy, which is made of a device's own shards.

    Raises:
      ValueError: prepared kernels are to be split over a tensor axis, or cast in GEMMs.
    """
    if precision == "bf16":
        kernels = dataclasses.replace(kernels, copies=None)
    if where.axes.tensor:
        if kernels.copies is not None:
            got = f"prepared kernels, tensor_axis={where.axes.tensor}"
            fix = "pass float kernels, or prepare each device's shards inside jax.shard_map"
            fail(op, "a tensor axis cannot split prepared kernels.", got, "float kernels", fix)
        return where.halves(op, "kernels", kernels)
    apart = [a for a in where.axes.tokens if a not in where.axes.experts]
    rows //= math.prod(where.mesh.shape[axis] for axis in apart)
    return ready(
        op,
        kernels,
        rounding=rounding,
        rows=rows,
        others=(x,),
        wanted=wanted,
        split=True,
        precision=precision,
    )
