"""In which context an operation is traced: inside a shard_map, on Explicit axes, or neither."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_fp8gemm._bind.partition import Axes, Rule, assign, shares, spec_of


def is_manual() -> bool:
    """Whether this is traced inside a shard_map, where an operation works on what it is given."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def is_automatic() -> bool:
    """Whether all axes of the mesh in use are Auto; also without one."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return all(kind == AxisType.Auto for kind in kinds)


def on_one_device(*arrays: jax.Array) -> bool:
    """Whether what is traced here will not be cut up over devices.

    As far as the mesh in use and the arrays' types tell. A mesh that only jax.jit's in_shardings
    name is not seen here.
    """
    return is_manual() or mesh_of(*arrays).size <= 1


def _varying(kind) -> frozenset[str]:
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # what other releases of jax call it


def vary_alike(*trees):
    """Inside a shard_map, types arrays as varying over all axes that any of them varies over.

    Outside of one, does nothing. Its transpose sums gradients over the axes that an array gains, so
    it belongs outside of a custom_vjp.
    """
    if not is_manual():
        return trees
    arrays, tree = jax.tree.flatten(trees)
    own = [_varying(jax.typeof(x)) for x in arrays]
    every = frozenset().union(*own)
    gained = [tuple(sorted(every - axes)) for axes in own]
    pairs = zip(arrays, gained, strict=True)
    varied = [jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in pairs]
    return jax.tree.unflatten(tree, varied)


def mesh_of(*arrays: jax.Array):
    """Returns the mesh in whose context this is traced, else that of the arrays' types."""
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays))
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def explicit_axes(mesh) -> Axes:
    """Returns the axes of a mesh that arrays' types name."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Returns the part of x's type that says how it is sharded, None without Explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if explicit_axes(sharding.mesh) else None


def enter(rule: Rule, make: Callable[[bool], Callable], operands, out_sharding=None):
    """Calls a function, with Explicit axes made Auto inside, and varying types made alike.

    make: of whether this is inside a shard_map, returns the function.

    On a mesh with Explicit axes its results are sharded as the operands say, unless out_sharding is
    given. Rows of a GEMM win over its columns.
    """
    function = make(is_manual())
    mesh = mesh_of(*operands)
    axes = explicit_axes(mesh)
    if axes:
        if out_sharding is None:
            out_sharding = _out_sharding(rule, operands, mesh)
        function = _automatic(function, mesh, axes, out_sharding)
    return function(*vary_alike(*operands))


def _out_sharding(rule: Rule, operands, mesh):
    specs = [jax.typeof(x).sharding.spec for x in operands]
    offered = [(rule.operands[i], specs[i], votes) for i, votes in rule.voters]
    sizes = rule.sizes([x.shape for x in operands])
    plan = assign(rule, offered, sizes, mesh)
    kept = {letter: cut for letter, cut in plan.items() if letter not in rule.summed}
    shared = shares(rule, plan, sizes, mesh)
    out = [spec_of(dims, kept, shared) for dims in rule.results]
    return out if len(out) > 1 else out[0]


def automatic(function: Callable, *likes: jax.Array | None) -> Callable:
    """Returns `function` with Explicit axes made Auto inside.

    Its results are sharded as `likes`, one for each: as the array, or not at all for None.
    """
    mesh = mesh_of(*(x for x in likes if x is not None))
    axes = explicit_axes(mesh)
    if not axes:
        return function
    out = [PartitionSpec() if x is None else jax.typeof(x).sharding for x in likes]
    return _automatic(function, mesh, axes, tuple(out) if len(out) > 1 else out[0])


def shard_result(y: jax.Array, out_sharding: NamedSharding | PartitionSpec | None) -> jax.Array:
    """Shards a result as asked for; without Explicit axes that is a constraint."""
    if out_sharding is None:
        return y
    mesh = getattr(out_sharding, "mesh", jax.sharding.get_abstract_mesh())
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(y, out_sharding)
    return jax.lax.with_sharding_constraint(y, out_sharding)


def _automatic(function: Callable, mesh, axes: Axes, out_sharding) -> Callable:
    inner = jax.sharding.auto_axes(function, axes=axes, out_sharding=out_sharding)

    def call(*arrays):
        with jax.sharding.use_abstract_mesh(mesh):
            return inner(*arrays)

    return call
