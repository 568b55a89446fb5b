"""Writes the figures of README.md and docs/ from stored rows, so that no figure is typed by hand.

    python benchmarks/readme.py --write    # after new rows were stored
    python benchmarks/readme.py --check    # what tests/test_docs.py does

A page holds a block between `<!-- figures: NAME -->` and `<!-- /figures -->`; BLOCKS names the
function that makes its text. Families of rows are found by their ops: a new one needs no change.
"""

import argparse
import json
import math
import pathlib
import re
import statistics
import sys

import fit_cost
import frameworks
import simulate

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
H200, H100 = "nvidia-h200.json", "nvidia-h100-80gb-hbm3.json"
PAGES = (
    "README.md",
    *(f"docs/{p}.md" for p in "adapters measured moe numerics simulation".split()),
)
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)

Row = dict

# A file of training runs and its arms; gaps are to the first.
BF16_RUNS = "train_moe.json", ("bf16", "control", "fp8")
COLUMN_RUNS = "train_moe_columns.json", ("fp8", "fp8_own_scales", "fp8_control", "fp8_again")
CHOSEN = 10  # SHARED_SPREAD of jax_fp8gemm/_core/reference.py

FAMILIES = {  # how a family is called for a reader; one that is not here goes by its own name
    "dense": "`dense`, shapes of DeepSeek-V3 (tuned)",
    "gradient": "weight gradient",
    "ragged": "`ragged` (no padding; DeepGEMM padded)",
    "contiguous": "`contiguous`",
    "masked": "`masked`",
    "ragged_contracting": "`ragged_contracting`",
    "drawn": "shapes drawn at random (not tuned)",
    "no scale shared, gradient": "weight gradient, columns that share no scale",
    "no scale shared, grouped": "`ragged_contracting`, columns that share no scale",
}


def stored(name: str) -> list[Row]:
    path = HERE / "results" / name
    return json.loads(path.read_text()) if path.exists() else []


def part(row: Row) -> tuple[str, str]:
    """Splits an op, "family: shape"."""
    family, _, shape = row["op"].partition(": ")
    return family, shape


def is_ours(name: str) -> bool:
    return name.startswith("fp8")


def ratio(row: Row) -> float:
    """How many times faster we are. `peer` is somebody else's, or ours in a row of theirs."""
    return row["us"] / row["peer_us"] if is_ours(row["peer"]) else row["peer_us"] / row["us"]


def has_peer(row: Row) -> bool:
    return bool(row.get("peer_us") and row.get("us"))


def family_of(row: Row) -> str:
    """The family of a row beside DeepGEMM: the variant where the op says "grouped" or "drawn"."""
    family = part(row)[0]
    if family == "grouped":
        return row["variant"]
    return f"drawn, {row['variant']}" if family == "drawn" and row["variant"] != "dense" else family


def beside_deepgemm(rows: list[Row]) -> dict[str, list[Row]]:
    """Returns the rows beside DeepGEMM by family: known families first, then the others."""
    found: dict[str, list[Row]] = {name: [] for name in FAMILIES}
    for row in rows:
        if has_peer(row) and "DeepGEMM" in row["peer"]:
            found.setdefault(family_of(row), []).append(row)
    return {name: some for name, some in found.items() if some}


def table(head: str, lines: list[tuple], aligned: str) -> str:
    """Returns a Markdown table. aligned: "l" or "r" for each column."""
    if not lines:
        return "No rows are stored yet.\n"
    columns = head.split(" | ")
    rule = "|".join("--:" if side == "r" else "---" for side in aligned)
    text = [f"| {' | '.join(columns)} |", f"|{rule}|"]
    return "\n".join(text + [f"| {' | '.join(map(str, line))} |" for line in lines]) + "\n"


def compared(groups: dict[str, list[Row]], head: str) -> str:
    """Returns a table of groups of rows: mean and lowest ratio, and how often we are slower."""
    lines = []
    for name, rows in groups.items():
        ratios = {row["op"]: ratio(row) for row in rows}
        mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
        worst = min(rows, key=ratio)
        slower = sum(value < 1 for value in ratios.values())
        lowest = f"{ratio(worst):.2f} ({size(worst)})"
        lines.append((name, len(rows), f"{mean:.2f}", lowest, f"{slower} of {len(rows)}"))
    return table(f"{head} | shapes | mean | lowest (m×n×k) | slower in", lines, "lrrlr")


def size(row: Row) -> str:
    groups = f"{row['g']} groups, " if row.get("g", 1) > 1 else ""
    return f"{groups}{row['m']}×{row['n']}×{row['k']}"


def listed(values) -> str:
    return ", ".join(sorted(set(values)))


