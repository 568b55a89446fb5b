"""DeepGEMM as a live peer: the same operands, in the same process, timed launch by launch in turn.

pip install tokenspeed-deepgemm==2.5.0.post20260604   # also needs torch, CUDA 13 and nvcc
python benchmarks/deepgemm_peer.py                    # compiles its kernels for every shape

It is no dependency. Where it cannot be imported, benchmarks say so and leave the peer out.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import os
import pathlib
import tempfile
import time

# Both are read when the GPU is first used. Torch needs room beside JAX's pool of memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
os.environ.setdefault("DG_JIT_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir(), "deep_gemm")))

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._core.layout import SCALE_BLOCK, round_up, scale_shape
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import shapes

PEER = "DeepGEMM"
PACKAGE = "tokenspeed-deepgemm"
KERNEL = "sm90_fp8_gemm"  # in the name of each of its kernels
PROCESSES = 10  # that compile its kernels
ROW_GROUPS = ("contiguous", "ragged")  # both are its contiguous layout, padded to whole blocks


@functools.cache
def library():
    """Returns (deep_gemm, torch), or None where they cannot be imported."""
    try:
        return importlib.import_module("deep_gemm"), importlib.import_module("torch")
    except Exception as error:  # no wheel, another torch, no nvcc, no GPU
        print(f"{PEER} is no peer here: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None


@functools.cache
def version() -> str:
    found = library()
    return f"{PACKAGE} {getattr(found[0], '__version__', 'unknown')}" if found else ""


def name_of(problem: Problem) -> str:
    """Returns the peer's name in a row: which of its functions, and what differs from ours."""
    if problem.variant == "ragged":
        return f"{PEER}, contiguous: the same rows, padded"
    if problem.scales == "1x128_1x128":
        return f"{PEER}, adds to its output"
    return PEER


# ---- Its functions -------------------------------------------------------------------------------


def call(deep_gemm, problem: Problem, lhs, rhs, out, groups, sizes):
    """Returns a function that launches DeepGEMM.

    Args:
      lhs, rhs: (FP8 numbers, scales) in its layouts.
      groups: an int32 vector: the group of each row, or the sizes.
      sizes: a list of int, which the host reads in its products grouped along k.
    """
    if problem.variant in ROW_GROUPS:
        run = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
        return functools.partial(run, lhs, rhs, out, groups)
    if problem.variant == "masked":
        expected = problem.m
        run = deep_gemm.m_grouped_fp8_gemm_nt_masked
        return functools.partial(run, lhs, rhs, out, groups, expected)
    if problem.variant == "ragged_contracting":
        run = deep_gemm.k_grouped_fp8_gemm_nt_contiguous
        return functools.partial(run, lhs, rhs, out, sizes, groups, out)
    if problem.scales == "1x128_1x128":
        return functools.partial(
            deep_gemm.fp8_gemm_nt, lhs, rhs, out, c=out, recipe=(1, 1, SCALE_BLOCK)
        )
    return functools.partial(deep_gemm.fp8_gemm_nt, lhs, rhs, out)


def padded(sizes: np.ndarray) -> np.ndarray:
    """Returns the group of each row of a contiguous layout, -1 for rows of padding."""
    rows = [np.repeat([i, -1], [n, -n % SCALE_BLOCK]) for i, n in enumerate(sizes)]
    return np.concatenate(rows).astype(np.int32)


def shapes_of(problem: Problem, sizes: np.ndarray | None) -> tuple:
    """Returns the shapes of lhs, rhs and out in its layouts."""
    p = problem
    if p.variant in ROW_GROUPS:
        m = len(padded(sizes))
        return (m, p.k), (p.g, p.n, p.k), (m, p.n)
    if p.variant == "masked":
        m = round_up(int(sizes.max()), 64)
        return (p.g, m, p.k), (p.g, p.n, p.k), (p.g, m, p.n)
    out = (p.g, p.m, p.n) if p.variant == "ragged_contracting" else (p.m, p.n)
    return (p.m, p.k), (p.n, p.k), out


def group_vector(problem: Problem, sizes: np.ndarray | None) -> np.ndarray | None:
    return padded(sizes) if problem.variant in ROW_GROUPS else sizes


def launcher(found, problem: Problem, lhs, rhs, sizes) -> tuple:
    """Returns (a function that launches it, its output), for tensors of torch.

    lhs, rhs: (FP8 numbers, row-major scales). Scales of rows are laid out here, ahead of the clock.
    """
    deep_gemm, torch = found
    aligned = deep_gemm.get_mn_major_tma_aligned_tensor
    lhs = lhs[0], aligned(lhs[1])
    rhs = rhs[0], aligned(rhs[1]) if problem.scales == "1x128_1x128" else rhs[1].contiguous()
    dtype = torch.float32 if problem.out == "f32" else torch.bfloat16
    out = torch.zeros(shapes_of(problem, sizes)[2], dtype=dtype, device="cuda")
    groups = group_vector(problem, sizes)
    if groups is not None:
        groups = torch.tensor(groups.tolist(), dtype=torch.int32, device="cuda")
    listed = None if sizes is None else [int(size) for size in sizes]
    return call(deep_gemm, problem, lhs, rhs, out, groups, listed), out


# ---- Compiling ahead -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A kernel to compile: one shape, and the sizes of its groups."""

    problem: Problem
    sizes: tuple[int, ...] | None = None

    @property
    def padded(self) -> "Job":
        """The same job for ragged groups as for contiguous ones: DeepGEMM pads them alike."""
        if self.problem.variant != "ragged":
            return self
        return Job(dataclasses.replace(self.problem, variant="contiguous"), self.sizes)


