"""Which expert sees which token: scores, choice and losses, and the order of the rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fp8gemm._bind.meshes import automatic
from jax_fp8gemm._core.checks import (
    as_float,
    as_int32,
    check_bool,
    check_option,
    is_integer,
    renamed,
)
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._core.qarray import exportable
from jax_fp8gemm._core.types import ScoreFunction
from jax_fp8gemm._moe.ordered import softmax_by_halves, sum_of_few

SMALLEST_SUM = 1e-20  # DeepSeek-V3's gate adds it to the sum of the chosen scores
# From so many scores on, and for so few choices, one maximum after the other should take less time
# than XLA's sort of every token's scores. Below, launches count, and a sort is a single one. An
# estimate: benchmarks/router.py times both on large batches.
MANY_SCORES, FEW_CHOICES = 1 << 18, 16


@exportable()
@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """What a router decided for t tokens.

    Attributes:
      expert_index: int32 [t, top_k], the chosen experts of each token, best first.
      gate_weights: f32 [t, top_k], the factors of their results.
      scores: f32 [t, e], of all experts, before the choice.
      aux_loss: f32 [], the load-balance loss; 1 for a perfect balance, more for a worse one.
      z_loss: f32 [], the mean square of the logsumexp of the logits.
      dropped: int32 [], how many of all choices found no room on their devices or with their
        experts; None unless `moe` has a device_capacity_factor.
    """

    expert_index: jax.Array
    gate_weights: jax.Array
    scores: jax.Array
    aux_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array | None = None


@renamed(score="score_function", scale="routed_scaling_factor")
def route(
    logits: jax.Array,
    top_k: int,
    *,
    score_function: ScoreFunction = "softmax",
    bias: jax.Array | None = None,
    normalize: bool = True,
    routed_scaling_factor: float = 1.0,
    axis: str | tuple[str, ...] | None = None,
    batch_invariant: bool = False,
) -> Routing:
    """Chooses top_k experts for each token: the largest score + bias, weighted by the score alone.

    gate_weights[t, j] = routed_scaling_factor · s[t, j] / Σ_j s[t, j], with
    s[t, j] = scores[t, expert_index[t, j]]
    aux_loss = e · Σ_i f_i · P_i, with f_i the share of the t · top_k choices that fell on expert i,
    and P_i the mean over tokens of its score, scores of a token normalized to the sum 1.

    Args:
      logits: bf16, f16 or f32 [t, e]; computed in float32.
      top_k: experts per token, 1 to e.
      score_function: "softmax" over the experts, or "sigmoid" of each.
      bias: f32 [e], steers the choice only: it has no gradient and is in no weight.
      normalize: whether the weights of a token sum to routed_scaling_factor.
      routed_scaling_factor: factor of the weights.
      axis: inside shard_map, the mesh axis, or axes, over which tokens are split evenly. Then
        aux_loss and z_loss are those of all tokens.
      batch_invariant: whether a token's experts and weights have the same bits however many tokens
        there are.

    Returns:
      Routing.

    Raises:
      ValueError: ranks or the length of bias do not fit, top_k is not in 1..e, or score_function is
        unknown.

    Source: Shazeer et al. (arXiv 1701.06538) for the choice; bias and sigmoid: DeepSeek-V3 (arXiv
    2412.19437), section 2.1.2; aux_loss: Switch Transformer (arXiv 2101.03961), equation 4, over
    top_k as in DeepSeek-V3, equations 17 to 20; z_loss: ST-MoE (arXiv 2202.08906), equation 5.

    Example:
      routing = route(x @ gate_kernel, top_k=8, score_function="sigmoid", bias=bias)
    """
    check_option("route", "score_function", score_function, ScoreFunction)
    check_bool("route", "normalize", normalize)
    check_bool("route", "batch_invariant", batch_invariant)
    logits = as_float("route", "logits", logits)
    _check_route(logits, top_k, bias)
    logits = logits.astype(jnp.float32)
    softmax = score_function == "softmax"
    soft = softmax_by_halves if batch_invariant else jax.nn.softmax
    scores = soft(logits) if softmax else jax.nn.sigmoid(logits)
    steered = scores if bias is None else scores + bias.astype(jnp.float32)[None]
    expert_index = _choose(jax.lax.stop_gradient(steered), top_k)
    weights = jnp.take_along_axis(scores, expert_index, axis=1)
    if normalize:
        weights = weights / (sum_of_few(weights, batch_invariant)[:, None] + SMALLEST_SUM)
    aux_loss = _aux_loss(scores, expert_index, softmax, axis)
    z_loss = _mean(jax.nn.logsumexp(logits, axis=1) ** 2, axis)
    return Routing(expert_index, routed_scaling_factor * weights, scores, aux_loss, z_loss)


def _check_route(logits: Any, top_k: Any, bias: Any) -> None:
    got = describe("logits", logits)
    if logits.ndim != 2:
        fail("route", "logits have the wrong rank.", got, "logits [t, e]", "reshape them")
    e = logits.shape[1]
    if not is_integer(top_k) or not 1 <= top_k <= e:
        fix = (
            "choose fewer experts per token" if is_integer(top_k) and top_k > e else "choose 1 to e"
        )
        got, expected = f"top_k={top_k!r}, {got}", f"an integer in 1..{e}"
        fail("route", f"top_k is {top_k!r}, with {e} experts.", got, expected, fix)
    if bias is not None and bias.shape != (e,):
        got = f"{describe('bias', bias)}, {got}"
        fail("route", "bias does not fit the logits.", got, f"bias [{e}]", "pass one per expert")


def _mean(x: jax.Array, axis: str | tuple[str, ...] | None) -> jax.Array:
    """The mean over tokens, dim 0; zero without any."""
    mean = x.sum(0) / max(x.shape[0], 1)
    return mean if axis is None else jax.lax.pmean(mean, axis)


def _choose(scores: jax.Array, top_k: int) -> jax.Array:
    """Returns the same as jax.lax.top_k: int32 [t, top_k], of equal scores the first."""
    unknown = jax.export.is_symbolic_dim(scores.shape[0])
    if unknown or scores.size < MANY_SCORES or top_k > FEW_CHOICES:
        return jax.lax.top_k(scores, top_k)[1]
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    gone = jnp.iinfo(jnp.int32).min
    keys = jnp.maximum(keys, gone + 1)
    expert = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
    chosen = []
    for _ in range(top_k):
        chosen.append(jax.lax.argmax(keys, 1, jnp.int32))
        keys = jnp.where(expert == chosen[-1][:, None], gone, keys)
    return jnp.stack(chosen, 1)


def count_choices(expert_index: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [num_experts]: how many of the choices are of each; without atomics."""
    same = expert_index[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None]
    return same.sum((0, 1), dtype=jnp.int32)


