"""Where a program's time goes on the GPU: its kernels by kind, beside the limit of the card."""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8gemm._core.checks import is_integer
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._tools.hlo import Operation, operations
from jax_fp8gemm._tools.timing import Kernel, tracing


class Limits(NamedTuple):
    """What a card can do in a second: FLOP with FP8 and with 16 bits, and bytes of memory."""

    fp8: float
    bf16: float
    memory: float


# fp8 with promotion at the power limit, and the H200's memory read only, measured on an H200
# (docs/kernel.md). Others from NVIDIA's data sheets, without sparsity.
LIMITS = {
    "NVIDIA H200": Limits(1763e12, 989e12, 4.4e12),
    "NVIDIA H100 80GB HBM3": Limits(1763e12, 989e12, 3.35e12),
}

# Kinds in the order in which they are tried, on the kernel's name, the operation's and its opcode.
KINDS = {
    "collective": r"nccl|all-reduce|all-gather|all-to-all|reduce-scatter|collective|allreduce",
    "attention": r"fmha|flash|sdpa|attention",
    "cast": r"fp8_quantize",
    "GEMM": r"gemm|nvjet|cublas|cutlass",
    "copy": r"memcpy|memset|^copy",
    "gather": r"gather|scatter",
}


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """Kernels of one kind and label, in one run of the program.

    Attributes:
      kind: "GEMM", "cast", "gather", "collective", "attention", "copy" or "XLA".
      label: variant and sizes of ours; else the name of the operation in the program.
      launches: how many there are.
      us: the time of all of them.
      nbytes: what they read and write, each operand and result once; 0 if not known.
      flops: of products of matrices, rows outside of groups included; 0 if there are none.
      limit_us: the time that the card needs for these, None if not known.
    """

    kind: str
    label: str
    launches: float
    us: float
    nbytes: int
    flops: int
    limit_us: float | None

    @property
    def of_limit(self) -> float | None:
        """The fraction of the card's limit that is reached."""
        return self.limit_us / self.us if self.limit_us is not None and self.us else None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Kernels of one run of a program, those that take longest first; str() is a table.

    Attributes:
      device: name of the GPU.
      us: time of all kernels.
      launches: their number.
      rows: one for each kind and label.
    """

    device: str
    us: float
    launches: float
    rows: tuple[KernelRow, ...]

    def by_kind(self) -> dict[str, list[KernelRow]]:
        """Returns the rows of each kind, the kind that takes longest first."""
        found = collections.defaultdict(list)
        for row in self.rows:
            found[row.kind].append(row)
        return dict(sorted(found.items(), key=lambda item: -sum(row.us for row in item[1])))

    def __str__(self) -> str:
        head = f"{self.device}: {self.us:.1f} µs of kernels in {self.launches:g} launches"
        width = max([12, *(len(row.label) + 2 for row in self.rows)])
        lines = [head, f"{'':{width}} launches        µs  share        MB  of the limit"]
        for kind, rows in self.by_kind().items():
            lines.append(_line(kind, rows, self.us, width))
            lines += [_line(f"  {row.label}", [row], self.us, width) for row in rows]
        return "\n".join(lines)


def _line(name: str, rows: list[KernelRow], total: float, width: int) -> str:
    us, launches = sum(row.us for row in rows), sum(row.launches for row in rows)
    limited = [row for row in rows if row.limit_us is not None]
    known = sum(row.us for row in limited)
    of_limit = f"{sum(row.limit_us or 0 for row in limited) / known:.2f}" if known else ""
    share = us / total if total else 0.0
    megabytes = sum(row.nbytes for row in rows) / 1e6
    return f"{name:{width}} {launches:8g} {us:9.1f} {share:6.1%} {megabytes:9.2f}  {of_limit:>12}"


def profile(function: Callable, *args: Any, reps: int = 5) -> Profile:
    """Runs a program on the GPU, prints its kernels by kind, and returns them.

    Args:
      function: jitted, or to be jitted. It closes over static arguments.
      args: its arguments: pytrees of arrays. A jax.ShapeDtypeStruct becomes an array of normal
        numbers, of zeros if it is not of floats. Pass arrays where contents matter, as for
        expert_index.
      reps: runs of which the mean is taken, 1 or more.

    Returns:
      Profile of the kernels on the first GPU.

    Raises:
      RuntimeError: there is no GPU.
      ValueError: reps is not a positive integer.

    Example:
      fp8.profile(jax.jit(step), jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16))
    """
    if not is_integer(reps) or reps < 1:
        got, fix = f"reps={reps!r}", "leave it out, or pass how many runs to take the mean of"
        fail("profile", "reps is not a positive integer.", got, "1 or more", fix)
    device = jax.devices()[0]
    if device.platform != "gpu":
        got = f"jax.devices()[0] is {device.device_kind!r} of platform {device.platform!r}"
        fix = "run it where JAX sees a GPU; jax.profiler.trace shows what a CPU does"
        what = "there is no GPU whose kernels could be timed."
        fail("profile", what, got, "an NVIDIA GPU", fix, RuntimeError)
    args = jax.tree.map(_array, args, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    lowered = jitted.lower(*args)
    program = _without_graphs(lowered)
    donates = any(info.donated for info in jax.tree.leaves(lowered.args_info))
    kernels = _run(program, args, reps, donates)
    found = summarize(kernels, program.as_text(), reps, device.device_kind)
    print(found)
    return found


def _without_graphs(lowered: Any) -> Any:
    """Compiles a program without CUDA graphs, whose kernels do not say what launched them."""
    return lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})


def _array(x: Any) -> Any:
    """Makes an array of a jax.ShapeDtypeStruct, where it says."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    made = jnp.zeros(x.shape, x.dtype)
    if floats:
        made = jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype)
    return made if x.sharding is None else jax.device_put(made, x.sharding)


