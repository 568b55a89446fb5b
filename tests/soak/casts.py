"""Casts whose results are known to the bit, and SwiGLU's, known to a step of FP8.

What is right is said here a second time, in jnp, and not by the library's reference.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from soak import exact

import jax_fp8gemm as fp8

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
FP8 = jnp.float8_e4m3fn
SMALLEST_NORMAL = 2.0**-126
LARGEST_FP8 = 448.0
EXTREMES = (np.nan, np.inf, -np.inf, 3e38, -3.3e38, 1e-39, -2e-38)


def drawn(key: jax.Array, shape: tuple[int, ...], dtype, extremes: bool) -> jax.Array:
    """Returns numbers of many sizes, ties between FP8 numbers among them, and a row of zeros."""
    keys = jax.random.split(key, 6)
    x = jax.random.normal(keys[0], shape) * exact.powers(keys[1], shape, 8)
    ties = (8.5 + jax.random.randint(keys[2], shape, 0, 8)) * exact.powers(keys[1], shape, 4)
    x = jnp.where(jax.random.bernoulli(keys[3], 0.2, shape), ties, x)
    x *= exact.powers(keys[4], (*shape[:-1], 1), 12)
    x = x.at[..., shape[-2] // 2, :].multiply(-0.0)
    if extremes:
        some = jax.random.bernoulli(keys[5], min(0.3, 3 / (shape[-1] * shape[-2])), shape)
        which = jax.random.randint(keys[3], shape, 0, len(EXTREMES))
        x = jnp.where(some, jnp.array(EXTREMES, jnp.float32)[which], x)
    return x.astype(dtype)


# ---- what is right ------------------------------------------------------------------------------


def scales(largest: jax.Array, rounding: str) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of tiles whose largest magnitudes these are, and its reciprocal."""
    if rounding == "pow2":  # 448 is 1.75 · 2^8
        bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)
        exponent = jnp.maximum(exponent, 1)
        scale, reciprocal = (
            jax.lax.bitcast_convert_type(e << 23, jnp.float32) for e in (exponent, 254 - exponent)
        )
    else:
        scale = jnp.maximum(largest * np.float32(1 / LARGEST_FP8), SMALLEST_NORMAL)
        reciprocal = 1 / scale
    zero, finite = largest == 0, jnp.isfinite(largest)
    pair = (jnp.where(finite, jnp.where(zero, 1, one), jnp.nan) for one in (scale, reciprocal))
    return tuple(pair)


