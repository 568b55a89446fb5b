"""What every benchmark shares: the form of a row, the roofline, where results go."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import subprocess
import time

import jax

from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.choice import file_name
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools.profile import LIMITS
from jax_fp8gemm._tools.timing import spread

HERE = pathlib.Path(__file__).parent
PEAK, _, BANDWIDTH = LIMITS["NVIDIA H200"]
START = time.perf_counter()


def results() -> pathlib.Path:
    """Returns where rows of the card at hand are stored."""
    return HERE / f"results/{file_name(jax.devices()[0].device_kind)}.json"


def version(package: str) -> str:
    """Returns the version of an installed package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def jax_version(cudnn: bool = False) -> str:
    """Returns the version of JAX, and of cuDNN where that library decides which kernel runs."""
    found = f"jax {jax.__version__}"
    if cudnn:
        # XLA gives ragged_dot a cuDNN kernel of its own from cuDNN 9.22 on.
        number = version("nvidia-cudnn-cu13") or version("nvidia-cudnn-cu12") or "unknown"
        found += f", cuDNN {number}"
    return found


def version_of(name: str) -> str:
    """Returns the version that a row names for one of JAX's or torch's peers."""
    if "torch" in name:
        return f"torch {version('torch')}"
    if "tokamax" in name:
        return f"tokamax {version('tokamax')}"
    return jax_version(cudnn="lax.ragged_dot" in name)


def beside(peer: str, times: list[float], peer_version: str = "") -> dict:
    """Returns what a row says of a peer that ran in the same process, launch by launch in turn."""
    us, low, high = spread(times)
    return {
        "peer": peer, "peer_version": peer_version or version_of(peer), "peer_us": round(us, 2),
        "peer_p10": round(low, 2), "peer_p90": round(high, 2), "same_run": True,
    }  # fmt: skip


def operations(p: Problem, rows: int) -> int:
    """Returns additions and multiplications of the rows that count."""
    return 2 * p.n * (p.m * p.k if VARIANTS[p.variant].groups == "k" else rows * p.k)


def traffic(p: Problem, rows: int) -> int:
    """Returns the bytes of a product when what counts of each operand is read or written once."""
    size = {"g": p.g, "m": p.m, "n": p.n, "k": p.k}
    table = VARIANTS[p.variant]
    elements = [math.prod(size[letter] for letter in dims) for dims in (table.rhs, table.out)]
    out_bytes = 4 if p.out == "f32" else 2
    if table.groups == "k":
        return p.m * p.k + elements[0] + out_bytes * elements[1]
    return rows * p.k + elements[0] + out_bytes * rows * p.n


def row(
    p: Problem,
    op: str,
    times: list[float],
    rows: int | None = None,
    *,
    products: int = 1,
    **extra,
) -> dict:
    """Returns a row of results.

    Args:
      products: of this size; three for forward and both gradients.
      rows: rows of lhs that count, of all groups together; default: all.
      times: µs of each launch; the row has their median, and the 10th and 90th percentile.
    """
    if rows is None:
        rows = p.m * (p.g if p.variant in ("batched", "masked") else 1)
    us, low, high = spread(times)
    flops, nbytes = products * operations(p, rows), products * traffic(p, rows)
    roofline = 1e6 * max(flops / PEAK, nbytes / BANDWIDTH)
    return {
        "op": op, "variant": p.variant, "m": p.m, "n": p.n, "k": p.k, "g": p.g,
        "scales": p.scales, "out": p.out, "us": round(us, 2), "p10": round(low, 2),
        "p90": round(high, 2), "tflops": round(1e-6 * flops / us, 1),
        "gbs": round(1e-3 * nbytes / us, 1), "roofline": round(roofline / us, 3),
        **extra,
    }  # fmt: skip


def runs(name: str, function, operands) -> bool:
    """Whether a peer works with what is installed here; says so where it does not."""
    try:
        jax.block_until_ready(function(*operands))
    except Exception as error:  # whatever somebody else's package raises
        print(f"{name} does not run here: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def facts() -> dict:
    """Returns the commit, the date, and the device with its driver, clock and power limit."""
    device = jax.devices()[0].device_kind
    if shutil.which("nvidia-smi"):
        device = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit",
             "--format=csv,noheader"], capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    commit = os.environ.get("JAX_FP8GEMM_COMMIT", "")
    return {"commit": commit, "date": str(datetime.date.today()), "device": device}


def save(rows: list[dict], out: str | None) -> None:
    """Writes rows with the commit and the date, in place of stored rows of the same op."""
    path = pathlib.Path(out) if out else results()
    stored = json.loads(path.read_text()) if path.exists() else []
    about = facts()
    fresh = {row["op"]: {**row, **about} for row in rows}
    if len(fresh) != len(rows):
        raise ValueError("two rows have the same op")
    kept = [row for row in stored if row["op"] not in fresh]
    path.write_text(
        "[\n" + ",\n".join(json.dumps(row) for row in [*kept, *fresh.values()]) + "\n]\n"
    )


def summary(rows: list[dict], name: str, peer: str = "DeepGEMM") -> str:
    """Prints, and returns, how rows whose op begins with `name` compare with a live peer."""
    found = [
        r
        for r in rows
        if r["op"].startswith(name) and r.get("same_run") and r["peer"].startswith(peer)
    ]
    if not found:
        return ""
    ratios = {r["op"]: r["peer_us"] / r["us"] for r in found}
    for r in found:
        print(f"{r['op']:44} {r['us']:8.2f} µs {r['tflops']:7.0f} TFLOP/s {ratios[r['op']]:6.3f}")
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    slower = sum(ratio < 1 for ratio in ratios.values())
    lowest = sorted(ratios.items(), key=lambda item: item[1])
    text = (
        f"== {name}{peer} µs / ours: geometric mean {mean:.3f}, worst {lowest[0][1]:.3f}, "
        f"slower in {slower} of {len(ratios)} rows"
    )
    print(text + "; lowest:")
    print("   " + ", ".join(f"{op.removeprefix(name)} {ratio:.3f}" for op, ratio in lowest[:6]))
    return text
