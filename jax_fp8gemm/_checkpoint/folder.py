"""The files of a checkpoint: one file, or a folder with an index of several."""

import json
import pathlib
from collections.abc import Callable, Collection
from typing import Any

from jax_fp8gemm._checkpoint.header import Entry, read_header
from jax_fp8gemm._core.errors import fail

INDEX = "model.safetensors.index.json"  # Hugging Face's name of the table of several files
SINGLE = "model.safetensors"


Select = Callable[[Collection[str]], set[str]]


def find_entries(op: str, path: pathlib.Path, select: Select) -> dict[str, Entry]:
    """Returns the tensors of a checkpoint by name, as far as `select` picks them from all names.

    Files that hold none of these need not be there.
    """
    if not path.is_dir() or not (path / INDEX).exists():
        file = path / SINGLE if path.is_dir() else path
        header = read_header(op, file)
        selected = select(header)
        return {name: entry for name, entry in header.items() if name in selected}
    entries: dict[str, Entry] = {}
    for file, names in _indexed(op, path, select).items():
        found = read_header(op, file)
        for name in names:
            if name not in found:
                got, fix = f"{len(found)} tensors in {file.name}", "fetch the file again"
                fail(op, f"{name} is missing.", got, f"{name}, as the index says", fix)
            entries[name] = found[name]
    return entries


def _indexed(op: str, folder: pathlib.Path, select: Select) -> dict[pathlib.Path, list[str]]:
    index = read_json(op, folder / INDEX)
    table = index.get("weight_map")
    if not isinstance(table, dict):
        fix = f"take {INDEX} from where the other files are from"
        got, expected = f"{sorted(index)}"[:300], "weight_map in it"
        fail(op, f"{folder / INDEX} is no index.", got, expected, fix)
    selected = select(table)
    files: dict[pathlib.Path, list[str]] = {}
    for name, file in table.items():
        plain = isinstance(file, str) and pathlib.PurePath(file).name == file and "\0" not in file
        if not plain or file in ("", ".."):
            fix = "correct the index: its files lie beside it"
            got = f"{file!r} for {name}"[:300]
            fail(op, f"{folder / INDEX} names no file of its folder.", got, "a file's name", fix)
        if name in selected:
            files.setdefault(folder / file, []).append(name)
    return files


def read_json(op: str, file: pathlib.Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds."""
    try:
        found = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        got, fix = f"{str(error)[:200]}", "fetch it again"
        fail(op, f"{file} is not JSON.", got, "a JSON object", fix)
    if not isinstance(found, dict):
        got, fix = type(found).__name__, "fetch it again"
        fail(op, f"{file} is not a JSON object.", got, "a JSON object", fix)
    return found
