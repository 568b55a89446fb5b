"""A checkpoint's tensors as a model's parameters, by a table of names."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_fp8gemm._checkpoint.placing import place
from jax_fp8gemm._checkpoint.reader import Catalog, ShardingFor, check_keep, sharding_of
from jax_fp8gemm._checkpoint.sources import AnySource, QSource, Rows, Stacked, Transposed
from jax_fp8gemm._checkpoint.tables import Row, Table
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.progress import Progress
from jax_fp8gemm._core.qarray import QArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor and a parameter meet.

    Attributes:
      stacked: where in dim 0 of the parameter the tensor stands; None: it is all of it.
    """

    row: Row
    parameter: str
    stored: str
    stacked: int | None


class Names:
    """A table, in both directions."""

    def __init__(self, op: str, table: Table):
        if not isinstance(table, Sequence) or not all(isinstance(row, Row) for row in table):
            got, fix = type(table).__name__, "take checkpoint.DEEPSEEK_V3 as an example"
            fail(op, "table is not a table of names.", got, "a tuple of Row", fix, TypeError)
        for row in table:
            stored, parameter = _keys(row.stored), _keys(row.parameter)
            if not parameter <= stored or len(stored - parameter) > 1:
                got = f"parameter {row.parameter!r}, stored {row.stored!r}"
                expected = "numbers of parameter in stored too, and one more at most"
                fix = "write {layer} in both, {expert} in stored alone"
                fail(op, "a row of the table does not fit itself.", got, expected, fix)
        self._rows = [(row, _pattern(row.stored), _pattern(row.parameter)) for row in table]

    def of_stored(self, name: str) -> list[Place]:
        """Returns what a tensor is: several parameters have a part of one, none has none."""
        found = []
        for row, pattern, _ in self._rows:
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                parameter = row.parameter.format(**numbers)
                index = [numbers[key] for key in numbers if f"{{{key}}}" not in row.parameter]
                stacked = int(index[0]) if index else None
                found.append(Place(row=row, parameter=parameter, stored=name, stacked=stacked))
        return found

    def of_parameter(self, name: str, count: int) -> list[Place]:
        """Returns where a parameter goes, by the first row that has it; count: of its dim 0."""
        for row, _, pattern in self._rows:
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                inner = _keys(row.stored) - set(numbers)
                if not inner:
                    stored = row.stored.format(**numbers)
                    return [Place(row=row, parameter=name, stored=stored, stacked=None)]
                (key,) = inner
                return [
                    Place(
                        row=row,
                        parameter=name,
                        stored=row.stored.format(**numbers, **{key: i}),
                        stacked=i,
                    )
                    for i in range(count)
                ]
        return []


def _keys(template: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", template))


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", template)
    texts, keys = map(re.escape, parts[::2]), [f"(?P<{key}>\\d+)" for key in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(texts, [*keys, ""], strict=True)))


def out_axis(row: Row, in_fp8: bool) -> int:
    """Returns which dim of a stored tensor is `out`."""
    return -1 if row.layout == "bias" or (row.layout == "kernel [in, out]" and not in_fp8) else -2