def shared(largest: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the scales [rows, steps] of blocks of 128 rows that lie within 2^10: the largest."""
    rows, steps = scale.shape
    pad = ((0, -rows % 128), (0, 0))
    blocks = jnp.pad(scale, pad).reshape(-1, 128, steps)
    counts = jnp.pad(largest != 0, pad).reshape(-1, 128, steps)
    most = jnp.where(counts, blocks, 0).max(1, keepdims=True)
    least = jnp.where(counts, blocks, jnp.inf).min(1, keepdims=True)
    close = jnp.isfinite(most) & (most > 0) & (most <= least * 2.0**10)
    return jnp.where(close, most, blocks).reshape(-1, steps)[:rows]


def tile_largest(x: jax.Array, tile: tuple) -> jax.Array:
    """Returns the largest magnitude of each tile of float32 [rows, columns], NaN above all."""
    rows, columns = x.shape
    high, wide = tile[0] or rows, tile[1] or columns
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    bits = jnp.pad(bits, [(0, -rows % high), (0, -columns % wide)])
    bits = bits.reshape(-(-rows // high), high, -(-columns // wide), wide).max((1, 3))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def each(scale: jax.Array, tile: tuple, shape) -> jax.Array:
    """Returns the scale of every element."""
    rows, columns = shape
    scale = jnp.repeat(scale, tile[0] or rows, 0)[:rows]
    return jnp.repeat(scale, tile[1] or columns, 1)[:, :columns]


def rounded(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -LARGEST_FP8, LARGEST_FP8).astype(FP8)


def bits(x: jax.Array) -> jax.Array:
    """Returns bit patterns, with one NaN."""
    if x.dtype == jnp.float32:
        found = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return jnp.where(jnp.isnan(x), jnp.uint32(0x7FC00000), found)
    found = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return jnp.where((found & 0x7F) == 0x7F, jnp.uint8(0x7F), found)


def wrong_cast(
    q: fp8.QArray, x: jax.Array, tile: tuple, rounding: str, used=None, share: bool = False
) -> jax.Array:
    """Returns which values of q are wrong, as a cast of float32 x; their scales wrong: all are.

    Without powers of two the division may be off by a unit in the last place, and so may fall on
    the other side of a tie. Denormals may count as zeros. used: which values have a meaning.
    share: rows of a block may have a common scale, see shared().
    """
    largest = tile_largest(x, tile)
    scale, reciprocal = scales(largest, rounding)
    if share:
        scale = shared(largest, scale)
        reciprocal = 1 / scale
    scaled = x * each(reciprocal, tile, x.shape)
    got = bits(q.qvalue)
    near = 2.0**-21 if rounding == "none" else 0.0
    right = (got == bits(rounded(scaled * (1 - near)))) | (
        got == bits(rounded(scaled * (1 + near)))
    )
    right |= (jnp.abs(x) < SMALLEST_NORMAL) & ((got & 0x7F) == 0)
    good = (bits(q.scale) == bits(scale)) | ((largest < SMALLEST_NORMAL) & (q.scale == 1))
    right &= each(good, tile, x.shape)
    return ~right if used is None else used & ~right


def placed(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns rows with each group at a multiple of 128, zeros between: what is transposed."""
    m, g = x.shape[0], sizes.shape[0]
    starts, ends = exact.ranges(sizes, m)
    needed = -(-(ends - starts) // 128) * 128
    places = (jnp.cumsum(needed) - needed)[:, None]
    at = jnp.arange((m + min(g, m) * 127) // 128 * 128)
    own = (at >= places) & (at < places + (ends - starts)[:, None])
    source = jnp.max(jnp.where(own, at - places + starts[:, None], -1), 0)
    return jnp.where((source >= 0)[:, None], x[jnp.maximum(source, 0)], 0)


def lines_of(x: jax.Array, sizes: jax.Array | None, tile: tuple) -> jax.Array:
    """Returns the rows whose transpose a transposed copy is."""
    if sizes is not None:
        return placed(x, sizes)
    return jnp.pad(x, [(0, -x.shape[0] % 128), (0, 0)]) if tile[0] == 1 else x


# ---- casts --------------------------------------------------------------------------------------

KINDS = ("quantize", "rows", "transposed", "both", "requantize")


@dataclasses.dataclass(frozen=True)
class Cast:
    """A cast of [m, k]. g: groups of rows, 0 for none. index: rows are gathered.

    share: the transposed copy has shared columns.
    """

    kind: str
    m: int
    k: int
    dtype: str = "bf16"
    tile: str = "1x128"
    rounding: str = "pow2"
    g: int = 0
    index: bool = False
    extremes: bool = False
    share: bool = False

    products = 0
    results = ()

    @property
    def name(self) -> str:
        return f"cast: {self.kind}"

    @property
    def work(self) -> int:
        return 64 * self.m * self.k

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        rows = self.m // 2 + 1 if self.index else self.m
        made = {"x": drawn(keys[0], (rows, self.k), DTYPES[self.dtype], self.extremes)}
        if self.kind == "requantize":
            q = fp8.quantize(made.pop("x"), scale_rounding=self.rounding)
            made |= {"x": q.qvalue, "scale": q.scale}
        if self.index:
            made["index"] = jax.random.randint(keys[1], (self.m,), -3, rows + 3)
        if self.g:
            made["group_sizes"] = exact.group_sizes(keys[2], self.g, self.m)
        return made

    def run(self, operands) -> list[fp8.QArray]:
        given = {name: operands[name] for name in ("index", "group_sizes") if name in operands}
        given["scale_rounding"] = self.rounding
        x, tile = operands["x"], exact.TILES[self.tile]
        if self.kind == "quantize":
            return [fp8.quantize(x, tile, **given)]
        if self.kind == "rows":
            return [fp8.quantize_rows(x, **given)]
        if self.share:
            given["shared_columns"] = True
        if self.kind == "transposed":
            return [fp8.quantize_transposed(x, tile, **given)]
        if self.kind == "both":
            return list(fp8.quantize_both(x, tile, **given))
        return [fp8.requantize(fp8.QArray(x, operands["scale"]), **given)]

    def marks(self, operands, outs) -> list[jax.Array]:
        """Returns for each result which of its values are wrong."""
        x, tile = operands["x"].astype(jnp.float32), exact.TILES[self.tile]
        if self.kind == "requantize":
            x = x * each(operands["scale"], tile, x.shape)
        if self.index:
            x = x[jnp.clip(operands["index"], 0, x.shape[0] - 1)]
        sizes, used = operands.get("group_sizes"), None
        if sizes is not None:
            used = (jnp.arange(self.m) < exact.ranges(sizes, self.m)[1][-1])[:, None]
        found, copies = [], list(outs)
        if self.kind in ("quantize", "rows", "both"):
            found.append(wrong_cast(copies.pop(0), x, tile, self.rounding, used))
        if copies:
            lines = lines_of(x, sizes, tile).T
            found.append(wrong_cast(copies[0], lines, tile, self.rounding, share=self.share))
        return found


# ---- SwiGLU -------------------------------------------------------------------------------------


def wrong_near(q: fp8.QArray, x: jax.Array, slack: jax.Array, rounding: str, used=None):
    """Returns which values of q are further from float32 x than FP8 and `slack` explain.

    Half a step of FP8 is 2^-4 of a value, or 2^-10 of the scale. A scale is right if the tile's
    largest magnitude fits it.
    """
    tile = (1, 128)
    largest = tile_largest(x, tile)
    room = tile_largest(slack, tile) + 1e-6 * largest
    least = jnp.maximum((largest - room) / LARGEST_FP8, SMALLEST_NORMAL)
    most = (largest + room) / LARGEST_FP8 * (2 if rounding == "pow2" else 1)
    good = (q.scale >= least * (1 - 1e-6)) & (q.scale <= jnp.maximum(most, SMALLEST_NORMAL) * 1.001)
    good |= (largest <= room) & (q.scale == 1)  # a tile of zeros
    scale = each(q.scale, tile, x.shape)
    error = jnp.abs(q.qvalue.astype(jnp.float32) * scale - x)
    right = error <= 1.01 * jnp.maximum(2.0**-4 * jnp.abs(x), 2.0**-10 * scale) + slack
    right &= each(good, tile, x.shape)
    return ~right if used is None else used & ~right


@dataclasses.dataclass(frozen=True)
class Swiglu:
    """swiglu_quantize_both of h [m, 2f], or its backward pass. g: groups of rows, 0 for none."""

    m: int
    f: int
    backward: bool = False
    rounding: str = "pow2"
    g: int = 0

    products = 0
    results = ()

    @property
    def name(self) -> str:
        return "cast: swiglu_backward" if self.backward else "cast: swiglu_quantize_both"

    @property
    def work(self) -> int:
        return 256 * self.m * self.f

    def make(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        h = (3 * jax.random.normal(keys[0], (self.m, 2 * self.f))).astype(jnp.bfloat16)
        made = {"h": h, "row_weight": jax.random.normal(keys[1], (self.m,))}
        if self.backward:
            q = fp8.quantize(made.pop("h"))
            made |= {"h": q.qvalue, "scale": q.scale}
            made["gradient"] = jax.random.normal(keys[2], (self.m, self.f), jnp.bfloat16)
        if self.g:
            made["group_sizes"] = exact.group_sizes(keys[3], self.g, self.m)
        return made

    def run(self, operands) -> list:
        sizes = operands.get("group_sizes")
        given = {"group_sizes": sizes, "scale_rounding": self.rounding}
        if not self.backward:
            return list(fp8.swiglu_quantize_both(operands["h"], operands["row_weight"], **given))
        h = fp8.QArray(operands["h"], operands["scale"])
        return list(fp8.swiglu_backward(h, operands["gradient"], operands["row_weight"], **given))

    def marks(self, operands, outs) -> list[jax.Array]:
        """Returns for each result which of its values are wrong."""
        h, sizes = operands["h"].astype(jnp.float32), operands.get("group_sizes")
        if self.backward:
            h = h * each(operands["scale"], (1, 128), h.shape)
        used = jnp.ones((self.m, 1), bool)
        if sizes is not None:
            used = (jnp.arange(self.m) < exact.ranges(sizes, self.m)[1][-1])[:, None]
        gate, up = jnp.split(h, 2, 1)
        sigmoid, weight = jax.nn.sigmoid(gate), operands["row_weight"][:, None]
        y = weight * gate * sigmoid * up
        if not self.backward:
            return [self._near(outs[0], y, used), self._turned(outs[1], y, sizes)]
        dy = operands["gradient"].astype(jnp.float32)
        d_up = weight * dy * gate * sigmoid
        d_gate = weight * dy * up * sigmoid * (1 + gate * (1 - sigmoid))
        parts = dy * gate * sigmoid * up
        error = jnp.abs(outs[4] - parts.sum(1)) > 1e-4 * jnp.abs(parts).sum(1) + 1e-6
        bend = 1e-5 * jnp.abs(weight * dy * up) * (1 + jnp.abs(gate))  # two terms may cancel
        return [
            self._near(outs[0], jnp.concatenate([d_gate, d_up], 1), used,
                       jnp.concatenate([bend, 0 * bend], 1)),
            self._turned(outs[1], d_gate, sizes, bend),
            self._turned(outs[2], d_up, sizes),
            self._turned(outs[3], y, sizes),
            used[:, 0] & error,
        ]  # fmt: skip

    def _near(self, q, x, used, slack=0.0) -> jax.Array:
        return wrong_near(q, x, 1e-5 * jnp.abs(x) + slack, self.rounding, used)

    def _turned(self, q, x, sizes, slack=0.0) -> jax.Array:
        slack = 1e-5 * jnp.abs(x) + slack
        x, slack = (lines_of(one, sizes, (1, 128)).T for one in (x, slack))
        return wrong_near(q, x, slack, self.rounding)
