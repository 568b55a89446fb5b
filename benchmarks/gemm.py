"""Times dense products on the GPU at hand, beside what else a JAX user has: device time, cold L2.

python benchmarks/gemm.py --out benchmarks/results/nvidia-h200.json
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import shapes  # noqa: E402

import jax_fp8gemm as fp8  # noqa: E402
from jax_fp8gemm import _native, reference, tuning  # noqa: E402
from jax_fp8gemm import config as configs  # noqa: E402

PEAK = 1763e12  # FLOP/s with promotion, measured: docs/measured.md
BANDWIDTH = 4.4e12  # B/s, read only, measured
REPS = 15
PEER_SHAPES = ("m64", "m4096", "square")


def roofline_us(p: configs.Problem) -> float:
    return 1e6 * max(2 * p.m * p.n * p.k / PEAK, traffic(p) / BANDWIDTH)


def traffic(p: configs.Problem) -> int:
    """Returns the bytes of a product when every operand is read, and the output written, once."""
    return p.m * p.k + p.n * p.k + (4 if p.out == "f32" else 2) * p.m * p.n


def row(p: configs.Problem, op: str, times: list[float], **extra) -> dict:
    us = statistics.median(times)
    low, high = (sorted(times)[round(q * (len(times) - 1))] for q in (0.1, 0.9))
    return {
        "op": op, "variant": p.variant, "m": p.m, "n": p.n, "k": p.k, "g": p.g,
        "scales": p.scales, "out": p.out, "us": round(us, 2), "p10": round(low, 2),
        "p90": round(high, 2), "tflops": round(2e-6 * p.m * p.n * p.k / us, 1),
        "gbs": round(1e-3 * traffic(p) / us, 1), "roofline": round(roofline_us(p) / us, 3),
        **extra,
    }  # fmt: skip


def facts() -> dict:
    clocks = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit",
         "--format=csv,noheader"], capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    commit = os.environ.get("JAX_FP8GEMM_COMMIT", "")
    return {"commit": commit, "date": str(datetime.date.today()), "device": clocks}


def all_shapes(only: str) -> list[shapes.Shape]:
    found = [*shapes.DENSE, *shapes.WEIGHT_GRADIENT]
    return [shape for shape in found if only in shape.name]


def problem_of(shape: shapes.Shape) -> configs.Problem:
    kind = jax.devices()[0].device_kind
    return configs.Problem(
        "dense", shape.m, shape.n, shape.k, 1, shape.scales, shape.out, device=kind
    )


def peers(lhs: fp8.QArray, rhs: fp8.QArray) -> dict:
    """Returns what a JAX user has today, as jitted functions of the same operands."""

    def dequantise_then_bf16(lhs, rhs):
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
        "dequantise, bf16 dot": (jax.jit(dequantise_then_bf16), (lhs, rhs)),
        "cuBLASLt, one scale": (jax.jit(cublaslt_per_tensor), (lhs, rhs)),
        "bf16 dot": (jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b)), (left, right)),
    }
    return {name: (lambda f=f, a=a: f(*a)) for name, (f, a) in made.items() if runs(name, f, a)}


def runs(name: str, function, operands) -> bool:
    """Whether a peer works with what is installed here; says so where it does not."""
    try:
        jax.block_until_ready(function(*operands))
    except jax.errors.JaxRuntimeError as error:
        print(f"{name} does not run here: {str(error).splitlines()[0]}")
        return False
    return True


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def products(only: str) -> list[dict]:
    """Times every shape in bursts, flushed by writing and by reading; then beside the peers."""
    listed = [(shape, problem_of(shape)) for shape in all_shapes(only)]
    operands = {shape.name: tuning.random_operands(problem) for shape, problem in listed}
    progress(f"{len(listed)} shapes, operands made")
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        made = pool.map(lambda a: tuning.compiled(a[1], None, operands[a[0].name]), listed)
        contenders = dict(zip((shape.name for shape, _ in listed), made, strict=True))
    progress("compiled")
    write = tuning.device_microseconds(contenders, REPS, tuning.KERNEL, burst=True)
    progress("timed, flushed by writing")
    read = tuning.device_microseconds(contenders, 7, tuning.KERNEL, burst=True, flush="read")
    progress("timed, flushed by reading")
    anchors = json.loads((HERE / "anchors.json").read_text())["us"]
    rows = []
    for shape, problem in listed:
        peer = anchors[shape.scales][str(shape.m)][f"{shape.n}x{shape.k}"]
        extra = {
            "peer": "DeepGEMM (stored, benchmarks/anchors.json)",
            "peer_us": peer,
            "us_read_flush": round(statistics.median(read[shape.name]), 2),
            "config": str(configs.select(problem)),
        }
        rows.append(row(problem, shape.name, write[shape.name], **extra))
    for shape, problem in listed:
        if shape.out == "bf16" and any(part in shape.name.split("_") for part in PEER_SHAPES):
            rows += beside_peers(shape, problem, contenders[shape.name], operands[shape.name])
    return rows


def beside_peers(shape, problem, ours, operands) -> list[dict]:
    """Times ours and the peers launch by launch in turn; ours is each row's `us`."""
    them = peers(*operands)
    ran = tuning.device_microseconds({"ours": ours, **them}, 5)
    progress(f"{shape.name} beside {len(them)} peers")
    return [
        row(problem, f"{shape.name}, in turn", ran["ours"], peer=name,
            peer_us=round(statistics.median(ran[name]), 2))
        for name in them
    ]  # fmt: skip


