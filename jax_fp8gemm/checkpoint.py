"""Block-FP8 weights from and to safetensors files, byte for byte, in DeepSeek-V3's naming.

A weight is two tensors: `X.weight` e4m3 [out, in] and `X.weight_scale_inv` f32
[⌈out/128⌉, ⌈in/128⌉], whose product it is. Together they are a QArray, as they are.
"""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import BLOCKS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray

SCALE = "_scale_inv"  # what DeepSeek appends; the "inverse" is what to multiply by
INDEX = "model.safetensors.index.json"  # Hugging Face's name of the table of several files


# safetensors' names of dtypes. Its numpy and flax front ends read no FP8 (version 0.8), so bytes
# are read here.
DTYPES = {
    "F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "BOOL": jnp.bool_,
    "I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8,
    "U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8,
}  # fmt: skip


__all__ = ["load", "save"]

Path = str | os.PathLike


def load(path: Path, *, keep: Callable[[str], bool] | None = None) -> dict[str, QArray | jax.Array]:
    """Reads tensors, and each FP8 weight with its scales as one QArray; no value is converted.

    Args:
      path: a safetensors file, or a folder with model.safetensors.index.json or else with
        model.safetensors.
      keep: says by a tensor's name (of a weight with scales: the weight's) whether to read it;
        default: everything.

    Returns:
      Arrays on the default device, by name. Under `X.weight` stands a QArray [out, in] with scales
      of 128x128, if the file also has `X.weight_scale_inv`: prepare_weight and gemm's rhs take it.

    Raises:
      ValueError: FP8 numbers without scales, scales without FP8 numbers, scales of another shape;
      a tensor missing from where the index has it. TypeError: an unknown dtype, scales other than
      f32, 64 bits without jax_enable_x64. FileNotFoundError: no such file.

    Source: DeepSeek-V3's repository, README_WEIGHTS.md.

    Example:
      tensors = checkpoint.load("DeepSeek-V3", keep=lambda name: ".layers.3." in name)
      w = prepare_weight(tensors["model.layers.3.self_attn.o_proj.weight"])
    """
    op, path = "checkpoint.load", pathlib.Path(path)
    wanted = (lambda name: True) if keep is None else (lambda name: keep(name.removesuffix(SCALE)))
    raw: dict[str, Any] = {}
    for file, names in _files(op, path, wanted).items():
        found = _read(op, file, wanted)
        for name in names or found:
            if name not in found:
                got, fix = f"{len(found)} tensors in {file.name}", "fetch the file again"
                fail(op, f"{name} is missing.", got, f"{name}, as the index says", fix)
            raw[name] = found[name]
    for name in _weights(op, raw):
        raw[name] = QArray(raw[name], raw.pop(name + SCALE))
    return jax.tree.map(jnp.asarray, raw)


def save(path: Path, tensors: Mapping[str, QArray | jax.Array]) -> None:
    """Writes tensors to one file, each QArray as `NAME` and `NAME_scale_inv`, as they are.

    The file appears whole or not at all: whoever is killed while writing leaves the old one.

    Args:
      path: of the file, in a folder that exists.
      tensors: arrays of any dtype but e4m3, and QArrays [out, in] with scales of 128x128, by name.

    Raises:
      ValueError: other scales, FP8 numbers without scales, a name taken twice. TypeError: not an
      array, a dtype that the format lacks. FileNotFoundError: no such folder.

    Example:
      checkpoint.save("model.safetensors", {"up.weight": quantize(w.T, (128, 128))})
    """
    op, path = "checkpoint.save", pathlib.Path(path)
    if not path.parent.is_dir():
        fix = "make it, or choose another"
        fail(op, "no such folder.", str(path.parent), "a folder", fix, FileNotFoundError)
    flat: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if isinstance(value, QArray):
            if name + SCALE in tensors:
                got, fix = f"{name} as QArray and {name + SCALE}", "drop one of them"
                fail(op, f"{name} has scales twice.", got, "the QArray alone", fix)
            flat[name], flat[name + SCALE] = _host(op, name, value.qvalue), np.asarray(value.scale)
        else:
            flat[name] = _host(op, name, value)
    _weights(op, flat)
    _write(path, flat)


