"""Weights of experts in FP8: two copies, gate beside up, made once; or cast in the products."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.kernel_level import K_MULTIPLE, gemm, gemm_casting
from jax_fp8gemm.prepared import Bits, cast_in_products, from_bits, save
from jax_fp8gemm.qarray import BLOCK, BLOCKS, QArray, exportable
from jax_fp8gemm.quantizing import check_float, quantize_both


@exportable
@dataclasses.dataclass(frozen=True)
class PreparedExperts:
    """Weights of experts with their FP8 copies, quantised once for many calls.

    Attributes:
      wi_0, wi_1, wo: as given; gradients flow to them.
      copies: for each product the matrices with what it contracts over last, as (uint8, f32):
        "up" [e, 2f, h], "down" [e, h, f], and for the gradients "up_back" [e, h, 2f], "down_back"
        [e, f, h]. h is filled with zeros to a multiple of 16, f to a multiple of 128. None: the
        products cast the weights themselves.
    """

    wi_0: jax.Array
    wi_1: jax.Array
    wo: jax.Array
    copies: dict[str, Bits] | None


def prepare_experts(
    wi_0: jax.Array, wi_1: jax.Array, wo: jax.Array, *, scale: str = "pow2"
) -> PreparedExperts:
    """Quantises weights of experts by 128x128, both ways: for as many calls as they stay the same.

    Args:
      wi_0, wi_1: bf16, f16 or f32 [e, h, f], gate and up. wo: [e, f, h], down.
      scale: "pow2" or "float32", see `quantize`.

    Returns:
      PreparedExperts, which expert_ffn and moe take in place of wi_0, without wi_1 and wo.

    Raises:
      ValueError: shapes that do not fit. TypeError: dtypes.

    Example:
      prepared = prepare_experts(wi_0, wi_1, wo)
      y = expert_ffn(x, experts, weights, prepared)
    """
    _check_weights("prepare_experts", wi_0, wi_1, wo)
    pad_h, pad_f = -wi_0.shape[1] % K_MULTIPLE, -wi_0.shape[2] % BLOCK
    values = jax.lax.stop_gradient((wi_0, wi_1, wo))
    wi = tuple(jnp.pad(w, [(0, 0), (0, pad_h), (0, pad_f)]) for w in values[:2])
    up_back, up = quantize_both(wi, BLOCKS, scale=scale)
    down = jnp.pad(values[2], [(0, 0), (0, pad_f), (0, pad_h)])
    down_back, down = quantize_both(down, BLOCKS, scale=scale)
    copies = {"up": up, "down": down, "up_back": up_back, "down_back": down_back}
    saved = {name: save(q, "moe_weights") for name, q in copies.items()}
    return PreparedExperts(wi_0, wi_1, wo, saved)


def operand(prepared: PreparedExperts, name: str):
    """Returns what `multiply` takes: the FP8 copy of this name, or the weights that it is of."""
    if prepared.copies is not None:
        return prepared.copies[name]
    return (prepared.wo,) if name.startswith("down") else (prepared.wi_0, prepared.wi_1)


def multiply(
    lhs: QArray, weights, sizes: jax.Array, *, transposed: bool, variant: str = "ragged"
) -> jax.Array:
    """Returns the product by what `operand` returned; transposed: for a forward product."""
    if weights[0].dtype == jnp.uint8:  # a copy, which lies as the product wants it
        return gemm(lhs, from_bits(weights), sizes, variant=variant)
    return gemm_casting(lhs, weights, sizes, transposed=transposed, variant=variant)


def prepared_of(op: str, wi_0, wi_1, wo, scale: str, rows: int) -> PreparedExperts:
    """rows: of all experts here, for the choice of how weights become FP8."""
    if isinstance(wi_0, PreparedExperts):
        if wi_1 is not None or wo is not None:
            got, mend = "PreparedExperts and wi_1 or wo", "leave wi_1 and wo out"
            fail(op, "weights were given twice.", got, "PreparedExperts alone", mend)
        return wi_0
    if wi_1 is None or wo is None:
        expected = "wi_0, wi_1 and wo, or PreparedExperts"
        fail(op, "wi_1 or wo is missing.", "wi_0 alone", expected, "pass all three")
    _check_weights(op, wi_0, wi_1, wo)
    if cast_in_products((wi_0, wi_1), (wo,), rows=rows, scale=scale):
        return PreparedExperts(wi_0, wi_1, wo, None)
    return prepare_experts(wi_0, wi_1, wo, scale=scale)


def _check_weights(op: str, wi_0, wi_1, wo) -> None:
    named = (("wi_0", wi_0), ("wi_1", wi_1), ("wo", wo))
    for name, w in named:
        check_float(op, name, w)
    got = ", ".join(describe(name, w) for name, w in named)
    if any(w.ndim != 3 for _, w in named):
        expected = "wi_0, wi_1 [e, h, f], wo [e, f, h]"
        fail(op, "weights have the wrong rank.", got, expected, "stack the experts along dim 0")
    e, h, f = wi_0.shape
    if wi_1.shape != (e, h, f) or wo.shape != (e, f, h):
        expected, mend = f"wi_1 [{e}, {h}, {f}], wo [{e}, {f}, {h}]", "swap the dims of one of them"
        fail(op, "the weights do not fit each other.", got, expected, mend)
    if wi_0.dtype != wi_1.dtype:
        fail(op, "wi_0 and wi_1 differ in dtype.", got, "one dtype", "cast one", TypeError)
