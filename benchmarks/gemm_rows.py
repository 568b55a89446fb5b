"""Times GEMMs in turn with a live DeepGEMM: ours, theirs, ours, theirs, with a cold L2 each time.

A burst has all launches of one shape, of both sides. The GPU rests between bursts, so that each
shape runs at the clock of a short burst. Results of both sides are checked first.
"""

import concurrent.futures
import dataclasses
import os
import statistics
from collections.abc import Callable

import deepgemm_peer
import jax
import numpy as np
from deepgemm_peer import Compiling, Job, Peer
from protocol import beside, progress, row

from jax_fp8gemm._core.layout import ROW_BLOCKS
from jax_fp8gemm._core.variants import VARIANTS
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import operands as made_up
from jax_fp8gemm._tools import timing

WRONG = 1e-5  # of the sampled error, far above what rounding to bf16 leaves
REPS, READ_REPS = 15, 7


@dataclasses.dataclass
class Case:
    """One row to measure: its op, the GEMM, and the sizes of its groups.

    shared: the share of rhs blocks with common column scales, for weight gradients.
    """

    op: str
    problem: Problem
    sizes: np.ndarray | None = None
    shared: float = 0.0

    def operands(self) -> tuple:
        return made_up.random_operands(self.problem, self.sizes, shared=self.shared)

    @property
    def job(self) -> Job:
        return Job(self.problem, None if self.sizes is None else tuple(map(int, self.sizes)))

    @property
    def rows(self) -> int | None:
        """Rows of lhs that belong to a group, of all groups together; None means all."""
        return int(self.sizes.sum()) if VARIANTS[self.problem.variant].groups == "m" else None


def measure(cases: list[Case], compiling: Compiling, reps: int = REPS) -> list[dict]:
    """Returns a row for every case, with the peer's times where there is a peer."""
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        operands = list(pool.map(Case.operands, cases))
        progress(f"{len(cases)} shapes, operands made")
        compiled = pool.map(
            lambda c, own: made_up.compiled(c.problem, None, own), cases, operands
        )  # fmt: skip
        ours = dict(zip((c.op for c in cases), compiled, strict=True))
        outs = list(pool.map(lambda run: jax.block_until_ready(run()), ours.values()))
        progress("ours compiled")
        compiling.wait()
        progress("the peer compiled")
        peers = {c.op: p for c, own in zip(cases, operands, strict=True) if (p := peer_of(c, own))}
        theirs = [peers[op].out() if op in peers else None for op in ours]
        both = list(zip(outs, theirs, strict=True))
        errors = dict(zip(ours, pool.map(errors_of, cases, operands, both), strict=True))
        del outs, theirs, both
    progress("checked")
    for op in [op for op, (own, _) in errors.items() if not own <= WRONG]:
        print(f"WRONG, left out: {op}, error {errors[op][0]:.1e}", flush=True)
        del ours[op]
    for op in [op for op in peers if op not in ours or not errors[op][1] <= WRONG]:
        print(f"the peer is left out: {op}, error {errors[op][1]:.1e}", flush=True)
        del peers[op]
    contenders, bursts = in_turn(ours, peers)
    ran = timing.device_kernels(contenders, reps, burst=bursts)
    progress("timed, flushed by writing")
    read = timing.device_microseconds(ours, READ_REPS, timing.KERNEL, burst=True, flush="read")
    progress("timed, flushed by reading")
    rows = []
    for case in (c for c in cases if c.op in ours):
        own, theirs = errors[case.op]
        extra = {
            "us_of": timing.KERNEL,
            "us_read_flush": round(statistics.median(read[case.op]), 2),
            "config": str(select(case.problem)),
            "error": own,
            **({"shared_blocks": case.shared} if case.problem.tiles[1] == ROW_BLOCKS else {}),
            **peer_fields(case, ran.get((case.op, "peer")), theirs),
        }
        times = timing.sums(ran[case.op, "ours"], timing.KERNEL)
        rows.append(row(case.problem, case.op, times, case.rows, **extra))
    return rows


def in_turn(ours: dict[str, Callable], peers: dict[str, Callable]) -> tuple[dict, list]:
    """Returns contenders, and bursts of one shape each with both sides in turn."""
    contenders, bursts = {}, []
    for op, run in ours.items():
        sides = {(op, "ours"): run} | ({(op, "peer"): peers[op]} if op in peers else {})
        contenders |= sides
        bursts.append(list(sides))
    return contenders, bursts


def peer_of(case: Case, operands: tuple) -> Peer | None:
    if deepgemm_peer.library() is None:
        return None
    try:
        return Peer(case.problem, operands, case.sizes)
    except Exception as error:  # whatever somebody else's package raises
        print(f"no peer for {case.op}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None


def errors_of(case: Case, operands: tuple, outs: tuple) -> tuple[float, float | None]:
    """Returns the sampled errors of both sides."""
    found = [
        None if out is None else float(f"{made_up.sample_error(case.problem, out, operands):.2g}")
        for out in outs
    ]
    return tuple(found)


def peer_fields(case: Case, launches: list | None, error: float | None) -> dict:
    """Returns what a row says of the peer: its GEMM kernel alone, as of ours.

    Not all kernels of a launch: copies of the flush's argument lie between two flushes, too.
    """
    if launches is None:
        return {}
    if not all(any(deepgemm_peer.KERNEL in name for name, _ in launch) for launch in launches):
        print(f"{case.op}: the trace has no kernel of the peer, which is left out", flush=True)
        return {}
    times = timing.sums(launches, deepgemm_peer.KERNEL)
    fields = beside(deepgemm_peer.name_of(case.problem), times, deepgemm_peer.version())
    return {**fields, "peer_us_of": deepgemm_peer.KERNEL, "peer_error": error}


def ready(cases: list[Case]) -> Compiling:
    """Starts to compile the peer's kernels for these cases, in other processes."""
    jax.devices()  # says early where no GPU is
    return Compiling([case.job for case in cases])