def _files(op: str, path: pathlib.Path, wanted) -> dict[pathlib.Path, list[str]]:
    """Returns the files to read with the tensors that the index expects in them; [] for all."""
    if not path.is_dir():
        return {path: []}
    if not (path / INDEX).exists():
        return {path / "model.safetensors": []}
    files: dict[pathlib.Path, list[str]] = {}
    index = json.loads((path / INDEX).read_text())
    if "weight_map" not in index:
        fix = "take model.safetensors.index.json from where the other files are from"
        fail(op, f"{path / INDEX} is no index.", f"{sorted(index)}", "weight_map in it", fix)
    for name, file in index["weight_map"].items():
        if wanted(name):
            files.setdefault(path / file, []).append(name)
    return files


def _read(op: str, file: pathlib.Path, wanted) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    content = file.read_bytes()
    try:
        tensors = deserialize(content)
    except SafetensorError as error:
        got, fix = f"{len(content)} bytes: {error}", "fetch it again; git-lfs leaves such pointers"
        fail(op, f"{file} is damaged.", got, "a whole safetensors file", fix)
    return {name: _array(op, name, tensor) for name, tensor in tensors if wanted(name)}


def _array(op: str, name: str, tensor: dict) -> np.ndarray:
    code, shape = tensor["dtype"], tensor["shape"]
    if code not in DTYPES:
        got, expected = f"{code} {shape}", f"one of {', '.join(DTYPES)}"
        fail(op, f"{name} has an unknown dtype.", got, expected, "leave it out by keep", TypeError)
    if code in ("F64", "I64", "U64") and not jax.config.read("jax_enable_x64"):
        expected, fix = "at most 32 bits", "set jax_enable_x64, or leave it out by keep"
        fail(op, f"{name} has 64 bits.", f"{code} {shape}", expected, fix, TypeError)
    return np.frombuffer(tensor["data"], DTYPES[code]).reshape(shape)


def _weights(op: str, raw: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the names of FP8 weights, each checked against its scales."""
    for name, value in raw.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in raw:
            weight, got = name.removesuffix(SCALE), describe(name, value)
            fail(op, f"{name} has no weight.", got, f"{weight} beside it", "add the weight")
    names = [name for name, value in raw.items() if value.dtype == FP8 or name + SCALE in raw]
    for name in names:
        _check_weight(op, name, raw[name], raw.get(name + SCALE))
    return names


def _check_weight(op: str, name: str, value: np.ndarray, scale: np.ndarray | None) -> None:
    if value.ndim < 2 or value.dtype != FP8:
        fix = "drop the scales, or quantize the weight"
        fail(op, f"{name} is no FP8 weight.", describe(name, value), "e4m3 [out, in]", fix)
    shape = list(scale_shape(value.shape, BLOCKS))
    expected = f"{name + SCALE} f32{shape}"
    if scale is None:
        fix = "a folder has the scales of all its files; to save, pass a QArray"
        fail(op, f"{name} has no scales.", describe(name, value), expected, fix)
    got = f"{describe(name, value)}, {describe('scales', scale)}"
    if list(scale.shape) != shape:
        fix = "quantize(w, (128, 128)) gives such scales"
        fail(op, f"{name} has scales of the wrong shape.", got, expected, fix)
    if scale.dtype != np.float32:
        fix = "convert the scales to float32"
        fail(op, f"{name} has scales of the wrong dtype.", got, expected, fix, TypeError)


def _host(op: str, name: str, value: jax.Array) -> np.ndarray:
    if not isinstance(value, jax.Array | np.ndarray):
        got, fix = type(value).__name__, "of a PreparedWeight pass .forward, of a tree its leaves"
        fail(op, f"{name} is no array.", got, "an array or a QArray", fix, TypeError)
    if value.dtype not in [jnp.dtype(dtype) for dtype in DTYPES.values()]:
        expected, fix = f"one of {', '.join(DTYPES)}", "cast it"
        what = f"{name} has a dtype that the format lacks."
        fail(op, what, describe(name, value), expected, fix, TypeError)
    return np.ascontiguousarray(value).reshape(value.shape)  # which makes [] to [1]


def _write(path: pathlib.Path, flat: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Hugging Face's loaders ask for a format; "pt" says that names and shapes are PyTorch's.
        save_file(flat, temporary, metadata={"format": "pt"})
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
