"""The order of the rows: each token's row once for each of its experts, sorted by expert."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fp8gemm._bind.meshes import automatic
from jax_fp8gemm._core.checks import as_int32, is_integer, renamed
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.groups import group_of_row
from jax_fp8gemm._core.qarray import exportable
from jax_fp8gemm._moe.ordered import sum_of_few


def count_choices(expert_index: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [num_experts]: how many of the choices [...] are of each; without atomics."""
    rank = expert_index.ndim
    expert = jnp.arange(num_experts, dtype=jnp.int32).reshape(*[1] * rank, num_experts)
    return (expert_index[..., None] == expert).sum(tuple(range(rank)), dtype=jnp.int32)


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
