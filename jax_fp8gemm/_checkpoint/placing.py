"""From files to devices: every process reads the parts that its own devices hold."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_fp8gemm._checkpoint.sources import AnySource, Index, QSource, Source, read
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.qarray import QArray


def place(op: str, name: str, source: AnySource, sharding: Sharding | None) -> QArray | jax.Array:
    """Returns the array once it lies on its devices; None: on JAX's default device.

    The next array is read after this one has arrived, so that host memory holds one at a time.
    """
    if not isinstance(source, QSource):
        return _place(op, name, source, sharding)
    scale = scale_sharding(sharding, source.shape, source.scale.shape)
    return QArray(_place(op, name, source.qvalue, sharding), _place(op, name, source.scale, scale))


def _place(op: str, name: str, source: Source, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read(source)))
    _check_sharding(op, name, source, sharding)
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one reading

    def part(index: Index | None) -> np.ndarray:
        assert index is not None  # which is for devices of other processes
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, source.shape, strict=True))
        if bounds not in parts:
            parts[bounds] = read(source, tuple(slice(*pair) for pair in bounds))
        return parts[bounds]

    array = jax.make_array_from_callback(source.shape, sharding, part, dtype=source.dtype)
    return jax.block_until_ready(array)


def _check_sharding(op: str, name: str, source: Source, sharding: Sharding) -> None:
    got = f"{name} {list(source.shape)}, {sharding}"[:300]
    if not isinstance(sharding, Sharding):
        expected, fix = "a Sharding or None for each name", "pass NamedSharding(mesh, spec)"
        fail(op, f"{name} has no sharding.", got, expected, fix, TypeError)
    try:
        sharding.shard_shape(source.shape)
    except ValueError as error:
        fix = "shard another dim, or return None for this name"
        what = f"{name} cannot be split like this."
        fail(op, what, got, f"dims that divide: {str(error)[:200]}", fix)


def scale_sharding(
    sharding: Sharding | None, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> Sharding | None:
    """Returns how scales lie: along a dim as the numbers do, or whole where that cuts a tile."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = []
    for axes, n, scales in zip(spec, shape, scale_shape, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        whole_tiles = n % scales == 0 if scales else True
        kept.append(axes if scales % ways == 0 and whole_tiles else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
