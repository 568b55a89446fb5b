"""Says what the partitioner gathers although it was sharded, and what to do about it."""

import dataclasses
import warnings

from jax_fp8gemm._core.errors import message
from jax_fp8gemm._core.layout import SCALE_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """Operands that every device gathers, because a rule does not cut one of their dims there.

    Attributes:
      op: the operation.
      letter, size: of the dim.
      axes, devices: the mesh axes that cut it, and how many devices they have.
      arrays: what is gathered, in words, with its bytes.
      whole: whether the dim is never cut; else only into whole blocks.
    """

    op: str
    letter: str
    size: int
    axes: tuple[str, ...]
    devices: int
    arrays: tuple[str, ...]
    whole: bool

    def warn(self) -> None:
        """Says so once; of experts once for all operations on as many of them."""
        experts = self.whole and self.letter == "g" and self.op.startswith("gemm")
        key = (self.axes, self.size, self.devices) if experts else self
        if key in _said:
            return
        _said.add(key)
        what, expected, fix = self._of_experts() if experts else self._of_dim()
        over = f"{self.letter}={self.size} over {self._names} of {self.devices} devices"
        got = f"{over}: shards of {self.size / self.devices:g}"
        got += "".join(f"; every device gathers {array}" for array in self.arrays)
        text = message(self.op, what, got=got, expected=expected, fix=fix)
        warnings.warn(text, stacklevel=2)

    @property
    def _names(self) -> str:
        return ", ".join(self.axes)

    def _of_experts(self) -> tuple[str, str, str]:
        name = self.axes[0] if len(self.axes) == 1 else self.axes
        return (
            "a mesh axis splits the experts, and no expert_axis was given: every device computes "
            "the rows of all experts.",
            "experts that stay where they are",
            f"pass expert_axis={name!r} to moe, expert_ffn or Fp8MoE; call others in jax.shard_map",
        )

    def _of_dim(self) -> tuple[str, str, str]:
        if self.whole:
            return (
                "a mesh axis splits a dim that this operation cannot split.",
                f"{self.letter} that is whole on every device",
                f"shard another dim over {self._names}, or call this in jax.shard_map; for a "
                "mixture of experts pass token_axes to moe, expert_ffn or Fp8MoE",
            )
        multiple = SCALE_BLOCK * self.devices
        return (
            "a mesh axis splits a block of scales; the dim is replicated along it.",
            f"shards that are multiples of {SCALE_BLOCK}",
            f"make {self.letter} a multiple of {multiple}, or shard another dim over {self._names}",
        )


_said: set[object] = set()
