"""Which tensors of a checkpoint are one weight: numbers and scales, by name, dtype and shape."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import jax

from jax_fp8gemm._checkpoint.header import DTYPES, Entry
from jax_fp8gemm._checkpoint.microscaled import GROUP
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import BLOCKS, ROWS, scale_shape

SCALE = "_scale_inv"  # DeepSeek's and Qwen's; the "inverse" is what to multiply by
SCALE_CODES = ("F32", "BF16", "F16", "F8_E8M0")  # all widen to float32 exactly
FP8_CODE = "F8_E4M3"
FP4_CODES = ("F4", "U8", "I8")  # two numbers a byte
EXPONENT_CODES = ("F8_E8M0", "U8")
LONG_CODES = ("I64", "U64")
BLOCKS_NAME, SCALES_NAME = "_blocks", "_scales"  # gpt-oss's MXFP4: [..., out, in / 32, 16] bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a tensor lies in a file, where its array does not show it.

    Attributes:
      code: safetensors' name of its dtype, as in "I64" of an array in int32; None: the array's.
      scale_name: the tensor that holds the scales of a QArray; None: its name and "_scale_inv".
      scale_code: their dtype: "F32", "BF16", "F16" or "F8_E8M0".

    Example:
      checkpoint.save("w.safetensors", {"w": q}, formats={"w": Format(scale_code="BF16")})
    """

    code: str | None = None
    scale_name: str | None = None
    scale_code: str = "F32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a checkpoint, or two that are one weight.

    Attributes:
      kind: "plain"; "fp8", a QArray as it is; "microscaled", which becomes one.
      shape: of the array that is read.
      numbers, scale: where they lie; scale is None of a plain one.
      format: what save needs to write the same bytes; None where the array says it all.
    """

    name: str
    kind: Literal["plain", "fp8", "microscaled"]
    shape: tuple[int, ...]
    numbers: Entry
    scale: Entry | None = None
    format: Format | None = None

    @property
    def nbytes(self) -> int:
        entries = [self.numbers] + ([self.scale] if self.scale else [])
        return sum(entry.end - entry.begin for entry in entries)


def select(names: Collection[str], keep: Callable[[str], bool]) -> set[str]:
    """Returns the tensors to look at, by names alone: what is kept, and what may belong to it."""
    owners = {name: _owner(name, names) for name in names}
    found = {
        name
        for name, owner in owners.items()
        if keep(owner) or (not name.endswith(SCALE) and keep(name))
    }
    return found | {owners[name] for name in found if owners[name] in names}


def _owner(name: str, names: Collection[str]) -> str:
    """Returns the weight that a tensor may be a part of; else its own name."""
    if name.endswith(SCALE):
        return name.removesuffix(SCALE)
    base = name.removesuffix(BLOCKS_NAME).removesuffix(SCALES_NAME)
    if base != name and base + BLOCKS_NAME in names and base + SCALES_NAME in names:
        return base
    for end, instead in (("_scale", ""), (".scale", ".weight")):
        weight = name.removesuffix(end) + instead
        if name.endswith(end) and weight in names:
            return weight
    return name


def find_weights(op: str, entries: Mapping[str, Entry]) -> dict[str, Weight]:
    """Returns what the tensors are, by the names of the arrays that they become.

    Raises:
      ValueError: FP8 numbers without scales, scales without FP8 numbers, scales of another shape.
      TypeError: a dtype that no array has.
    """
    pairs = {name: scale for name in entries if (scale := _scale_name(name, entries))}
    scales = set(pairs.values())
    found = {}
    for name, entry in entries.items():
        if name in scales:
            continue
        if name in pairs:
            weight = _pair(op, name, entry, pairs[name], entries[pairs[name]])
        else:
            weight = _plain(op, name, entry)
        found[weight.name] = weight
    return found


def _scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """Returns the tensor with the scales of this one, if there is any."""
    base = name.removesuffix(BLOCKS_NAME)
    if name.endswith(BLOCKS_NAME) and base + SCALES_NAME in entries:
        return base + SCALES_NAME
    if name + SCALE in entries:
        return name + SCALE
    if entries[name].code not in (FP8_CODE, *FP4_CODES):
        return None  # of a norm, say, beside which a scale is another parameter
    candidates = [f"{name}_scale"]
    if name.endswith(".weight"):
        candidates.append(name.removesuffix(".weight") + ".scale")
    return next((scale for scale in candidates if scale in entries), None)


def _plain(op: str, name: str, entry: Entry) -> Weight:
    if name.endswith(SCALE):
        got, weight = f"{name} {entry}", name.removesuffix(SCALE)
        fail(op, f"{name} has no weight.", got, f"{weight} beside it", "add the weight")
    if entry.code == FP8_CODE:
        fix = "a folder has the scales of all its files; pass the folder"
        expected = f"{name + SCALE}, of shape {_shapes(entry)}"
        fail(op, f"{name} has no scales.", f"{name} {entry}", expected, fix)
    if entry.code not in DTYPES:
        expected, fix = f"one of {', '.join(DTYPES)}", "leave it out by keep"
        what = f"{name} has an unknown dtype."
        fail(op, what, f"{name} {entry}", expected, fix, TypeError)
    narrow = not jax.config.read("jax_enable_x64")
    if narrow and entry.code == "F64":
        expected, fix = "at most 32 bits", "set jax_enable_x64, or leave it out by keep"
        fail(op, f"{name} has 64 bits.", f"{name} {entry}", expected, fix, TypeError)
    narrowed = Format(code=entry.code) if narrow and entry.code in LONG_CODES else None
    return Weight(name=name, kind="plain", shape=entry.shape, numbers=entry, format=narrowed)


def _pair(op: str, name: str, entry: Entry, scale_name: str, scale: Entry) -> Weight:
    got = f"{name} {entry}, {scale_name} {scale}"
    if scale_name.endswith(SCALES_NAME):
        shape = (*entry.shape[:-2], entry.shape[-2] * GROUP) if len(entry.shape) >= 3 else ()
        base = name.removesuffix(BLOCKS_NAME)
        fits = entry.shape == (*scale.shape, GROUP // 2) and len(entry.shape) >= 3
        if entry.code != "U8" or scale.code not in EXPONENT_CODES or not fits:
            expected = f"{name} U8 [..., out, in / 32, 16], {scale_name} U8 [..., out, in / 32]"
            fail(op, f"{base} is no MXFP4 weight.", got, expected, "leave it out by keep")
        return Weight(name=base, kind="microscaled", shape=shape, numbers=entry, scale=scale)
    if entry.code in FP4_CODES and _is_microscaled(entry, scale):
        shape = (*scale.shape[:-1], scale.shape[-1] * GROUP)
        return Weight(name=name, kind="microscaled", shape=shape, numbers=entry, scale=scale)
    if entry.code != FP8_CODE or len(entry.shape) < 2:
        fix = "leave it out by keep, drop the scales, or quantize the weight"
        fail(op, f"{name} is no FP8 weight.", got, "F8_E4M3 [..., out, in]", fix)
    fits = scale.shape in (scale_shape(entry.shape, tile) for tile in (BLOCKS, ROWS))
    if _is_microscaled(entry, scale) and not (fits and scale.code in SCALE_CODES):
        return Weight(name=name, kind="microscaled", shape=entry.shape, numbers=entry, scale=scale)
    if not fits:
        fix = "quantize(w, (128, 128)) gives such scales"
        what = f"{name} has scales of the wrong shape."
        fail(op, what, got, f"scales of shape {_shapes(entry)}", fix)
    if scale.code not in SCALE_CODES:
        expected, fix = f"scales {', '.join(SCALE_CODES)}", "convert the scales to float32"
        fail(op, f"{name} has scales of the wrong dtype.", got, expected, fix, TypeError)
    form = Format(scale_name=scale_name, scale_code=scale.code)
    return Weight(name=name, kind="fp8", shape=entry.shape, numbers=entry, scale=scale, format=form)


def _is_microscaled(entry: Entry, scale: Entry) -> bool:
    """Whether each 32 numbers of a row have an exponent of their own."""
    if scale.code not in EXPONENT_CODES or len(entry.shape) < 2 or not scale.shape:
        return False
    numbers = scale.shape[-1] * GROUP
    per_entry = 2 if entry.code in ("U8", "I8") else 1  # F4's shapes count numbers
    return entry.shape == (*scale.shape[:-1], numbers // per_entry)


def _shapes(entry: Entry) -> str:
    """Returns the shapes that scales of a weight may have, as text."""
    blocks, rows = (list(scale_shape(entry.shape, tile)) for tile in (BLOCKS, ROWS))
    return f"{blocks} or, for each row, {rows}"
