"""Checkpoint: the tensors of files, each read when it is asked for."""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import jax
from jax.sharding import Sharding

from jax_fp8gemm._checkpoint.arrays import source_of
from jax_fp8gemm._checkpoint.folder import find_entries
from jax_fp8gemm._checkpoint.pairs import Format, Weight, find_weights, select
from jax_fp8gemm._checkpoint.placing import place
from jax_fp8gemm._checkpoint.quantization import Quantization, read_quantization
from jax_fp8gemm._checkpoint.sources import AnySource, Mapped
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.progress import Progress
from jax_fp8gemm._core.qarray import QArray

Keep = Callable[[str], bool]
ShardingFor = Sharding | Callable[[str], Sharding | None] | None


@jax.tree_util.register_pytree_with_keys_class
class Tensors(dict[str, QArray | jax.Array]):
    """Arrays by name, and how each lay in its file: a dict, and a pytree as a dict is.

    Attributes:
      formats: of those arrays that do not show it; `save` writes them so again.
    """

    def __init__(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), *,
        formats: Mapping[str, Format] | None = None,
    ):  # fmt: skip
        super().__init__(tensors)
        self.formats: dict[str, Format] = dict(formats or {})

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(name), value) for name, value in self.items()]
        return children, (tuple(self), tuple(self.formats.items()))

    @classmethod
    def tree_unflatten(cls, aux: tuple, children: Iterable[Any]) -> "Tensors":
        names, formats = aux
        return cls(zip(names, children, strict=True), formats=dict(formats))


class Catalog:
    """What the files of a checkpoint hold, by their headers.

    Attributes:
      op: the function that was called, for errors.
      weights: by name, as far as they are kept.
      quantization: what config.json says of it.
    """

    def __init__(self, op: str, path: pathlib.Path, keep: Keep | None):
        check_keep(op, keep)
        kept = keep or (lambda name: True)
        self.op, self._files = op, Mapped(op)
        self.quantization: Quantization | None = read_quantization(op, path)
        entries = find_entries(op, path, lambda names: select(names, kept))
        found = find_weights(op, entries)
        self.weights: dict[str, Weight] = {name: found[name] for name in found if kept(name)}

    @property
    def formats(self) -> dict[str, Format]:
        return {name: weight.format for name, weight in self.weights.items() if weight.format}

    def source(self, name: str, rows: slice | None = None) -> AnySource:
        return source_of(self.op, self._files, self.weights[name], rows)

    def read(self, name: str, sharding: Sharding | None) -> QArray | jax.Array:
        return place(self.op, name, self.source(name), sharding)


@final
class Checkpoint(Mapping[str, QArray | jax.Array]):
    """The tensors of files by name. `checkpoint["name"]` reads one of them from the disk.

    A weight and its scales are one entry, a QArray. Nothing is kept in memory once it is returned.

    Attributes:
      formats: how arrays lie in their files where the array does not show it.
      quantization: what config.json says of it; None where it says nothing.
    """

    def __init__(self, catalog: Catalog):
        self._catalog = catalog

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.weights)

    def __len__(self) -> int:
        return len(self._catalog.weights)

    def __contains__(self, name: object) -> bool:
        return name in self._catalog.weights

    def __getitem__(self, name: str) -> QArray | jax.Array:
        return self._catalog.read(name, None)

    @property
    def formats(self) -> dict[str, Format]:
        return self._catalog.formats

    @property
    def quantization(self) -> Quantization | None:
        return self._catalog.quantization

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, which is not read for it."""
        return self._catalog.weights[name].shape

    def read(self, name: str, sharding: Sharding | None = None) -> QArray | jax.Array:
        """Reads one tensor to its devices; each process reads what its own devices hold.

        Args:
          name: of the tensor.
          sharding: where it goes; None: JAX's default device. The scales of a QArray go along with
            its numbers, or everywhere where the sharding would split a scale tile.

        Returns:
          A QArray, or an array of the dtype in the file.

        Raises:
          KeyError: there is no such tensor.
          ValueError: the sharding does not fit its shape, or an MXFP4 weight is not exact in E4M3.

        Example:
          w = checkpoint.open("DeepSeek-V3").read("lm_head.weight", NamedSharding(mesh, P("x")))
        """
        return self._catalog.read(name, sharding)


def read_all(catalog: Catalog, sharding: ShardingFor) -> Tensors:
    """Reads everything, one tensor after the other."""
    tensors = Tensors(formats=catalog.formats)
    weights = catalog.weights
    nbytes = sum(weight.nbytes for weight in weights.values())
    with Progress(catalog.op, nbytes, in_bytes=True) as bar:
        for name, weight in weights.items():
            tensors[name] = catalog.read(name, sharding_of(sharding, name))
            bar.step(weight.nbytes)
    return tensors


def sharding_of(sharding: ShardingFor, name: str) -> Sharding | None:
    return sharding(name) if callable(sharding) else sharding


def check_keep(op: str, keep: object) -> None:
    if keep is not None and not callable(keep):
        got, fix = type(keep).__name__, "keep=lambda name: name in names"
        fail(op, "keep is not a function.", got, "a function of a name", fix, TypeError)
