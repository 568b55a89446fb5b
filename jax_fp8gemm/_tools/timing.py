"""Times work on the GPU by the device's own clock, with a cold L2 before every launch.

The clock is the trace of jax.profiler. CUPTI records every kernel of the process, so programs of
another framework are timed the same way. This file imports nothing of the package: a script can
load it by path and time any version with it.
"""

import contextlib
import functools
import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FLUSH_BYTES = 256 << 20  # several times the 50 or 60 MB of L2
FLUSH_KERNEL = "shift_left"  # the operation that names the kernel of the flush in a trace
READING_KERNEL = "reduce"  # likewise
FLUSH_US = 20.0  # a flush takes at least this long
PAUSE = 0.1  # s between bursts, for the clock to recover
KERNEL = "fp8_gemm"  # entry point of our GEMM kernels, csrc/gemm_spec.cpp
OURS = "fp8_"  # all our entry points begin like this

Contender = Callable[[], Any]  # starts work; returns arrays to wait for, or waits itself
Event = tuple[str, float]  # name of a kernel, µs
Bursts = bool | Sequence[Sequence[Hashable]]


class Kernel(NamedTuple):
    """A kernel or copy in a trace; `stats` has the hlo_op and hlo_module that launched it."""

    start_ns: float
    name: str
    us: float
    stats: dict[str, Any]


@functools.partial(jax.jit, donate_argnums=0)
def _flush(buffer: jax.Array, value: jax.Array) -> jax.Array:
    """Overwrites `buffer`, and so everything else in L2."""
    return jax.lax.shift_left(jax.lax.iota(jnp.uint32, buffer.size), value)


@jax.jit
def _flush_by_reading(buffer: jax.Array, value: jax.Array) -> jax.Array:
    """Reads `buffer`, and leaves L2 full of lines that need no write-back."""
    return jnp.max(jax.lax.shift_left(buffer, value))


def device_kernels(
    contenders: dict[Hashable, Contender],
    reps: int,
    *,
    burst: Bursts = False,
    flush: str = "write",
) -> dict[Hashable, list[list[Event]]]:
    """Runs contenders, L2 flushed before each launch, and returns what ran on the device.

    Args:
      contenders: functions by name. A function of another framework must wait for its own work.
      reps: launches of each contender.
      burst: which contenders share a burst. In a burst they are launched in turn, `reps` times,
        and the GPU rests before the next one. True gives each contender a burst of its own. A
        list has the names of each burst. False puts all into one.
      flush: "write" or "read" 256 MB before each launch.

    Returns:
      For each contender, for each launch, [(kernel name, µs), ...].
    """
    order = launch_order(list(contenders), reps, burst)
    buffer = jnp.zeros(FLUSH_BYTES // 4, jnp.uint32)
    for run in contenders.values():
        jax.block_until_ready(run())
    jax.block_until_ready(_flush_by_reading(buffer, jnp.uint32(0)))
    with tracing() as events:
        for index, (name, rest) in enumerate(order):
            if rest:
                time.sleep(PAUSE)
            value = jnp.uint32(index % 8)
            if flush == "write":
                buffer = _flush(buffer, value)
                jax.block_until_ready(buffer)
            else:
                jax.block_until_ready(_flush_by_reading(buffer, value))
            jax.block_until_ready(contenders[name]())
    launches = between_flushes([(event.name, event.us) for event in events], flush)
    if len(launches) != len(order):
        raise RuntimeError(f"{len(launches)} flushes in the trace, {len(order)} expected")
    found: dict[Hashable, list[list[Event]]] = {name: [] for name in contenders}
    for (name, _), launch in zip(order, launches, strict=True):
        found[name].append(launch)
    return found


def launch_order(names: list, reps: int, burst: Bursts) -> list[tuple[Hashable, bool]]:
    """Returns (name, whether the GPU rests before it) of every launch, in order."""
    bursts = [[name] for name in names] if burst is True else burst or [names]
    if sorted(map(repr, names)) != sorted(repr(name) for group in bursts for name in group):
        raise ValueError("every contender belongs to one burst")
    return [
        (name, burst is not False and turn == place == 0)
        for group in bursts
        for turn in range(reps)
        for place, name in enumerate(group)
    ]


@contextlib.contextmanager
def tracing() -> Iterator[list[Kernel]]:
    """Yields a list that has, after the block, everything that ran on the first GPU, in order."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    events: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            yield events
        finally:
            jax.profiler.stop_trace()
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            events += kernels_of(jax.profiler.ProfileData.from_file(path))
    events.sort(key=lambda event: event.start_ns)


def kernels_of(trace: Any) -> list[Kernel]:
    """Returns what a jax.profiler.ProfileData has of the first GPU."""
    return [
        Kernel(event.start_ns, event.name, event.duration_ns / 1e3, dict(event.stats))
        for plane in trace.planes
        if plane.name.startswith("/device:GPU:0")
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]


def between_flushes(events: Iterable[Event], flush: str = "write") -> list[list[Event]]:
    """Splits a trace at the flushes. A flush by reading is two kernels."""
    launches: list[list[Event]] = []
    kernel = FLUSH_KERNEL if flush == "write" else READING_KERNEL
    in_flush = False
    for name, us in events:
        if kernel in name and us > FLUSH_US:
            launches.append([])
            in_flush = flush == "read"
        elif in_flush and OURS not in name:
            in_flush = False  # the second, small, kernel of the reduction
        elif launches:
            launches[-1].append((name, us))
    return launches


def sums(launches: list[list[Event]], only: str = "") -> list[float]:
    """Returns µs of each launch: the sum of the kernels whose name contains `only`."""
    return [sum(us for kernel, us in launch if only in kernel) for launch in launches]


def device_microseconds(
    contenders: dict[Hashable, Contender], reps: int, only: str = "", **how
) -> dict[Hashable, list[float]]:
    """Returns, for each contender, the µs of each launch: see device_kernels and sums."""
    ran = device_kernels(contenders, reps, **how)
    return {name: sums(launches, only) for name, launches in ran.items()}


def spread(times: list[float]) -> tuple[float, float, float]:
    """Returns the median and the 10th and 90th percentile."""
    ordered = sorted(times)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return statistics.median(ordered), low, high
