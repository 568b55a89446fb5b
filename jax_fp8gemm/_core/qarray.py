"""QArray: FP8 numbers and the scales that give them their size."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp

from jax_fp8gemm._core.errors import message
from jax_fp8gemm._core.layout import TILES, Tile, scale_shape

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn

Container = TypeVar("Container")


def exportable(
    name: str | None = None, *, later: tuple[str, ...] = ()
) -> Callable[[type[Container]], type[Container]]:
    """Makes a dataclass of arrays a pytree that exported programs can take and return.

    Args:
      name: under which exported programs know it; default: the class's own. It stays for ever.
      later: fields that came later, None by default. Where they are None the pytree is that of
        before, so that programs that were exported then still run.
    """

    def register(cls: type[Container]) -> type[Container]:
        if later:
            _register_with_later(cls, later)
        else:
            jax.tree_util.register_dataclass(cls)
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jax_fp8gemm.{name or cls.__name__}",
            serialize_auxdata=lambda set_later: ",".join(set_later).encode(),
            deserialize_auxdata=lambda names: tuple(names.decode().split(",")) if names else (),
        )
        return cls

    return register


def _register_with_later(cls: type[Any], later: tuple[str, ...]) -> None:
    """The names of later fields that are not None are static; `exportable` writes them down."""
    first = tuple(f.name for f in dataclasses.fields(cls) if f.name not in later)

    def names(value: Any) -> tuple[str, ...]:
        return tuple(name for name in later if getattr(value, name) is not None)

    def flatten(value: Any):
        set_later = names(value)
        return tuple(getattr(value, name) for name in (*first, *set_later)), set_later

    def flatten_with_keys(value: Any):
        children, set_later = flatten(value)
        keys = map(jax.tree_util.GetAttrKey, (*first, *set_later))
        return tuple(zip(keys, children, strict=True)), set_later

    def unflatten(set_later: tuple[str, ...], children: Any) -> Any:
        return cls(**dict(zip((*first, *set_later), children, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


@exportable()
@dataclasses.dataclass(frozen=True, eq=False)
class QArray:
    """An array in FP8 with scales: real[i, j] = qvalue[i, j] · scale[i // rows, j // columns].

    Attributes:
      qvalue: float8_e4m3fn [..., rows, k].
      scale: float32 [..., scale rows, scale columns], one per tile of the last two dims. A tile
        is (1, 128), (128, 128), (1, k) or the whole matrix; it follows from the two shapes.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
    """

    qvalue: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    def has_tile(self, tile: Tile) -> bool:
        """Whether the shapes fit `tile`. More than one can fit a small array; all mean the same."""
        return tuple(self.scale.shape) == scale_shape(self.shape, tile)

    @property
    def tile(self) -> Tile:
        """The first of (1, 128), (128, 128), (1, None), (None, None) that fits the shapes."""
        for tile in TILES:
            if self.has_tile(tile):
                return tile
        raise ValueError(
            message(
                "QArray",
                "the shape of scale fits no tile of qvalue.",
                got=f"qvalue {list(self.shape)}, scale {list(self.scale.shape)}",
                expected="scale "
                + " or ".join(str(list(scale_shape(self.shape, t))) for t in TILES),
                fix="make it with jax_fp8gemm.quantize, or transpose the scales",
            )
        )