def card(rows: list[Row]) -> str:
    """One sentence: the device, its driver, the commits."""
    devices = listed(", driver ".join(r["device"].split(", ")[:2]) for r in rows if "device" in r)
    return f"Device: {devices}. Commit of the rows: {listed(r['commit'] for r in rows)}."


# ---- the blocks ---------------------------------------------------------------------------------


def speed() -> str:
    """README: beside DeepGEMM, by family."""
    groups = beside_deepgemm(stored(H200))
    rows = [row for some in groups.values() for row in some]
    if not rows:
        return compared(groups, "GEMM")
    names = {FAMILIES.get(name, name): some for name, some in groups.items()}
    if any(not row.get("same_run") for row in rows):
        old = {f: any(not row.get("same_run") for row in some) for f, some in names.items()}
        names = {f"{family} †" if old[family] else family: some for family, some in names.items()}
        note = "† DeepGEMM's times were stored on another day, which can flatter either side. "
    else:
        note = "Both ran in one process, launch by launch. "
    versions = listed(row["peer_version"] for row in rows if row.get("peer_version"))
    note += f"DeepGEMM is {versions}. " if versions else ""
    if not any(part(row)[0] == "drawn" for row in rows):
        note += "No row of an untuned shape is stored yet; expect lower ratios there. "
    return compared(names, "GEMM") + "\n" + note + card(rows) + "\n"


def peer_name(row: Row) -> str:
    """Who else: without the config that a peer was tuned to."""
    theirs = is_ours(row["peer"])  # the row
    name = re.sub(r" \(.*\)$", "", part(row)[1] if theirs else row["peer"])
    version = row.get("version" if theirs else "peer_version")
    return f"{name} ({version})" if version else name


def others() -> str:
    """README: single GEMMs beside everybody else, by peer."""
    groups: dict[str, list[Row]] = {}
    for row in stored(H200):
        if has_peer(row) and "DeepGEMM" not in row["peer"] and part(row)[0].startswith("beside"):
            # Older rows of torch count its launch too, and did not run in turn with ours.
            by_events = row["peer"].startswith("torch") and not row.get("same_run")
            if not is_ours(row["peer"]) and not by_events:
                groups.setdefault(peer_name(row), []).append(row)
    rows = [row for some in groups.values() for row in some]
    return compared(groups, "beside") + ("\n" + card(rows) + "\n" if rows else "")


STEPS = ("forward + backward", "ragged forward + backward", "MoE layer", "training step")


def in_order(rows: list[Row]) -> list[Row]:
    """Sorts by op, "8 experts" before "32 experts"."""
    return sorted(rows, key=lambda row: [(len(word), word) for word in row["op"].split(", ")])


def whole_steps(rows: list[Row]) -> list[Row]:
    """Rows of forward and backward: a peer's, that names ours; or ours, that names a peer."""
    found = [row for row in rows if part(row)[0].startswith(STEPS) and has_peer(row)]
    found = [row for row in found if is_ours(row["peer"]) != is_ours(part(row)[1])]
    return sorted(in_order(found), key=lambda row: [not row["op"].startswith(s) for s in STEPS])


def steps_of(name: str) -> str:
    rows = whole_steps(stored(name))
    lines = []
    for row in rows:
        ours, theirs = row["us"], row["peer_us"]
        if is_ours(row["peer"]):
            ours, theirs = theirs, ours
        what = step_name(row)
        lines.append((what, peer_name(row), *(f"{us / 1e3:.2f}" for us in (ours, theirs)),
                      f"{ratio(row):.2f}"))  # fmt: skip
    head = "forward and backward | beside | FP8, ms | theirs, ms | times faster"
    return table(head, lines, "llrrr") + ("\n" + card(rows) + "\n" if rows else "")


def step_name(row: Row) -> str:
    what = part(row)[0].replace(", forward + backward", "")
    if what.startswith("ragged forward + backward"):
        return f"`fp8_ragged_dot`, {size(row)}"
    return f"`fp8_matmul`, {size(row)}" if what == "forward + backward" else what


def layers() -> str:
    """README and docs/measured.md: forward and backward with all casts."""
    return steps_of(H200)


def layers_h100() -> str:
    return steps_of(H100)


def slower() -> str:
    """docs/measured.md: every stored shape in which we are slower than DeepGEMM."""
    rows = [row for some in beside_deepgemm(stored(H200)).values() for row in some]
    if rows and min(map(ratio, rows)) >= 1:
        return "None.\n"
    rows = sorted((row for row in rows if ratio(row) < 1), key=ratio)
    lines = [(row["op"], size(row), f"{row['us']:.1f}", f"{row['peer_us']:.1f}",
              f"{ratio(row):.3f}") for row in rows]  # fmt: skip
    return table("row | m×n×k | ours, µs | DeepGEMM, µs | ratio", lines, "llrrr")