def part_of(row: Row, n: int) -> slice | None:
    """Returns what of `out` the parameter is, where the tensor has n."""
    return {
        "all": None,
        "first half": slice(0, n // 2, 1),
        "second half": slice(n // 2, n, 1),
        "even": slice(0, n, 2),
        "odd": slice(1, n, 2),
    }[row.part]


# ---- reading ------------------------------------------------------------------------------------


def read_parameters(
    op: str,
    path: Any,
    table: Table,
    keep: Callable[[str], bool] | None,
    sharding: ShardingFor,
) -> dict[str, Any]:
    names = Names(op, table)
    check_keep(op, keep)

    def kept(stored: str) -> bool:
        places = names.of_stored(stored) if keep else []
        candidates = [place.parameter for place in places] or [stored]
        return keep is None or any(map(keep, candidates))

    catalog = Catalog(op, path, kept)
    found = _by_parameter(op, names, list(catalog.weights))
    found = {name: places for name, places in found.items() if keep is None or keep(name)}
    tree: dict[str, Any] = {}
    nbytes = sum(weight.nbytes for weight in catalog.weights.values())
    with Progress(op, nbytes, in_bytes=True) as bar:
        for name, places in found.items():
            source = _source(op, catalog, name, places)
            _insert(tree, name, place(op, name, source, sharding_of(sharding, name)))
            share = 1 if places[0].row.part == "all" else 2
            bar.step(sum(catalog.weights[at.stored].nbytes for at in places) // share)
    return tree


def _by_parameter(op: str, names: Names, stored: list[str]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    missing = []
    for name in stored:
        places = names.of_stored(name)
        missing += [] if places else [name]
        for at in places:
            found.setdefault(at.parameter, []).append(at)
    if missing:
        got = f"{len(missing)} tensors, the first {', '.join(missing[:3])}"
        fix = "add rows to the table, or drop these by keep"
        fail(op, "the table has no row for some tensors.", got, "a row for each tensor", fix)
    return found


def _source(op: str, catalog: Catalog, name: str, places: list[Place]) -> AnySource:
    if places[0].stacked is None:
        if len(places) > 1:
            got, fix = ", ".join(at.stored for at in places), "drop one of them by keep"
            fail(op, f"{name} is there twice.", got, "one tensor", fix)
        return _part(op, catalog, places[0])
    places = sorted(places, key=lambda at: -1 if at.stacked is None else at.stacked)
    numbers = [at.stacked for at in places]
    if numbers != list(range(len(places))):
        lost = sorted(set(range(len(places))) - set(numbers))[:3]
        got, expected = f"{len(places)} tensors, {lost} not among them", "all from 0 on, each once"
        fail(op, f"{name} has gaps.", got, expected, "fetch the files that hold the others")
    sources = [_part(op, catalog, at) for at in places]
    kinds = {_kind(source) for source in sources}
    if len(kinds) > 1:
        got, fix = "; ".join(sorted(kinds)), "read them by load, and stack them by hand"
        fail(op, f"{name} is of tensors that differ.", got, "one shape and dtype", fix)
    return _stack(sources)


def _kind(source: AnySource) -> str:
    if isinstance(source, QSource):
        return f"FP8 {list(source.shape)} with scales {list(source.scale.shape)}"
    return f"{source.dtype} {list(source.shape)}"


def _stack(sources: list[AnySource]) -> AnySource:
    numbers = [source.qvalue for source in sources if isinstance(source, QSource)]
    if not numbers:
        return Stacked(sources=tuple(s for s in sources if not isinstance(s, QSource)))
    scales = [source.scale for source in sources if isinstance(source, QSource)]
    return QSource(qvalue=Stacked(sources=tuple(numbers)), scale=Stacked(sources=tuple(scales)))


def _part(op: str, catalog: Catalog, at: Place) -> AnySource:
    weight, row = catalog.weights[at.stored], at.row
    in_fp8 = weight.scale is not None
    axis = out_axis(row, in_fp8)
    least = 1 if row.layout in ("bias", "as stored") else 2
    if len(weight.shape) < least + (row.part != "all" and row.layout == "as stored"):
        got, fix = f"{at.stored} {list(weight.shape)}", "correct the table's layout"
        fail(op, f"{at.parameter} has the wrong rank.", got, f"{least} dims or more", fix)
    rows = part_of(row, weight.shape[axis]) if row.part != "all" else None
    if rows is not None and weight.shape[axis] % 2:
        got, fix = f"{at.stored} {list(weight.shape)}", "correct the table: it has no halves"
        fail(op, f"{at.parameter} is no half.", got, "an even number", fix)
    if axis == -2:
        source = catalog.source(at.stored, rows)
    else:
        source = catalog.source(at.stored)
        if rows is not None and not isinstance(source, QSource):
            source = Rows(source=source, rows=rows, axis=-1)
    if row.layout == "kernel" and not isinstance(source, QSource):
        return Transposed(source=source)
    return source


def _insert(tree: dict[str, Any], name: str, value: QArray | jax.Array) -> None:
    *levels, last = name.split(".")
    for level in levels:
        tree = tree.setdefault(level, {})
    tree[last] = value
