"""How tokens travel to the devices that hold their experts, and results back; inside shard_map.

Sending copies rows to devices; collecting, its transpose, sums what came back. So the forward pass
is collect(experts(send(x))), and the backward pass collect(experts'(send(dy))).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.partition import Axes
from jax_fp8gemm._core.bits import map_rows
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.qarray import QArray, exportable
from jax_fp8gemm._core.types import ExchangeKind, Wire


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
      slot: int32 [t, top_k], the slot from which choice j of a token gets its share of the result:
        one for each device the token goes to, devices · capacity for the other choices.
    """

    token: jax.Array
    slot: jax.Array


def make_slots(expert_index: jax.Array, per_device: int, devices: int, capacity: int) -> Slots:
    """Returns slots for int [t, top_k] choices; a device's tokens past `capacity` get none."""
    t, top_k = expert_index.shape
    device = jnp.where(expert_index >= 0, expert_index // per_device, devices)
    goes = (device[:, :, None] == jnp.arange(devices)[None, None]).any(1)  # [t, devices]
    position = jnp.cumsum(goes, 0, dtype=jnp.int32) - 1
    place = jnp.take_along_axis(position, jnp.minimum(device, devices - 1), 1)
    same = device[:, :, None] == device[:, None, :]
    again = (same & jnp.tri(top_k, k=-1, dtype=bool)[None]).any(2)  # an earlier choice went there
    nowhere = devices * capacity
    kept = (device < devices) & ~again & (place < capacity)
    slot = jnp.where(kept, device * capacity + place, nowhere).astype(jnp.int32)
    tokens = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], slot.shape)
    token = jnp.full(nowhere, t, jnp.int32).at[slot].set(tokens, mode="drop")
    return Slots(token, slot)


def send(
    x: jax.Array, exchange: TokenExchange | None, slots: Slots | None, empty: int = 0
) -> jax.Array:
    """Returns what this device receives: [rows, ...] of [t, ...]; empty slots hold `empty`."""
    if exchange is None:
        return x
    if exchange.kind == "all_to_all":
        assert slots is not None
        x = x.at[slots.token].get(mode="fill", fill_value=empty)
        x = jax.lax.all_to_all(x, exchange.axes, 0, 0, tiled=True)
    everywhere = exchange.everywhere
    return jax.lax.all_gather(x, everywhere, tiled=True) if everywhere else x


def send_quantized(q: QArray, exchange: TokenExchange | None, slots: Slots | None) -> QArray:
    """As `send`: one byte for each element, and the scales of its rows."""
    return map_rows(lambda x: send(x, exchange, slots), q)


def collect(y: jax.Array, exchange: TokenExchange | None, slots: Slots | None) -> jax.Array:
    """Returns for each own token the sum of what devices computed for it: [t, h] of [rows, h].

    all_gather sums in y's dtype on the way, all_to_all in float32 after it; either returns y's.
    """
    if exchange is None:
        return y
    if exchange.everywhere:
        y = jax.lax.psum_scatter(y, exchange.everywhere, tiled=True)
    if exchange.kind == "all_gather":
        return y
    assert slots is not None
    back = jax.lax.all_to_all(y, exchange.axes, 0, 0, tiled=True)
    parts = back.at[slots.slot].get(mode="fill", fill_value=0)
    return parts.astype(jnp.float32).sum(1).astype(y.dtype)


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
