"""The public names and their signatures: every change of them is seen in a diff.

To accept a change: JAX_FP8GEMM_WRITE_API=1 python -m pytest tests/test_api.py
"""

import ast
import dataclasses
import importlib
import inspect
import os
import pathlib
import re
import textwrap
from collections.abc import Callable

import jax_fp8gemm
from jax_fp8gemm._core.version import __version__

GOLDEN = pathlib.Path(__file__).parent / "data/public_api.txt"
DOORS = ("jax_fp8gemm", *(f"jax_fp8gemm.{name}" for name in ("linen", "nnx", "checkpoint")))
DOORS += ("jax_fp8gemm.deep_gemm",)


def described(name: str, value: object) -> list[str]:
    """Returns a line for a function or constant, one for each part of a class."""
    if inspect.isfunction(value):
        return [f"{name}{signature(value)}"]
    if not inspect.isclass(value):
        return [f"{name}: {type(value).__name__}"]
    lines = [f"class {name}"]
    if dataclasses.is_dataclass(value):
        flax = ("parent", "name", "promote_dtype", "dot_general")  # as the classes they come from
        own = [f for f in dataclasses.fields(value) if f.name in value.__annotations__]
        own = [f for f in own if f.name not in flax]
        lines += [f"{name}.{f.name}: {default_of(f)}" for f in own]
    elif hasattr(value, "_fields"):
        lines += [f"{name}.{field}" for field in value._fields]
    private = [base for base in value.__mro__[:0:-1] if is_private(base)]
    parts = {part: member for one in (*private, value) for part, member in vars(one).items()}
    for part, member in parts.items():
        if part.startswith("_") and part not in ("__call__", "__init__"):
            continue
        member = getattr(member, "__func__", member)
        if part == "__init__" and dataclasses.is_dataclass(value):
            continue
        if inspect.isfunction(member) and member.__module__.startswith("jax_fp8gemm"):
            lines.append(f"{name}.{part}{signature(member)}")
        elif isinstance(member, property):
            lines.append(f"{name}.{part} (property)")
    return lines


def is_private(base: type) -> bool:
    """Whether it is a class of this package that users know by its subclasses alone."""
    return base.__module__.startswith("jax_fp8gemm") and base.__name__.startswith("_")


def signature(function: Callable) -> str:
    """Returns the signature as its source has it: the same for every version of JAX."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){result}"


def default_of(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return f"= {getattr(field.default, '__qualname__', repr(field.default))}"


def public_api() -> str:
    lines = []
    for door in DOORS:
        module = importlib.import_module(door)
        assert sorted(module.__all__) == sorted(set(module.__all__)), door
        for name in sorted(module.__all__):
            lines += described(f"{door}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_those_on_record():
    found = public_api()
    if os.environ.get("JAX_FP8GEMM_WRITE_API") == "1":
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text(), __doc__


def test_nothing_else_is_public():
    named = {name for name, value in vars(jax_fp8gemm).items() if not inspect.ismodule(value)}
    assert {name for name in named if not name.startswith("_")} <= set(jax_fp8gemm.__all__)


def test_every_public_function_says_what_it_takes_gives_and_raises():
    for name in jax_fp8gemm.__all__:
        value = getattr(jax_fp8gemm, name)
        if inspect.isfunction(value):
            text = inspect.getdoc(value) or ""
            for part in ("Args:", "Returns:", "Raises:"):
                assert part in text, f"{name} has no {part}"


def test_there_is_one_version():
    assert jax_fp8gemm.__version__ == __version__


# ---- docstrings ---------------------------------------------------------------------------------


def section(docstring: str, title: str) -> list[str]:
    """Returns the items of a docstring's section, a continued line joined to its item."""
    lines = inspect.cleandoc(docstring).splitlines()
    if f"{title}:" not in lines:
        return []
    found: list[str] = []
    for line in lines[lines.index(f"{title}:") + 1 :]:
        if not line.startswith("  "):
            break
        if line.startswith("   ") and found:
            found[-1] += f" {line.strip()}"
        else:
            found.append(line.strip())
    return found


def public_functions() -> dict[str, Callable]:
    doors = [importlib.import_module(door) for door in DOORS]
    every = {f"{m.__name__}.{name}": getattr(m, name) for m in doors for name in m.__all__}
    return {name: value for name, value in every.items() if inspect.isfunction(value)}


def test_a_tool_can_read_the_docstrings():
    """Args and Raises have one name a line; Args are those of the signature."""
    wrong = []
    for name, function in public_functions().items():
        parameters = inspect.signature(function).parameters
        for item in section(function.__doc__ or "", "Args"):
            if item.partition(":")[0].lstrip("*") not in parameters:
                wrong.append(f"{name}: {item}")
        for item in section(function.__doc__ or "", "Raises"):
            if not re.match(r"\w+(Error|Exception): ", item) or re.search(r"\. \w+Error: ", item):
                wrong.append(f"{name}: {item}")
    assert not wrong, "\n".join(wrong)


def test_every_argument_is_explained():
    missing = []
    for name, function in public_functions().items():
        explained = {item.partition(":")[0] for item in section(function.__doc__ or "", "Args")}
        kinds = inspect.signature(function).parameters
        missing += [f"{name}: {p}" for p in kinds if p not in explained]
    assert not missing, "\n".join(missing)
