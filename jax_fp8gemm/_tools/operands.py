"""Random operands of GEMMs, their groups, the programs that run on them, and a check of results."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_fp8gemm._bind.gemm_op import GemmSpec, gemm
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.layout import BLOCKS, SCALE_BLOCK, Tile, round_up, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.problem import SPREAD, GemmConfig, Problem
from jax_fp8gemm._tools.timing import Contender


def random_operand(
    key: jax.Array, shape: tuple[int, ...], tile: Tile, shared: float = 0.0
) -> QArray:
    """Returns normal numbers in FP8, with scales of about 1/100 that differ from tile to tile.

    shared: the share of blocks of 128 rows that have one scale for each 128 of k, as casts with
    `shared_columns` make them. Only for tiles of 1x128.
    """
    values, scales, chosen = jax.random.split(key, 3)
    q = jnp.clip(64 * jax.random.normal(values, shape, jnp.bfloat16), -448, 448).astype(FP8)
    scale = jax.random.uniform(scales, scale_shape(shape, tile), minval=0.005, maxval=0.015)
    if shared:
        first = scale[..., ::SCALE_BLOCK, :]
        common = jax.random.uniform(chosen, first.shape) < shared
        common, first = (
            jnp.repeat(x, SCALE_BLOCK, -2)[..., : scale.shape[-2], :] for x in (common, first)
        )
        scale = jnp.where(common, first, scale)
    return QArray(q, scale)


def group_sizes(
    problem: Problem,
    total: int | None = None,
    *,
    spread: tuple[float, float] = SPREAD,
    seed: int = 0,
) -> np.ndarray:
    """Returns sizes in a range of multiples of their mean; together `total` rows, or k."""
    variant = VARIANTS[problem.variant]
    if total is None:
        rows = problem.m * (problem.g if problem.variant == "masked" else 1)
        total = problem.k if variant.groups == "k" else rows
    unit = SCALE_BLOCK if variant.groups == "k" else 1
    weights = np.random.default_rng(seed).uniform(*spread, problem.g)
    ends = np.round(np.cumsum(weights) / weights.sum() * total / unit) * unit
    return np.diff(ends, prepend=0).astype(np.int32)


def group_operand(problem: Problem, sizes: np.ndarray) -> np.ndarray:
    """Returns what gemm takes as group_sizes for groups of these sizes."""
    if VARIANTS[problem.variant].group_operand == "m":  # every group padded to whole blocks
        rows = [np.repeat([i, -1], [n, -n % SCALE_BLOCK]) for i, n in enumerate(sizes)]
        return np.concatenate(rows).astype(np.int32)
    return sizes


def sizes_of(problem: Problem, groups: ArrayLike) -> np.ndarray:
    """Returns the sizes that group_operand was given."""
    operand = np.asarray(groups)
    if VARIANTS[problem.variant].group_operand == "m":
        return np.bincount(operand[operand >= 0], minlength=problem.g)
    return operand


def random_operands(
    problem: Problem, sizes: np.ndarray | None = None, *, seed: int = 0, shared: float = 0.0
) -> tuple:
    """Returns lhs, rhs and, in a grouped variant, the group operand for groups of `sizes`.

    A rhs that the kernel casts is a bf16 array. Where the GEMM accumulates, zeros come last.

    Args:
      shared: of rhs, see `random_operand`.
    """
    row, p = VARIANTS[problem.variant], problem
    letters = {"g": p.g, "m": p.m, "n": p.n, "k": p.k}
    groups = None
    if row.group_operand:
        groups = group_operand(p, group_sizes(p) if sizes is None else sizes)
        if p.variant == "contiguous":
            letters["m"] = len(groups)
        if p.variant == "masked":
            letters["m"] = round_up(int(groups.max()), 64)
    keys = jax.random.split(jax.random.key(seed))
    make = jax.jit(random_operand, static_argnums=(1, 2, 3))
    shapes = (tuple(letters[c] for c in dims) for dims in (row.lhs, row.rhs))
    lhs, rhs = (make(*a) for a in zip(keys, shapes, p.tiles, (0.0, shared), strict=True))
    if p.casts:
        w = jnp.swapaxes(rhs.qvalue, -1, -2) if p.rhs == "bf16_transposed" else rhs.qvalue
        rhs = w.astype(jnp.bfloat16)
    operands = (lhs, rhs) if groups is None else (lhs, rhs, jnp.asarray(groups))
    init = jnp.zeros([letters[c] for c in row.out], jnp.float32)
    return (*operands, init) if p.accumulate else operands


def compiled(problem: Problem, config: GemmConfig | None, operands) -> Contender:
    """Returns a function that runs the GEMM with `config`, compiled ahead."""
    executable = executable_of(problem, config, operands)
    return lambda: executable(*operands)


def executable_of(problem: Problem, config: GemmConfig | None, operands):
    """Compiles the GEMM; operands may be shapes."""
    spec = GemmSpec(
        variant=VARIANTS[problem.variant],
        scales=problem.scales,
        out=problem.out,
        num_sms=problem.num_sms,
        config=config,
        expected_rows=problem.m if problem.variant == "masked" else 0,
        rhs=problem.rhs,
        accumulate=problem.accumulate,
    )

    def run(lhs, rhs, *rest):
        if problem.casts:
            return gemm(spec, lhs.qvalue, rhs, lhs.scale, *rest)
        return gemm(spec, lhs.qvalue, rhs.qvalue, lhs.scale, rhs.scale, *rest)

    return jax.jit(run).lower(*operands).compile()


def sample_error(problem: Problem, out: jax.Array, operands) -> float:
    """Returns calc_diff, Σ(out − exact)² / Σ(out² + exact²), of 32 rows in each group."""
    rows, groups, columns = sample(problem, operands)
    picked = out[groups, rows] if out.ndim == 3 else out[rows]
    lhs, rhs = operands[:2]
    if problem.casts:
        w = jnp.swapaxes(rhs, -1, -2) if problem.rhs == "bf16_transposed" else rhs
        rhs = QArray(*reference.quantize(w, BLOCKS, "pow2"))
    return float(_squared_error(picked, lhs, rhs, rows, groups, columns))


def sample(problem: Problem, operands) -> tuple:
    """Returns rows of lhs [g, 32], their groups [g, 32], and each group's range of k [g, 2].

    g: groups without rows are left out.
    """
    p, row, draw = problem, VARIANTS[problem.variant], np.random.default_rng(1)
    sizes = sizes_of(p, operands[2]) if row.group_operand else np.full(p.g, p.m)
    counts = sizes if row.groups == "m" else np.full(p.g, p.m)
    rows = np.stack([draw.integers(0, max(n, 1), 32) for n in counts])
    rows[:, -1] = np.maximum(counts - 1, 0)
    if p.variant in ("ragged", "contiguous"):
        taken = sizes if p.variant == "ragged" else -(-sizes // SCALE_BLOCK) * SCALE_BLOCK
        rows += (np.cumsum(taken) - taken)[:, None]
    ends = np.cumsum(sizes) if row.groups == "k" else np.full(p.g, p.k)
    columns = np.stack([ends - sizes if row.groups == "k" else 0 * ends, ends], 1)
    found = rows, np.repeat(np.arange(p.g)[:, None], 32, 1), columns
    return tuple(x[counts > 0] for x in found)


@jax.jit
def _squared_error(picked, lhs, rhs, rows, groups, columns) -> jax.Array:
    def one_group(carry, group):
        got, rows, group, (start, end) = group
        left, right = QArray(lhs.qvalue, lhs.scale), QArray(rhs.qvalue, rhs.scale)
        if lhs.ndim == 3:
            left = jax.tree.map(lambda x: x[group[0]], left)
        if rhs.ndim == 3:
            right = jax.tree.map(lambda x: x[group[0]], right)
        scale = left.scale[rows] if left.scale.shape[0] > 1 else left.scale
        left = reference.dequantize(left.qvalue[rows], scale, lhs.tile)
        right = reference.dequantize(right.qvalue, right.scale, rhs.tile)
        at = jnp.arange(lhs.shape[-1])
        left = jnp.where((at >= start) & (at < end), left, 0)
        exact = jnp.einsum("rk,nk->rn", left, right, precision=jax.lax.Precision.HIGHEST)
        got = got.astype(jnp.float32)
        error, total = carry
        return (error + jnp.sum((got - exact) ** 2), total + jnp.sum(got**2 + exact**2)), None

    groups = (picked.reshape(*rows.shape, -1), rows, groups, columns)
    error, total = jax.lax.scan(one_group, (jnp.float32(0), jnp.float32(0)), groups)[0]
    return error / total
