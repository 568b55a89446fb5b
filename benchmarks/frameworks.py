"""The tables of docs/adapters.md, from tests/data/frameworks.json; `make frameworks` stores it.

benchmarks/readme.py writes them into the page.
"""

import json
import pathlib

STORED = pathlib.Path(__file__).parents[1] / "tests/data/frameworks.json"
KINDS = ("refused", "beyond FP8's error", "left out")


def text() -> str:
    """Returns the counts of each suite, and then each reason."""
    return f"{counts(stored())}\n{reasons(stored())}"


def stored() -> dict[str, dict]:
    return json.loads(STORED.read_text())


def losses() -> str:
    """Returns how far apart losses are, by model."""
    head = "| model | adapter with | before the first step | after the last, of the first loss |"
    lines = [head, "|---|---|--:|--:|"]
    for suite in stored().values():
        for name, both in suite.get("losses", {}).items():
            model, _, products = name.partition(", ")
            own, ours = both["own"], both["adapter"]
            first, last = (100 * (ours[i] - own[i]) / own[0] for i in (0, -1))
            lines.append(f"| {model} | {products} | {first:.2f} % | {last:.2f} % |")
    return "\n".join(lines) + "\n"


def counts(suites: dict[str, dict]) -> str:
    lines = [
        f"| suite | passed | failed | {' | '.join(KINDS)} | run |",
        "|---|" + "--:|" * 5 + "---|",
    ]
    for name, suite in suites.items():
        skipped = (sum(suite[kind].values()) for kind in KINDS)
        cells = (name, suite["passed"], len(suite["failed"]), *skipped, when(name, suite))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def when(name: str, suite: dict) -> str:
    versions = suite["versions"]
    named = [p for p in versions if p in ("jax", "its tests") or p in name.lower()]
    packages = ", ".join(f"{p} {versions[p]}" for p in named)
    return f"{suite['date']}, {suite['commit']}: {packages}"


def reasons(suites: dict[str, dict]) -> str:
    lines = ["| suite | kind | reason | cases |", "|---|---|---|--:|"]
    for name, suite in suites.items():
        for kind in KINDS:
            lines += [f"| {name} | {kind} | {why} | {n} |" for why, n in suite[kind].items()]
        lines += [f"| {name} | failed | {case} | 1 |" for case in suite["failed"]]
    return "\n".join(lines) + "\n"
