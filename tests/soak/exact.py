"""Numbers whose products are exact, drawn on the device, and groups of every kind.

An FP8 value is an integer from -4 to 4, and a scale is a power of two. The tensor core's sum over
128 of k is then an integer of at most 2048, which its 13 bits hold. All sums are multiples of one
power of two, and at most 2^24 times as large, so float32 holds them in whatever order they are
added. Nothing is rounded before the result is, and results can be compared bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 4  # of the integers
TILES = {"1x128": (1, 128), "128x128": (128, 128), "row": (1, None), "tensor": (None, None)}
SCALES = {  # as `gemm` names them: tiles of lhs and rhs
    "1x128_128x128": ("1x128", "128x128"),
    "1x128_1x128": ("1x128", "1x128"),
    "row_row": ("row", "row"),
    "tensor_tensor": ("tensor", "tensor"),
}


def exponents(k: int) -> int:
    """Returns how far the exponents of both scales may be from 0, so that sums over k are exact.

    Sums are multiples of 2^(-2e) and at most 16 · k · 2^(2e), which is to be 2^23 times that.
    """
    for e in (2, 1):
        if 16 * k * 2 ** (4 * e) <= 2**23:
            return e
    return 0


def integers(key: jax.Array, shape: tuple[int, ...], largest: int = LARGEST) -> jax.Array:
    """Returns whole float32 numbers from -largest to largest."""
    bits = jax.random.bits(key, shape, jnp.uint8) % jnp.uint8(2 * largest + 1)
    return bits.astype(jnp.float32) - largest


def powers(key: jax.Array, shape: tuple[int, ...], e: int) -> jax.Array:
    """Returns powers of two from 2^-e to 2^e; made of bits, because exp2 may be inexact."""
    exponent = jax.random.bits(key, shape, jnp.uint8) % jnp.uint8(2 * e + 1)
    bits = (exponent.astype(jnp.int32) - e + 127) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def shared(key: jax.Array, scale: jax.Array) -> jax.Array:
    """Gives blocks of 128 rows their first row's scale: all of them, none, or each by chance."""
    rows = scale.shape[-2]
    first = scale[..., ::128, :]
    which, coins = jax.random.split(key)
    chance = jnp.array([0.0, 0.9, 1.0])[jax.random.randint(which, (), 0, 3)]
    chosen = jax.random.uniform(coins, first.shape) < chance
    chosen, first = (jnp.repeat(x, 128, -2)[..., :rows, :] for x in (chosen, first))
    return jnp.where(chosen, first, scale)


def scale_shape(shape: tuple[int, ...], tile: str) -> tuple[int, ...]:
    """Returns the shape of the scales of [..., rows, columns]."""
    *lead, rows, columns = shape
    high, wide = TILES[tile]
    return (*lead, -(-rows // high) if high else 1, -(-columns // wide) if wide else 1)


def spread(scale: jax.Array, tile: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns the scale of every element."""
    rows, columns = shape[-2:]
    high, wide = TILES[tile]
    scale = jnp.repeat(scale, high or rows, -2)[..., :rows, :]
    return jnp.repeat(scale, wide or columns, -1)[..., :columns]


def to_bf16(x: jax.Array) -> jax.Array:
    """Returns float32 numbers rounded to bf16, to nearest even; by bits, as no compiler drops it.

    Written as two conversions, XLA may take both out.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(rounded, jnp.float32))


# ---- groups -------------------------------------------------------------------------------------

HUGE = 2**31 - 1


def group_sizes(key: jax.Array, g: int, places: int) -> jax.Array:
    """Returns sizes of g groups, int32: even, skewed, empty, all in one, too many, negative, huge.

    Which kind it is depends on the key alone, so one program meets all of them.
    """
    kind, some, other, drawn = jax.random.split(key, 4)
    shares = jax.random.uniform(drawn, (g,)) ** jax.random.randint(some, (), 1, 12)
    fit = jnp.floor(shares / shares.sum() * places).astype(jnp.int32)
    loose = jax.random.randint(drawn, (g,), 0, max(2, 2 * places // g + 2))
    chosen = jnp.arange(g) == jax.random.randint(other, (), 0, g)
    sparse = jnp.where(jax.random.bernoulli(some, 0.5, (g,)), fit, 0)
    kinds = [
        fit,
        loose,
        sparse,
        jnp.where(chosen, places, 0),
        jnp.where(chosen, jax.random.randint(some, (), -places - 2, places + 2), 1),
        loose - places // g // 2 - 1,
        jnp.where(chosen, HUGE, loose),
        jnp.zeros(g, jnp.int32),
    ]
    often = jnp.array(np.repeat(np.arange(len(kinds)), [6, 4, 4, 2, 2, 2, 1, 1]))
    which = often[jax.random.randint(kind, (), 0, len(often))]
    return jnp.stack([one.astype(jnp.int32) for one in kinds])[which]


def ranges(sizes: jax.Array, places: int) -> tuple[jax.Array, jax.Array]:
    """Returns where groups that lie end to end begin and end: negative is 0, the rest is cut off.

    Sums of up to 2^31 / places sizes do not overflow.
    """
    ends = jnp.minimum(jnp.cumsum(jnp.clip(sizes, 0, places)), places)
    return jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]]), ends


def inside(sizes: jax.Array, places: int) -> jax.Array:
    """Returns which places belong to which group, bool [g, places]."""
    starts, ends = ranges(sizes, places)
    at = jnp.arange(places)
    return (at >= starts[:, None]) & (at < ends[:, None])


def blocks_of_rows(key: jax.Array, g: int, m: int) -> jax.Array:
    """Returns the group of each row for `contiguous`: one for each 128 rows, padding at its end."""
    groups, counts = jax.random.split(key)
    blocks = -(-m // 128)
    group = jax.random.randint(groups, (blocks,), -1, g)
    full = jax.random.randint(counts, (blocks,), -128, 129)  # half of the blocks are full
    count = jnp.where(full <= 0, 128, full)
    rows = jnp.where(jnp.arange(128) < count[:, None], group[:, None], -1)
    return rows.reshape(-1)[:m].astype(jnp.int32)
