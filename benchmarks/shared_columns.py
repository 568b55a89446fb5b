"""How far apart may columns lie that share a scale? By the error of a gradient to a weight.

    python benchmarks/shared_columns.py    # minutes on a CPU; stores its rows

In dw = xᵀ·dy both operands have one scale for 128 tokens of a column. Where the scales of 128
columns of dy lie within 2^spread of each other, the largest serves them all. Each row has the error
of dw against float64 with that rule and without it, and the share of blocks to which it applies.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from protocol import facts, progress
from train_moe import compiled_step, initial, optimizer
from watch import MATRICES, group_of_steps, moe_lm, shares, watched

from jax_fp8gemm._core import reference
from jax_fp8gemm._core.groups import place_by_groups
from jax_fp8gemm._core.layout import ROW_BLOCKS
from jax_fp8gemm._core.qarray import FP8

RESULTS = pathlib.Path(__file__).parent / "results/shared_columns.json"
SPREADS = range(6, 13)  # powers of two
TOKENS, FEATURES, OUTPUTS = 1024, 384, 512  # of x [tokens, features] and dy [tokens, outputs]
MANY_TOKENS, MANY_OUTPUTS = 8192, 2048  # for the share of blocks, which needs no product
SEEDS = range(4)
SIZE = moe_lm.Size(width=256, layers=2, heads=4, experts=4, hidden=256, context=128)
MOMENTS = (0, 30, 200)  # steps of the training run at which its operands are taken
SEQUENCES, SEEN = 4, 32  # of a step, and of what is taken

Operands = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # x, dy, group sizes


# ---- Made up gradients: (draw, tokens, columns, spread) -> dy -----------------------------------


def normal(draw, tokens, n, spread):
    return draw.normal(size=(tokens, n))


def log_normal(sigma: float, of_tokens: float = 0.0) -> Callable:
    """Returns normal data times a factor of each column and one of each token."""

    def make(draw, tokens, n, spread):
        columns = np.exp(sigma * draw.normal(size=n))
        rows = np.exp(of_tokens * draw.normal(size=(tokens, 1)))
        return draw.normal(size=(tokens, n)) * columns * rows

    return make


def student(draw, tokens, n, spread):
    return draw.standard_t(2, size=(tokens, n))


def swiglu(draw, tokens, n, spread):
    """The gradient to gate and up, where one feature in a hundred is thirty times larger."""
    h = draw.normal(size=(tokens, n)) * np.where(draw.random(n) < 0.01, 30.0, 1.0)
    out = draw.normal(size=(tokens, n // 2))
    return np.asarray(reference.swiglu_gradients(h, out, np.ones(tokens))[0])


def squared_relu(draw, tokens, n, spread):
    """The gradient to g of relu(g)², where features are positive for 0.02 to 70 % of the tokens."""
    g = draw.normal(size=(tokens, n)) + draw.uniform(-3.5, 0.5, size=n)
    return draw.normal(size=(tokens, n)) * 2 * np.maximum(g, 0)


def at_the_limit(values: Callable) -> Callable:
    """Returns the worst that the rule lets through: every other column smaller by 2^spread."""

    def make(draw, tokens, n, spread):
        tiles = values(draw, tokens, n, spread).reshape(-1, 128, n)
        tiles *= 224.5 / 256 / np.abs(tiles).max(1, keepdims=True)  # the least of a binade
        tiles[..., 1::2] *= 2.0**-spread
        return tiles.reshape(tokens, n)

    return make


MADE_UP = {
    "normal": normal,
    "columns log-normal, σ 0.5": log_normal(0.5),
    "columns log-normal, σ 1": log_normal(1),
    "columns log-normal, σ 2": log_normal(2),
    "columns log-normal, σ 1, tokens σ 2": log_normal(1, 2),
    "Student t, 2 degrees of freedom": student,
    "SwiGLU with outlier features": swiglu,
    "squared ReLU, sparse": squared_relu,
}
AT_THE_LIMIT = {
    "normal, at the limit": at_the_limit(normal),
    "Student t, at the limit": at_the_limit(student),
}
MADE_UP |= AT_THE_LIMIT


# ---- Gradients of a training run ----------------------------------------------------------------


def operands_of(params: dict, tokens: jax.Array) -> Iterator[tuple[str, Operands]]:
    """Yields each matrix's operands of a backward pass, of all layers."""
    found = []

    def seen(name, x, dy, sizes):
        jax.debug.callback(lambda *arrays: found.append((name, arrays)), x, dy, sizes)

    arm = watched(seen, jnp.float32)
    jax.block_until_ready(jax.grad(lambda p: moe_lm.loss(p, tokens, SIZE, arm)[0])(params))
    jax.effects_barrier()
    assert len(found) == SIZE.layers * len(MATRICES)
    for name, arrays in found:
        yield name, tuple(None if a is None else np.asarray(a) for a in arrays)


def trained(seed: int) -> Iterator[tuple[int, dict, jax.Array]]:
    """Trains in float32, and yields the step, the parameters and a batch at each moment."""
    text, draw = moe_lm.corpus(4 << 20)[0], np.random.default_rng(seed)
    params, rule = initial(seed, SIZE, 0.0), optimizer(max(MOMENTS))
    state = rule.init(params)
    step = compiled_step(moe_lm.F32, SIZE, rule, SEQUENCES)
    for index in range(max(MOMENTS) + 1):
        if index in MOMENTS:
            yield index, params, jnp.asarray(moe_lm.batch(text, draw, SEEN, SIZE.context))
        tokens = jnp.asarray(moe_lm.batch(text, draw, SEQUENCES, SIZE.context))
        params, state, _ = step(params, state, tokens)