def _aux_loss(
    scores: jax.Array,
    expert_index: jax.Array,
    softmax: bool,
    axis: str | tuple[str, ...] | None,
) -> jax.Array:
    e = scores.shape[1]
    chosen = count_choices(expert_index, e).astype(jnp.float32) / max(expert_index.size, 1)
    if axis is not None:
        chosen = jax.lax.pmean(chosen, axis)
    sums = scores.sum(1, keepdims=True) + SMALLEST_SUM
    shares = scores if softmax else scores / sums
    return e * jnp.sum(chosen * _mean(shares, axis))


# ---- the order of the rows ----------------------------------------------------------------------


@exportable()
@dataclasses.dataclass(frozen=True, eq=False)
class Permutation:
    """Rows by expert: each of t · top_k (token, choice) pairs is one row.

    Attributes:
      order: int32 [rows]; row i is the pair order[i] = token · top_k + choice. What it says of rows
        past the groups means nothing.
      group_sizes: int32 [e], rows of each expert, end to end from row 0 on.
    """

    order: jax.Array
    group_sizes: jax.Array

    def inverse(self, pairs: int | None = None) -> jax.Array:
        """Returns the row of each pair, int32 [pairs]; `rows` for pairs that have none.

        Args:
          pairs: how many there are; None: as many as rows.
        """
        rows = self.order.shape[0]
        pairs = rows if pairs is None else pairs
        row = jnp.arange(rows, dtype=jnp.int32)
        inside = row < self.group_sizes.sum()
        nowhere = jnp.full(pairs, rows, jnp.int32)
        return nowhere.at[jnp.where(inside, self.order, pairs)].set(row, mode="drop")


def permutation_of(expert_index: jax.Array, num_experts: int) -> Permutation:
    """Returns the stable order by expert of int [t, top_k] choices.

    A choice outside 0..num_experts-1 goes to no expert: its row lies past the groups.
    """
    expert_index = expert_index.astype(jnp.int32)
    flat = expert_index.reshape(-1)
    # A radix sort passes over the rows once for each byte of the keys.
    narrow = next(d for d in (jnp.uint8, jnp.uint16, jnp.uint32) if num_experts <= jnp.iinfo(d).max)
    known = (flat >= 0) & (flat < num_experts)
    keys = jnp.where(known, flat, num_experts).astype(narrow)
    row = jnp.arange(flat.size, dtype=jnp.int32)
    _, order = jax.lax.sort((keys, row), num_keys=1, is_stable=True)
    return Permutation(order, count_choices(expert_index, num_experts))


def first_choices(expert_index: jax.Array, num_experts: int, most: int) -> jax.Array:
    """Returns choices int [t, top_k] without those past the first `most`, which are no expert.

    First choices of all tokens come before second ones, each in the order of the tokens.
    """
    inside = (expert_index >= 0) & (expert_index < num_experts)
    place = jnp.cumsum(inside.T.reshape(-1), dtype=jnp.int32).reshape(inside.T.shape).T
    return jnp.where(inside & (place <= most), expert_index, num_experts)


def cut(permutation: Permutation, capacity: int) -> Permutation:
    """Returns the permutation without the rows of an expert past its first `capacity`."""
    old = permutation.group_sizes
    new = jnp.minimum(old, capacity)
    rows, last = permutation.order.shape[0], old.shape[0] - 1
    moved = (jnp.cumsum(old) - old) - (jnp.cumsum(new) - new)  # rows that each group moves up
    source = jnp.arange(rows) + moved[jnp.minimum(group_of_row(new, rows), last)]
    return Permutation(permutation.order[jnp.minimum(source, rows - 1)], new)


