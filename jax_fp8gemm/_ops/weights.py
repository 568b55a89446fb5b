"""How weights become FP8: copies, made once for many GEMMs, or a cast in the GEMM itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._core.bits import Bits, from_bits, to_bits, transpose
from jax_fp8gemm._core.checks import as_float, check_option, check_quantized, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, K_MULTIPLE, ROWS, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray, exportable
from jax_fp8gemm._core.types import ScaleRounding
from jax_fp8gemm._ops.casts import BothCopies, cast_both, cast_transposed


@exportable()
@dataclasses.dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight [..., k, n] in FP8, in both orientations: pass it in place of the weight.

    Attributes:
      w: the float weight [..., k, n], where gradients go; None for inference.
      nk: FP8 copy [..., n, k] for the forward GEMM, as (uint8 bits, f32 scales of 128x128).
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
        """QArray [..., n, k], scaled (128, 128)."""
        return from_bits(self.nk)

    @property
    def backward(self) -> QArray:
        """QArray [..., k, n], scaled (128, 128)."""
        return transpose(self.forward) if self.kn is None else from_bits(self.kn)


Weight = jax.Array | PreparedWeight
Copies = tuple[Bits, Bits | None]


@renamed(scale="scale_rounding")
def prepare_weight(
    w: jax.Array | QArray, *, scale_rounding: ScaleRounding = "pow2"
) -> PreparedWeight:
    """Quantizes a weight once, for all GEMMs of a step: forward and gradient to x.

    Args:
      w: bf16, f16 or f32 [..., k, n]. For inference also a QArray [..., n, k] scaled by (128, 128),
        as block-FP8 checkpoints hold weights.
      scale_rounding: "pow2" or "none", see `quantize`. A QArray keeps its scales.

    Returns:
      PreparedWeight: `fp8_matmul(x, prepared)` is `fp8_matmul(x, w)`, bit for bit, and gradients
      reach w through it. Prepare inside the function that is differentiated, and outside of the
      loop over microbatches.

    Raises:
      TypeError: w is neither a float array nor a QArray.
      ValueError: a QArray has other scales, or scale_rounding is unknown.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.

    Example:
      prepared = prepare_weight(w)
      ys = jax.lax.map(lambda x: fp8_matmul(x, prepared), microbatches)
    """
    op = "prepare_weight"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    if isinstance(w, QArray):
        check_quantized(op, "w", w)
        if not w.has_tile(BLOCKS):
            got = f"{describe('w', w.qvalue)}, {describe('scale', w.scale)}"
            fix = "quantize(w, (128, 128))"
            if w.has_tile(ROWS):  # as compressed-tensors has weights
                fix = "multiply by gemm(quantize(x, (1, None)), w), or " + fix
            fail(op, "w has other scales.", got, "scales of 128x128", fix)
        return PreparedWeight(None, to_bits(w), None)
    w = as_float(op, "w", w)
    kn, nk = cast_both(jax.lax.stop_gradient(w), BLOCKS, scale_rounding=scale_rounding)
    return PreparedWeight(w, to_bits(nk), to_bits(kn))


def as_weight(op: str, name: str, w: Any) -> Weight:
    return w if isinstance(w, PreparedWeight) else as_float(op, name, w)


def describe_weight(name: str, w: Weight) -> str:
    if isinstance(w, PreparedWeight):
        return f"{name} prepared [{', '.join(map(str, w.shape))}]"
    return describe(name, w)


def split(w: Weight) -> tuple[jax.Array | None, Copies | None]:
    """Returns the float weight, where gradients go, and the FP8 copies, as far as there are any."""
    return (w.w, (w.nk, w.kn)) if isinstance(w, PreparedWeight) else (w, None)


def forward_copy(w: jax.Array | None, copies: Copies | None, rounding: ScaleRounding) -> QArray:
    """Returns the operand [..., n, k] of the forward GEMM alone."""
    if copies is not None:
        return from_bits(copies[0])
    assert w is not None
    return cast_transposed(w, BLOCKS, scale_rounding=rounding)


def both_copies(w: jax.Array | None, copies: Copies | None, rounding: ScaleRounding) -> BothCopies:
    """Returns the weight's copies [..., k, n], for the gradient to x, and [..., n, k], for y."""
    if copies is not None:
        prepared = PreparedWeight(None, *copies)
        nk = prepared.forward
        return BothCopies(prepared.backward, nk)
    assert w is not None
    return cast_both(w, BLOCKS, scale_rounding=rounding)


# ---- casts in the GEMM --------------------------------------------------------------------------

# Rows of a group, on average, up to which a cast in the GEMM takes less time than making copies: a
# weight is read twice as bf16, and nothing is written. With more rows the GEMMs read and cast it
# anew for every 256 of them. Measured on an H200: docs/measured.md.
CAST_ROWS = 512


def cast_in_gemm(
    op: str,
    weights: list[tuple[jax.Array, ...]],
    *,
    rows: Any,
    rounding: ScaleRounding,
    others: tuple[jax.Array, ...] = (),
    wanted: bool | None,
    split: bool = False,
) -> bool:
    """Whether grouped GEMMs cast these weights themselves: the same numbers, and no copies.

    Unless the user decides, not in a program of several devices: under automatic partitioning it is
    cheaper to gather FP8 copies than bf16 weights.

    Args:
      weights: for each GEMM [g, k, n], or two arrays that lie side by side.
      rows: of all groups together.
      others: further arrays of the same GEMMs, whose types may name a mesh.
      wanted: the user's word; None: decide.
      split: whether a shard_map follows, which leaves nothing to the partitioner.

    Raises:
      ValueError: it is wanted, and not possible.
    """
    arrays = [w for gemm in weights for w in gemm]
    reason = _why_no_cast(weights, rounding)
    if wanted and reason:
        got = ", ".join(describe("w", w) for w in arrays) + f", scale_rounding={rounding!r}"
        expected = f"bf16 weights, dims that are multiples of {K_MULTIPLE}, powers of two"
        fail(
            op, f"the GEMM cannot cast these weights: {reason}.", got, expected, "cast_in_gemm=None"
        )
    if wanted is not None:
        return wanted
    few = isinstance(rows, int) and rows <= CAST_ROWS * arrays[0].shape[0]  # symbolic: any number
    return few and not reason and (split or meshes.on_one_device(*arrays, *others))


def _why_no_cast(weights: list[tuple[jax.Array, ...]], rounding: ScaleRounding) -> str | None:
    arrays = [w for gemm in weights for w in gemm]
    if any(w.dtype != jnp.bfloat16 for w in arrays):
        return "they are not bf16"
    if any(size % K_MULTIPLE for w in arrays for size in w.shape[1:]):
        return f"their dims are not multiples of {K_MULTIPLE}"
    if any(len(gemm) == 2 and gemm[0].shape[-1] % SCALE_BLOCK for gemm in weights):
        return f"the hidden dim is not a multiple of {SCALE_BLOCK}"
    return None if rounding == "pow2" else "scales are not powers of two"
