"""FP8 weights from and to safetensors files, byte for byte, straight to where they are needed.

A weight is two tensors, `X.weight` e4m3 [out, in] and its scales, whose product it is. Together
they are a QArray, as they are. docs/checkpoints.md has the layouts.
"""

import os
import pathlib
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Sharding

from jax_fp8gemm._checkpoint.pairs import Format
from jax_fp8gemm._checkpoint.quantization import Quantization
from jax_fp8gemm._checkpoint.reader import Catalog, Checkpoint, Tensors, read_all
from jax_fp8gemm._checkpoint.writer import check_folder, flatten, write_tensors
from jax_fp8gemm._core.qarray import QArray

__all__ = ["Checkpoint", "Format", "Quantization", "Tensors", "load", "open", "save"]

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
      scales of another shape. TypeError: an unknown dtype. FileNotFoundError: no such file.
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
      format cannot hold. TypeError: not an array, a dtype that files lack. FileNotFoundError: no
      such folder.

    Example:
      checkpoint.save("model.safetensors", {"up.weight": quantize(w.T, (128, 128))})
    """
    op, path = "checkpoint.save", pathlib.Path(path)
    check_folder(op, path.parent)
    if formats is None:
        formats = tensors.formats if isinstance(tensors, Tensors) else {}
    write_tensors(path, flatten(op, tensors, formats))