def compile_one(job: Job) -> float:
    """Launches DeepGEMM once on zeros, which leaves the kernel in its cache; returns seconds."""
    start, problem = time.perf_counter(), job.problem
    found = library()
    if found is None:
        raise RuntimeError("deep_gemm cannot be imported in a process of its own")
    torch = found[1]
    sizes = None if job.sizes is None else np.array(job.sizes)
    made = []
    for shape, tile in zip(shapes_of(problem, sizes)[:2], problem.tiles, strict=True):
        q = torch.zeros(shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        scale = torch.zeros(scale_shape(shape, tile), dtype=torch.float32, device="cuda")
        made.append((q.flatten() if problem.variant == "ragged_contracting" else q, scale))
    launch, _ = launcher(found, problem, *made, sizes)
    launch()
    torch.cuda.synchronize()
    del launch, made
    torch.cuda.empty_cache()
    return time.perf_counter() - start


def processes(count: int) -> concurrent.futures.Executor:
    """Returns a pool of new processes: a forked one could not use the GPU."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, mp_context=context)


class Compiling:
    """Kernels that other processes compile meanwhile. `wait` before anything is timed."""

    def __init__(self, jobs: list[Job], pool: concurrent.futures.Executor | None = None):
        self.futures: list[concurrent.futures.Future] = []
        if jobs and library():
            # Shapes that differ in m alone may share a kernel: let one compile it first.
            jobs = sorted({job.padded for job in jobs}, key=lambda job: job.problem.m)
            self.pool = pool or processes(min(PROCESSES, os.cpu_count() or 1, len(jobs)))
            self.futures = [self.pool.submit(compile_one, job) for job in jobs]

    def wait(self) -> int:
        """Waits for all and returns how many failed; a failure is not fatal here."""
        failed = 0
        for future in self.futures:
            error = future.exception()
            if error is not None:
                failed += 1
                print(f"{PEER} does not compile: {str(error)[:300]}", flush=True)
        if self.futures:
            self.pool.shutdown()  # frees the memory of the GPU too
        self.futures = []
        return failed


def every_job() -> list[Job]:
    dense = [*shapes.DENSE, *shapes.WEIGHT_GRADIENT, *shapes.drawn()]
    jobs = [
        Job(Problem("dense", s.m, s.n, s.k, 1, s.scales, s.out)) for s in dense
    ]  # fmt: skip
    return jobs + [Job(s.problem(), tuple(map(int, s.sizes()))) for s in shapes.GROUPED]


# ---- The peer of one shape -----------------------------------------------------------------------


def to_torch(torch, x: jax.Array):
    """Returns the same memory as a tensor, or a copy of FP8 where dlpack does not know the type."""
    if x.dtype != FP8:
        return torch.from_dlpack(x)
    try:
        return torch.from_dlpack(x)
    except Exception:  # of a version of jaxlib or torch
        as_bytes = jax.lax.bitcast_convert_type(x, jnp.uint8)
        return torch.from_dlpack(jax.block_until_ready(as_bytes)).view(torch.float8_e4m3fn)


class Peer:
    """DeepGEMM on operands of ours; calling it launches the kernel and waits for it."""

    def __init__(self, problem: Problem, operands: tuple, sizes: np.ndarray | None):
        self.problem, self.sizes = problem, sizes
        found = library()
        if found is None:
            raise RuntimeError("deep_gemm cannot be imported")
        self.torch = found[1]
        lhs, rhs = (QArray(x.qvalue, x.scale) for x in operands[:2])
        if problem.variant == "ragged":
            index = jnp.asarray(self.row_of_padded())
            lhs = jax.tree.map(lambda x: x[index], lhs)
        pairs = [(lhs.qvalue, lhs.scale), (rhs.qvalue, rhs.scale)]
        if problem.variant == "ragged_contracting":
            pairs = [(by_groups(q, sizes), scale) for q, scale in pairs]
        pairs = jax.block_until_ready(pairs)
        tensors = [tuple(to_torch(self.torch, x) for x in pair) for pair in pairs]
        self.launch, self.result = launcher(found, problem, *tensors, sizes)
        self()

    def __call__(self) -> None:
        self.launch()
        self.torch.cuda.synchronize()

    def row_of_padded(self) -> np.ndarray:
        """Returns which row of ours each row of the padded layout is; padding repeats a row."""
        groups, most = padded(self.sizes), max(int(self.sizes.sum()) - 1, 0)
        return np.minimum(np.cumsum(groups >= 0) - 1, most).clip(0).astype(np.int32)

    def out(self) -> jax.Array:
        """Returns one product in our layout; the memory is the peer's own, or a gathered copy."""
        self.result.zero_()  # some functions add to it
        self()
        out = jax.dlpack.from_dlpack(self.result)
        if self.problem.variant == "ragged":
            out = out[jnp.asarray(np.flatnonzero(padded(self.sizes) >= 0))]
        return jax.block_until_ready(out)


def by_groups(q: jax.Array, sizes: np.ndarray) -> jax.Array:
    """[rows, k] -> every group's [rows, k of the group], one after the other, flat."""
    cuts = np.cumsum(sizes)[:-1].tolist()
    return jnp.concatenate([part.reshape(-1) for part in jnp.split(q, cuts, axis=1)])


def main() -> None:
    if library() is None:
        raise SystemExit(1)
    start, jobs = time.perf_counter(), every_job()
    failed = Compiling(jobs).wait()
    seconds = time.perf_counter() - start
    print(f"{version()}: {len(jobs)} shapes compiled in {seconds:.0f} s, {failed} failed")


if __name__ == "__main__":
    main()
