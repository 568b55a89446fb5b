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
import numpy as np

import jax_fp8gemm as fp8
from jax_fp8gemm._core.groups import group_of_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import moe_lm

DENSE, GROUPED = ("qkv", "out"), ("gate", "up", "down")
MATRICES = DENSE + GROUPED


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


# ---- How alike the columns of gradients are -----------------------------------------------------


def group_of_steps(sizes: np.ndarray | None, steps: int) -> np.ndarray:
    """Returns the group of each step of a transposed copy, -1 past the groups, int [steps]."""
    if sizes is None:
        return np.zeros(steps, int)
    group = np.asarray(group_of_step(jnp.asarray(sizes), steps))
    return np.where(group < len(sizes), group, -1)


def shares(scale: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """Returns the share of blocks whose columns share, and of those that do in every step.

    "whole" counts 128 columns along all tokens of one group: a GEMM is fast where all steps share.

    Args:
      scale: [columns, steps]. group: int [steps], the group of each; negative where there is none.
    """
    whole_blocks = np.pad(scale, ((0, -len(scale) % 128), (0, 0)), mode="edge")
    alike = np.ptp(whole_blocks.reshape(-1, 128, scale.shape[1]), axis=1) == 0
    groups = [alike[:, group == g] for g in np.unique(group[group >= 0])]
    return {
        "blocks": np.mean(np.concatenate(groups, 1)),
        "whole": np.mean([one.all(1) for one in groups]),
    }


@functools.cache
def gradients_of(size: moe_lm.Size) -> tuple[Callable, list]:
    """Returns a function of (params, tokens), and the list to which it adds what it sees.

    One entry for each matrix and layer: name, statistics, scales, group sizes.
    """
    found: list = []

    def seen(name, x, dy, sizes):
        columns = fp8.quantize_transposed(dy, group_sizes=sizes, shared_columns=True)
        counts = fp8.cast_statistics(columns, dy, transposed=True, group_sizes=sizes)
        add = lambda *values: found.append((name, *values))  # noqa: E731
        jax.debug.callback(add, counts, columns.scale, sizes)

    arm = watched(seen)
    return jax.jit(jax.grad(lambda p, tokens: moe_lm.loss(p, tokens, size, arm)[0])), found


def column_statistics(params: dict, tokens: jax.Array, size: moe_lm.Size) -> dict[str, dict]:
    """Returns, for each matrix, what the cast of the gradients in a backward pass did.

    "shared" is the share of blocks of 128 columns and 128 tokens with one scale, "whole" that of
    128 columns that share in every step, and "underflow" that of numbers which became zero.
    """
    gradients, found = gradients_of(size)
    found.clear()
    jax.block_until_ready(gradients(params, tokens))
    jax.effects_barrier()
    return {name: _of_matrix([f[1:] for f in found if f[0] == name]) for name in MATRICES}


def _of_matrix(layers: list[tuple]) -> dict[str, float]:
    counts = jax.tree.map(lambda *each: sum(map(int, each)), *(layer[0] for layer in layers))
    wholes = [shares(np.asarray(scale), group_of_steps(sizes, scale.shape[1]))["whole"]
              for _, scale, sizes in layers]  # fmt: skip
    found = {
        "shared": counts.shared_blocks / counts.blocks, "whole": np.mean(wholes),
        "underflow": counts.underflows / counts.values,
        "nonfinite_tiles": counts.nonfinite_tiles,
    }  # fmt: skip
    return {key: round(float(value), 6) for key, value in found.items()}
