"""The one form of every error: what, got, expected, mend."""

import jax


def message(op: str, what: str, *, got: str, expected: str, mend: str) -> str:
    """Returns the four-part text of an error of operation `op`."""
    return f"{op}: {what}\n  got       {got}\n  expected  {expected}\n  mend      {mend}"


def describe(name: str, value: jax.Array) -> str:
    """Returns name, type and shape, as in `x bf16[256, 512]`."""
    short = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "float8_e4m3fn": "e4m3"}
    dtype = short.get(str(value.dtype), str(value.dtype))
    return f"{name} {dtype}[{', '.join(map(str, value.shape))}]"


def fail(op: str, what: str, got: str, expected: str, mend: str, error: type = ValueError):
    """Raises `error` with the four-part text."""
    raise error(message(op, what, got=got, expected=expected, mend=mend))
