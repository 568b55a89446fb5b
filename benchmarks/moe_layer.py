"""Times one DeepSeek-shaped MoE layer, forward and backward, casts and permutation included.

python benchmarks/moe_layer.py

Ours is `expert_ffn`; beside it the same layer in bf16 around JAX's Pallas kernels, tuned by hand,
and around jax.lax.ragged_dot. The router is outside: all see the same choices.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
from pallas_peer import tuned
from protocol import progress, save
from quantize import compare

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from moe_lm import plain_experts

import jax_fp8gemm as fp8
from jax_fp8gemm._ops.weights import CAST_ROWS
from jax_fp8gemm._select.problem import Problem

WIDTH, HIDDEN, TOP_K = 7168, 2048, 8  # DeepSeek-V3 (arXiv 2412.19437), section 4.2
CASES = [(8, 8192), (8, 32768), (32, 8192), (32, 32768)]  # experts of this device, rows
CASES += [(8, 8 * CAST_ROWS)]  # up to which products cast weights themselves


def operands(experts: int, rows: int, width: int, hidden: int) -> tuple:
    """Returns x, expert choices and weights, and bf16 kernels."""
    tokens = rows // TOP_K
    keys = jax.random.split(jax.random.key(0), 5)
    routing = fp8.route(jax.random.normal(keys[0], (tokens, experts)), TOP_K)
    shapes = (
        (tokens, width),
        (experts, width, hidden),
        (experts, width, hidden),
        (experts, hidden, width),
    )
    x, wi_0, wi_1, wo = (
        jax.random.normal(key, shape, jnp.bfloat16) * shape[-2] ** -0.5
        for key, shape in zip(keys[1:], shapes, strict=True)
    )
    return x, routing, fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)


def forward_and_backward(layer):
    """Returns a step of the loss Σ y² / 2. Its gradient is y: backward waits for forward."""

    @jax.jit
    def both(x, routing, kernels):
        y, pull = jax.vjp(lambda x, kernels: layer(x, routing, kernels), x, kernels)
        return y, pull(y)

    return both


def ours(x, routing, kernels) -> jax.Array:
    return fp8.expert_ffn(x, routing.expert_index, routing.gate_weights, kernels)


def with_copies(x, routing, kernels) -> jax.Array:
    """The same, with FP8 copies of the weights whatever the number of rows."""
    prepared = fp8.prepare_experts(kernels)
    return fp8.expert_ffn(x, routing.expert_index, routing.gate_weights, prepared)


def layer(
    experts: int, rows: int, width: int = WIDTH, hidden: int = HIDDEN, *, alone: bool = False
) -> list[dict]:
    """Returns rows of one case; their `us` is forward + backward. alone: without peers."""
    given = operands(experts, rows, width, hidden)
    if alone:
        return timed(experts, rows, given, {"fp8 expert_ffn": ours}, width, hidden)
    layers = {"fp8 expert_ffn": ours, "jax.lax.ragged_dot": plain_experts()}
    if rows <= CAST_ROWS * experts:
        layers["fp8 expert_ffn, weights copied"] = with_copies
    up, down = (tuned(rows, k, n, experts) for k, n in ((width, hidden), (hidden, width)))
    if up and down:

        def pallas(lhs, rhs, sizes):
            return (up if rhs.shape[1] == width else down)(lhs, rhs, sizes)

        layers["Pallas ragged_dot_mgpu, tuned"] = plain_experts(pallas)
    return timed(experts, rows, given, layers, width, hidden)


def timed(
    experts: int, rows: int, given: tuple, layers: dict, width: int, hidden: int
) -> list[dict]:
    problem = Problem("ragged", rows, hidden, 3 * width, experts)  # gate, up and down
    op = f"MoE layer, {experts} experts, {rows} rows, forward + backward"
    made = {name: (forward_and_backward(f), given) for name, f in layers.items()}
    return compare(problem, op, made, "fp8 expert_ffn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="default: results/<card>.json")
    parser.add_argument("--experts", type=int, help="only this many experts")
    parser.add_argument("--alone", action="store_true", help="ours, in a minute")
    options = parser.parse_args()
    for experts, rows in CASES:
        if options.experts in (None, experts):
            save(layer(experts, rows, alone=options.alone), options.out)
            progress(f"{experts} experts, {rows} rows")


if __name__ == "__main__":
    main()
