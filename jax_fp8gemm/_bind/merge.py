"""A batch of grouped GEMMs as one GEMM, on one device: what a vmap becomes.

The matrices of all elements are groups of one GEMM. Rows, or steps of k, are sorted by group, and
what lies past an element's groups goes to the end, where nothing is computed. Elements that share
their matrices share groups too, so that no matrix is copied and each is read once. The price is a
pass over lhs and one over the result; a loop would copy as much, to slice the batch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.bits import take_rows
from jax_fp8gemm._core.groups import clamped_sizes, group_of_row, group_of_step, whole_steps
from jax_fp8gemm._core.layout import SCALE_BLOCK, TOKEN_MULTIPLE, ceil_div, round_up
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._core.types import VariantName

LHS, RHS = ("lhs", "lhs_scale"), ("rhs", "rhs_right", "rhs_scale")
Named = dict[str, jax.Array]


class Stacked(NamedTuple):
    """Operands of `size` GEMMs: by name, and which have the batch as their first dim."""

    size: int
    batched: Mapping[str, bool]
    named: Named

    def spread(self, *names: str) -> Named:
        """Returns those of the operands that are there, each with the batch as its first dim."""
        return {x: self._own(x) for x in names if x in self.named}

    def _own(self, name: str) -> jax.Array:
        x = self.named[name]
        return x if self.batched[name] else jnp.broadcast_to(x, (self.size, *x.shape))

    @property
    def has_own_matrices(self) -> bool:
        """Whether each element has matrices of its own."""
        return any(self.batched[x] for x in RHS if x in self.named)

    def matrices(self) -> Named:
        """Returns all matrices, [groups, ...], copied for no element."""
        if not self.has_own_matrices:
            return {x: self.named[x] for x in RHS if x in self.named}
        return {x: _flat(w) for x, w in self.spread(*RHS).items()}


class Merged(NamedTuple):
    """One GEMM; `unmerge` makes the batch's results of its result."""

    variant: VariantName
    named: Named
    unmerge: Callable[[jax.Array], jax.Array]


def merge(variant: VariantName, stacked: Stacked) -> Merged:
    """Returns one GEMM for all elements. Scales are in their logical layout, by rows or blocks."""
    return MERGES[variant](stacked)


