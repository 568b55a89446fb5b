"""Times two checkouts of this package in one call, in alternating rounds: did a change pay?

python benchmarks/before_after.py OLD NEW

OLD and NEW are folders that `pip install --target FOLDER CHECKOUT` made, or the Python interpreters
of two virtual environments. Each side gets a process of its own. It compiles every program once,
then times a round each time it is asked to. The rounds alternate, so both sides see the same clocks
and temperature, and only one runs at a time. The device time of whole programs is compared.
Nothing is stored unless --out names a file.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve()
MARK = "@before_after "  # begins every line that a child means for its parent

# m, n, k
MATMUL = ((4096, 4096, 7168), (4096, 7168, 2048), (16384, 4096, 7168))
DENSE = (
    (64, 2112, 7168),
    (64, 7168, 16384),
    (128, 4096, 7168),
    (192, 4096, 7168),
    (333, 4096, 7168),
    (700, 4096, 7168),
    (1024, 7168, 2048),
    (4096, 4096, 7168),
    (8192, 8192, 8192),
)
RAGGED = (8, 32768, 4096, 7168)  # groups, rows, n, k
MASKED = (32, 256, 4096, 7168)  # groups, rows that each has room for, n, k
CONTRACTING = (8, 32768, 4096, 7168)  # groups, k of all, m, n
# m, n, k, and groups that k is cut into, 0 for a dense product
GRADIENTS = (
    (2112, 7168, 4096, 0),
    (7168, 2112, 4096, 0),
    (7168, 4096, 4096, 0),
    (7168, 16384, 4096, 0),
    (24576, 1536, 4096, 0),
    (4096, 7168, 32768, 8),
    (7168, 2048, 8192, 32),
)
LAYER = (8, 8192, 7168, 2048, 8)  # experts, rows, width, hidden, choices of a token
TINY = 64  # by which --tiny divides every size


# ---- In a process of one checkout ----------------------------------------------------------------


def programs(tiny: bool, only: str = "") -> dict[str, Callable]:
    """Returns compiled programs whose name contains `only`, as functions without arguments."""
    import jax
    import jax.numpy as jnp

    import jax_fp8gemm as fp8

    def cut(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(s // TINY, 16) if s > 32 else min(s, 4) for s in sizes) if tiny else sizes

    def normal(seed: int, *shape: int):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * shape[-1] ** -0.5

    made = {}

    def add(name: str, function, *operands) -> None:
        if only in name:
            executable = jax.jit(function).lower(*operands).compile()
            made[name] = functools.partial(executable, *operands)

    def with_gradients(product):
        def both(x, w, *rest):
            y, pull = jax.vjp(lambda x, w: product(x, w, *rest), x, w)
            return y, pull(y)

        return both

    rows, blocks = (1, 128), (128, 128)
    for m, n, k in map(cut, MATMUL):
        x, w = normal(0, m, k), normal(1, k, n)
        add(f"fp8_matmul {m}x{n}x{k}", fp8.fp8_matmul, x, w)
        both = with_gradients(fp8.fp8_matmul)
        add(f"fp8_matmul {m}x{n}x{k}, with gradients", both, x, w)
    for m, n, k in map(cut, DENSE):
        lhs, rhs = fp8.quantize(normal(0, m, k), rows), fp8.quantize(normal(1, n, k), blocks)
        add(f"gemm {m}x{n}x{k}", fp8.gemm, lhs, rhs)

    g, m, n, k = cut(RAGGED)
    x, w, both = normal(0, m, k), normal(1, g, k, n), with_gradients(fp8.fp8_ragged_dot)
    add(f"fp8_ragged_dot {g} groups {m}x{n}x{k}, with gradients", both, x, w, uneven(g, m))

    g, m, n, k = cut(MASKED)
    lhs = fp8.quantize(normal(0, g, m, k), rows)
    rhs = fp8.quantize(normal(1, g, n, k), blocks)
    masked = functools.partial(fp8.gemm, variant="masked", expected_rows=m // 2)
    sizes = jnp.minimum(uneven(g, g * m // 2), m)
    add(f"gemm masked {g}x{m} {n}x{k}", masked, lhs, rhs, sizes)

    g, k, m, n = cut(CONTRACTING)
    k = max(k, 128 * g)
    lhs, rhs = fp8.quantize(normal(0, m, k), rows), fp8.quantize(normal(1, n, k), rows)
    contracting = functools.partial(
        fp8.gemm, variant="ragged_contracting", out_dtype=jnp.float32
    )  # fmt: skip
    name = f"gemm ragged_contracting {g} groups {m}x{n}"
    add(name, contracting, lhs, rhs, uneven(g, k, 128))

    for m, n, k, g in map(cut, GRADIENTS):
        every_other = (1 + jnp.arange(n) % 2).astype(jnp.bfloat16)[:, None]  # twice as large
        lhs = fp8.quantize(normal(0, m, k), rows)
        rhs = fp8.quantize(normal(1, n, k) * every_other, rows)
        common = fp8.QArray(rhs.qvalue, jnp.full_like(rhs.scale, 2.0**-14))
        sizes = [uneven(g, max(k, 128 * g), 128)] if g else []
        product = functools.partial(
            fp8.gemm, variant="ragged_contracting" if g else "dense", out_dtype=jnp.float32
        )
        name = f"gemm gradient {m}x{n}x{k}, {g} groups"
        add(f"{name}, no scale shared", product, lhs, rhs, *sizes)
        add(f"{name}, all shared", product, lhs, common, *sizes)

    experts, m, width, hidden, top_k = cut(LAYER)
    x, logits = normal(0, m // top_k, width), normal(1, m // top_k, experts).astype(jnp.float32)
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    kernels = [normal(2 + i, *shape) for i, shape in enumerate(shapes)]
    name = f"MoE layer, {experts} experts, {m} rows, with gradients"
    add(name, functools.partial(layer, fp8, top_k), x, logits, kernels)
    return made


def uneven(groups: int, total: int, unit: int = 1):
    """Returns sizes that differ from group to group, multiples of `unit`, `total` together."""
    import jax.numpy as jnp
    import numpy as np

    weights = 1 + 0.3 * np.cos(np.arange(groups))
    ends = np.round(np.cumsum(weights) / weights.sum() * total / unit) * unit
    return jnp.asarray(np.diff(ends, prepend=0).astype(np.int32))


def layer(fp8, top_k: int, x, logits, kernels):
    """One expert layer, forward and backward, in the API that this checkout has."""
    import jax

    routing = fp8.route(logits, top_k)

    def forward(x, kernels):
        if hasattr(fp8, "ExpertKernels"):
            wi_0, wi_1, wo = kernels
            held = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
            return fp8.expert_ffn(x, routing.expert_index, routing.gate_weights, held)
        return fp8.expert_ffn(x, routing.experts, routing.weights, *kernels)

    y, pull = jax.vjp(forward, x, kernels)
    return y, pull(y)


def checksum(results) -> int:
    """Returns a number that changes with any bit of the results."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def of_one(x):
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size)
        return jnp.sum((bits + 1) * (2 * place + 1), dtype=jnp.uint32)

    return sum((i + 1) * int(of_one(x)) for i, x in enumerate(jax.tree.leaves(results))) % 2**32


