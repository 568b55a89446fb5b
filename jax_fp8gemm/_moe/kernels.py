"""The experts' matrices as the user passes them: floats or FP8, gate and up apart or as one."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.bits import Bits
from jax_fp8gemm._core.checks import as_float, check_quantized
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, SCALE_BLOCK
from jax_fp8gemm._core.qarray import QArray, exportable

Kernel = Any  # a float array, a QArray, or None: another field has it
MATRICES = ("wi_0", "wi_1", "wi", "wo")
BIASES = ("wi_0_bias", "wi_1_bias", "wi_bias", "wo_bias")


@exportable("PreparedExperts", later=("wi", *BIASES))
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExpertKernels:
    """The matrices of experts: gate, up and down, in floats or, for inference, in FP8.

    Attributes:
      wi_0, wi_1: bf16, f16 or f32 [e, h, f], gate and up. Gradients flow to them. Or QArrays
        [e, f, h] with scales of 128x128, as block-FP8 checkpoints hold them.
      wo: [e, f, h], down; likewise. Or a QArray [e, h, f].
      copies: None, or what `prepare_experts` adds to floats: FP8 copies for each GEMM, with what it
        contracts over last, as bits and f32 scales: "up" [e, 2f, h] and "down" [e, h, f]; for the
        gradients "up_back" [e, h, 2f] and "down_back" [e, f, h]. h is filled with zeros to a
        multiple of 16, f to one of 128. Bits are uint8 or, on one device, uint32 of four each.
      wi: gate and up as one array, gate first, in place of wi_0 and wi_1: [e, h, 2f], or a QArray
        [e, 2f, h].
      wi_0_bias, wi_1_bias: None, or floats [e, f] that are added to gate and up.
      wi_bias: both as one array [e, 2f].
      wo_bias: None, or floats [e, h] that are added to the result of an expert.

    An expert with squared ReLU has no wi_1. QArrays are constants: no gradient flows to them. An
    expert that sees every token has matrices without the dim e.
    """

    wi_0: Kernel = None
    wi_1: Kernel = None
    wo: Kernel
    copies: dict[str, Bits] | None = None
    wi: Kernel = None
    wi_0_bias: jax.Array | None = None
    wi_1_bias: jax.Array | None = None
    wi_bias: jax.Array | None = None
    wo_bias: jax.Array | None = None

    @property
    def has_biases(self) -> bool:
        return any(getattr(self, name) is not None for name in BIASES)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(e, h, f), or (h, f) of an expert that sees every token."""
        *lead, rows, columns = self.wo.shape
        return (*lead, rows, columns) if isinstance(self.wo, QArray) else (*lead, columns, rows)

    @property
    def is_fp8(self) -> bool:
        """Whether the matrices are QArrays."""
        return isinstance(self.wo, QArray)


def describe_kernels(kernels: ExpertKernels) -> str:
    """Returns the name, dtype and shape of a matrix that shows the sizes."""
    if not kernels.is_fp8:
        return describe("wi_0", kernels.wi_0)
    return describe("wo", kernels.wo.qvalue)


def without_biases(kernels: ExpertKernels) -> ExpertKernels:
    return dataclasses.replace(kernels, **dict.fromkeys(BIASES))


def of_rows(bias: jax.Array, group: jax.Array) -> jax.Array:
    """Returns the bias [e, n] of each row, f32 [m, n]; zero for rows past the groups.

    A GEMM by ones and zeros, whose transpose adds up without atomics.

    Args:
      group: int [m].
    """
    chosen = group[:, None] == jnp.arange(bias.shape[0])[None]
    return jnp.dot(chosen.astype(jnp.float32), bias.astype(jnp.float32), precision="highest")


def as_kernels(
    op: str, name: str, kernels: Any, ndim: int = 3, *, gated: bool = True
) -> ExpertKernels:
    """Returns experts' matrices, checked; of floats and of biases, gate and up are apart.

    Args:
      ndim: 3, or 2 for an expert that sees every token.
      gated: whether there is a matrix "up" beside "gate".
    """
    checked = _as_matrices(op, name, kernels, ndim, gated)
    return dataclasses.replace(checked, **_as_biases(op, name, kernels, checked.sizes))