def _flat(x: jax.Array) -> jax.Array:
    """[b, g, ...] -> [b · g, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _ragged(stacked: Stacked) -> Merged:
    sizes, m = stacked.spread("groups")["groups"], stacked.named["lhs"].shape[-2]
    group = jax.vmap(lambda own: group_of_row(own, m))(sizes)
    return _by_group(stacked, group, jax.vmap(lambda own: clamped_sizes(own, m))(sizes))


def _masked(stacked: Stacked) -> Merged:
    """Elements with their own matrices are more groups; those that share them have ragged rows."""
    if stacked.has_own_matrices:
        return _batched(stacked)._replace(variant="masked")
    g, m = stacked.named["lhs"].shape[-3:-1]
    sizes = jnp.clip(stacked.spread("groups")["groups"], 0, m)
    inside = jnp.arange(m)[None, None] < sizes[:, :, None]
    group = jnp.where(inside, jnp.arange(g)[None, :, None], g).reshape(stacked.size, -1)
    rows = {x: y.reshape(*y.shape[:-3], g * m, -1) for x, y in stacked.named.items() if x in LHS}
    ragged = _by_group(stacked._replace(named={**stacked.named, **rows}), group, sizes)
    unmerge = ragged.unmerge
    return ragged._replace(unmerge=lambda out: unmerge(out).reshape(stacked.size, g, m, -1))


def _by_group(stacked: Stacked, group: jax.Array, sizes: jax.Array) -> Merged:
    """Sorts rows by group: a ragged GEMM.

    Args:
      group: int32 [b, m] of each row; g for rows past the groups, whose results are zero.
      sizes: int32 [b, g], how many rows have each group.
    """
    (b, m), g = group.shape, sizes.shape[1]
    if stacked.has_own_matrices:
        group = jnp.where(group < g, g * jnp.arange(b)[:, None] + group, b * g)
        sizes = sizes.reshape(-1)
    else:
        sizes = sizes.sum(0, dtype=jnp.int32)
    order = jnp.argsort(group.reshape(-1), stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(b * m, dtype=order.dtype))
    rows = {
        x: take_rows(_flat(y), order) if stacked.batched[x] else take_rows(y, order % m)
        for x, y in stacked.named.items()
        if x in LHS
    }
    named = {**stacked.named, **rows, **stacked.matrices(), "groups": sizes}
    return Merged("ragged", named, lambda out: out[place].reshape(b, m, -1))


def _contiguous(stacked: Stacked) -> Merged:
    """More rows; where an element does not end with a block of 128 rows, padding is added."""
    g, (m, _) = stacked.named["rhs"].shape[-3], stacked.named["lhs"].shape[-2:]
    padded = round_up(m, TOKEN_MULTIPLE)
    rows = stacked.spread("groups", *LHS)
    group = rows.pop("groups")
    if stacked.has_own_matrices:
        first = g * jnp.arange(stacked.size, dtype=jnp.int32)[:, None]
        group = jnp.where(group < 0, -1, first + jnp.minimum(group, g - 1))
    group = jnp.pad(group, [(0, 0), (0, padded - m)], constant_values=-1)
    rows = {x: _flat(_pad(y, -2, padded)) for x, y in rows.items()}
    named = {**stacked.named, **rows, **stacked.matrices(), "groups": group.reshape(-1)}

    def unmerge(out):
        return out.reshape(stacked.size, padded, -1)[:, :m]

    return Merged("contiguous", named, unmerge)


def _ragged_contracting(stacked: Stacked) -> Merged:
    """Steps of 128 of k, sorted by group."""
    sizes, k = stacked.spread("groups")["groups"], stacked.named["lhs"].shape[-1]
    (b, g), steps = sizes.shape, ceil_div(k, SCALE_BLOCK)
    group = jax.vmap(lambda own: group_of_step(own, steps))(sizes)
    group = jnp.where(group < g, g * jnp.arange(b)[:, None] + group, b * g)
    element, step = jnp.divmod(jnp.argsort(group.reshape(-1), stable=True), steps)

    def columns(name: str) -> jax.Array:
        """Sorts the columns of an operand, or of its scales."""
        x = stacked.named[name]
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == FP8 else x
        width = 1 if name.endswith("scale") else SCALE_BLOCK
        x = _pad(bits, -1, steps * width).reshape(*x.shape[:-1], steps, width)
        taken = x[element, :, step] if stacked.batched[name] else jnp.moveaxis(x, 1, 0)[step]
        x = jnp.moveaxis(taken, 0, 1).reshape(x.shape[-3], -1)
        return jax.lax.bitcast_convert_type(x, FP8) if x.dtype == jnp.uint8 else x

    named = {x: columns(x) for x in stacked.named if x != "groups"}
    own = jax.vmap(lambda own: clamped_sizes(whole_steps(own, steps), steps))(sizes)
    named["groups"] = own.reshape(-1) * TOKEN_MULTIPLE
    return Merged("ragged_contracting", named, lambda out: out.reshape(b, g, *out.shape[1:]))


def _batched(stacked: Stacked) -> Merged:
    named = {x: _flat(y) for x, y in stacked.spread(*stacked.named).items()}
    return Merged("batched", named, lambda out: out.reshape(stacked.size, -1, *out.shape[1:]))


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Fills a dim with zeros up to `size`; FP8 numbers as bytes."""
    missing = size - x.shape[axis]
    if not isinstance(missing, int) or missing > 0:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, missing)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == FP8 else x
        x = jax.lax.bitcast_convert_type(jnp.pad(bits, pads), x.dtype)
    return x


MERGES: dict[VariantName, Callable[[Stacked], Merged]] = {
    "batched": _batched,
    "ragged": _ragged,
    "contiguous": _contiguous,
    "masked": _masked,
    "ragged_contracting": _ragged_contracting,
}
