"""Times dense GEMMs on the GPU at hand, in turn with what else there is: device time, cold L2.

python benchmarks/gemm.py
"""

import argparse
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from deepgemm_peer import to_torch
from gemm_rows import Case, measure, ready
from protocol import beside, progress, row, runs, save, summary

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.native import TARGET
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem, attributes
from jax_fp8gemm._tools import operands as made_up
from jax_fp8gemm._tools import shapes, timing

CALLS = 200  # in a program whose host time is measured
BESIDE_PEERS = ("ffn_up_m64", "ffn_up_m4096", "attention_out_m4096", "square")
# The beginning of a row's name, its shapes, and the share of blocks with common column scales.
KINDS = (
    ("dense: ", shapes.DENSE, 0.0),
    ("gradient: ", shapes.WEIGHT_GRADIENT, 1.0),
    ("no scale shared, gradient: ", shapes.WEIGHT_GRADIENT, 0.0),
    ("drawn: ", shapes.drawn(), 0.0),
)


def problem_of(shape: shapes.Shape) -> Problem:
    kind = jax.devices()[0].device_kind
    return Problem("dense", shape.m, shape.n, shape.k, 1, shape.scales, shape.out, device=kind)


def products(only: str) -> list[dict]:
    """Times the tuned shapes, weight gradients, and shapes that no table was tuned for."""
    cases = [
        Case(kind + shape.name, problem_of(shape), shared=shared)
        for kind, listed, shared in KINDS
        for shape in listed
        if only in kind + shape.name
    ]
    return measure(cases, ready(cases))


def beside_all(only: str) -> Iterator[list[dict]]:
    for shape in shapes.DENSE:
        if shape.name in BESIDE_PEERS and only in shape.name:
            yield beside_peers(shape, problem_of(shape))


def peers(lhs: fp8.QArray, rhs: fp8.QArray) -> dict:
    """Returns what a JAX user has today, as jitted functions of the same operands."""

    def dequantize_then_bf16(lhs, rhs):
        left, right = (
            reference.dequantize(x.qvalue, x.scale, x.tile).astype(jnp.bfloat16) for x in (lhs, rhs)
        )
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


def torch_peer(lhs: fp8.QArray, rhs: fp8.QArray):
    """Returns torch's block-scaled product, which is cuBLASLt's, on the same operands."""
    import torch

    a, b = (to_torch(torch, x.qvalue) for x in (lhs, rhs))
    # The scales of one column of blocks are next to each other.
    a_scale = to_torch(torch, jax.block_until_ready(lhs.scale.T)).t()
    b_scale = to_torch(torch, rhs.scale).t()

    def run() -> None:
        torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16)
        torch.cuda.synchronize()

    run()
    return run


def beside_peers(shape: shapes.Shape, problem: Problem) -> list[dict]:
    """Times ours and the peers launch by launch in turn; ours is each row's `us`."""
    operands = made_up.random_operands(problem)
    them = peers(*operands)
    try:
        them["torch._scaled_mm, 1x128 by 128x128"] = torch_peer(*operands)
    except Exception as error:  # no torch, or a cuBLASLt without these scales
        print(f"torch._scaled_mm does not run here: {str(error)[:200]}", flush=True)
    contenders = {"ours": made_up.compiled(problem, None, operands), **them}
    ran = timing.device_kernels(contenders, 5)
    ours = timing.sums(ran["ours"], timing.KERNEL)
    progress(f"{shape.name} beside {len(them)} peers")
    return [
        row(problem, f"beside {name}: {shape.name}", ours, **beside(name, timing.sums(ran[name])))
        for name in them
    ]


def matmul() -> list[dict]:
    """Times fp8_matmul with its casts, forward and forward + backward, beside bf16."""
    m, n, k = 4096, 4096, 7168
    problem = Problem("dense", m, n, k)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    contenders = {}
    for name, dot in (("fp8_matmul", fp8.fp8_matmul), ("bf16 dot", jnp.dot)):
        forward, both = jax.jit(dot), jax.jit(functools.partial(with_gradients, dot))
        contenders[name, "forward"] = functools.partial(forward, x, w)
        contenders[name, "forward + backward"] = functools.partial(both, x, w, dy)
    kinds = ("forward", "forward + backward")
    bursts = [[("fp8_matmul", what), ("bf16 dot", what)] for what in kinds]
    ran = timing.device_kernels(contenders, 7, burst=bursts)
    rows = []
    for what, count in zip(kinds, (1, 3), strict=True):
        launches, theirs = ran["fp8_matmul", what], timing.sums(ran["bf16 dot", what])
        total, ours = timing.sums(launches), timing.sums(launches, timing.KERNEL)
        middle = statistics.median(ours)
        extra = {
            "us_products": round(middle, 2),
            "us_casts": round(statistics.median(total) - middle, 2),
            **beside("bf16 dot", theirs),
        }
        op = f"jitted fp8_matmul: {what}"
        rows.append(row(problem, op, total, products=count, **extra))
        rows.append(row(problem, f"jitted bf16 dot: {what}", theirs, products=count))
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
    contenders = {name: (chain, (*made_up.random_operands(problem), jnp.zeros((1, 8))))}
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


PARTS = ("products", "peers", "matmul", "host", "compiling")


def parts(options: argparse.Namespace) -> Iterator[list[dict]]:
    if "products" in options.only:
        yield products(options.rows)
    if "peers" in options.only:
        yield from beside_all(options.rows)
    if not options.rows:
        for part in (matmul, host, compiling):
            if part.__name__ in options.only:
                yield part()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--rows", default="", help="only shapes whose op contains this")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="default: all")
    options = parser.parse_args()
    for rows in parts(options):
        save(rows, options.out)
        for kind, _, _ in KINDS:
            summary(rows, kind)
        for r in rows:
            if "DeepGEMM" not in r.get("peer", ""):
                print(r["op"], r["us"], "µs", r.get("peer_us", ""), r.get("us_casts", ""))


if __name__ == "__main__":
    main()
