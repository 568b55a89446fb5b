"""The best grouped product in bf16 that JAX ships for Hopper: its Pallas kernels, tuned by hand.

With a cuDNN before 9.22, XLA expands jax.lax.ragged_dot into a much larger dense GEMM. That makes
it no fair peer alone.
"""

import concurrent.futures
import functools
import os
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_fp8gemm._tools import timing

NAMES = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
BLOCKS = ((192, 128), (128, 192), (128, 128))
FORWARD = [(*block, 64, 4, grid) for block in BLOCKS for grid in (2, 8)]
WEIGHT_GRADIENT = [(128, n, 64, 4, grid) for n in (128, 192) for grid in (2, 8)]

Config = tuple[int, ...]


def forward(lhs, rhs, sizes, config: Config, transpose_rhs: bool = False) -> jax.Array:
    """lhs [m, k], rhs [g, k, n] (or [g, n, k]) -> [m, n]."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    blocks = dict(zip(NAMES, config, strict=True))
    return ragged_dot_mgpu.ragged_dot(
        lhs, rhs, group_sizes=sizes, transpose_rhs=transpose_rhs, **blocks
    )


def weight_gradient(lhs, dy, sizes, config: Config) -> jax.Array:
    """lhs [m, k], dy [m, n] -> [g, k, n]."""
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    blocks = dict(zip(NAMES, config, strict=True))
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(lhs, dy, group_sizes=sizes, **blocks)


def differentiable(forward_config: Config, dlhs_config: Config, drhs_config: Config) -> Callable:
    """Returns ragged_dot(lhs, rhs, sizes) whose three products are the Pallas kernels."""

    @jax.custom_vjp
    def ragged_dot(lhs, rhs, sizes):
        return forward(lhs, rhs, sizes, forward_config)

    def save(lhs, rhs, sizes):
        return ragged_dot(lhs, rhs, sizes), (lhs, rhs, sizes)

    def pull(saved, dy):
        lhs, rhs, sizes = saved
        dlhs = forward(dy, rhs, sizes, dlhs_config, transpose_rhs=True)
        return dlhs, weight_gradient(lhs, dy, sizes, drhs_config), None

    ragged_dot.defvjp(save, pull)
    return ragged_dot


def tuned(m: int, k: int, n: int, g: int, reps: int = 3) -> Callable | None:
    """Times a handful of configs for each of the three products and returns the best of each.

    None where the kernels do not run with what is installed.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    lhs = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    rhs = jax.random.normal(keys[1], (g, k, n), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    sizes = jnp.full(g, m // g, jnp.int32)
    products = {
        "forward": (functools.partial(forward), (lhs, rhs, sizes), FORWARD),
        "dlhs": (functools.partial(forward, transpose_rhs=True), (dy, rhs, sizes), FORWARD),
        "drhs": (weight_gradient, (lhs, dy, sizes), WEIGHT_GRADIENT),
    }
    made = {}
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for name, (product, operands, configs) in products.items():
            for config in configs:
                run = functools.partial(product, config=config)
                made[name, config] = pool.submit(_compiled, run, operands)
    contenders = {key: future.result() for key, future in made.items() if future.result()}
    times = timing.device_microseconds(contenders, reps) if contenders else {}
    best = {}
    for (name, config), us in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        best.setdefault(name, (config, statistics.median(us)))
    for name, (config, us) in best.items():
        print(f"Pallas {name} [{m}, {k}] x [{g}, {k}, {n}]: {config}, {us:.0f} µs", flush=True)
    if set(best) != set(products):
        return None
    return differentiable(*(best[name][0] for name in products))


def _compiled(function, operands) -> Callable | None:
    try:
        run = jax.jit(function).lower(*operands).compile()
        jax.block_until_ready(run(*operands))
    except Exception:  # a config that does not fit, or kernels that are not there
        return None
    return functools.partial(run, *operands)