@renamed(experts="expert_index")
def permute(
    x: jax.Array, expert_index: ArrayLike, num_experts: int
) -> tuple[jax.Array, Permutation]:
    """Copies each token's row once for each of its experts, sorted by expert.

    rows[i] = x[order[i] // top_k]; rows of one expert keep the order of their tokens.

    Args:
      x: [t, h].
      expert_index: int [t, top_k]; one expert twice in a token is legal, and a number outside
        0..num_experts-1 is no expert: such rows come last and are zero.
      num_experts: how many there are.

    Returns:
      rows [t · top_k, h], of x's dtype, and the Permutation whose group_sizes a grouped product
      takes. The gradient of x is the sum over its rows, in float32, without atomics.

    Raises:
      ValueError: ranks or the number of tokens do not fit.
      TypeError: expert_index is not an integer array.

    Example:
      rows, permutation = permute(x, routing.expert_index, 64)
      y = unpermute(fp8_ragged_dot(rows, w, permutation.group_sizes), permutation, top_k)
    """
    expert_index = as_int32("permute", "expert_index", expert_index)
    _check_permute("permute", x, expert_index)
    if not is_integer(num_experts) or num_experts < 0:
        got, fix = f"num_experts={num_experts!r}", "pass the number of experts"
        fail("permute", "num_experts is not a count.", got, "an integer, 0 or more", fix)

    def run(x, expert_index):
        permutation = permutation_of(expert_index, num_experts)
        return _spread(x, permutation, expert_index.shape[1]), permutation

    return automatic(run, x, None)(x, expert_index)


def unpermute(rows: jax.Array, permutation: Permutation, top_k: int) -> jax.Array:
    """Sums the rows of each token: out[t] = Σ_j rows[row of pair (t, j)], in float32.

    Args:
      rows: [t · top_k, h]. Rows past the groups count as zero, whatever they hold.
      permutation: as `permute` returned it.
      top_k: rows per token.

    Returns:
      [t, h], of rows' dtype.

    Raises:
      ValueError: the number of rows differs from the permutation's, or is no multiple of top_k.
    """
    count = permutation.order.shape[0]
    fits = is_integer(top_k) and top_k >= 1 and count % top_k == 0
    if rows.ndim != 2 or rows.shape[0] != count or not fits:
        got = f"{describe('rows', rows)}, a permutation of {count} rows, top_k={top_k!r}"
        expected, fix = "rows [t * top_k, h]", "pass what permute returned for these tokens"
        fail("unpermute", "rows do not fit the permutation.", got, expected, fix)
    return automatic(lambda *operands: _collect(*operands, top_k), rows)(rows, permutation)


def _check_permute(op: str, x: Any, expert_index: jax.Array) -> None:
    got = f"{describe('x', x)}, {describe('expert_index', expert_index)}"
    if x.ndim != 2 or expert_index.ndim != 2 or x.shape[0] != expert_index.shape[0]:
        expected = "x [t, h], expert_index [t, top_k]"
        fix = "reshape them to one row per token"
        fail(op, "x and expert_index do not fit.", got, expected, fix)


def rows_or_zero(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows[index]; zero where index is past the rows."""
    return rows.at[index].get(mode="fill", fill_value=0)


def sum_rows(
    rows: jax.Array,
    permutation: Permutation,
    top_k: int,
    dtype: jnp.dtype,
    tokens: int | None = None,
    *,
    in_order: bool = False,
) -> jax.Array:
    """As unpermute, rounded to `dtype` once; tokens: None: as many as rows / top_k.

    in_order: a token's rows are added in the order of its choices, whatever t is.
    """
    row = permutation.inverse(None if tokens is None else tokens * top_k)
    pairs = rows_or_zero(rows, row).reshape(-1, top_k, rows.shape[1])
    return sum_of_few(pairs.astype(jnp.float32), in_order).astype(dtype)


# The two are each other's transpose. Said so, because the transpose that JAX would derive for a
# gather adds up with atomics: in bfloat16 and in any order.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(x: jax.Array, permutation: Permutation, top_k: int) -> jax.Array:
    order = permutation.order
    inside = jnp.arange(order.shape[0]) < permutation.group_sizes.sum()
    return rows_or_zero(x, jnp.where(inside, order // top_k, x.shape[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _collect(rows: jax.Array, permutation: Permutation, top_k: int) -> jax.Array:
    return sum_rows(rows, permutation, top_k, rows.dtype)


_spread.defvjp(
    lambda x, permutation, top_k: (_spread(x, permutation, top_k), permutation),
    lambda top_k, permutation, rows: (_collect(rows, permutation, top_k), None),
)


_collect.defvjp(
    lambda rows, permutation, top_k: (_collect(rows, permutation, top_k), permutation),
    lambda top_k, permutation, x: (_spread(x, permutation, top_k), None),
)
