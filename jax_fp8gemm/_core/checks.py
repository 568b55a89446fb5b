"""Checks of arguments: each raises a four-part error under the name of the function called."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.qarray import FP8, QArray

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
    options = get_args(literal)
    if not isinstance(value, str) or value not in options:
        expected = " or ".join(f'"{one}"' for one in options)
        fail(op, f"{name} is unknown.", f"{name}={value!r}", expected, f"choose a {name} of these")


def as_float(op: str, name: str, x: Any) -> jax.Array:
    """Returns a float array as JAX has it: NumPy's become JAX's, in the width that JAX gives them.

    Raises:
      TypeError: x is not an array, or not bf16, f16 or f32.
      ValueError: x lies in host memory.
    """
    if isinstance(x, np.ndarray | np.generic):
        x = jnp.asarray(x)
    if not isinstance(x, jax.Array):
        fix = f"call jnp.asarray({name})"
        if isinstance(x, QArray) and op != "prepare_weight":
            fix = f"for an FP8 weight, use prepare_weight({name})"
        what, expected = f"{name} is not an array.", "a bf16, f16 or f32 array"
        fail(op, what, type(x).__name__, expected, fix, TypeError)
    if x.dtype not in FLOATS:
        what, fix = f"{name} has the wrong dtype.", f"cast {name} to bfloat16"
        fail(op, what, describe(name, x), "bf16, f16 or f32", fix, TypeError)
    check_memory(op, name, x)
    return x


def check_memory(op: str, name: str, x: jax.Array) -> None:
    """Checks that an array lies in the device's memory, as kernels need it."""
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
        got, fix = f"{describe(name, x)} in host memory", f"move {name} by jax.device_put"
        fail(op, f"{name} is not on the device.", got, f"{name} in device memory", fix)


def check_positive(op: str, name: str, count: Any) -> None:
    """Checks an integer of 1 or more, or None."""
    if count is None or (is_integer(count) and count >= 1):
        return
    fix = "leave it out, or pass None, for all"
    fail(op, f"{name} is not a positive integer.", f"{name}={count!r}", "1 or more", fix)


def check_bool(op: str, name: str, value: Any, *, or_none: bool = False) -> None:
    if not isinstance(value, bool | np.bool_) and not (or_none and value is None):
        expected = "True, False or None" if or_none else "True or False"
        fix = f"pass {expected}"
        fail(op, f"{name} is not a bool.", f"{name}={value!r}", expected, fix, TypeError)


def is_integer(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def check_quantized(op: str, name: str, q: Any) -> None:
    """Checks that q is a QArray of e4m3 numbers and f32 scales of one of the tiles."""
    if not isinstance(q, QArray):
        got, fix = describe(name, q), f"quantize({name})"
        fail(op, f"{name} is not quantized.", got, f"{name} QArray", fix, TypeError)
    got = f"{describe(name, q.qvalue)}, {describe('scale', q.scale)}"
    dtypes = [getattr(x, "dtype", None) for x in (q.qvalue, q.scale)]
    if dtypes != [FP8, jnp.float32]:
        expected, fix = "e4m3 numbers and f32 scales", f"quantize({name})"
        fail(op, f"{name} has the wrong dtype.", got, expected, fix, TypeError)
    if q.qvalue.ndim < 2 or q.scale.ndim != q.qvalue.ndim:
        expected = f"{name} [..., rows, k], scale with as many dims"
        fail(op, f"{name} has the wrong rank.", got, expected, f"reshape {name}, or its scale")
    for part, x in ((name, q.qvalue), (f"{name}'s scale", q.scale)):
        if isinstance(x, jax.Array):
            check_memory(op, part, x)


def check_integers(op: str, name: str, integers: Any) -> None:
    if not hasattr(integers, "dtype") or not jnp.issubdtype(integers.dtype, jnp.integer):
        got, fix = describe(name, integers), f"cast {name} to int32"
        fail(op, f"{name} must be integers.", got, "integers", fix, TypeError)


def as_int32(op: str, name: str, integers: Any) -> jax.Array:
    """Returns the nearest int32 of each: the one door of counts, indices and groups.

    NumPy's integers are brought into range before JAX, without x64, would drop their upper bits.
    """
    if not isinstance(integers, jax.Array):
        given = np.asarray(integers)
        if integers is None or given.dtype == object:
            check_integers(op, name, integers)
        integers = given if given.size else given.astype(np.int32)  # [] is one of floats
    check_integers(op, name, integers)
    own, most = np.iinfo(integers.dtype), np.iinfo(np.int32)
    if own.max > most.max:
        integers = integers.clip(max(own.min, most.min), most.max)
    return jnp.asarray(integers.astype(np.int32))


def as_groups(op: str, name: str, sizes: Any) -> jax.Array:
    """Returns the sizes of one group or more, int32 [g]."""
    sizes = as_int32(op, name, sizes)
    if sizes.ndim != 1:
        expected, fix = f"{name} [g]", "pass one size for each group"
        fail(op, f"{name} has the wrong rank.", describe(name, sizes), expected, fix)
    if not sizes.shape[0]:
        fix = f"pass one size or more, or leave {name} out"
        fail(op, "there are no groups.", describe(name, sizes), f"{name} [g], g of 1 or more", fix)
    return sizes
