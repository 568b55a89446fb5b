"""FP8 arrays as bytes: how they are saved for the backward pass, padded and moved."""

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm._core.layout import K_MULTIPLE
from jax_fp8gemm._core.qarray import FP8, QArray

# NOTE: jax.checkpoint saves floats through reduce_precision, which turns e4m3 numbers above 240
# into NaN, and autodiff would give FP8 arrays FP8 cotangents; as uint8 they are left alone.
Bits = tuple[jax.Array, jax.Array]  # (uint8 qvalue, or uint32 of four each; f32 scale)


def to_bits(q: QArray) -> Bits:
    return jax.lax.bitcast_convert_type(q.qvalue, jnp.uint8), q.scale


def save(q: QArray, name: str) -> Bits:
    """Returns the bytes and scales, named for jax.checkpoint policies.

    On one device bytes are kept in fours: jax.lax.scan stacks what is saved in zeros, which XLA
    writes four times as fast as words. Turning FP8 numbers into words costs nothing there. Over
    several devices a shard need not hold whole words.
    """
    bits, scale = to_bits(q)
    mesh = jax.typeof(bits).sharding.mesh
    alone = mesh.empty or mesh.size == 1
    known = not any(map(jax.export.is_symbolic_dim, bits.shape))  # else StableHLO refuses
    if alone and known and bits.shape[-1] % 4 == 0:
        bits = _words(bits)
    return checkpoint_name(bits, name), checkpoint_name(scale, name)


def named(q: QArray, name: str) -> tuple[QArray, Bits]:
    """Returns q as read from its named bytes, and these.

    Who reads q this way needs no second cast where a jax.checkpoint policy saves the name.
    """
    bits = save(q, name)
    return from_bits(bits), bits


def from_bits(bits: Bits) -> QArray:
    values, scale = bits
    if values.dtype == jnp.uint32:
        values = _bytes(values)
    return QArray(jax.lax.bitcast_convert_type(values, FP8), scale)


def transpose(q: QArray) -> QArray:
    """Returns the transposed matrix; exact where a tile has as many rows as columns."""
    return QArray(jnp.swapaxes(q.qvalue, -1, -2), jnp.swapaxes(q.scale, -1, -2))


def pad_k(q: QArray) -> QArray:
    """Fills the last dim with zeros to a multiple of 16. The scales already cover it."""
    pad = -q.shape[-1] % K_MULTIPLE
    if not pad:
        return q
    bits, scale = to_bits(q)
    return from_bits((jnp.pad(bits, [(0, 0)] * (q.ndim - 1) + [(0, pad)]), scale))


def map_rows(function: Callable[[jax.Array], jax.Array], q: QArray) -> QArray:
    """Applies a function that moves rows to the FP8 numbers, as bytes, and to the scales."""
    bits, scale = to_bits(q)
    return from_bits((function(bits), function(scale)))


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], of FP8 numbers or bytes too, whose rows are then of multiples of four.

    Bytes travel in fours: XLA moves 16 bytes a thread then, and only 4 otherwise.
    """
    if x.dtype == FP8:
        bits = take_rows(jax.lax.bitcast_convert_type(x, jnp.uint8), index)
        return jax.lax.bitcast_convert_type(bits, FP8)
    if x.dtype != jnp.uint8:
        return x[index]
    return _bytes(_words(x)[index])


def _words(x: jax.Array) -> jax.Array:
    """uint8 [..., n] as uint32 [..., n / 4]."""
    fours = x.reshape(*x.shape[:-1], x.shape[-1] // 4, 4)
    return jax.lax.bitcast_convert_type(fours, jnp.uint32)


def _bytes(x: jax.Array) -> jax.Array:
    """uint32 [..., n] as uint8 [..., 4n]."""
    every = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return every.reshape(*x.shape[:-1], 4 * x.shape[-1])