def _as_biases(op: str, name: str, kernels: ExpertKernels, sizes: tuple) -> dict[str, Any]:
    given = {b: as_float(op, b, v) for b in BIASES if (v := getattr(kernels, b)) is not None}
    *lead, h, f = sizes
    if kernels.wi_1 is None and kernels.wi is None and given.keys() - {"wi_0_bias", "wo_bias"}:
        got, fix = ", ".join(given), "leave wi_1_bias and wi_bias out"
        fail(op, f"{name} have a bias of a matrix that is not there.", got, "wi_0_bias", fix)
    shapes = {"wo_bias": (*lead, h), "wi_bias": (*lead, 2 * f)}
    for bias, value in given.items():
        shape = shapes.get(bias, (*lead, f))
        if value.shape != shape:
            got, expected = describe(bias, value), f"{bias} {list(shape)}"
            fail(op, f"{bias} does not fit {name}.", got, expected, "pass one for each column")
    both = given.pop("wi_bias", None)
    if both is not None:
        given["wi_0_bias"], given["wi_1_bias"] = jnp.split(both, 2, axis=-1)
    return given


def _as_matrices(op: str, name: str, kernels: Any, ndim: int, gated: bool) -> ExpertKernels:
    dims = "[e, h, f], [e, h, f], [e, f, h]" if ndim == 3 else "[h, f], [h, f], [f, h]"
    if not isinstance(kernels, ExpertKernels):
        got, fix = type(kernels).__name__, f"{name}=ExpertKernels(wi_0=, wi_1=, wo=)"
        expected = f"ExpertKernels with wi_0, wi_1, wo {dims}"
        fail(op, f"{name} is not an ExpertKernels.", got, expected, fix, TypeError)
    given = {m: w for m in MATRICES if (w := getattr(kernels, m)) is not None}
    _check_names(op, name, set(given), gated)
    if any(isinstance(w, QArray) for w in given.values()):
        return _as_fp8(op, name, kernels, given, ndim)
    named = {matrix: as_float(op, matrix, w) for matrix, w in given.items()}
    if "wi" in named:
        named = _halves(op, named, ndim)
    kernels = ExpertKernels(**named, copies=kernels.copies)
    got = ", ".join(describe(matrix, w) for matrix, w in named.items())
    _check_ranks(op, name, named, ndim, f"wi_0, wi_1, wo {dims}")
    _check_count(op, kernels, got)
    *lead, h, f = kernels.wi_0.shape
    up = kernels.wi_0 if kernels.wi_1 is None else kernels.wi_1
    if up.shape != (*lead, h, f) or kernels.wo.shape != (*lead, f, h):
        expected = f"wi_1 {[*lead, h, f]}, wo {[*lead, f, h]}"
        fail(op, f"{name} do not fit each other.", got, expected, "swap the dims of one of them")
    if kernels.wi_0.dtype != up.dtype:
        what = "wi_0 and wi_1 differ in dtype."
        fail(op, what, got, "one dtype", "cast one of them", TypeError)
    return kernels


def _check_names(op: str, name: str, given: set[str], gated: bool) -> None:
    if given in (({"wi_0", "wi_1", "wo"}, {"wi", "wo"}) if gated else ({"wi_0", "wo"},)):
        return
    what, expected = f"{name} lack matrices, or have too many.", "wi_0, wi_1, wo; or wi, wo"
    fix = "pass gate and up as wi_0 and wi_1, or both as wi"
    if not gated:
        expected, fix = "wi_0, wo", "squared ReLU has no gate: leave wi_1 out"
    fail(op, what, ", ".join(sorted(given)) or "none", expected, fix)


def _check_ranks(op: str, name: str, named: dict[str, Any], ndim: int, expected: str) -> None:
    if any(w.ndim != ndim for w in named.values()):
        got = ", ".join(describe(matrix, w) for matrix, w in named.items())
        fix = "stack the experts along dim 0" if ndim == 3 else "pass one expert's matrices"
        fail(op, f"{name} have the wrong rank.", got, expected, fix)