# ---- The measures -------------------------------------------------------------------------------


def scales_of(dy: np.ndarray, spread: int | None) -> np.ndarray:
    """Returns the scales [columns, steps] of dy's transposed copy; None: each column's own."""
    with mock.patch.object(reference, "SHARED_SPREAD", spread):
        columns = jnp.asarray(dy.T, jnp.float32)
        return np.asarray(
            reference.quantize(columns, ROW_BLOCKS, "pow2", shared=spread is not None)[1]
        )


def rounded(dy: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns what FP8 with these scales makes of dy, in float64."""
    wide = np.repeat(scale, 128, 1)[:, : dy.shape[0]].T.astype(np.float64)
    return (dy / wide).astype(np.float32).astype(FP8).astype(np.float64) * wide


def of_columns(dw: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Returns the relative error of every column that is not all zeros, and last of all of dw."""
    error, size = np.sum((dw - exact) ** 2, 0), np.sum(exact**2, 0)
    some = size > 0
    return np.sqrt(np.append(error[some], error.sum()) / np.append(size[some], size.sum()))


def errors(x: np.ndarray, dy: np.ndarray, spreads: Iterable[int]) -> list[dict[str, float]]:
    """Returns, for each spread, how far dw is from float64; "own" is with each column's own scale.

    "increase" is the largest of any column over its own error without the rule.
    """
    x8 = rounded(x, scales_of(x, None))
    exact = x.T.astype(np.float64) @ dy.astype(np.float64)
    own = of_columns(x8.T @ rounded(dy, scales_of(dy, None)), exact)
    found = []
    for spread in spreads:
        shared = of_columns(x8.T @ rounded(dy, scales_of(dy, spread)), exact)
        found.append({
            "own_worst": own[:-1].max(), "worst": shared[:-1].max(), "own_total": own[-1],
            "total": shared[-1], "increase": (shared[:-1] / own[:-1]).max() - 1,
        })  # fmt: skip
    return found


def made_up_rows(name: str) -> list[dict]:
    """Returns a row for each spread, the mean over seeds."""
    make, found = MADE_UP[name], {spread: [] for spread in SPREADS}
    for seed in SEEDS:
        for spreads in [[s] for s in SPREADS] if name in AT_THE_LIMIT else [SPREADS]:
            draw = np.random.default_rng(seed)
            x, dy = draw.normal(size=(TOKENS, FEATURES)), make(draw, TOKENS, OUTPUTS, spreads[0])
            many = make(draw, MANY_TOKENS, MANY_OUTPUTS, spreads[0]).astype(np.float32)
            for spread, row in zip(spreads, errors(x, dy, spreads), strict=True):
                one = np.zeros(MANY_TOKENS // 128, int)
                found[spread].append({**row, **shares(scales_of(many, spread), one)})
    return [{"data": name, "spread": spread, **mean(rows)} for spread, rows in found.items()]


def trained_rows() -> list[dict]:
    """Returns rows of each matrix at each moment, the mean over layers and seeds."""
    found: dict[tuple[str, int], list[dict]] = {}
    for seed in SEEDS[:2]:
        for step, params, tokens in trained(seed):
            for name, operands in operands_of(params, tokens):
                for spread, row in zip(SPREADS, of_operands(*operands), strict=True):
                    found.setdefault((f"training, step {step}: {name}", spread), []).append(row)
            progress(f"training, seed {seed}, step {step}")
    return [{"data": name, "spread": spread, **mean(rows)}
            for (name, spread), rows in found.items()]  # fmt: skip


def of_operands(x: np.ndarray, dy: np.ndarray, sizes: np.ndarray | None) -> list[dict[str, float]]:
    """Returns errors and shares for each spread. Errors are of the largest group of rows."""
    if sizes is None:
        sizes = np.array([len(x)])
    largest = np.argmax(sizes)
    own = slice(sizes[:largest].sum(), sizes[: largest + 1].sum())
    placed = np.asarray(place_by_groups(jnp.asarray(dy), jnp.asarray(sizes)))
    group = group_of_steps(sizes, len(placed) // 128)
    return [
        {**row, **shares(scales_of(placed, spread), group)}
        for spread, row in zip(SPREADS, errors(x[own], dy[own], SPREADS), strict=True)
    ]


def mean(rows: list[dict]) -> dict[str, float]:
    """Returns the mean of each measure, and the largest increase of all."""
    found = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
    found["increase_most"] = max(row["increase"] for row in rows)
    return {key: round(float(value), 5) for key, value in found.items()}


def store(rows: list[dict], path: pathlib.Path) -> None:
    """Writes rows in place of stored ones of the same data."""
    kept = json.loads(path.read_text()) if path.exists() else []
    fresh = {row["data"] for row in rows}
    rows = [row for row in kept if row["data"] not in fresh] + [{**r, **facts()} for r in rows]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--only", choices=("made_up", "training"))
    options = parser.parse_args()
    for name in MADE_UP if options.only != "training" else ():
        store(made_up_rows(name), options.out)
        progress(name)
    if options.only != "made_up":
        store(trained_rows(), options.out)


if __name__ == "__main__":
    main()