def matmul() -> list[dict]:
    """Times fp8_matmul with XLA's casts, forward and forward + backward, beside bf16."""
    m, n, k = 4096, 4096, 7168
    problem = configs.Problem("dense", m, n, k)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    rows = []
    for name, dot in (("fp8_matmul", fp8.fp8_matmul), ("bf16 dot", jnp.dot)):
        forward = jax.jit(dot)
        both = jax.jit(lambda x, w, dy, dot=dot: jax.vjp(dot, x, w)[1](dy))
        runs = {
            "forward": lambda f=forward: f(x, w),
            "forward + backward": lambda f=both: f(x, w, dy),
        }
        for what, launches in tuning.device_kernels(runs, 7, burst=True).items():
            total = [sum(us for _, us in launch) for launch in launches]
            ours = [
                sum(us for kernel, us in launch if tuning.KERNEL in kernel) for launch in launches
            ]
            middle = statistics.median(ours)
            extra = {"us_products": round(middle, 2)} if name == "fp8_matmul" else {}
            if extra:
                extra["us_casts"] = round(statistics.median(total) - middle, 2)
            rows.append(row(problem, f"{name}, {what}", total, **extra))
    return rows


def host() -> list[dict]:
    """Times what a call costs the host: compiling, loading, and launching a tiny product."""
    problem = configs.Problem("dense", 64, 64, 256)
    cold = configs.GemmConfig("persistent", 256, 128, 3, "lhs", group_m=31)  # used by nobody
    big = configs.Problem("dense", 4096, 4096, 7168)
    made = _native.compile(configs.attributes(big, cold))
    operands = tuning.random_operands(problem)

    @jax.jit
    def chain(lhs, rhs, init):
        for _ in range(200):
            init = fp8.gemm(lhs, rhs, out_dtype=jnp.float32, init=init)
        return init

    init = jnp.zeros((64, 64))
    jax.block_until_ready(chain(*operands, init))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(chain(*operands, init))
        times.append(1e6 * (time.perf_counter() - start) / 200)
    graphs = "command_buffer=" not in os.environ.get("XLA_FLAGS", "")
    name = "one call of 200 in a program, " + ("CUDA graph" if graphs else "launched one by one")
    return [
        {"op": f"compile, {made['origin']}", "us": round(1e6 * made["seconds"])},
        {"op": name, "us": round(statistics.median(times), 2)},
    ]


def summary(rows: list[dict]) -> None:
    for scales, name in (("1x128_128x128", "dense"), ("1x128_1x128", "weight gradient")):
        ratios = {
            r["op"]: r["peer_us"] / r["us"]
            for r in rows
            if r.get("scales") == scales and "DeepGEMM" in r.get("peer", "")
        }
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
            worst = sorted(ratios.items(), key=lambda item: item[1])[:6]
            print(f"{name}: DeepGEMM µs / ours, geometric mean {mean:.3f} of {len(ratios)} rows")
            print("  lowest: " + ", ".join(f"{op} {ratio:.3f}" for op, ratio in worst))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(HERE / "results/nvidia-h200.json"))
    parser.add_argument("--rows", default="", help="only shapes whose name contains this")
    parser.add_argument("--host-only", action="store_true", help="only what a call costs the host")
    options = parser.parse_args()
    rows = host() if options.host_only else [*products(options.rows), *matmul(), *host()]
    rows = [{**r, **facts()} for r in rows]
    path = pathlib.Path(options.out)
    if options.host_only and path.exists():
        rows = json.loads(path.read_text()) + rows
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    for r in rows:
        if "config" in r:
            print(
                f"{r['op']:24} {r['us']:8.2f} µs  {r['peer_us'] / r['us']:.3f} of DeepGEMM's speed"
            )
    summary(rows)


START = time.perf_counter()
if __name__ == "__main__":
    main()
