"""Times an exchange of tokens on one GPU, all but its wire: device time, cold L2.

python benchmarks/exchange.py

Ragged GEMMs of which half of the rows lie past the groups, beside the real rows alone. The local
parts of an exchange: packing rows, unpacking them, sorting them by expert, and summing results. A
whole layer under shard_map over one device, beside the same layer without.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from protocol import BANDWIDTH, beside, progress, row, save

import jax_fp8gemm as fp8
from jax_fp8gemm._core.bits import map_rows, take_rows
from jax_fp8gemm._moe.exchange import make_slots, pack, sum_slots, to_slots, unpack
from jax_fp8gemm._moe.order import permutation_of, sum_rows
from jax_fp8gemm._ops.gemm import multiply
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import timing
from jax_fp8gemm._tools.operands import group_sizes, random_operands

REPS = 9
THREADS = 8  # compile at a time
TARGET = 3.5  # TB/s of the local parts
MOST_ZEROS, MOST_SHARDED = 1.03, 1.02  # times that of the peer
Rows = list[dict]
Program = tuple[Callable, tuple]  # jitted function, operands


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a layer over `devices`, as one of them sees it; DeepSeek-V3's (arXiv 2412.19437)."""

    t: int = 4096  # own tokens
    h: int = 7168
    f: int = 2048
    own: int = 8  # experts
    top_k: int = 8
    devices: int = 2
    nodes: int = 8  # devices of the all-to-all


# Experts, rows of the matrix, real ones, n, k: up and down of such a layer, and few rows a group.
GEMMS = [
    (8, 65536, 32768, 4096, 7168),
    (8, 65536, 32768, 7168, 2048),
    (32, 8192, 4096, 4096, 7168),
]


def compiled(programs: dict[str, Program]) -> dict[str, Callable]:
    """Compiles programs side by side; returns functions that run them."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda one: one[0].lower(*one[1]).compile(), programs.values()))
    pairs = zip(programs, made, strict=True)
    return {name: functools.partial(run, *programs[name][1]) for name, run in pairs}


# ---- rows past the groups -----------------------------------------------------------------------


def gemm_programs(shape: tuple[int, ...]) -> tuple[Problem, dict[str, Program]]:
    g, m, real, n, k = shape
    problem = Problem("ragged", m, n, k, g)
    lhs, rhs, sizes = random_operands(problem, group_sizes(problem, real))
    alone = map_rows(lambda x: x[:real], lhs)

    def own(leave_rest: bool) -> Callable:
        how = {"variant": "ragged", "expected_rows": real, "leave_rest": leave_rest}
        return jax.jit(lambda lhs, rhs, sizes: multiply(lhs, rhs, jnp.bfloat16, sizes, **how))

    public = jax.jit(functools.partial(fp8.gemm, variant="ragged"))
    return problem, {
        "the real rows alone": (public, (alone, rhs, sizes)),
        "half of the rows past the groups, zeros": (public, (lhs, rhs, sizes)),
        "half of the rows past the groups, left as they are": (own(True), (lhs, rhs, sizes)),
        "half of the rows past the groups, zeros, rows expected": (own(False), (lhs, rhs, sizes)),
    }


def gemms(shape: tuple[int, ...]) -> Rows:
    """The GEMM kernels alone, launch by launch in turn."""
    g, _, real, n, k = shape
    problem, programs = gemm_programs(shape)
    runs = compiled(programs)
    times = timing.device_microseconds(runs, REPS, timing.KERNEL, burst=[list(runs)])
    peer, *names = runs
    rows = []
    for name in names:
        made = row(problem, f"exchange: ragged {g}x{n}x{k}, {real} rows, {name}", times[name], real)
        made |= beside(f"fp8 gemm of {peer}", times[peer], "this package")
        made |= {"ratio": ratio(times[name], times[peer]), "target_ratio": MOST_ZEROS}
        rows.append(made)
    return rows


def ratio(times: list[float], peer: list[float]) -> float:
    return round(statistics.median(times) / statistics.median(peer), 4)


# ---- local parts --------------------------------------------------------------------------------


def nbytes(*trees) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def choices(t: int, experts: int, top_k: int) -> jax.Array:
    """Returns different experts of each token, all as likely."""
    scores = jax.random.uniform(jax.random.key(0), (t, experts))
    return jax.lax.top_k(scores, top_k)[1].astype(jnp.int32)


def travelling(t: int, s: Sizes) -> list[jax.Array]:
    """Returns what travels of t tokens: FP8 bytes, their scales, choices, weights."""
    keys = jax.random.split(jax.random.key(1), 3)
    return [
        jax.random.randint(keys[0], (t, s.h), 0, 120).astype(jnp.uint8),
        jax.random.uniform(keys[1], (t, s.h // 128)),
        choices(t, s.own * s.devices, s.top_k) + 1,
        jax.random.uniform(keys[2], (t, s.top_k)),
    ]


def local_parts(s: Sizes) -> dict[str, tuple[Callable, tuple, int]]:
    """Returns each part as a function, its operands, and the bytes that it must move.

    These are operands once and results once. Of rows past the groups, and of empty slots' sources,
    nothing counts.
    """
    mine, received = travelling(s.t, s), travelling(s.t * s.devices, s)
    packed, arrived = jax.jit(pack)(mine), jax.jit(pack)(received)
    everywhere = choices(s.t, s.own * s.nodes, s.top_k)
    goes = np.zeros((s.t, s.nodes), bool)
    goes[np.arange(s.t)[:, None], np.asarray(everywhere) // s.own] = True
    room = int(goes.sum(0).max())
    slots = make_slots(everywhere, s.own, s.nodes, room)
    back = jax.random.normal(jax.random.key(2), (s.nodes * room, s.h), jnp.bfloat16)
    order = permutation_of(received[2] - 1, s.own)
    real = int(order.group_sizes.sum())
    token = order.order // s.top_k
    results = jax.random.normal(jax.random.key(3), (len(token), s.h), jnp.bfloat16)
    wide, row_bytes, out_bytes = 2 * s.h, nbytes(packed[0]), 2 * s.h * s.t

    def sort(values, scale, token):
        return take_rows(values, token), take_rows(scale, token)

    def combine(rows, order):
        return sum_rows(rows, order, s.top_k, jnp.bfloat16, s.t * s.devices)

    reached = len(np.unique(np.asarray(token)[:real]))
    fp8_row = s.h + 4 * (s.h // 128)
    return {
        "pack": (lambda *x: pack(x), tuple(mine), 2 * nbytes(packed)),
        "pack into slots": (
            lambda slots, *x: to_slots(pack(x), slots),
            (slots, *mine),
            nbytes(packed) + s.nodes * room * row_bytes,
        ),
        "unpack": (lambda x: unpack(x, mine), (arrived,), 2 * nbytes(arrived)),
        "rows by expert": (sort, (*received[:2], token), (reached + real) * fp8_row),
        "combine": (combine, (results, order), real * wide + s.devices * out_bytes),
        "combine slots": (sum_slots, (back, slots), int(goes.sum()) * wide + out_bytes),
    }


def parts(s: Sizes) -> Rows:
    """All kernels of each part, XLA's."""
    made = local_parts(s)
    runs = compiled({name: (jax.jit(f), given) for name, (f, given, _) in made.items()})
    times = timing.device_microseconds(runs, REPS, burst=True)
    rows = []
    for name, (_, _, moved) in made.items():
        us, low, high = timing.spread(times[name])
        rate = moved / us / 1e6
        rows.append({
            "op": f"exchange: {name}", "variant": "exchange", "m": s.t, "k": s.h,
            "us": round(us, 2), "p10": round(low, 2), "p90": round(high, 2), "bytes": moved,
            "gbs": round(1e3 * rate, 1), "target_gbs": 1e3 * TARGET,
            "roofline": round(rate * 1e12 / BANDWIDTH, 3),
        })  # fmt: skip
    return rows


