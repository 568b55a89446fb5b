"""Scales of blocks that lie on several devices: each casts its own part by the scale of all.

The scale of a block follows from its largest magnitude. Each device finds that of its own part, and
an all-reduce takes the largest of them: exact, and one number for 16384. So FP8 weights can be
sharded into parts of any size, and what is gathered of them later is FP8.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jax_fp8gemm._core import reference
from jax_fp8gemm._core.layout import SCALE_BLOCK, ceil_div
from jax_fp8gemm._core.types import ScaleRounding


@dataclasses.dataclass(frozen=True)
class Share:
    """How devices share the blocks of one dim.

    Attributes:
      axes: the mesh axes that cut it, into shards that are not whole blocks.
      size: of the dim, on all devices together.
    """

    axes: tuple[str, ...]
    size: int


Shares = Mapping[str, Share]  # by the letter of the dim


@dataclasses.dataclass(frozen=True)
class _Dim:
    """The blocks of one dim of a shard.

    Attributes:
      step: neighbours of which all lie in one block.
      block: int32 [size / step], the block of each step.
      count: of blocks; on all devices where these share them.
    """

    step: int
    block: jax.Array
    count: int

    @classmethod
    def of(cls, size: int, share: Share | None) -> "_Dim":
        step = math.gcd(size, SCALE_BLOCK)
        first = jnp.arange(size // step, dtype=jnp.int32) * step
        if share is not None:
            first = first + size * jax.lax.axis_index(share.axes)
        whole = size if share is None else share.size
        return cls(step, first // SCALE_BLOCK, ceil_div(whole, SCALE_BLOCK))

    def largest(self, x: jax.Array) -> jax.Array:
        """Returns the largest number ≥ 0 of every block, [..., count] of [..., steps]."""
        own = self.block[:, None] == jnp.arange(self.count, dtype=jnp.int32)
        return jnp.where(own, x[..., None], 0).max(-2)

    def spread(self, x: jax.Array) -> jax.Array:
        """Returns for every element its block's number, [..., size] of [..., count]."""
        return jnp.repeat(x[..., self.block], self.step, axis=-1)


def cast_part(
    x: jax.Array, rounding: ScaleRounding, rows: Share | None, columns: Share | None
) -> tuple[jax.Array, jax.Array]:
    """Casts a shard by scales of 128x128: the numbers that the whole matrix has there.

    Args:
      x: bf16, f16 or f32 [..., m, k].
      rows, columns: how devices share the blocks of m and k; None: they do not.

    Returns:
      e4m3 [..., m, k], and f32 scales, of a shared dim those of the whole matrix.
    """
    *lead, m, k = x.shape
    down, across = _Dim.of(m, rows), _Dim.of(k, columns)
    x = x.astype(jnp.float32)
    cells = reference.magnitude_bits(x)
    cells = cells.reshape(*lead, m // down.step, down.step, k // across.step, across.step)
    bits = across.largest(cells.max((-3, -1)))
    bits = jnp.swapaxes(down.largest(jnp.swapaxes(bits, -1, -2)), -1, -2)
    axes = tuple(axis for share in (rows, columns) if share for axis in share.axes)
    amax = jax.lax.bitcast_convert_type(jax.lax.pmax(bits, axes), jnp.float32)
    scale = reference.scale_of(amax, rounding)
    inverse = jnp.swapaxes(down.spread(jnp.swapaxes(1 / scale, -1, -2)), -1, -2)
    return reference.to_fp8(x * across.spread(inverse)), scale
