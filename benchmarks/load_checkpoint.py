"""Times checkpoint.load on a CPU, beside a plain read of the same bytes into device arrays.

    python benchmarks/load_checkpoint.py    # writes 1 GB to a temporary folder; stores its rows

Both take turns. "cold": the kernel is asked to forget the file's pages before each, so the disk is
read. "warm": the pages are in memory. The plain read is numpy.fromfile and jax.device_put, tensor
by tensor. The first run of each is not counted.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from protocol import HERE, beside, progress, save

from jax_fp8gemm import checkpoint
from jax_fp8gemm._checkpoint.header import read_header
from jax_fp8gemm._core.layout import BLOCKS, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._tools.timing import spread

RESULTS = HERE / "results/cpu-checkpoint.json"
REPS = 7
EXPERTS, H, F = 22, 7168, 2048  # of a DeepSeek-V3 layer, as many as make 1 GB
MX_EXPERTS, MX_H, MX_F = 4, 2880, 2880  # of gpt-oss, in 53 MB: each number is looked up
PEER = "numpy.fromfile and device_put"


def write_block_fp8(folder: pathlib.Path, scale: float = 1) -> None:
    """Writes experts as DeepSeek-V3 stores them, in two files."""
    draw = np.random.default_rng(0)
    h, f = (round(n * scale) for n in (H, F))
    shapes = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    for file, numbers in enumerate((range(EXPERTS // 2), range(EXPERTS // 2, EXPERTS))):
        tensors = {}
        for i in numbers:
            for name, shape in shapes.items():
                qvalue = draw.integers(0, 0x7F, shape, np.uint8).view(FP8)
                scales = np.ones(scale_shape(shape, BLOCKS), np.float32)
                tensors[f"{i}.{name}.weight"] = QArray(*map(jnp.asarray, (qvalue, scales)))
        checkpoint.save(folder / f"{file}.safetensors", tensors)


def write_mxfp4(folder: pathlib.Path, scale: float = 1) -> None:
    """Writes experts as gpt-oss stores them, in one file."""
    draw = np.random.default_rng(0)
    h, f = (round(n * scale) // 32 * 32 for n in (MX_H, MX_F))
    tensors = {}
    for name, (n, k) in {"gate_up_proj": (2 * f, h), "down_proj": (h, f)}.items():
        shape = (MX_EXPERTS, n, k // 32)
        tensors[f"{name}_blocks"] = draw.integers(0, 256, (*shape, 16), np.uint8)
        tensors[f"{name}_scales"] = draw.integers(115, 125, shape, np.uint8)
    checkpoint.save(folder / "0.safetensors", tensors)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def ours(folder: pathlib.Path) -> list:
    return [checkpoint.load(file) for file in files_of(folder)]


def plain(folder: pathlib.Path) -> list:
    arrays = []
    for file in files_of(folder):
        for entry in read_header("plain", file).values():
            count = entry.end - entry.begin
            content = np.fromfile(file, np.uint8, count, offset=entry.begin)
            arrays.append(jax.block_until_ready(jax.device_put(content)))
    return arrays


def forget(folder: pathlib.Path) -> None:
    """Asks the kernel to drop the files' pages, so that they are read from the disk again."""
    for file in files_of(folder):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turn(folder: pathlib.Path, reps: int, cold: bool) -> tuple[list[float], list[float]]:
    """Returns µs of each run of ours and of the plain read."""
    times: dict[Callable, list[float]] = {ours: [], plain: []}
    for _ in range(reps + 1):
        for read in times:
            if cold:
                forget(folder)
            start = time.perf_counter()
            arrays = read(folder)
            times[read].append(1e6 * (time.perf_counter() - start))
            del arrays
    return times[ours][1:], times[plain][1:]


def measure(reps: int = REPS, scale: float = 1) -> list[dict]:
    rows = []
    cases = {"block FP8": write_block_fp8, "MXFP4 to E4M3": write_mxfp4}
    for name, write in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            write(path, scale)
            nbytes = sum(file.stat().st_size for file in files_of(path))
            progress(f"{name}: {nbytes / 1e9:.2f} GB are written")
            for state in ("cold", "warm"):
                times, peer = in_turn(path, reps, cold=state == "cold")
                us, low, high = spread(times)
                row = {
                    "op": f"load checkpoint: {name}, {state}", "bytes": nbytes, "us": round(us, 2),
                    "p10": round(low, 2), "p90": round(high, 2),
                    "gbs": round(1e-3 * nbytes / us, 3),
                    **beside(PEER, peer, f"numpy {np.__version__}, jax {jax.__version__}"),
                    "cpus": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1),
                }  # fmt: skip
                ratio = row["peer_us"] / row["us"]
                progress(f"{row['op']}: {row['gbs']} GB/s, {ratio:.2f} of a plain read's rate")
                rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--dry", action="store_true", help="store nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = measure()
    if not args.dry:
        save(rows, args.out)


if __name__ == "__main__":
    main()
