"""What config.json says of a checkpoint's quantization, as serving engines read it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

from jax_fp8gemm._checkpoint.folder import read_json
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import SCALE_BLOCK

CONFIG = "config.json"
SECTIONS = ("quantization_config", "compression_config")  # the latter of older compressed-tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """The quantization section of config.json.

    Attributes:
      method: "fp8", "compressed-tensors" or "mxfp4".
      block: rows and columns that share a scale; None: a scale for each row, or as MXFP4 has it.
      not_converted: modules whose weights are not quantized.
      scale_format: "ue8m0" where scales are powers of two, else "float".
    """

    method: str
    block: tuple[int, int] | None = None
    not_converted: tuple[str, ...] = ()
    scale_format: str = "float"


def read_quantization(op: str, path: pathlib.Path) -> Quantization | None:
    """Returns the section of a folder's config.json, None where there is none.

    Raises:
      NotImplementedError: it names what this library does not read.
    """
    if not path.is_dir() or not (path / CONFIG).exists():
        return None
    config = read_json(op, path / CONFIG)
    text = config.get("text_config")  # of models for images and text
    for part in (config, text if isinstance(text, dict) else {}):
        for key in SECTIONS:
            if part.get(key) is not None:
                return _Section(op, path / CONFIG, part[key]).read()
    return None


class _Section:
    def __init__(self, op: str, file: pathlib.Path, section: Any):
        self._op, self._file = op, file
        if not isinstance(section, dict):
            self._unknown(f"a section that is a {type(section).__name__}")
        self._section: dict[str, Any] = section

    def _unknown(self, got: str) -> NoReturn:
        expected = (
            "quant_method fp8 (weight_block_size [128, 128]), compressed-tensors (8-bit floats by "
            "channel, or by block of 128x128), or mxfp4"
        )
        fix = "take the FP8 release of the model, or its bf16 one without this section"
        what = f"{self._file} names a quantization that is not read."
        fail(self._op, what, got[:300], expected, fix, NotImplementedError)

    def read(self) -> Quantization:
        method = self._section.get("quant_method")
        if method == "fp8":
            return self._fp8()
        if method == "compressed-tensors":
            return self._compressed()
        if method == "mxfp4":
            return Quantization(
                method="mxfp4",
                not_converted=self._names("modules_to_not_convert"),
                scale_format="ue8m0",
            )
        self._unknown(f"quant_method {method!r}")

    def _fp8(self) -> Quantization:
        section = self._section
        if section.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            self._unknown(f"fmt {section['fmt']!r}")
        scale_format = section.get("scale_fmt") or "float"
        if scale_format not in ("float", "ue8m0"):
            self._unknown(f"scale_fmt {scale_format!r}")
        names = self._names("modules_to_not_convert") or self._names("ignored_layers")
        block = self._block(section.get("weight_block_size"), "weight_block_size")
        return Quantization(
            method="fp8", block=block, not_converted=names, scale_format=scale_format
        )

    def _compressed(self) -> Quantization:
        groups = self._section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            self._unknown(f"config_groups {groups!r}")
        blocks = set()
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, Mapping):
                self._unknown(f"config_groups.{name} {group!r}")
            kind = weights.get("num_bits"), weights.get("type"), weights.get("symmetric", True)
            strategy = weights.get("strategy")
            if kind != (8, "float", True) or strategy not in ("channel", "block"):
                self._unknown(f"config_groups.{name}.weights {dict(weights)}")
            by_block = strategy == "block"
            structure = weights.get("block_structure")
            blocks.add(self._block(structure, "block_structure") if by_block else None)
        block = blocks.pop() if len(blocks) == 1 else None
        return Quantization(
            method="compressed-tensors", block=block, not_converted=self._names("ignore")
        )

    def _block(self, value: Any, name: str) -> tuple[int, int]:
        if value != [SCALE_BLOCK, SCALE_BLOCK]:
            self._unknown(f"{name} {value!r}")
        return SCALE_BLOCK, SCALE_BLOCK

    def _names(self, key: str) -> tuple[str, ...]:
        names = self._section.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._unknown(f"{key} {names!r}")
        return tuple(names)
