"""Meshes of eight devices, and what travels between them in a compiled program."""

import collections
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "seq", "model")
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def mesh_of(kind: AxisType):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


def collectives(text: str) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Returns of every collective in an HLO text its kind, and dtype and shape of its results."""
    found = []
    for result, kind, start in re.findall(rf"= (.*?) ({KINDS})(-start)?\(", text):
        arrays = [
            (dtype, tuple(map(int, shape.split(","))) if shape else ())
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        ]
        both = start and result.startswith("((")  # an asynchronous one also carries its operands
        found.append((kind, arrays[len(arrays) // 2 :] if both else arrays))
    return found


def count(text: str) -> dict[str, int]:
    return dict(collections.Counter(kind for kind, _ in collectives(text)))


def gathered(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of all arrays that are gathered or exchanged."""
    kinds = ("all-gather", "all-to-all", "collective-permute")
    return [array for kind, arrays in collectives(text) if kind in kinds for array in arrays]


def place(mesh, tree, *specs):
    """Puts arrays (or pytrees of them) on the mesh, one spec for each."""
    at = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    return [jax.device_put(x, sharding) for x, sharding in zip(tree, at, strict=True)]


def near(got, expected, bound: float = 1e-5) -> bool:
    """Whether all leaves agree up to `bound` of the largest element."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if a.shape != b.shape or not np.abs(a - b).max() <= bound * np.abs(b).max():
            return False
    return True