def clock():
    """Returns the timing module beside this script: both checkouts are timed by one clock."""
    path = HERE.parents[1] / "jax_fp8gemm/_tools/timing.py"
    spec = importlib.util.spec_from_file_location("before_after_timing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_round(made: dict[str, Callable], reps: int) -> dict[str, list[float]]:
    """Returns µs of `reps` launches of each program: device time, or wall time without a GPU."""
    import jax

    if jax.default_backend() == "gpu":
        return clock().device_microseconds(made, reps, burst=True)
    found = {}
    for name, run in made.items():
        found[name] = []
        for _ in range(reps):
            start = time.perf_counter()
            jax.block_until_ready(run())
            found[name].append(1e6 * (time.perf_counter() - start))
    return found


def child(path: str, reps: int, tiny: bool, only: str) -> None:
    """Answers every line of stdin: a round of times, until stdin ends."""
    import jax_fp8gemm

    home = pathlib.Path(jax_fp8gemm.__file__).resolve().parents[1]
    if os.path.isdir(path) and home != pathlib.Path(path).resolve():
        raise ImportError(f"jax_fp8gemm came from {home}, not from {path}")
    made = programs(tiny, only)
    sums = {name: checksum(run()) for name, run in made.items()}
    print(MARK + json.dumps({"checksums": sums}), flush=True)
    for _ in sys.stdin:
        print(MARK + json.dumps(one_round(made, reps)), flush=True)


# ---- In the parent -------------------------------------------------------------------------------


class Checkout:
    """A process that has the programs of one checkout."""

    def __init__(self, path: str, reps: int, tiny: bool, only: str = ""):
        self.path = path
        environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}
        python = sys.executable
        if os.path.isdir(path):  # comes before an installed package
            rest = environment.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.abspath(path), rest]))
        else:
            python = path
        command = [python, str(HERE), path, path, "--child", "--reps", str(reps), "--only", only]
        self.process = subprocess.Popen(
            [*command, "--tiny"] if tiny else command,
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.rounds: list[dict[str, list[float]]] = []

    def answer(self) -> dict:
        """Returns the next message of the child. Other lines of its output are shown."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            print(f"[{self.path}] {line}", end="", flush=True)
        raise RuntimeError(f"the process of {self.path} ended with {self.process.wait()}")

    def round(self) -> None:
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        self.rounds.append(self.answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def median(self, name: str) -> float:
        """Returns the median over the rounds of each round's median."""
        return statistics.median(statistics.median(times[name]) for times in self.rounds)


def compare(old: Checkout, new: Checkout, rounds: int) -> list[dict]:
    """Runs rounds in turn, the first of each to warm up, and returns a row for every program."""
    sums = [side.answer()["checksums"] for side in (old, new)]
    for turn in range(rounds + 1):
        for side in (old, new) if turn % 2 else (new, old):
            side.round()
    for side in (old, new):
        side.rounds = side.rounds[1:]
        side.close()
    return [
        {
            "program": name, "old_us": round(old.median(name), 2),
            "new_us": round(new.median(name), 2),
            "ratio": round(old.median(name) / new.median(name), 4),
            "same_bits": sums[0][name] == sums[1][name],
        }
        for name in sums[0]
        if name in sums[1]
    ]  # fmt: skip


def report(rows: list[dict]) -> float:
    """Prints old µs / new of every program, and returns the geometric mean."""
    for r in rows:
        bits = "" if r["same_bits"] else "  other bits"
        print(f"{r['program']:60} {r['old_us']:10.1f} {r['new_us']:10.1f} {r['ratio']:7.3f}{bits}")
    mean = math.exp(statistics.fmean(math.log(r["ratio"]) for r in rows))
    worst = min(rows, key=lambda r: r["ratio"])
    print(f"== old µs / new: geometric mean {mean:.4f}, worst {worst['ratio']:.3f} "
          f"({worst['program']})")  # fmt: skip
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=6, help="of each side, after one to warm up")
    parser.add_argument("--reps", type=int, default=5, help="launches of a program in a round")
    parser.add_argument("--out", type=pathlib.Path, help="file to store the rows in")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.old, options.reps, options.tiny, options.only)
        return
    how = options.reps, options.tiny, options.only
    sides = [Checkout(path, *how) for path in (options.old, options.new)]
    rows = compare(*sides, options.rounds)
    report(rows)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
