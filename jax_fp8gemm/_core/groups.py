"""Groups of rows that lie end to end: where each begins and ends, from sizes on the device."""

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.layout import TOKEN_MULTIPLE


def group_ends(group_sizes: jax.Array, limit: int) -> jax.Array:
    """Returns where groups that lie end to end in `limit` places end, int32 [g].

    Negative sizes count as zero; what does not fit any more is cut off.
    """
    sizes = jnp.clip(group_sizes, 0, limit).astype(jnp.uint32)
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, limit), sizes)
    return ends.astype(jnp.int32)


def clamped_sizes(group_sizes: jax.Array, limit: int) -> jax.Array:
    """Returns how many of `limit` places each group has, int32 [g]; see `group_ends`."""
    return jnp.diff(group_ends(group_sizes, limit), prepend=0)


def groups_from(
    group_sizes: jax.Array, first: jax.Array, count: int, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Returns where group `first` begins, and the sizes of `count` groups from it on, int32.

    Groups that do not exist are empty; see `group_ends`.
    """
    sizes, g = clamped_sizes(group_sizes, limit), group_sizes.shape[0]
    own = jnp.clip(first, -count, g) + jnp.arange(count)
    exists = (own >= 0) & (own < g)
    start = jnp.sum(jnp.where(jnp.arange(g) < first, sizes, 0), dtype=jnp.int32)
    return start, jnp.where(exists, sizes[jnp.clip(own, 0, g - 1)], 0)


def group_of_row(group_sizes: jax.Array, m: int) -> jax.Array:
    """Returns the group of each of m rows, int32 [m]; g for rows past the groups."""
    return jnp.searchsorted(group_ends(group_sizes, m), jnp.arange(m), side="right").astype("int32")


def group_of_step(group_sizes: jax.Array, steps: int) -> jax.Array:
    """Returns the group of each step of 128 of k, int32 [steps]; every group begins a new step."""
    return group_of_row(whole_steps(group_sizes, steps), steps)


def whole_steps(group_sizes: jax.Array, steps: int) -> jax.Array:
    """Returns how many steps of 128 of k each group asks for, at most all, int32 [g]."""
    own = jnp.clip(group_sizes, 0, steps * TOKEN_MULTIPLE)
    return (own + TOKEN_MULTIPLE - 1) // TOKEN_MULTIPLE


def grouped_tokens(m: int, g: int) -> int:
    """Returns the tokens of a transposed copy by groups: any sizes of g groups fit."""
    return (m + min(g, m) * (TOKEN_MULTIPLE - 1)) // TOKEN_MULTIPLE * TOKEN_MULTIPLE


def place_by_groups(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Moves rows so that every group begins at a multiple of 128, zeros between: [tokens, k].

    Rows past the groups are not looked at.
    """
    m, g = x.shape[0], group_sizes.shape[0]
    tokens = jnp.arange(grouped_tokens(m, g))
    ends = group_ends(group_sizes, m)
    sizes = jnp.diff(ends, prepend=0)
    places = jnp.cumsum(-(-sizes // TOKEN_MULTIPLE)) * TOKEN_MULTIPLE  # where the next group begins
    group = jnp.searchsorted(places, tokens, side="right")
    last = jnp.minimum(group, g - 1)
    offset = tokens - jnp.where(group > 0, places[group - 1], 0)
    inside = (group < g) & (offset < sizes[last])
    source = jnp.where(inside, ends[last] - sizes[last] + offset, 0)
    return jnp.where(inside[:, None], x[source], 0)
