"""DeepGEMM's operands: pairs of numbers and scales, its options, and its layouts of groups."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_fp8gemm._core.checks import as_int32, check_positive, check_quantized
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import SCALE_BLOCK, ceil_div
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._ops.gemm import gemm

Pair = tuple[jax.Array, jax.Array]
Recipe = tuple[int, int, int]
P = ParamSpec("P")
R = TypeVar("R")

# Rows of a and of b, and of k, that share a scale: what the kernels for Hopper have.
RECIPES = ((1, 128, 128), (1, 1, 128))


_num_sms: int | None = None


def set_num_sms(num_sms: int | None) -> None:
    """Limits the multiprocessors of products traced from now on.

    Args:
      num_sms: at most so many; None for no limit.
    """
    global _num_sms
    check_positive("set_num_sms", "num_sms", num_sms)
    _num_sms = num_sms


def get_num_sms() -> int | None:
    """Returns what set_num_sms set."""
    return _num_sms


class Options(TypedDict, total=False):
    """What DeepGEMM's GEMMs take besides operands.

    Attributes:
      recipe: rows of a, rows of b and of k that share a scale. The shapes of scales say the same.
      recipe_a, recipe_b: likewise, (rows, k) for each.
      compiled_dims, disable_ue8m0_cast: not looked at, as they are of no use here.
    """

    recipe: Recipe | None
    recipe_a: tuple[int, int] | None
    recipe_b: tuple[int, int] | None
    compiled_dims: str
    disable_ue8m0_cast: bool


def returns_output(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Answers DeepGEMM's output argument with an error that says what to write.

    Args:
      example: the call without it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kinds = [one.kind for one in inspect.signature(function).parameters.values()]
        most = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            named = [name for name in ("d", "out") if name in kwargs]
            if named or len(args) > most:
                got = f"{named[0]}=" if named else f"{len(args)} arguments before the named ones"
                what, fix = "there is no output argument.", f"write {example}"
                expected = "no output: it is returned"
                fail(function.__name__, what, got, expected, fix, TypeError)
            return function(*args, **kwargs)

        return call

    return decorate


def operand(op: str, name: str, pair: Any) -> QArray:
    """Returns a pair as a QArray."""
    q = QArray(*_both(op, name, pair))
    check_quantized(op, name, q)
    return q


def transposed(q: QArray) -> QArray:
    return QArray(q.qvalue.swapaxes(-1, -2), q.scale.swapaxes(-1, -2))


def _both(op: str, name: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        fix = "pass what per_token_cast_to_fp8 or per_block_cast_to_fp8 returns"
        expected = "(e4m3 numbers, f32 scales)"
        fail(op, f"{name} has no scales.", describe(name, pair), expected, fix, TypeError)
    return pair[0], pair[1]


def check_options(op: str, lhs: QArray, rhs: QArray, options: Options) -> None:
    """Checks the options of a GEMM, and that the scales are as a recipe says."""
    known = Options.__annotations__
    for name, given in options.items():
        if name not in known:
            expected, fix = ", ".join(known), f"leave {name} out"
            fail(
                op, f"there is no argument {name!r}.", f"{name}={given!r}", expected, fix, TypeError
            )
    recipe = options.get("recipe")
    of_a, of_b = options.get("recipe_a"), options.get("recipe_b")
    if of_a and of_b:
        recipe = (of_a[0], of_b[0], of_a[1]) if of_a[1] == of_b[1] else (0, 0, 0)
    if recipe is None:
        return
    got = f"recipe={tuple(recipe)}, recipe_a={of_a}, recipe_b={of_b}"
    if tuple(recipe) not in RECIPES:
        expected, fix = " or ".join(map(str, RECIPES)), "scale by 1x128 and 128x128"
        fail(op, "Hopper has no such scales.", got, expected, fix, NotImplementedError)
    if not (lhs.has_tile((1, SCALE_BLOCK)) and rhs.has_tile((recipe[1], SCALE_BLOCK))):
        got += f", {describe('scale of a', lhs.scale)}, {describe('of b', rhs.scale)}"
        fix = "leave recipe out: the shapes of scales decide"
        fail(op, "the scales are not as the recipe says.", got, "scales of its shapes", fix)


def multiply_adding(
    op: str,
    lhs: QArray,
    rhs: QArray,
    c: jax.Array | None,
    out_dtype: DTypeLike | None,
    **how: Any,
) -> jax.Array:
    """Returns gemm's result, added to c where there is one. Default dtype: c's, or bfloat16."""
    how["num_sms"] = _num_sms
    if c is None:
        return gemm(lhs, rhs, out_dtype=out_dtype or jnp.bfloat16, **how)
    c = jnp.asarray(c)
    dtype = jnp.dtype(out_dtype or c.dtype)
    if c.dtype != dtype or dtype not in (jnp.bfloat16, jnp.float32):
        got, fix = f"{describe('c', c)}, out_dtype={dtype}", "cast c to out_dtype"
        fail(op, "c has another dtype than the result.", got, "both bf16 or f32", fix, TypeError)
    init = c.astype(jnp.float32)
    return gemm(lhs, rhs, out_dtype=jnp.float32, init=init, **how).astype(dtype)


# ---- layouts of groups --------------------------------------------------------------------------


def flat(op: str, name: str, pair: Any, ks: Any) -> QArray:
    """Returns a flat operand, group after group of [m, k of the group], as one [m, Σ k↑128].

    Args:
      pair: e4m3 [Σ m · k], and f32 [m, Σ ceil(k / 128)].
      ks: k of each group, on the host.
    """
    values, scale = _both(op, name, pair)
    if isinstance(ks, Tracer):
        fix = f"pass ks as a list, or {name} as [m, k] with its groups along k"
        what = "a flat operand needs its groups' k on the host."
        fail(op, what, f"traced {describe('ks', ks)}", "a list of integers", fix, TypeError)
    own = [int(k) for k in np.asarray(ks)]
    rows, steps = scale.shape[0], sum(ceil_div(k, SCALE_BLOCK) for k in own)
    if values.size != rows * sum(own) or scale.shape != (rows, steps):
        got = f"{describe(name, values)}, {describe('scale', scale)}, ks={own}"
        expected = f"{name} [m · {sum(own)}], scale [m, {steps}]"
        fail(op, f"{name} does not fit ks.", got, expected, "pass the k of each group")
    parts = jnp.split(values, np.cumsum(own)[:-1] * rows)
    pads = [((0, 0), (0, -k % SCALE_BLOCK)) for k in own]
    wide = [jnp.pad(x.reshape(rows, k), pad) for x, k, pad in zip(parts, own, pads, strict=True)]
    return operand(op, name, (jnp.concatenate(wide, 1), scale))


def group_of_row(op: str, ends: ArrayLike, m: int) -> jax.Array:
    """Returns the group of each row, -1 for padding, from where each group's own rows end."""
    ends = as_int32(op, "grouped_layout", ends)
    rows = jnp.arange(m, dtype=jnp.int32)
    owner = jnp.searchsorted(_aligned(ends), rows, side="right").astype(jnp.int32)
    own = owner.clip(0, ends.shape[0] - 1)
    return jnp.where((owner < ends.shape[0]) & (rows < ends[own]), owner, -1)


def sizes_of_ends(op: str, ends: ArrayLike) -> jax.Array:
    """Returns the size of each group: it begins at the next multiple of 128 after the last end."""
    ends = as_int32(op, "ks", ends)
    return ends - jnp.pad(_aligned(ends)[:-1], (1, 0))


def _aligned(ends: jax.Array) -> jax.Array:
    return -(-ends // SCALE_BLOCK) * SCALE_BLOCK
