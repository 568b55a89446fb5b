"""A model's parameters as an FP8 checkpoint: names, FP8 weights, files of a size, config.json."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8gemm._checkpoint.folder import INDEX, SINGLE
from jax_fp8gemm._checkpoint.joined import join_fp8
from jax_fp8gemm._checkpoint.parameters import Names, Place, out_axis
from jax_fp8gemm._checkpoint.quantization import CONFIG
from jax_fp8gemm._checkpoint.tables import Table
from jax_fp8gemm._checkpoint.writer import check_folder, flatten, write_tensors, write_text
from jax_fp8gemm._core.checks import FLOATS
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, SCALE_BLOCK, ceil_div
from jax_fp8gemm._core.progress import Progress
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ScaleRounding
from jax_fp8gemm._ops.quantize import quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """One tensor to write: the parameters that are parts of it.

    Attributes:
      parts: for each part of `out`, where it lies and the parameter.
    """

    name: str
    parts: tuple[tuple[Place, QArray | jax.Array], ...]

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes in a file."""
        return sum(_nbytes(at, value) for at, value in self.parts)


def _nbytes(at: Place, value: QArray | jax.Array) -> int:
    elements = math.prod(value.shape if at.stacked is None else value.shape[1:])
    if isinstance(value, QArray) or at.row.fp8:
        return elements + 4 * ceil_div(elements, SCALE_BLOCK**2)
    return jnp.dtype(value.dtype).itemsize * elements


def write_parameters(
    op: str,
    folder: pathlib.Path,
    parameters: Any,
    table: Table,
    *,
    config: Mapping[str, Any],
    file_bytes: int,
    scale_rounding: ScaleRounding,
) -> None:
    check_folder(op, folder)
    old = [file.name for file in (*folder.glob("*.safetensors"), *folder.glob(INDEX))]
    if old:
        got, fix = f"{folder} with {', '.join(sorted(old)[:3])}", "choose another folder"
        fail(op, "the folder has a checkpoint.", got, "a folder without one", fix)
    exports = _exports(op, Names(op, table), parameters)
    files = _files(exports, file_bytes)
    weight_map: dict[str, str] = {}
    whole: list[str] = []
    size = 0
    with Progress(op, sum(export.nbytes for export in exports), in_bytes=True) as bar:
        for file, members in files.items():
            tensors = {e.name: _tensor(op, e, scale_rounding) for e in members}
            whole += [n for n, x in tensors.items() if not isinstance(x, QArray) and x.ndim > 1]
            flat = flatten(op, tensors, {})
            write_tensors(folder / file, flat)
            weight_map |= dict.fromkeys(flat, file)
            size += sum(array.nbytes for array in flat.values())
            bar.step(sum(export.nbytes for export in members))
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2))
    text = json.dumps({**config, "quantization_config": _section(whole)}, indent=2)
    write_text(folder / CONFIG, text)


def _section(whole: list[str]) -> dict[str, Any]:
    """Returns what serving engines need to know; whole: matrices that are not in FP8."""
    modules = [name.removesuffix(".weight") for name in whole if name.endswith(".weight")]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
        "modules_to_not_convert": modules,
    }


def _exports(op: str, names: Names, parameters: Any) -> list[Export]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        parameters, is_leaf=lambda x: isinstance(x, QArray)
    )
    found: dict[str, list[tuple[Place, Any]]] = {}
    for path, value in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(value, QArray | jax.Array):
            value = jnp.asarray(value)
        places = names.of_parameter(name, value.shape[0] if value.ndim else 0)
        if not places:
            got, fix = describe(name, value), "add a row to the table, or leave it out"
            fail(op, f"the table has no row for {name}.", got, "a row for each parameter", fix)
        for at in places:
            found.setdefault(at.stored, []).append((at, value))
    order = {part: i for i, part in enumerate(("all", "first half", "second half", "even", "odd"))}
    exports = []
    for stored, parts in found.items():
        parts = sorted(parts, key=lambda part: order[part[0].row.part])
        whole = [at.row.part for at, _ in parts]
        if whole not in (["all"], ["first half", "second half"], ["even", "odd"]):
            got = ", ".join(f"{at.parameter} ({at.row.part})" for at, _ in parts)
            fix = "pass gate and up both, once each"
            fail(op, f"{stored} has not all its parts.", got, "all of it, once", fix)
        exports.append(Export(name=stored, parts=tuple(parts)))
    return exports


def _files(exports: list[Export], file_bytes: int) -> dict[str, list[Export]]:
    """Returns the files and what goes into each, in order; a tensor is never cut."""
    groups: list[list[Export]] = [[]]
    size = 0
    for export in exports:
        if groups[-1] and size + export.nbytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(export)
        size += export.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


# ---- one tensor ---------------------------------------------------------------------------------


def _tensor(op: str, export: Export, rounding: ScaleRounding) -> QArray | jax.Array:
    pieces = [_piece(op, at, value) for at, value in export.parts]
    in_fp8 = [piece for piece in pieces if isinstance(piece, QArray)]
    floats = [piece for piece in pieces if not isinstance(piece, QArray)]
    row = export.parts[0][0].row
    interleaved = row.part == "even"
    if in_fp8 and floats:
        got = ", ".join(at.parameter for at, _ in export.parts)
        fix = "quantize both, or neither"
        fail(op, f"{export.name} is FP8 in part.", got, "QArrays or floats", fix, TypeError)
    if in_fp8:
        if len(in_fp8) == 1:
            return in_fp8[0]
        return join_fp8(op, export.name, in_fp8, in_turns=interleaved)
    joined = _join(floats, out_axis(row, in_fp8=row.fp8), interleaved)
    if not row.fp8:
        return joined
    if joined.dtype not in FLOATS or joined.ndim < 2:
        got, fix = describe(export.name, joined), "cast it to bfloat16"
        fail(op, f"{export.name} is no float weight.", got, "bf16, f16 or f32", fix, TypeError)
    return quantize(joined, BLOCKS, scale_rounding=rounding)


def _piece(op: str, at: Place, value: QArray | jax.Array) -> QArray | jax.Array:
    """Returns what of a parameter goes into one tensor, in the tensor's order of dims."""
    if isinstance(value, QArray) and not value.has_tile(BLOCKS):
        got = f"{describe(at.parameter, value.qvalue)}, {describe('scale', value.scale)}"
        fix = "quantize(w, (128, 128)); checkpoint.save writes scales of rows"
        fail(op, f"{at.parameter} has other scales.", got, "scales of 128x128", fix)
    if at.stacked is not None:
        value = jax.tree.map(lambda x: x[at.stacked], value)
    if isinstance(value, QArray) or value.ndim < 2:
        return value
    turned = at.row.layout == "kernel" or (at.row.layout == "kernel [in, out]" and at.row.fp8)
    return jnp.swapaxes(value, -1, -2) if turned else value


def _join(parts: list[jax.Array], axis: int, interleaved: bool) -> jax.Array:
    if len(parts) == 1:
        return parts[0]
    if not interleaved:
        return jnp.concatenate(parts, axis=axis)
    shape = list(parts[0].shape)
    shape[axis] *= 2
    return jnp.stack(parts, axis=len(shape) + 1 + axis).reshape(shape)
