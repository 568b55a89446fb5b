"""What travels between devices in a compiled program."""

import collections
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns kind and shape of the result of every collective in an HLO text."""
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^ ]* ({KINDS})(?:-start)?\(", text)
    return [(kind, tuple(map(int, shape.split(","))) if shape else ()) for shape, kind in found]


def count(text: str) -> dict[str, int]:
    return dict(collections.Counter(kind for kind, _ in collectives(text)))


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
