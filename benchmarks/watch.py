"""Sees what the backward pass of a model multiplies: which gradients, and how alike their columns.

An Arm of `watched` works in floats. It shows the operands that FP8 would cast for the gradients to
weights, and changes nothing.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import moe_lm

DENSE, GROUPED = ("qkv", "out"), ("gate", "up", "down")


def watched(seen: Callable, dtype: jnp.dtype = jnp.bfloat16) -> moe_lm.Arm:
    """Returns an Arm that calls seen(matrix, x [m, k], dy [m, n], group sizes or None).

    It does so while the backward pass is traced: `seen` gets tracers.
    """
    dense, grouped = itertools.cycle(DENSE), itertools.cycle(GROUPED)  # a layer multiplies in turn

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        y = _product(next(dense), seen, x.reshape(-1, w.shape[0]), w.astype(dtype), None)
        return y.reshape(*x.shape[:-1], w.shape[1])

    def ragged_dot(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return _product(next(grouped), seen, rows, w, sizes)

    return moe_lm.Arm("watched", dot, moe_lm.plain_experts(ragged_dot, dtype), dtype)


def _plain(x, w, sizes):
    return jnp.dot(x, w) if sizes is None else jax.lax.ragged_dot(x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(name, seen, x, w, sizes):
    return _plain(x, w, sizes)


def _forward(name, seen, x, w, sizes):
    return _plain(x, w, sizes), (x, w, sizes)


def _backward(name, seen, kept, dy):
    x, w, sizes = kept
    seen(name, x, dy, sizes)
    _, back = jax.vjp(lambda x, w: _plain(x, w, sizes), x, w)
    return *back(dy), None


_product.defvjp(_forward, _backward)
