"""How tokens travel to the devices that hold their experts, and results back; inside shard_map.

Sending copies rows to devices; collecting, its transpose, sums what came back. So the forward pass
is collect(experts(send(x))), and the backward pass collect(experts'(send(dy))).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.partition import Axes
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.qarray import exportable
from jax_fp8gemm._core.types import ExchangeKind, Wire
from jax_fp8gemm._moe.ordered import sum_of_few


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenExchange:
    """Static description of how tokens travel.

    Attributes:
      axes: mesh axes over which tokens and experts are split.
      gathered: mesh axes over which tokens are split, and each expert's hidden dim: what arrives
        is gathered over them too, and results are summed.
      kind: "all_gather": every device sees all tokens; or "all_to_all": a token goes once to each
        device that holds one of its experts.
      wire: "fp8" or "bf16", as what x and the gradient dy are sent. Results are collected in bf16.
    """

    axes: Axes
    gathered: Axes = ()
    kind: ExchangeKind
    wire: Wire

    @property
    def everywhere(self) -> Axes:
        """The axes over which every device gets all that is sent."""
        return (*self.axes, *self.gathered) if self.kind == "all_gather" else self.gathered


@exportable()
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where all_to_all puts t tokens: `capacity` slots for each device of the axis.

    Attributes:
      token: int32 [devices · capacity], the token in each slot; t in an empty one.
      slot: int32 [t, min(devices, top_k)], the slots from which a token gets its results: one for
        each device that it goes to, devices · capacity for the rest.
    """

    token: jax.Array
    slot: jax.Array


def make_slots(expert_index: jax.Array, per_device: int, devices: int, capacity: int) -> Slots:
    """Returns slots for int [t, top_k] choices; a device's tokens past `capacity` get none."""
    t, top_k = expert_index.shape
    device = jnp.where(expert_index >= 0, expert_index // per_device, devices)
    goes = (device[:, :, None] == jnp.arange(devices)[None, None]).any(1)  # [t, devices]
    place = jnp.cumsum(goes, 0, dtype=jnp.int32) - 1
    nowhere = devices * capacity
    first = jnp.arange(devices, dtype=jnp.int32)[None] * capacity
    slot = jnp.where(goes & (place < capacity), first + place, nowhere)
    if devices > top_k:  # a token goes to top_k of them at most
        slot = -jax.lax.top_k(-slot, top_k)[0]
    tokens = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full(nowhere, t, jnp.int32).at[slot].set(tokens, mode="drop")
    # Else XLA works a slot out anew for every element of the row that it leads to.
    return Slots(*jax.lax.optimization_barrier((token, slot)))


def send(x: jax.Array, exchange: TokenExchange, slots: Slots | None) -> jax.Array:
    """Returns what this device receives: [rows, ...] of [t, ...]; empty slots hold zeros."""
    if exchange.kind == "all_to_all":
        assert slots is not None
        x = jax.lax.all_to_all(to_slots(x, slots), exchange.axes, 0, 0, tiled=True)
    everywhere = exchange.everywhere
    return jax.lax.all_gather(x, everywhere, tiled=True) if everywhere else x


def send_together(
    arrays: Sequence[jax.Array], exchange: TokenExchange | None, slots: Slots | None
) -> list[jax.Array]:
    """As `send`, in one exchange: a token's rows of several arrays [t, ...] travel as one row.

    A row of each is a multiple of four bytes.
    """
    if exchange is None:
        return list(arrays)
    return unpack(send(pack(arrays), exchange, slots), arrays)


def pack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns the rows of arrays [t, ...] side by side, uint32 [t, words]."""
    return jnp.concatenate([_to_words(x) for x in arrays], 1)


def unpack(rows: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the arrays whose rows `pack` laid side by side, now as many as rows."""
    widths = [math.prod(x.shape[1:]) * x.dtype.itemsize // 4 for x in like]
    parts = jnp.split(rows, list(itertools.accumulate(widths))[:-1], axis=1)
    return [_from_words(part, x) for part, x in zip(parts, like, strict=True)]


def _to_words(x: jax.Array) -> jax.Array:
    each = 4 // x.dtype.itemsize
    grouped = x if each == 1 else x.reshape(len(x), -1, each)
    return jax.lax.bitcast_convert_type(grouped, jnp.uint32)


def _from_words(words: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, like.dtype).reshape(len(words), *like.shape[1:])


def collect(
    y: jax.Array, exchange: TokenExchange | None, slots: Slots | None, *, in_order: bool = False
) -> jax.Array:
    """Returns for each own token the sum of what devices computed for it: [t, h] of [rows, h].

    all_gather sums in y's dtype on the way, all_to_all in float32 after it; either returns y's.

    Args:
      in_order: all_to_all sums in the order of the devices, whatever t is.
    """
    if exchange is None:
        return y
    if exchange.everywhere:
        y = jax.lax.psum_scatter(y, exchange.everywhere, tiled=True)
    if exchange.kind == "all_gather":
        return y
    assert slots is not None
    back = jax.lax.all_to_all(y, exchange.axes, 0, 0, tiled=True)
    return sum_slots(back, slots, in_order=in_order)


def to_slots(x: jax.Array, slots: Slots) -> jax.Array:
    """Returns each slot's row of [t, ...]; zeros in empty ones."""
    return x.at[slots.token].get(mode="fill", fill_value=0)


def sum_slots(rows: jax.Array, slots: Slots, *, in_order: bool = False) -> jax.Array:
    """Returns for each token the sum of its slots' rows, in float32: [t, h], of rows' dtype."""
    parts = rows.at[slots.slot].get(mode="fill", fill_value=0)
    return sum_of_few(parts.astype(jnp.float32), in_order).astype(rows.dtype)


def axis_size(op: str, axes: Axes, num_experts: int) -> int:
    """Returns how many devices of mesh axes hold num_experts experts, evenly; inside shard_map.

    Raises:
      ValueError: num_experts is no multiple of it.
    """
    size = math.prod(jax.lax.axis_size(axis) for axis in axes)
    if num_experts % size:
        what = f"{num_experts} experts do not split over {size} devices."
        names = ", ".join(map(repr, axes))
        got = f"{num_experts} experts, mesh axis {names} of {size} devices"
        fix = f"use a multiple of {size} experts, or fewer devices for them"
        fail(op, what, got, f"num_experts % {size} == 0", fix)
    return size
