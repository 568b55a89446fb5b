"""A matmul over all devices with both gradients, whose three results are known to the bit.

Sums over devices are of whole numbers, so they are exact in any order.
"""

import dataclasses

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from soak.gradients import Gradients

P = PartitionSpec
# How x [m, k], w [k, n] and y [m, n] lie, and the collectives that follow.
STRATEGIES = {
    "data": (P("x"), P(), P("x")),  # all-reduce of dw
    "fsdp": (P("x"), P("x"), P("x")),  # gathers w, scatters dw
    "columns": (P(), P(None, "x"), P(None, "x")),  # all-reduce of dx
    "rows": (P(None, "x"), P("x"), P()),  # all-reduce of y
    "sequence": (P("x"), P(None, "x"), P(None, "x")),  # gathers x, scatters dx
}


@dataclasses.dataclass(frozen=True)
class Sharded(Gradients):
    """fp8_matmul, forward and backward, over a mesh of one axis.

    Attributes:
      split: a row of STRATEGIES.
    """

    split: str = "data"

    @property
    def name(self) -> str:
        return f"fp8_matmul and gradients over devices, {self.split}"

    @property
    def results(self) -> list:
        return []  # not called one by one: memory of several devices has no one address

    def run(self, operands: dict[str, jax.Array]) -> list[jax.Array]:
        mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
        x, w, y = (NamedSharding(mesh, spec) for spec in STRATEGIES[self.split])
        at = jax.lax.with_sharding_constraint
        placed = {"x": at(operands["x"], x), "w": at(operands["w"], w)}
        out, dx, dw = super().run({**operands, **placed, "dy": at(operands["dy"], y)})
        return [at(out, y), at(dx, x), at(dw, w)]
