"""How weights become FP8: copies, made once for many products, or a cast in the product itself."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_fp8gemm import meshes
from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.kernel_level import K_MULTIPLE
from jax_fp8gemm.qarray import BLOCK, BLOCKS, FP8, QArray, exportable
from jax_fp8gemm.quantizing import check_float, quantize_both, quantize_transposed

# NOTE: jax.checkpoint saves floats through reduce_precision, which turns e4m3 numbers above 240
# into NaN, and autodiff would give FP8 arrays FP8 cotangents; as uint8 they are left alone.
Bits = tuple[jax.Array, jax.Array]  # (uint8 qvalue, f32 scale)


def to_bits(q: QArray) -> Bits:
    return jax.lax.bitcast_convert_type(q.qvalue, jnp.uint8), q.scale


def save(q: QArray, name: str) -> Bits:
    """Names an FP8 array for jax.checkpoint policies."""
    bits, scale = to_bits(q)
    return checkpoint_name(bits, name), checkpoint_name(scale, name)


def from_bits(bits: Bits) -> QArray:
    return QArray(jax.lax.bitcast_convert_type(bits[0], FP8), bits[1])


def transpose(q: QArray) -> QArray:
    """The transposed matrix; exact where a tile has as many rows as columns."""
    return QArray(jnp.swapaxes(q.qvalue, -1, -2), jnp.swapaxes(q.scale, -1, -2))


def pad_k(q: QArray) -> QArray:
    """Zero-fills the last dim to what a product contracts over; the scales already cover it."""
    pad = -q.shape[-1] % K_MULTIPLE
    if not pad:
        return q
    bits, scale = to_bits(q)
    return from_bits((jnp.pad(bits, [(0, 0)] * (q.ndim - 1) + [(0, pad)]), scale))


@exportable
@dataclasses.dataclass(frozen=True)
class PreparedWeight:
    """A weight [..., k, n] in FP8, in both orientations: pass it in place of the weight.

    Attributes:
      w: the float weight [..., k, n], where gradients go; None for inference.
      nk: FP8 copy [..., n, k] for the forward product, as (uint8 bits, f32 scales of 128x128).
      kn: FP8 copy [..., k, n] for the gradient to x, likewise; None: the transpose of nk.
    """

    w: jax.Array | None
    nk: Bits
    kn: Bits | None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., k, n]."""
        *lead, n, k = self.nk[0].shape
        return (*lead, k, n)

    @property
    def ndim(self) -> int:
        return self.nk[0].ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of w; bfloat16 where there is none."""
        return jnp.dtype(jnp.bfloat16) if self.w is None else self.w.dtype

    @property
    def forward(self) -> QArray:
        return from_bits(self.nk)

    @property
    def backward(self) -> QArray:
        return transpose(self.forward) if self.kn is None else from_bits(self.kn)


Weight = jax.Array | PreparedWeight


def prepare_weight(w: jax.Array | QArray, *, scale: str = "pow2") -> PreparedWeight:
    """Quantises a weight once, for all products of a step: forward and gradient to x.

    Args:
      w: bf16, f16 or f32 [..., k, n]; or a QArray [..., n, k] scaled by (128, 128), as block-FP8
        checkpoints hold weights, for inference.
      scale: "pow2" or "float32", see `quantize`.

    Returns:
      PreparedWeight: `fp8_matmul(x, prepared)` is `fp8_matmul(x, w)`, bit for bit, and gradients
      reach w through it. Prepare inside the function that is differentiated, outside of the loop
      over microbatches.

    Raises:
      TypeError: not floats. ValueError: a QArray with other scales.

    Example:
      wq = prepare_weight(w)
      ys = jax.lax.map(lambda x: fp8_matmul(x, wq), microbatches)
    """
    if isinstance(w, QArray):
        if not w.has_tile(BLOCKS):
            got = f"{describe('w', w.qvalue)}, {describe('scale', w.scale)}"
            expected = "scales of 128x128"
            fail("prepare_weight", "w has other scales.", got, expected, "quantize(w, (128, 128))")
        return PreparedWeight(None, to_bits(w), None)
    check_float("prepare_weight", "w", w)
    kn, nk = quantize_both(jax.lax.stop_gradient(w), BLOCKS, scale=scale)
    return PreparedWeight(w, to_bits(nk), to_bits(kn))


def check_weight(op: str, name: str, w: Weight) -> None:
    if not isinstance(w, PreparedWeight):
        check_float(op, name, w)


def describe_weight(name: str, w: Weight) -> str:
    if isinstance(w, PreparedWeight):
        return f"{name} prepared [{', '.join(map(str, w.shape))}]"
    return describe(name, w)


def split(w: Weight) -> tuple[jax.Array | None, tuple[Bits, Bits | None] | None]:
    """Returns the float weight, where gradients go, and the FP8 copies, as far as there are any."""
    return (w.w, (w.nk, w.kn)) if isinstance(w, PreparedWeight) else (w, None)


def forward_copy(w: jax.Array | None, copies, scale: str) -> QArray:
    """Returns the operand [..., n, k] of the forward product alone."""
    return from_bits(copies[0]) if copies else quantize_transposed(w, BLOCKS, scale=scale)


def both_copies(w: jax.Array | None, copies, scale: str) -> tuple[QArray, QArray]:
    """Returns the operands [..., n, k] of the forward product and [..., k, n] of the gradient's."""
    if copies:
        prepared = PreparedWeight(None, *copies)
        return prepared.forward, prepared.backward
    kn, nk = quantize_both(w, BLOCKS, scale=scale)
    return nk, kn


# ---- Casts in the products ----------------------------------------------------------------------

# Rows of a group, on average, up to which a cast in the products takes less time than making
# copies: a weight is read twice as bf16, and nothing is written. With more rows the products read
# and cast it anew for every 256 of them (docs/measured.md).
CAST_ROWS = 512


def cast_in_products(*weights: tuple[jax.Array, ...], rows: int, scale: str) -> bool:
    """Whether grouped products cast these weights themselves: the same numbers, and no copies.

    Not where a program may be cut up over devices after it is traced: there, what travels between
    them had better be FP8.

    Args:
      weights: for each product [g, k, n], or two arrays that lie side by side.
      rows: of all groups together.
    """
    arrays = [w for product in weights for w in product]
    few = isinstance(rows, int) and rows <= CAST_ROWS * arrays[0].shape[0]  # symbolic: any number
    fits = all(size % K_MULTIPLE == 0 for w in arrays for size in w.shape[1:])
    fits &= all(len(product) == 1 or product[0].shape[-1] % BLOCK == 0 for product in weights)
    bf16 = all(w.dtype == jnp.bfloat16 for w in arrays)
    return few and fits and bf16 and scale == "pow2" and meshes.on_one_device(*arrays)