def casts() -> str:
    """docs/measured.md: rates of the casts, beside XLA's."""
    rows = {part(row)[1]: row for row in stored(H200) if part(row)[0] == "quantize"}
    lines = []
    for name, row in rows.items():
        if name.startswith("XLA") or not row.get("us_kernel"):
            continue
        xla = rows.get(f"XLA: {name}")
        clean = row.get("gbs_read_flush")
        lines.append((name, f"{row['gbs'] / 1e3:.2f}", f"{clean / 1e3:.2f}" if clean else "",
                      f"{xla['gbs'] / 1e3:.2f}" if xla else ""))  # fmt: skip
    head = "cast | TB/s | TB/s, clean L2 | XLA, TB/s"
    return table(head, lines, "lrrr") + ("\n" + card(list(rows.values())) + "\n" if rows else "")


def memory() -> str:
    """docs/measured.md: what a program needs beside its arguments."""
    rows = in_order([row for row in stored(H200) if row.get("bytes_peak")])
    lines = [(row["op"].replace(", forward + backward", ""), f"{row['bytes_peak'] / 2**30:.2f}")
             for row in rows]  # fmt: skip
    return table("program | GiB", lines, "lr") + ("\n" + card(rows) + "\n" if rows else "")


def host() -> str:
    """docs/measured.md: what a call and a compilation cost the host."""
    rows = [row for row in stored(H200) if part(row)[0] == "host"]
    lines = [(part(row)[1], f"{row['us']:,.1f}".replace(",", " ")) for row in rows]
    return table("what | µs", lines, "lr") + ("\n" + card(rows) + "\n" if rows else "")


def by_arm(name: str, arms: tuple[str, ...]) -> dict[str, list[dict]]:
    runs = sorted(stored(name), key=lambda run: run["seed"])
    return {arm: [run for run in runs if run["arm"] == arm] for arm in arms}


