"""What users call: quantize, dequantize, gemm, fp8_matmul."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm import reference
from jax_fp8gemm.config import GemmConfig
from jax_fp8gemm.errors import describe, message
from jax_fp8gemm.primitives import Static, product
from jax_fp8gemm.qarray import (
    BLOCKS,
    FP8,
    ROW_BLOCKS,
    TILES,
    QArray,
    Tile,
    round_up,
    scale_shape,
)
from jax_fp8gemm.variants import SCALES, VARIANTS

K_MULTIPLE = 16  # bytes: what the copy engine wants of a row of FP8 numbers
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def quantize(x: jax.Array, tile: Tile = ROW_BLOCKS, *, scale: str = "pow2") -> QArray:
    """Quantises to FP8 with one scale for each tile of the last two dims.

    qvalue = e4m3(clip(x / scale, ±448)), scale ≈ max|tile| / 448.

    Args:
      x: bf16, f16 or f32 [..., rows, k].
      tile: (1, 128) for activations and gradients, (128, 128) for weights, (1, None) per row,
        (None, None) per matrix.
      scale: "pow2" rounds scales up to powers of two, which makes quantising once more along the
        other axis exact; "float32" keeps max|tile| / 448.

    Returns:
      QArray. A tile of zeros has scale 1; a tile with NaN or Inf has scale NaN.

    Raises:
      TypeError: x is not of a float type. ValueError: an unknown tile or scale, or rank below 2.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2; E4M3 (arXiv 2209.05433).
    """
    if tile not in TILES:
        _fail("quantize", "unknown tile.", f"tile {tile}", f"one of {TILES}", "choose one of these")
    if scale not in ("pow2", "float32"):
        _fail("quantize", "unknown scale.", f"scale {scale!r}", '"pow2" or "float32"', "choose one")
    _check_float("quantize", "x", x)
    if x.ndim < 2:
        _fail("quantize", "x is no matrix.", describe("x", x), "rank 2 or more", "pass x[None, :]")
    return QArray(*reference.quantize(x, tile, scale))


def dequantize(q: QArray, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns qvalue · scale, multiplied in float32, as `dtype` [..., rows, k]."""
    return reference.dequantize(q.qvalue, q.scale, q.tile).astype(dtype)


def gemm(
    lhs: QArray,
    rhs: QArray,
    *,
    variant: str = "dense",
    out_dtype: jnp.dtype = jnp.bfloat16,
    init: jax.Array | None = None,
    num_sms: int | None = None,
    config: GemmConfig | None = None,
) -> jax.Array:
    """Multiplies FP8 operands: out[m, n] = Σ_k lhs[m, k] · rhs[n, k], both with their scales.

    Sums of 128 of k are made by the tensor core and added up in float32.

    Args:
      lhs: QArray [m, k] (dense) or [g, m, k] (batched).
      rhs: QArray [n, k] or [g, n, k]; both operands have k last, a multiple of 16. Scales are
        1x128 × 128x128, 1x128 × 1x128, per row × per row, or per tensor × per tensor.
      variant: "dense" or "batched".
      out_dtype: bfloat16 or float32.
      init: f32, of the output's shape: what to add the product to; needs out_dtype float32.
        Donate it to save a copy.
      num_sms: upper bound of the multiprocessors to use; None for all.
      config: overrides jax_fp8gemm.config.select.

    Returns:
      out_dtype [m, n] or [g, m, n]. On a Hopper GPU two runs give the same bits.

    Raises:
      ValueError: shapes or scales that do not fit, an unknown variant. TypeError: dtypes.

    Example:
      out = gemm(quantize(x), quantize(w.T, (128, 128)))
    """
    if variant not in VARIANTS:
        _fail("gemm", "unknown variant.", repr(variant), f"one of {list(VARIANTS)}", "choose one")
    _check_operands(lhs, rhs, variant)
    shape = VARIANTS[variant].out_shape(lhs.shape, rhs.shape)
    static = Static(
        variant, _scales(lhs, rhs), _out_name(out_dtype, init, shape), num_sms or 0, config
    )
    return product(lhs, rhs, init, static)


def _fail(op: str, what: str, got: str, expected: str, mend: str, error: type = ValueError):
    raise error(message(op, what, got=got, expected=expected, mend=mend))