def _check_count(op: str, kernels: ExpertKernels, got: str) -> None:
    if 0 in kernels.wo.shape[:-2]:
        expected, fix = "1 expert or more", "leave the layer out where there are none"
        fail(op, "there are no experts.", got, expected, fix)


def _halves(op: str, named: dict[str, jax.Array], ndim: int) -> dict[str, jax.Array]:
    """Returns gate and up apart; where ranks are wrong, what the check of ranks will name."""
    wi, wo = named["wi"], named["wo"]
    if wi.ndim != ndim:
        return {"wi_0": wi, "wi_1": wi, "wo": wo}
    if wi.shape[-1] % 2:
        expected, fix = "wi [..., h, 2f]", "put gate and up side by side"
        fail(op, "wi has no two halves.", describe("wi", wi), expected, fix)
    gate, up = jnp.split(wi, 2, axis=-1)
    return {"wi_0": gate, "wi_1": up, "wo": wo}


def _as_fp8(op: str, name: str, kernels: ExpertKernels, given: dict, ndim: int) -> ExpertKernels:
    for matrix, w in given.items():
        if not isinstance(w, QArray):
            got = f"{describe(matrix, w)} beside QArrays"
            fix = f"quantize(jnp.swapaxes({matrix}, -1, -2), (128, 128))"
            what = f"{matrix} is not in FP8, others are."
            fail(op, what, got, "all in FP8, or none", fix, TypeError)
        check_quantized(op, matrix, w)
    parts = {matrix: w.qvalue for matrix, w in given.items()}
    scales = (describe(f"{matrix}'s scale", w.scale) for matrix, w in given.items())
    got = ", ".join((*(describe(*pair) for pair in parts.items()), *scales))
    e = "e, " if ndim == 3 else ""
    expected = f"QArrays wi_0, wi_1 [{e}f, h] or wi [{e}2f, h], wo [{e}h, f]"
    _check_ranks(op, name, parts, ndim, expected)
    _check_count(op, kernels, got)
    *lead, h, f = kernels.wo.shape
    shapes = {"wi": (*lead, 2 * f, h), "wo": (*lead, h, f)}
    if any(w.shape != shapes.get(matrix, (*lead, f, h)) for matrix, w in given.items()):
        fix = "FP8 matrices are [out, in]: swap the dims of the floats before you quantize"
        fail(op, f"{name} do not fit each other.", got, expected, fix)
    if not all(w.has_tile(BLOCKS) for w in given.values()):
        fix = "quantize(w, (128, 128))"
        fail(op, f"{name} have other scales.", got, "scales of 128x128", fix)
    if kernels.wi is not None and f % SCALE_BLOCK:
        fix = "pass gate and up apart, as wi_0 and wi_1"
        what = "a block of scales has rows of gate and of up."
        fail(op, what, got, f"wi [{e}2f, h], f a multiple of {SCALE_BLOCK}", fix)
    return dataclasses.replace(kernels, copies=None)


def fp8_halves(kernels: ExpertKernels) -> ExpertKernels:
    """Returns FP8 kernels with gate and up apart."""
    if kernels.wi is None:
        return kernels
    f = kernels.sizes[-1]
    rows = slice(None, f), slice(f, None)
    scale_rows = slice(None, f // SCALE_BLOCK), slice(f // SCALE_BLOCK, None)
    wi_0, wi_1 = (
        QArray(kernels.wi.qvalue[..., r, :], kernels.wi.scale[..., s, :])
        for r, s in zip(rows, scale_rows, strict=True)
    )
    return dataclasses.replace(kernels, wi_0=wi_0, wi_1=wi_1, wi=None)


def check_shards(op: str, name: str, kernels: ExpertKernels, devices: int) -> None:
    """Checks that tensor axes of so many devices leave blocks of an FP8 kernel's scales whole."""
    f = kernels.sizes[-1]
    multiple = SCALE_BLOCK * devices
    if kernels.is_fp8 and devices > 1 and f % multiple:
        got = f"{name} in FP8 with f={f}, {devices} devices: shards of {f / devices:g}"
        fix = f"pad f to {math.ceil(f / multiple) * multiple} with zeros, or name no tensor_axis"
        what = "a tensor axis would split a block of scales."
        fail(op, what, got, f"f % {multiple} == 0", fix)
