"""Small random operands made by numpy: JAX would compile a program for each of their shapes."""

import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.layout import SCALE_BLOCK, Tile, round_up, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools.operands import group_operand, group_sizes


def random_operand(seed, shape: tuple[int, ...], tile: Tile, shared: float = 0.0) -> QArray:
    """As random_operand of jax_fp8gemm._tools.operands, with other numbers.

    Args:
      seed: a number, or several.
    """
    draw = np.random.default_rng(seed)
    q = np.clip(64 * draw.standard_normal(shape, np.float32), -448, 448).astype(FP8)
    scale = draw.uniform(0.005, 0.015, scale_shape(shape, tile)).astype(np.float32)
    if shared:
        first = scale[..., ::SCALE_BLOCK, :]
        common = np.repeat(draw.random(first.shape) < shared, SCALE_BLOCK, -2)
        first = np.repeat(first, SCALE_BLOCK, -2)
        rows = np.s_[..., : scale.shape[-2], :]
        scale = np.where(common[rows], first[rows], scale)
    return QArray(jnp.asarray(q), jnp.asarray(scale))


def random_operands(
    problem: Problem, sizes: np.ndarray | None = None, *, seed: int = 0, shared: float = 0.0
) -> tuple:
    """Returns lhs, rhs and, in a grouped variant, the group operand, as its namesake does."""
    row, p = VARIANTS[problem.variant], problem
    letters, groups = {"g": p.g, "m": p.m, "n": p.n, "k": p.k}, []
    if row.group_operand:
        groups = [jnp.asarray(group_operand(p, group_sizes(p) if sizes is None else sizes))]
        if p.variant == "contiguous":
            letters["m"] = len(groups[0])
        if p.variant == "masked":
            letters["m"] = round_up(int(groups[0].max()), 64)
    shapes = (tuple(letters[c] for c in dims) for dims in (row.lhs, row.rhs))
    sides = enumerate(zip(shapes, p.tiles, (0.0, shared), strict=True))
    return *(random_operand((seed, i), *side) for i, side in sides), *groups
