"""GEMMs as a command line has them: `ragged:m=4096,n=7168,k=2048,g=8`."""

import dataclasses
from typing import Any

from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._select.saved import made

EXPECTED = "VARIANT:m=...,n=...,k=... and, where they differ from the usual, g, scales, out, rhs"


def is_problem(text: str) -> bool:
    """Whether this means a GEMM; else it is a MODULE:FUNCTION."""
    return text.partition(":")[0] in VARIANTS


def problem_text(problem: Problem) -> str:
    """Returns a GEMM as `parse_problem` reads it."""
    fields = dataclasses.asdict(problem)
    usual = {field.name: field.default for field in dataclasses.fields(Problem)}
    del fields["variant"], fields["device"]
    words = (
        f"{name}={int(x) if isinstance(x, bool) else x}"
        for name, x in fields.items()
        if x != usual[name]
    )
    return f"{problem.variant}:{','.join(words)}"


def parse_problem(op: str, text: str, device: str) -> Problem:
    """Returns the GEMM that a text means.

    Raises:
      ValueError: it means none.
    """
    variant, _, rest = text.partition(":")
    usual = {
        field.name: field.default
        for field in dataclasses.fields(Problem)
        if field.default is not dataclasses.MISSING
    }
    try:
        fields: dict[str, Any] = {**usual, "variant": variant, "device": device}
        for word in rest.split(","):
            name, _, value = word.partition("=")
            fields[name] = int(value) if value.isdecimal() else value
            if isinstance(usual.get(name), bool) and value in ("0", "1"):
                fields[name] = value == "1"
        return made(Problem, fields)
    except ValueError as error:
        fix = "write it as dense:m=4096,n=7168,k=2048"
        fail(op, "this is no GEMM.", f"{text}: {error}", EXPECTED, fix)