def last(run: dict) -> float:
    """The mean loss of the last tenth of a run."""
    return statistics.fmean(run["losses"][-max(1, len(run["losses"]) // 10) :])


def training() -> str:
    """README: the training runs, a line for each arm."""
    arms = by_arm(*BF16_RUNS)
    lines = []
    for arm, runs in arms.items():
        if not runs:
            continue
        mean = {
            key: statistics.fmean(run[key] for run in runs) for key in ("held_out", "ms_a_step")
        }
        loss = statistics.fmean(map(last, runs))
        room = statistics.fmean(run["bytes_temporary"] for run in runs) / 1e9
        lines.append((arm, len(runs), f"{loss:.4f}", f"{mean['held_out']:.4f}",
                      f"{mean['ms_a_step']:.1f}", f"{room:.1f}"))  # fmt: skip
    head = "runs in | seeds | loss, last 100 steps | held out | ms a step | temporaries, GB"
    runs = [run for some in arms.values() for run in some]
    return table(head, lines, "lrrrrr") + ("\n" + card(runs) + "\n" if runs else "")


def training_runs() -> str:
    """docs/numerics.md: every training run beside bf16."""
    return every_run(*BF16_RUNS)


def every_run(name: str, arms: tuple[str, ...]) -> str:
    """Returns a line for each run of a file; gaps are to the first arm's run of the same seed."""
    base, found = arms[0], by_arm(name, arms)
    twins = {run["seed"]: run for run in found[base]}
    lines = []
    for arm, runs in found.items():
        for run in runs:
            twin = twins.get(run["seed"])
            gap = "" if arm == base or not twin else f"{100 * (last(run) / last(twin) - 1):+.2f} %"
            cosines = [run["cosine"].get(when, {}).get("all") for when in ("start", "end")]
            lines.append((arm, run["seed"], f"{last(run):.4f}", gap, f"{run['held_out']:.4f}",
                          f"{run['ms_a_step']:.1f}",
                          *("" if c is None else f"{c:.4f}" for c in cosines)))  # fmt: skip
    head = f"arm | seed | loss, last 100 | gap to {base} | held out | ms a step"
    head += " | cosine at start | at end"
    return table(head, lines, "lrrrrrrr")


# ---- scales that columns share ------------------------------------------------------------------


def of_data(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Returns rows by data and spread. Of a training run: all matrices, the worst or the mean."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        spreads = found.setdefault(row["data"].partition(":")[0], {})
        spreads.setdefault(row["spread"], []).append(row)
    how = dict.fromkeys(("blocks", "whole"), statistics.fmean)
    keys = ("own_worst", "worst", "own_total", "total", "increase", "blocks", "whole")
    return {
        data: {spread: {key: how.get(key, max)(row[key] for row in some) for key in keys}
               for spread, some in spreads.items()}
        for data, spreads in found.items()
    }  # fmt: skip


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def column_errors() -> str:
    """docs/numerics.md: errors of gradients to weights, with scales that columns share."""
    spreads, errors = (8, 9, 10, 11, 12), ("own_worst", "worst", "own_total", "total")
    lines = []
    for data, rows in of_data(stored("shared_columns.json")).items():
        found = [percent(rows[CHOSEN][key], 2) for key in errors]
        lines.append((data, *found, *(percent(rows[s]["increase"], 2) for s in spreads)))
    head = "dy | worst column: own scale | shared | all of dw: own scales | shared"
    head += "".join(f" | increase at 2^{s}" for s in spreads)
    return table(head, lines, "lrrrrrrrrr")


def column_shares() -> str:
    """docs/numerics.md: the share of blocks whose columns share a scale."""
    spreads, lines = (6, 8, 9, 10, 11, 12), []
    for data, rows in of_data(stored("shared_columns.json")).items():
        if "at the limit" not in data:
            found = [(percent(rows[s]["blocks"]), percent(rows[s]["whole"])) for s in spreads]
            lines.append((data, *map(", ".join, found)))
    return table("dy" + "".join(f" | 2^{s}" for s in spreads), lines, "l" + "r" * len(spreads))


def column_runs() -> str:
    """docs/numerics.md: training with and without scales that columns share."""
    return every_run(*COLUMN_RUNS)


def column_watch() -> str:
    """docs/numerics.md: how many blocks share over a training run, the mean over seeds."""
    runs = by_arm(*COLUMN_RUNS)["fp8"]
    lines = []
    for step in runs[0]["columns"] if runs else ():
        at = [run["columns"][step] for run in runs]
        for matrix in at[0]:
            means = [statistics.fmean(one[matrix][key] for one in at)
                     for key in ("shared", "whole", "underflow")]  # fmt: skip
            lines.append((step, matrix, *(percent(mean, 2) for mean in means)))
    head = "step | gradient to the result of | blocks that share | in every step | underflows"
    return table(head, lines, "rlrrr")


def regret() -> str:
    """docs/measured.md: how good the cost model's choices are."""
    data = fit_cost.read()
    head = "GEMMs | number | regret, mean | worst | above 8 %"
    lines = [
        (name, r.count, f"{r.mean:.1%}", f"{r.worst:.0%}", r.above)
        for name, r in fit_cost.summary(data, fit_cost.H200).items()
    ]
    return table(head, lines, "lrrrr")


def decode() -> str:
    """docs/moe.md: a layer with FP8 weights beside its limits."""
    rows = []
    for kind in ("MoE layer with FP8 weights, ", "whole DeepSeek-V3 layer with FP8 weights, "):
        some = [row for row in stored(H200) if row["op"].startswith(kind)]
        some.sort(key=lambda row: row["limit_us"])
        what = kind.split(" with ")[0].replace("DeepSeek-V3 ", "")
        rows += [(f"{what}, {row['op'].removeprefix(kind)}", row) for row in some]
    lines = [
        (name, row["experts"], f"{row['us']:.0f}", f"{row['limit_us']:.0f}",
         f"{row['times_limit']:.2f}")
        for name, row in rows
    ]  # fmt: skip
    head = "what | experts with tokens | µs | limit, µs | times the limit"
    about = "\n" + card([row for _, row in rows]) + "\n" if rows else ""
    return table(head, lines, "lrrrr") + about


BLOCKS = {
    "regret": regret,
    "decode": decode,
    "speed": speed,
    "others": others,
    "layers": layers,
    "layers-h100": layers_h100,
    "slower": slower,
    "casts": casts,
    "memory": memory,
    "host": host,
    "training": training,
    "training-runs": training_runs,
    "column-errors": column_errors,
    "column-shares": column_shares,
    "column-runs": column_runs,
    "column-watch": column_watch,
    "frameworks": frameworks.text,
    "framework-losses": frameworks.losses,
    "simulation": lambda: simulate.text() + "\n",
}


def rewritten(text: str) -> str:
    """Returns the text of a page with its blocks made anew."""
    return MARKED.sub(lambda block: block[1] + BLOCKS[block[2]]() + block[4], text)


def stale() -> list[str]:
    """Returns the pages whose blocks differ from the stored rows."""
    pages = {page: (ROOT / page).read_text() for page in PAGES}
    return [page for page, text in pages.items() if rewritten(text) != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="name the pages that are out of date")
    what.add_argument("--write", action="store_true", help="bring them up to date")
    args = parser.parse_args()
    pages = stale()
    for page in pages:
        print(f"{page}: figures differ from what is stored")
        if args.write:
            (ROOT / page).write_text(rewritten((ROOT / page).read_text()))
    return 1 if args.check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
