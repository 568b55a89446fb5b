"""Times dense products on the GPU at hand, beside what else a JAX user has: device time, cold L2.

python benchmarks/gemm.py
"""

import argparse
import concurrent.futures
import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import shapes
from protocol import ANCHORS, deepgemm, progress, row, runs, save, summary

import jax_fp8gemm as fp8
from jax_fp8gemm import tuning
from jax_fp8gemm._bind.native import TARGET
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem, attributes

REPS = 15
CALLS = 200  # in a program whose host time is measured
BESIDE_PEERS = ("ffn_up_m64", "ffn_up_m4096", "attention_out_m4096", "square")


def all_shapes(only: str) -> list[shapes.Shape]:
    found = [*shapes.DENSE, *shapes.WEIGHT_GRADIENT]
    return [shape for shape in found if only in shape.name]


def problem_of(shape: shapes.Shape) -> Problem:
    kind = jax.devices()[0].device_kind
    return Problem("dense", shape.m, shape.n, shape.k, 1, shape.scales, shape.out, device=kind)


def peers(lhs: fp8.QArray, rhs: fp8.QArray) -> dict:
    """Returns what a JAX user has today, as jitted functions of the same operands."""

    def dequantize_then_bf16(lhs, rhs):
        left = reference.dequantize(lhs.qvalue, lhs.scale, lhs.tile).astype(jnp.bfloat16)
        right = reference.dequantize(rhs.qvalue, rhs.scale, rhs.tile).astype(jnp.bfloat16)
        return jnp.einsum("mk,nk->mn", left, right)

    def cublaslt_per_tensor(lhs, rhs):  # an easier job: one scale, no promotion
        return jnp.einsum("mk,nk->mn", lhs.qvalue, rhs.qvalue, preferred_element_type=jnp.bfloat16)

    def bf16(lhs, rhs):
        left, right = (q.qvalue.astype(jnp.bfloat16) for q in (lhs, rhs))
        return left, right

    left, right = jax.jit(bf16)(lhs, rhs)
    made = {
        "dequantize, bf16 dot": (jax.jit(dequantize_then_bf16), (lhs, rhs)),
        "cuBLASLt, one scale": (jax.jit(cublaslt_per_tensor), (lhs, rhs)),
        "bf16 dot": (jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b)), (left, right)),
    }
    return {name: (lambda f=f, a=a: f(*a)) for name, (f, a) in made.items() if runs(name, f, a)}


def products(only: str) -> Iterator[list[dict]]:
    """Times every shape in bursts, flushed by writing and by reading; then beside the peers."""
    listed = [(shape, problem_of(shape)) for shape in all_shapes(only)]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda a: (a[0].name, tuning.random_operands(a[1])), listed)
        operands = dict(found)
        progress(f"{len(listed)} shapes, operands made")
        made = pool.map(lambda a: tuning.compiled(a[1], None, operands[a[0].name]), listed)
        contenders = dict(zip((shape.name for shape, _ in listed), made, strict=True))
    progress("compiled")
    write = tuning.device_microseconds(contenders, REPS, tuning.KERNEL, burst=True)
    progress("timed, flushed by writing")
    read = tuning.device_microseconds(contenders, 7, tuning.KERNEL, burst=True, flush="read")
    progress("timed, flushed by reading")
    rows = []
    for shape, problem in listed:
        peer = ANCHORS[shape.scales][str(shape.m)][f"{shape.n}x{shape.k}"]
        extra = {
            **deepgemm(peer),
            "us_read_flush": round(statistics.median(read[shape.name]), 2),
            "config": str(select(problem)),
        }
        name = "gradient: " if shape.scales == "1x128_1x128" else "dense: "
        rows.append(row(problem, name + shape.name, write[shape.name], **extra))
    yield rows
    for shape, problem in listed:
        if shape.name in BESIDE_PEERS:
            yield beside_peers(shape, problem, contenders[shape.name], operands[shape.name])
            yield beside_torch(shape, problem, statistics.median(write[shape.name]))


def beside_peers(shape, problem, ours, operands) -> list[dict]:
    """Times ours and the peers launch by launch in turn; ours is each row's `us`."""
    them = peers(*operands)
    ran = tuning.device_microseconds({"ours": ours, **them}, 5)
    progress(f"{shape.name} beside {len(them)} peers")
    return [
        row(problem, f"beside {name}: {shape.name}", ran["ours"], peer=name,
            peer_us=round(statistics.median(ran[name]), 2))
        for name in them
    ]  # fmt: skip


