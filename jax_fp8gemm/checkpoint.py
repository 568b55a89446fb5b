"""FP8 weights from and to safetensors files, byte for byte, straight to where they are needed.

A weight is two tensors, `X.weight` e4m3 [out, in] and its scales, whose product it is. Together
they are a QArray, as they are. docs/checkpoints.md has the layouts.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Sharding

from jax_fp8gemm._checkpoint.export import write_parameters
from jax_fp8gemm._checkpoint.pairs import Format
from jax_fp8gemm._checkpoint.parameters import read_parameters
from jax_fp8gemm._checkpoint.quantization import Quantization
from jax_fp8gemm._checkpoint.reader import Catalog, Checkpoint, Tensors, read_all
from jax_fp8gemm._checkpoint.tables import (
    DEEPSEEK_V3,
    GLM_4_5,
    GPT_OSS,
    QWEN3_MOE,
    Row,
    Table,
)
from jax_fp8gemm._checkpoint.writer import check_folder, flatten, write_tensors
from jax_fp8gemm._core.checks import check_option, check_positive
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import ScaleRounding

__all__ = [
    "DEEPSEEK_V3", "GLM_4_5", "GPT_OSS", "QWEN3_MOE", "Checkpoint", "Format", "Quantization",
    "Row", "Tensors", "load", "load_parameters", "open", "save", "save_parameters",
]  # fmt: skip

Path = str | os.PathLike
ShardingFor = Sharding | Callable[[str], Sharding | None]


def open(path: Path, *, keep: Callable[[str], bool] | None = None) -> Checkpoint:
    """Reads the headers of files, and each tensor when it is asked for.

    Args:
      path: a safetensors file, or a folder with model.safetensors.index.json or else with
        model.safetensors. A folder's config.json is read too, where there is one.
      keep: says by a tensor's name (of a weight with scales: the weight's) whether it is there at
        all; default: everything. Files without any of these need not exist.

    Returns:
      Checkpoint: a Mapping from names to arrays, which reads from memory-mapped files.

    Raises:
      ValueError: a damaged file or index, FP8 numbers without scales, scales without FP8 numbers,
        scales of another shape.
      TypeError: an unknown dtype.
      FileNotFoundError: no such file.
      NotImplementedError: config.json names a quantization that is not read.

    Source: the format's description in the safetensors repository; DeepSeek-V3's
      README_WEIGHTS.md; OCP Microscaling Formats 1.0 for MXFP4.

    Example:
      model = checkpoint.open("DeepSeek-V3")
      w = model.read("lm_head.weight", NamedSharding(mesh, PartitionSpec("x")))
    """
    return Checkpoint(Catalog("checkpoint.open", pathlib.Path(path), keep))


def load(
    path: Path,
    *,
    keep: Callable[[str], bool] | None = None,
    sharding: ShardingFor | None = None,
) -> Tensors:
    """Reads tensors, and each FP8 weight with its scales as one QArray; no value is rounded.

    Args:
      path: as of `open`.
      keep: says by a tensor's name (of a weight with scales: the weight's) whether to read it;
        default: everything.
      sharding: where tensors go: one Sharding, or a function from a name to a Sharding or None;
        None: JAX's default device. Each process reads what its own devices hold.

    Returns:
      A dict of arrays by name. A weight is a QArray [..., out, in] with scales f32 of 128x128 or,
      of compressed-tensors, of a row each. prepare_weight and gemm's rhs take the former, gemm with
      an lhs scaled by rows the latter. MXFP4 and MXFP8 become E4M3 with scales of 128x128. Integers
      of 64 bits become 32 bits wide without jax_enable_x64. `formats` has what `save` needs to
      write the same bytes.

    Raises:
      ValueError: as of `open`, or an MXFP4 weight is not exact in E4M3, or a sharding does not fit.
      TypeError: an unknown dtype, a number that needs 64 bits. FileNotFoundError,
      NotImplementedError: as of `open`.

    Source: as of `open`.

    Example:
      tensors = checkpoint.load("DeepSeek-V3", keep=lambda name: ".layers.3." in name)
      w = prepare_weight(tensors["model.layers.3.self_attn.o_proj.weight"])
    """
    return read_all(Catalog("checkpoint.load", pathlib.Path(path), keep), sharding)


def save(
    path: Path,
    tensors: Mapping[str, QArray | jax.Array],
    *,
    formats: Mapping[str, Format] | None = None,
) -> None:
    """Writes tensors to one file, each QArray as its numbers and its scales, as they are.

    The file appears whole or not at all: whoever is killed while writing leaves the old one.

    Args:
      path: of the file, in a folder that exists.
      tensors: arrays of any dtype but e4m3, and QArrays [..., out, in] with scales of 128x128 or of
        a row each, by name.
      formats: how tensors are written where their arrays do not show it; default: as `load` found
        them, where tensors are its result, else scales as f32 under `NAME_scale_inv`.

    Raises:
      ValueError: other scales, FP8 numbers without scales, a name taken twice, a value that its
        format cannot hold.
      TypeError: not an array, a dtype that files lack.
      FileNotFoundError: no such folder.

    Example:
      checkpoint.save("model.safetensors", {"up.weight": quantize(w.T, (128, 128))})
    """
    op, path = "checkpoint.save", pathlib.Path(path)
    check_folder(op, path.parent)
    if formats is None:
        formats = tensors.formats if isinstance(tensors, Tensors) else {}
    write_tensors(path, flatten(op, tensors, formats))


def load_parameters(
    path: Path,
    table: Table,
    *,
    keep: Callable[[str], bool] | None = None,
    sharding: ShardingFor | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint as a model's parameters: experts stacked, gate and up apart.

    Args:
      path: as of `open`.
      table: which tensor is which parameter: DEEPSEEK_V3, QWEN3_MOE, GLM_4_5, GPT_OSS, or a tuple
        of Row.
      keep: says by a parameter's name (by the tensor's own where the table has none for it)
        whether to read it; default: everything.
      sharding: as of `load`, by the parameter's name and of its shape. A device reads those experts
        alone that it holds.

    Returns:
      A tree of dicts: "layers.3.experts.wi_0" is at `["layers"]["3"]["experts"]["wi_0"]`. FP8
      weights are QArrays [e, out, in] or [out, in]. Kernels in floats are [e, in, out] or
      [in, out].

    Raises:
      ValueError: a tensor that the table does not have, an expert missing, a part that splits a
        scale tile and is not exact with other tiles; and as of `load`.
      TypeError: as of `load`.
      FileNotFoundError: as of `load`.
      NotImplementedError: as of `load`.

    Source: names as published with each model.

    Example:
      tree = checkpoint.load_parameters("DeepSeek-V3", checkpoint.DEEPSEEK_V3)
      experts = tree["layers"].pop("3").pop("experts")
      down = prepare_weight(experts.pop("wo"))
    """
    return read_parameters("checkpoint.load_parameters", pathlib.Path(path), table, keep, sharding)


