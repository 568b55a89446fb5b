"""Checks of arguments: each raises a four-part error under the name of the function called."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.types import options_of

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
HALVES = (jnp.bfloat16, jnp.float16)

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Answers an argument's former name with an error that has the new one.

    Args:
      names: by the former name, what to pass today.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not names.keys().isdisjoint(kwargs):
                old = next(name for name in names if name in kwargs)
                got, expected = f"{old}={kwargs[old]!r}", names[old]
                what = f"there is no argument {old!r}."
                fail(function.__name__, what, got, expected, f"pass {expected}", TypeError)
            return function(*args, **kwargs)

        return call

    return decorate


def check_option(op: str, name: str, value: object, literal: object) -> None:
    """Checks that `value` is one of the strings of a Literal of types.py."""
    options = options_of(literal)
    if not isinstance(value, str) or value not in options:
        expected = " or ".join(f'"{one}"' for one in options)
        fail(op, f"{name} is unknown.", f"{name}={value!r}", expected, f"choose a {name} of these")


def check_float(op: str, name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        fix = "call jnp.asarray(x); for an FP8 weight, use prepare_weight"
        what, expected = f"{name} is not an array.", "a bf16, f16 or f32 array"
        fail(op, what, type(x).__name__, expected, fix.replace("(x)", f"({name})"), TypeError)
    if x.dtype not in FLOATS:
        what, fix = f"{name} has the wrong dtype.", f"cast {name} to bfloat16"
        fail(op, what, describe(name, x), "bf16, f16 or f32", fix, TypeError)


def check_positive(op: str, name: str, count: Any) -> None:
    """Checks an integer of 1 or more, or None."""
    if count is None or (is_integer(count) and count >= 1):
        return
    fix = "leave it out, or pass None, for all"
    fail(op, f"{name} is not a positive integer.", f"{name}={count!r}", "1 or more", fix)


def is_integer(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_quantized(op: str, name: str, q: Any) -> None:
    if not isinstance(q, QArray):
        got, fix = describe(name, q), f"quantize({name})"
        fail(op, f"{name} is not quantized.", got, f"{name} QArray", fix, TypeError)


def check_integers(op: str, name: str, integers: Any) -> None:
    if not hasattr(integers, "dtype") or not jnp.issubdtype(integers.dtype, jnp.integer):
        got, fix = describe(name, integers), f"cast {name} to int32"
        fail(op, f"{name} must be integers.", got, "integers", fix, TypeError)


def as_int32(op: str, name: str, integers: Any) -> jax.Array:
    """Returns the nearest int32 of each."""
    integers = jnp.asarray(integers)
    check_integers(op, name, integers)
    own, most = jnp.iinfo(integers.dtype), jnp.iinfo(jnp.int32)
    if own.max > most.max:
        integers = jnp.clip(integers, max(own.min, most.min), most.max)
    return integers.astype(jnp.int32)
