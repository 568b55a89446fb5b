"""The one form of every error: what, got, expected, fix."""

from typing import Any, NoReturn

SHORT = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "float8_e4m3fn": "e4m3"}


def message(op: str, what: str, *, got: str, expected: str, fix: str) -> str:
    """Returns the four-part text of an error of operation `op`."""
    return f"{op}: {what}\n  got       {got}\n  expected  {expected}\n  fix       {fix}"


def describe(name: str, value: Any) -> str:
    """Returns name, dtype and shape of an array, as in `x bf16[256, 512]`; else name and type."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        return f"{name} {type(value).__name__}"
    dtype = SHORT.get(str(value.dtype), str(value.dtype))
    return f"{name} {dtype}[{', '.join(map(str, value.shape))}]"


def fail(
    op: str, what: str, got: str, expected: str, fix: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `error` with the four-part text."""
    raise error(message(op, what, got=got, expected=expected, fix=fix))