def save_parameters(
    path: Path,
    parameters: Any,
    table: Table,
    *,
    config: Mapping[str, Any] | None = None,
    file_bytes: int = 5_000_000_000,  # Hugging Face's size of a file
    scale_rounding: ScaleRounding = "pow2",
) -> None:
    """Writes a model's parameters as a block-FP8 checkpoint, as serving engines load them.

    The inverse of `load_parameters`. Weights that a row calls fp8 are quantized by 128x128 where
    they are in floats. Other arrays keep their dtype.

    Args:
      path: of a folder that exists and has no checkpoint yet.
      parameters: a tree of arrays and QArrays, of dicts or other pytrees, as ExpertKernels.
      table: as of `load_parameters`. A parameter goes where its first row says.
      config: what else config.json has to say: the model's own sizes and names.
      file_bytes: how large a file gets; a single tensor may be larger. With several files there is
        an index.
      scale_rounding: "pow2" or "none", see `quantize`. A QArray keeps its scales.

    Raises:
      ValueError: a parameter that the table does not have, one of two parts missing, QArrays with
        other scales, QArrays of one tensor that cannot be joined exactly, a checkpoint in the
        folder.
      TypeError: FP8 and floats in one tensor.
      FileNotFoundError: no such folder.

    Source: config.json of DeepSeek-V3, quantization_config.

    Example:
      checkpoint.save_parameters("trained", parameters, checkpoint.QWEN3_MOE, config=config)
    """
    op = "checkpoint.save_parameters"
    check_option(op, "scale_rounding", scale_rounding, ScaleRounding)
    check_positive(op, "file_bytes", file_bytes)
    write_parameters(
        op,
        pathlib.Path(path),
        parameters,
        table,
        config=config or {},
        file_bytes=file_bytes,
        scale_rounding=scale_rounding,
    )
