"""The user's file of tuned configs: where it is, who may have written it, how it is written.

A file is of one card and of one version of this package. It is trusted like an entry of the kernel
cache: it and its folder must belong to this user or to root, and nobody else may write to them.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import stat
import tempfile
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from jax_fp8gemm._core.errors import fail, message
from jax_fp8gemm._core.folders import cache_folder
from jax_fp8gemm._core.version import __version__
from jax_fp8gemm._select.problem import GemmConfig, Problem, why_illegal

VARIABLE = "JAX_FP8GEMM_TUNED"
LARGEST_FILE = 64 << 20  # bytes; a row has about 500
Table = dict[Problem, GemmConfig]
T = TypeVar("T")


def file_name(device: str) -> str:
    """Returns what files about a kind of device are called: "nvidia-h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def tuned_path(device: str) -> str:
    """Returns JAX_FP8GEMM_TUNED, or the card's own file beside the kernels; "" where none is."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return os.path.expanduser(chosen)
    folder = cache_folder().path
    return folder and os.path.join(folder, f"tuned-{file_name(device)}.json")


# ---- reading ------------------------------------------------------------------------------------


def read(device: str) -> Table:
    """Returns the configs of the user's file; none, with a warning, where it cannot be used."""
    path = tuned_path(device)
    if not path:
        return {}
    try:
        text = _text(path)
        return {} if text is None else _parsed(text, device)
    except (OSError, ValueError) as error:
        fix = f"run tune again, remove the file, or set {VARIABLE} to another one, or to nothing"
        expected = f"a file of tuned configs of {device} and version {__version__}"
        what = "a file of tuned configs is not used."
        got = f"{path}: {error}"
        warnings.warn(
            message("jax_fp8gemm", what, got=got, expected=expected, fix=fix), stacklevel=2
        )
        return {}


def _text(path: str) -> str | None:
    """Returns what the file holds, None if there is no such file.

    Raises:
      OSError: somebody else may have written it, or it cannot be read.
      ValueError: somebody else may have written it, or it cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would wait
    try:
        _check_folder(path)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        return None
    with open(descriptor, encoding="utf-8") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > LARGEST_FILE:
            raise ValueError(f"{status.st_size} bytes")
        _check_owner(status, "it")
        return file.read()


def _check_folder(path: str) -> None:
    if not os.path.isabs(path):
        raise ValueError("not an absolute path")
    _check_owner(os.stat(os.path.dirname(path)), "its folder")


def _check_owner(status: os.stat_result, what: str) -> None:
    """As written_by_others() of csrc/files.cpp says for the kernel cache."""
    if status.st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{what} is owned by user {status.st_uid}")
    for bit, who in ((stat.S_IWOTH, "everyone"), (stat.S_IWGRP, f"group {status.st_gid}")):
        if status.st_mode & bit:
            raise ValueError(f"{what} is writable by {who}")


def _parsed(text: str, device: str) -> Table:
    """Raises ValueError for damage, another version or another card."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("no file of tuned configs") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError("no file of tuned configs")
    for name, expected in (("version", __version__), ("device", device)):
        if content.get(name) != expected:
            raise ValueError(f"of {name} {content.get(name)!r}")
    return dict(_row(i, row, device) for i, row in enumerate(content["rows"]))


def _row(index: int, row: Any, device: str) -> tuple[Problem, GemmConfig]:
    try:
        problem = made(Problem, {**row["problem"], "device": device})
        config = made(GemmConfig, row["config"])
        if reason := why_illegal(problem, config):
            raise ValueError(reason)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {index}: {error}") from None
    return problem, config


def made(kind: type[T], given: Mapping[str, Any]) -> T:
    """Returns the dataclass of these fields, all of which are there and of their types."""
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(typing.cast(Any, kind))}
    if set(given) != names:
        raise ValueError(f"fields {sorted(set(given) ^ names)} are missing or unknown")
    for name, value in given.items():
        words = typing.get_args(hints[name])
        right = value in words if words else type(value) is hints[name]
        least = 0 if name == "num_sms" else 1
        if not right or (hints[name] is int and value < least):
            raise ValueError(f"{name} is {value!r}")
    return kind(**given)


# ---- writing ------------------------------------------------------------------------------------


def prepare(device: str) -> str:
    """Returns the file's path, its folder made.

    Raises:
      ValueError: there is no file, or its folder is not to be trusted.
      OSError: its folder cannot be made.
    """
    path = tuned_path(device)
    if not path:
        _refuse(f"{VARIABLE}={os.environ.get(VARIABLE, '')!r}, and no folder of kernels")
    try:
        if os.path.isabs(path):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _check_folder(path)
    except ValueError as error:
        _refuse(f"{path}: {error}")
    return path


def _refuse(got: str) -> NoReturn:
    expected = "an absolute path, in a folder that only you or root may write to"
    fail("tune", "there is no place for tuned configs.", got, expected, f"set {VARIABLE} to one")


def write(path: str, device: str, rows: Mapping[Problem, tuple[GemmConfig, float]]) -> None:
    """Adds configs, with their µs, to a file. Rows of other problems stay; of equal ones the last
    writer's count.

    Writers take turns by a lock where the file system has locks. A reader sees the old file or the
    new one, never a part.
    """
    with _locked(f"{path}.lock"):
        kept = _rows(path, device)
        kept |= {_key(problem): _as_row(problem, *config) for problem, config in rows.items()}
        head = json.dumps({"version": __version__, "device": device})[:-1]
        lines = ",\n".join(json.dumps(kept[key]) for key in sorted(kept))
        _replace(path, f'{head}, "rows": [\n{lines}\n]}}\n')


def _rows(path: str, device: str) -> dict[str, dict[str, Any]]:
    """Returns the rows of a file; none where it cannot be used: it is then written anew."""
    try:
        text = _text(path)
        if text is None or not _parsed(text, device):
            return {}
    except (OSError, ValueError):
        return {}
    return {json.dumps(row["problem"]): row for row in json.loads(text)["rows"]}


def _key(problem: Problem) -> str:
    return json.dumps(_fields(problem))


def _fields(problem: Problem) -> dict[str, Any]:
    fields = dataclasses.asdict(problem)
    del fields["device"]  # the file says it once
    return fields


def _as_row(problem: Problem, config: GemmConfig, us: float) -> dict[str, Any]:
    return {
        "problem": _fields(problem),
        "config": dataclasses.asdict(config),
        "us": round(us, 2),
    }


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: str, text: str) -> None:
    """Writes a file at once, with mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".tuned-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