# ---- a whole layer ------------------------------------------------------------------------------


def layer(s: Sizes) -> Rows:
    """Forward and backward of Σ y² / 2, under shard_map over one device and without, in turn."""
    up, down = (s.own, s.h, s.f), (s.own, s.f, s.h)
    shapes = (s.t, s.h), up, up, down
    x, wi_0, wi_1, wo = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) * shape[-2] ** -0.5
        for i, shape in enumerate(shapes)
    )
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    gate_kernel = jax.random.normal(jax.random.key(4), (s.h, s.own)) * s.h**-0.5
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def step(moe, x, gate_kernel, kernels):
        y, pull = jax.vjp(lambda *given: moe(*given, top_k=s.top_k)[0], x, gate_kernel, kernels)
        return y, pull(y)

    sharded = functools.partial(fp8.moe, expert_axis="x", mesh=mesh)
    given = x, gate_kernel, kernels
    runs = compiled(
        {
            name: (jax.jit(functools.partial(step, moe)), given)
            for name, moe in (("shard_map over one device", sharded), ("one device", fp8.moe))
        }
    )
    times = timing.device_microseconds(runs, REPS, burst=[list(runs)])
    name, peer = runs
    problem = Problem("ragged", s.t * s.top_k, s.f, 3 * s.h, s.own)  # gate, up and down
    op = f"exchange: MoE layer, {s.own} experts, {s.t} tokens, forward + backward: {name}"
    made = row(problem, op, times[name], products=3)
    made |= beside(f"fp8 moe, {peer}", times[peer], "this package")
    made |= {"ratio": ratio(times[name], times[peer]), "target_ratio": MOST_SHARDED}
    return [made]


# -------------------------------------------------------------------------------------------------


def measure(only: str, s: Sizes, shapes: Iterable[tuple[int, ...]]) -> Iterator[Rows]:
    made = {f"gemms {shape}": functools.partial(gemms, shape) for shape in shapes}
    made |= {"parts": functools.partial(parts, s), "layer": functools.partial(layer, s)}
    for name, part in made.items():
        if only in name:
            yield part()
            progress(name)


def table(rows: Rows) -> str:
    """Returns one line for each row: its time, and how it stands to its aim."""
    lines = []
    for r in rows:
        if "ratio" in r:
            met = r["ratio"] <= r["target_ratio"]
            aim = f"{r['ratio']:6.3f} of {r['peer_us']:.1f} µs, at most {r['target_ratio']}"
        else:
            met = r["gbs"] >= r["target_gbs"]
            aim = f"{r['gbs'] / 1e3:6.2f} TB/s, at least {r['target_gbs'] / 1e3}"
        lines.append(f"{r['us']:9.1f} µs  {aim}: {'yes' if met else 'NO '}  {r['op']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--only", default="", help="gemms, parts or layer")
    options = parser.parse_args()
    found: Rows = []
    for rows in measure(options.only, Sizes(), GEMMS):
        save(rows, options.out)
        found += rows
    print(table(found))


if __name__ == "__main__":
    main()