def beside_torch(shape, problem, us: float) -> list[dict]:
    """Times torch's block-scaled product (cuBLASLt's) by events, which include its launch."""
    name = "torch._scaled_mm, 1x128 by 128x128"

    def times() -> list[float]:
        import torch

        m, n, k = problem.m, problem.n, problem.k
        a, b = (64 * torch.randn(rows, k, device="cuda") for rows in (m, n))
        a, b = (x.clamp(-448, 448).to(torch.float8_e4m3fn) for x in (a, b))
        a_scale = torch.rand(k // 128, m, device="cuda").t()  # rows next to each other
        b_scale = torch.rand(n // 128, k // 128, device="cuda").t()
        flush, found = torch.empty(tuning.FLUSH_BYTES, dtype=torch.uint8, device="cuda"), []
        for _ in range(REPS + 1):
            flush.zero_()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16)
            events[1].record()
            torch.cuda.synchronize()
            found.append(1e3 * events[0].elapsed_time(events[1]))
        return found[1:]

    if not runs(name, times, ()):
        return []
    peer_us = round(statistics.median(times()), 2)
    return [row(problem, f"beside {name}: {shape.name}", [us], peer=name, peer_us=peer_us)]


def matmul() -> list[dict]:
    """Times fp8_matmul with its casts, forward and forward + backward, beside bf16."""
    m, n, k = 4096, 4096, 7168
    problem = Problem("dense", m, n, k)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    rows = []
    for name, dot in (("fp8_matmul", fp8.fp8_matmul), ("bf16 dot", jnp.dot)):
        forward, both = jax.jit(dot), jax.jit(functools.partial(with_gradients, dot))
        contenders = {
            "forward": lambda f=forward: f(x, w),
            "forward + backward": lambda f=both: f(x, w, dy),
        }
        for what, launches in tuning.device_kernels(contenders, 7, burst=True).items():
            total = [sum(us for _, us in launch) for launch in launches]
            ours = [
                sum(us for kernel, us in launch if tuning.KERNEL in kernel) for launch in launches
            ]
            middle = statistics.median(ours)
            extra = {"us_products": round(middle, 2)} if name == "fp8_matmul" else {}
            if extra:
                extra["us_casts"] = round(statistics.median(total) - middle, 2)
            count = 3 if what == "forward + backward" else 1
            rows.append(row(problem, f"jitted {name}: {what}", total, products=count, **extra))
    return rows


def with_gradients(dot, x, w, dy):
    y, pull = jax.vjp(dot, x, w)
    return y, pull(dy)


def host() -> list[dict]:
    """Times what a call in a program costs the host: a chain of tiny products, until it has run.

    Launched one by one, calls without rows tell what of it is XLA's own: they return before
    anything is encoded or launched.
    """
    problem = Problem("dense", 1, 8, 128)  # so small that the host is what takes time
    specification = attributes(problem, select(problem))

    @jax.jit
    def chain(lhs, rhs, init):
        for _ in range(CALLS):
            init = fp8.gemm(lhs, rhs, out_dtype=jnp.float32, init=init)
        return init

    @jax.jit
    def without_rows(*operands):
        result = jax.ShapeDtypeStruct((0, 8), jnp.bfloat16)
        call = jax.ffi.ffi_call(TARGET, result, has_side_effect=True)  # else XLA would drop it
        return [call(*operands, **specification) for _ in range(CALLS)][-1]

    lhs, rhs, lhs_scale, rhs_scale = (0, 128), (8, 128), (1, 0), (1, 4)  # kernel level
    nothing = [jnp.zeros(shape, FP8) for shape in (lhs, rhs)]
    nothing += [jnp.zeros(shape) for shape in (lhs_scale, rhs_scale)]
    graphs = "command_buffer=" not in os.environ.get("XLA_FLAGS", "")
    name = "host: in a CUDA graph" if graphs else "host: launched one by one"
    contenders = {name: (chain, (*tuning.random_operands(problem), jnp.zeros((1, 8))))}
    if not graphs:
        contenders[f"{name}, without rows"] = (without_rows, nothing)
    times = {name: [] for name in contenders}
    for turn, (name, (run, operands)) in itertools.product(range(21), contenders.items()):
        start = time.perf_counter()
        jax.block_until_ready(run(*operands))
        if turn > 0:  # the first compiles
            times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return [
        {"op": f"{name}, per call of {CALLS}", "us": round(statistics.median(us), 2),
         "least": round(min(us), 2)} for name, us in times.items()
    ]  # fmt: skip


def compiling() -> list[dict]:
    """Times two processes that need one kernel: the first compiles it, the second loads it."""
    big = Problem("dense", 4096, 4096, 7168)
    wanted = attributes(big, select(big))
    wanted = {k: v if isinstance(v, str) else int(v) for k, v in wanted.items()}
    code = f"""
from jax_fp8gemm._bind import native as _native
made = _native.compile({wanted})
print(made["origin"], made["seconds"])
"""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            # NVRTC has a cache of its own, which knows the kernel from before.
            environment = {
                **os.environ, "JAX_FP8GEMM_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"
            }  # fmt: skip
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            origin, seconds = done.stdout.split()
            rows.append({"op": f"host: kernel from {origin}", "us": round(1e6 * float(seconds))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--rows", default="", help="only shapes whose name contains this")
    parser.add_argument("--host-only", action="store_true", help="only what a call costs the host")
    options = parser.parse_args()
    if options.host_only:
        parts = iter([host()])
    else:
        parts = itertools.chain(
            products(options.rows), (part() for part in (matmul, host, compiling))
        )
    for rows in parts:
        save(rows, options.out)
        summary(rows, "dense: ")
        summary(rows, "gradient: ")
        for r in rows:
            if "DeepGEMM" not in r.get("peer", ""):
                print(r["op"], r["us"], "µs", r.get("peer_us", ""), r.get("us_casts", ""))


if __name__ == "__main__":
    main()