def _run(program: Any, args: tuple, reps: int, donates: bool) -> list[Kernel]:
    """Returns the kernels of all runs. Donated arguments are copied outside of the trace."""

    def run(given: tuple, times: int) -> list[Kernel]:
        with tracing() as kernels:
            for _ in range(times):
                jax.block_until_ready(program(*given))
        return kernels

    def copies() -> tuple:
        return jax.block_until_ready(jax.tree.map(jnp.copy, args))

    jax.block_until_ready(program(*(copies() if donates else args)))
    if not donates:
        return run(args, reps)
    return [kernel for _ in range(reps) for kernel in run(copies(), 1)]


def summarize(kernels: list[Kernel], text: str, reps: int, device: str) -> Profile:
    """Returns the kernels of one run, of those of `reps` runs of the program with this text."""
    module = re.match(r"HloModule ([\w.-]+)", text)
    known = operations(text)
    # By operation, or by its own name for a kernel that no operation is known of.
    found: dict[str, dict[str, list[float]]] = {}
    for kernel in kernels:
        where = kernel.stats.get("hlo_module")
        if where is not None and module is not None and where != module[1]:
            continue  # of another program: copies of arguments
        name = str(kernel.stats.get("hlo_op", kernel.name))
        times = found.setdefault(name if name in known else kernel.name, {})
        times.setdefault(kernel.name, []).append(kernel.us)
    rows = collections.defaultdict(list)
    for name, times in found.items():
        row = _row(known.get(name), times, reps, LIMITS.get(device))
        rows[row.kind, row.label].append(row)
    merged = sorted(map(_merged, rows.values()), key=lambda row: -row.us)
    launches = sum(row.launches for row in merged)
    return Profile(device, sum(row.us for row in merged), launches, tuple(merged))


def _row(
    operation: Operation | None, times: dict[str, list[float]], reps: int, limits: Limits | None
) -> KernelRow:
    """Returns the row of one operation; times: µs of each launch, by the name of the kernel."""
    main = max(times, key=lambda kernel: sum(times[kernel]))
    kind = kind_of(main, operation)
    us = sum(map(sum, times.values())) / reps
    launches = sum(map(len, times.values())) / reps
    if operation is None:
        return KernelRow(kind, main, launches, us, 0, 0, None)
    runs = len(times[main]) / reps  # of the operation: more than one in a loop
    nbytes, flops = round(runs * operation.nbytes), round(runs * operation.flops)
    limit = None if limits is None else _limit(kind, operation, limits)
    limit = None if limit is None else 1e6 * runs * limit
    return KernelRow(kind, operation.label, launches, us, nbytes, flops, limit)


def _limit(kind: str, operation: Operation, limits: Limits) -> float | None:
    """Returns the seconds that the card needs at least, None if that is not known."""
    seconds = operation.nbytes / limits.memory
    if kind == "GEMM":
        rates = {"f8e4m3fn": limits.fp8, "bf16": limits.bf16, "f16": limits.bf16}
        if operation.dtype not in rates:
            return None
        return max(seconds, operation.flops / rates[operation.dtype])
    return None if kind in ("attention", "collective") else seconds


def kind_of(kernel: str, operation: Operation | None) -> str:
    """Returns the kind of a kernel."""
    words = [kernel]
    if operation is not None:
        words += [operation.name, operation.opcode, "gather" if operation.moves_rows else ""]
    for kind, pattern in KINDS.items():
        if any(re.search(pattern, word, re.IGNORECASE) for word in words):
            return kind
    return "XLA"


def _merged(rows: list[KernelRow]) -> KernelRow:
    """Returns the sum of rows of one kind and label, whose limits are all known or none is."""
    limits = [row.limit_us for row in rows]
    return dataclasses.replace(
        rows[0],
        launches=sum(row.launches for row in rows),
        us=sum(row.us for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        flops=sum(row.flops for row in rows),
        limit_us=None if None in limits else sum(filter(None, limits)),
    )
