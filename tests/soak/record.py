"""What the soak did: one file, a run after the other, written again after every program."""

import collections
import hashlib
import json
import os
import pathlib
import threading

ROOT = pathlib.Path(__file__).parent.parent.parent
MOST_FOUND = 20  # faults that a run describes


def digest(root: pathlib.Path = ROOT) -> str:
    """Returns the SHA-256 of all sources in csrc and jax_fp8gemm: what a run is a run of."""
    found = hashlib.sha256()
    for folder in ("csrc", "jax_fp8gemm"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cpp", ".h", ".cuh") and path.is_file():
                name = path.relative_to(root).as_posix()
                found.update(f"{name}\0{path.stat().st_size}\0".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def read(path: pathlib.Path) -> dict:
    """Returns the stored record; an empty one where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"runs": [], "planted": []}


def write(path: pathlib.Path, record: dict) -> None:
    """Writes all or nothing: whoever stops us leaves a record that can be read."""
    lists = [
        f'"{name}": [\n' + ",\n".join(json.dumps(run) for run in record[name]) + "\n]"
        for name in ("runs", "planted")
    ]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text("{" + ",\n".join(lists) + "}\n")
    os.replace(temporary, path)


def summary(record: dict, of: str) -> dict:
    """Returns the sum of the runs whose sources have the digest `of`."""
    runs = [run for run in record["runs"] if run["digest"] == of]
    products = collections.Counter()
    for run in runs:
        products.update(run["products"])
    total = {name: sum(run[name] for run in runs) for name in TOTALS}
    total["seconds"] = round(total["seconds"], 1)
    return {"digest": of, "runs": len(runs), **total, "products": sum(products.values()),
            "by_variant": dict(sorted(products.items()))}  # fmt: skip


TOTALS = ("seconds", "casts", "calls", "adjacent", "programs", "faults")


class Run:
    """One run, as several threads add to it. Its row is the last of the record.

    Attributes:
      row: seconds; products, by variant, whose whole result was compared; casts likewise; calls
        into poisoned memory, and how many had both neighbours touching; programs compiled; faults:
        programs, seeds and calls with something wrong; found: the first of these.
    """

    def __init__(self, path: pathlib.Path, about: dict, planted: str = ""):
        self.path, self.list = path, "planted" if planted else "runs"
        self.lock = threading.RLock()  # a signal may come while its thread has the lock
        self.row = about | {"planted": planted} if planted else dict(about)
        self.row |= dict.fromkeys(TOTALS, 0) | {"products": {}, "found": []}

    def add(self, check, times: int) -> None:
        """Counts a check whose results were compared `times` times."""
        with self.lock:
            if check.products:
                products = self.row["products"]
                products[check.name] = products.get(check.name, 0) + check.products * times
            else:
                self.row["casts"] += times

    def count(self, name: str, times: int) -> None:
        with self.lock:
            self.row[name] += times

    def fault(self, what: dict, times: int = 1) -> None:
        """Counts faults, and keeps the smallest that are known."""
        with self.lock:
            self.row["faults"] += times
            found = [*self.row["found"], what]
            self.row["found"] = sorted(found, key=lambda one: one["work"])[:MOST_FOUND]

    def save(self, seconds: float) -> None:
        with self.lock:
            self.row["seconds"] = round(seconds, 1)
            record = read(self.path)
            same = [i for i, row in enumerate(record[self.list]) if self._is(row)]
            if same:
                record[self.list][same[0]] = self.row
            else:
                record[self.list].append(self.row)
            write(self.path, record)

    def _is(self, row: dict) -> bool:
        names = ("digest", "started", "seed", "planted")
        return all(row.get(name) == self.row.get(name) for name in names)

    @property
    def total(self) -> int:
        with self.lock:
            return sum(self.row["products"].values())