def _check_float(op: str, name: str, x: jax.Array) -> None:
    if x.dtype not in FLOATS:
        mend = f"cast {name} to bfloat16"
        _fail(
            op,
            f"{name} has the wrong dtype.",
            describe(name, x),
            "bf16, f16 or f32",
            mend,
            TypeError,
        )


def _check_operands(lhs: QArray, rhs: QArray, variant: str) -> None:
    row = VARIANTS[variant]
    for name, q, letters in (("lhs", lhs, row.lhs), ("rhs", rhs, row.rhs)):
        if not isinstance(q, QArray):
            _fail(
                "gemm",
                f"{name} is not quantised.",
                type(q).__name__,
                "QArray",
                f"quantize({name})",
                TypeError,
            )
        text = f"{name} [{', '.join(letters)}]"
        if q.ndim != len(letters) or q.scale.ndim != len(letters):
            got = describe(name, q.qvalue) + ", " + describe("scale", q.scale)
            _fail("gemm", f"{name} has the wrong rank.", got, text, f"reshape {name} to {text}")
        if q.qvalue.dtype != FP8 or q.scale.dtype != jnp.float32:
            got = describe(name, q.qvalue) + ", " + describe("scale", q.scale)
            _fail(
                "gemm",
                f"{name} has the wrong dtype.",
                got,
                "e4m3 and f32 scales",
                f"quantize({name})",
                TypeError,
            )
    both = describe("lhs", lhs.qvalue) + ", " + describe("rhs", rhs.qvalue)
    k = lhs.shape[-1]
    if k != rhs.shape[-1]:
        mend = "both operands have k last; if rhs is stored [k, n], quantise its transpose"
        _fail("gemm", "dim k differs between lhs and rhs.", both, f"rhs [..., n, {k}]", mend)
    if lhs.shape[:-2] != rhs.shape[:-2]:
        _fail(
            "gemm", "dim g differs between lhs and rhs.", both, "equal g", "broadcast one of them"
        )
    if k % K_MULTIPLE:
        mend = f"pad k to {round_up(k, K_MULTIPLE)} with zeros, as fp8_matmul does"
        _fail("gemm", f"dim k is not a multiple of {K_MULTIPLE}.", both, "k % 16 == 0", mend)


def _scales(lhs: QArray, rhs: QArray) -> str:
    """Returns the name of the first pair of tiles that fits; small arrays fit several, alike."""
    for name, (lhs_tile, rhs_tile) in SCALES.items():
        if lhs.has_tile(lhs_tile) and rhs.has_tile(rhs_tile):
            return name
    got = f"lhs {list(lhs.shape)} with scale {list(lhs.scale.shape)}, "
    got += f"rhs {list(rhs.shape)} with scale {list(rhs.scale.shape)}"
    pairs = [
        f"{list(scale_shape(lhs.shape, a))} and {list(scale_shape(rhs.shape, b))}"
        for a, b in SCALES.values()
    ]
    mend = "quantize(lhs) with tile (1, 128), quantize(rhs, (128, 128))"
    _fail("gemm", "the scales have shapes that no kernel takes.", got, " or ".join(pairs), mend)


def _out_name(out_dtype, init: jax.Array | None, shape: tuple[int, ...]) -> str:
    name = {"bfloat16": "bf16", "float32": "f32"}.get(jnp.dtype(out_dtype).name)
    if name is None:
        _fail(
            "gemm",
            "unknown out_dtype.",
            str(out_dtype),
            "bfloat16 or float32",
            "choose one",
            TypeError,
        )
    if init is None:
        return name
    if name != "f32" or init.dtype != jnp.float32:
        got = f"{describe('init', init)}, out_dtype {jnp.dtype(out_dtype).name}"
        _fail(
            "gemm",
            "init needs float32.",
            got,
            "f32 init and out_dtype",
            "cast init to f32",
            TypeError,
        )
    if init.shape != shape:
        _fail(
            "gemm",
            "init has the wrong shape.",
            describe("init", init),
            f"f32{list(shape)}",
            "reshape it",
        )
    return name


# ---- fp8_matmul ---------------------------------------------------------------------------------


def fp8_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    preferred_element_type: jnp.dtype | None = None,
    scale: str = "pow2",
) -> jax.Array:
    """Multiplies in FP8, forward and backward: y[..., n] = Σ_k x[..., k] · w[k, n].

    Forward and the gradient to x scale 1x128 × 128x128, the gradient to w 1x128 × 1x128 along
    tokens, in float32. Floats come in and go out; FP8 never crosses a derivative.

    Args:
      x: bf16, f16 or f32 [..., k].
      w: bf16, f16 or f32 [k, n], as Flax stores kernels.
      preferred_element_type: dtype of y; default: the promoted dtype of x and w.
      scale: "pow2" or "float32", see `quantize`.

    Returns:
      [..., n]. Gradients have the dtypes of x and w. Residuals are named "fp8_matmul_x" and
      "fp8_matmul_w" for jax.checkpoint policies.

    Raises:
      ValueError: rank of w is not 2, or k differs. TypeError: not floats.
      NotImplementedError: a second derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      y = jax.jit(fp8_matmul)(x, w)
    """
    _check_float("fp8_matmul", "x", x)
    _check_float("fp8_matmul", "w", w)
    both = describe("x", x) + ", " + describe("w", w)
    if w.ndim != 2 or x.ndim < 1:
        _fail(
            "fp8_matmul", "w or x has the wrong rank.", both, "x [..., k], w [k, n]", "reshape them"
        )
    if x.shape[-1] != w.shape[0]:
        expected, mend = f"w [{x.shape[-1]}, n]", "if w is stored [n, k], pass w.T"
        _fail("fp8_matmul", "dim k differs between x and w.", both, expected, mend)
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(x, w))
    y = _matmul(x.reshape(-1, x.shape[-1]), w, scale, dtype)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _pad_k(q: QArray) -> QArray:
    """Zero-fills the last dim to what a product contracts over; the scales already cover it."""
    pad = -q.shape[-1] % K_MULTIPLE
    if not pad:
        return q
    bits = jnp.pad(_to_bits(q.qvalue), [(0, 0)] * (q.ndim - 1) + [(0, pad)])
    return QArray(_from_bits(bits), q.scale)


# NOTE: jax.checkpoint saves floats through reduce_precision, which turns e4m3 numbers above 240
# into NaN; as uint8 they are left alone.
def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _from_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, FP8)


def _transpose(q: QArray) -> QArray:
    """The transposed matrix; exact where a tile has as many rows as columns."""
    return QArray(q.qvalue.T, q.scale.T)


def _product(lhs: QArray, rhs: QArray, dtype: jnp.dtype) -> jax.Array:
    """A dense product as `dtype`; float16 by way of float32."""
    out_dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    return gemm(_pad_k(lhs), _pad_k(rhs), out_dtype=out_dtype).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, w, scale, dtype):
    return _product(quantize(x, scale=scale), _transpose(quantize(w, BLOCKS, scale=scale)), dtype)


def _matmul_forward(x, w, scale, dtype):
    """Residuals: x's transposed copy and w's, in FP8; empty arrays that remember the dtypes."""
    wq = quantize(w, BLOCKS, scale=scale)
    y = _product(quantize(x, scale=scale), _transpose(wq), dtype)
    saved_x = _save(quantize(x.T, scale=scale), "fp8_matmul_x")
    saved_w = _save(wq, "fp8_matmul_w")
    return y, (saved_x, saved_w, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _matmul_backward(scale, dtype, residuals, dy):
    saved_x, saved_w, like_x, like_w = residuals
    dx = _product(quantize(dy, scale=scale), _load(saved_w), like_x.dtype)
    dw = gemm(_pad_k(_load(saved_x)), _pad_k(quantize(dy.T, scale=scale)), out_dtype=jnp.float32)
    return dx, dw.astype(like_w.dtype)


def _save(q: QArray, name: str) -> tuple[jax.Array, jax.Array]:
    return checkpoint_name(_to_bits(q.qvalue), name), checkpoint_name(q.scale, name)


def _load(saved: tuple[jax.Array, jax.Array]) -> QArray:
    return QArray(_from_bits(saved[0]), saved[1])


_matmul.defvjp(_matmul_forward, _matmul_backward)
