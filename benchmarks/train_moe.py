"""Does training in FP8 end where bf16 does? Pairs of runs from the same seeds and batches.

    python benchmarks/train_moe.py --runs bf16:0 fp8:0 control:0   # each is stored when it ends
    python benchmarks/train_moe.py --report                    # table and picture of what is stored

Arms: "fp8", everything but embedding, head, router, norms and attention in FP8; "bf16", on the
best grouped product that JAX has; "control", bf16 again, its initial weights changed by 1e-5 of
their size: how far two equal recipes drift apart by chance.

What do scales that columns share change? Then nothing else may: every op has to be deterministic.

    export XLA_FLAGS=--xla_gpu_deterministic_ops=true
    python benchmarks/train_moe.py --out benchmarks/results/train_moe_columns.json --resume \\
      --watch 250 --runs fp8:0 fp8_again:0 fp8_own_scales:0 fp8_control:0

Arms: "fp8_own_scales", where each column of a gradient has its own scale; "fp8_again", which must
repeat "fp8" to the last bit; "fp8_control", from weights changed as those of "control".
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pallas_peer import tuned
from protocol import facts
from watch import column_statistics, moe_lm

LARGE = moe_lm.Size(width=1024, layers=8, heads=8, experts=16, hidden=1024, context=1024)
TINY = moe_lm.Size(width=64, layers=2, heads=2, experts=4, hidden=128, context=32)
RESULTS = pathlib.Path(__file__).parent / "results/train_moe.json"
HELD_OUT = 1 << 20  # bytes at the end of the text
NOISE = 1e-5
RATE = 6e-4  # of learning, at its highest
EVERY = 10  # steps between stored losses
COMPARED = 4  # sequences of a batch whose gradients are compared with float32's
BESIDE = {"fp8": "bf16", "control": "bf16", "fp8_own_scales": "fp8", "fp8_again": "fp8",
          "fp8_control": "fp8"}  # the arm that each is compared with  # fmt: skip
COLORS = {"bf16": "tab:blue", "fp8": "tab:orange", "control": "tab:gray",
          "fp8_own_scales": "tab:green", "fp8_control": "tab:gray"}  # fmt: skip


@functools.cache
def arm_of(name: str, size: moe_lm.Size, sequences: int) -> moe_lm.Arm:
    if name.startswith("fp8"):
        return moe_lm.fp8_arm(name, shared_columns=name != "fp8_own_scales")
    if name == "control":
        return arm_of("bf16", size, sequences)
    rows = sequences * size.context * size.top_k
    on_gpu = jax.devices()[0].platform == "gpu"
    pallas = tuned(rows, size.width, size.hidden, size.experts) if on_gpu else None
    experts = moe_lm.plain_experts(pallas or jax.lax.ragged_dot)
    return moe_lm.Arm("bf16", moe_lm.BF16.dot, experts)


@functools.cache
def optimizer(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, RATE, min(100, steps // 10 + 1), steps, RATE / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95))


def initial(seed: int, size: moe_lm.Size, noise: float) -> dict:
    params = moe_lm.init(jax.random.key(seed), size)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1000 + seed), len(leaves))
    moved = [
        x * (1 + noise * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def compiled_step(
    arm: moe_lm.Arm, size: moe_lm.Size, rule: optax.GradientTransformation, sequences: int
) -> jax.stages.Compiled:
    """Returns one step: (params, state, tokens) -> (params, state, cross entropy)."""
    objective = functools.partial(moe_lm.loss, size=size, arm=arm)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        (_, entropy), gradients = jax.value_and_grad(objective, has_aux=True)(params, tokens)
        updates, state = rule.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, entropy

    params = jax.eval_shape(lambda: moe_lm.init(jax.random.key(0), size))
    tokens = jax.ShapeDtypeStruct((sequences, size.context + 1), jnp.uint8)
    return step.lower(params, jax.eval_shape(rule.init, params), tokens).compile()


def train(name: str, seed: int, size: moe_lm.Size, options: argparse.Namespace) -> dict:
    """Returns the losses of one run and what it cost."""
    text, digest = moe_lm.corpus()
    steps, sequences = options.steps, options.sequences
    arm, rule = arm_of(name, size, sequences), optimizer(steps)
    changed = name.endswith("control")
    params = initial(seed, size, NOISE if changed else 0.0)
    step, state = compiled_step(arm, size, rule, sequences), rule.init(params)
    run: dict = {"arm": name, "seed": seed, "steps": steps, "cosine": {}, "columns": {}}

    def look(when: str, index: int) -> None:
        if not changed and options.cosines and when:
            run["cosine"][when] = cosine(params, tokens[:COMPARED], size, arm)
        if options.watch and index % options.watch == 0:
            run["columns"][str(index)] = column_statistics(params, tokens, size)

    losses, times = [], []
    batches = drawn(text[:-HELD_OUT], seed, sequences, size)
    tokens = next(batches)
    for index in range(steps):
        look("" if index else "start", index)
        start = time.perf_counter()
        params, state, entropy = step(params, state, tokens)
        tokens = next(batches)
        losses.append(float(entropy))
        times.append(time.perf_counter() - start)
        progress(f"{name}:{seed}", losses, times, steps)
    look("end", steps)
    median = float(np.median(times))
    return {
        **run, "tokens_a_step": sequences * size.context,
        "losses": [round(float(np.mean(losses[i : i + EVERY])), 5)
                   for i in range(0, steps, EVERY)],
        "last_loss": losses[-1],
        "held_out": round(evaluate(params, text[-HELD_OUT:], size, arm, sequences), 5),
        "ms_a_step": round(1e3 * median, 2),
        "tokens_per_s": round(sequences * size.context / median),
        "bytes_temporary": step.memory_analysis().temp_size_in_bytes, "corpus_sha256": digest,
        "corpus_bytes": len(text), "xla_flags": os.environ.get("XLA_FLAGS", ""), **facts(),
    }  # fmt: skip


def drawn(text: np.ndarray, seed: int, sequences: int, size: moe_lm.Size) -> Iterator[jax.Array]:
    draw = np.random.default_rng(seed)
    while True:
        yield jnp.asarray(moe_lm.batch(text, draw, sequences, size.context))


def progress(run: str, losses: list[float], times: list[float], steps: int) -> None:
    done = len(losses)
    if done % EVERY == 0 or done == steps:
        end = "\n" if done == steps else ""
        ms = 1e3 * np.median(times)
        text = f"\r{run} {done}/{steps} loss {losses[-1]:.4f} {ms:.1f} ms a step"
        print(text, end=end, flush=True)


@functools.cache
def loss_of(arm: moe_lm.Arm, size: moe_lm.Size) -> Callable:
    return jax.jit(lambda params, tokens: moe_lm.loss(params, tokens, size, arm)[1])


@functools.cache
def gradient_of(arm: moe_lm.Arm, size: moe_lm.Size) -> Callable:
    return jax.jit(jax.grad(lambda params, tokens: moe_lm.loss(params, tokens, size, arm)[0]))


def evaluate(params, text, size: moe_lm.Size, arm: moe_lm.Arm, sequences: int) -> float:
    """Returns the mean loss of text that was never trained on."""
    loss = loss_of(arm, size)
    draw, count = np.random.default_rng(12345), 8
    batches = [jnp.asarray(moe_lm.batch(text, draw, sequences, size.context)) for _ in range(count)]
    return float(np.mean([float(loss(params, tokens)) for tokens in batches]))


@jax.jit
def sums_of_products(got: dict, exact: dict) -> dict:
    def three(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.stack([jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)])

    return jax.tree.map(three, got, exact)


def cosine(params, tokens, size: moe_lm.Size, arm: moe_lm.Arm) -> dict[str, float]:
    """Returns how alike the arm's gradients are to float32's, per parameter and over all.

    Every token goes to every expert: a choice that falls otherwise changes a row's gradient whole,
    in any precision below float32, and would hide what rounding does. "top_k" is over all
    parameters, choices included.
    """
    every = dataclasses.replace(size, top_k=size.experts)
    return {
        **compare_gradients(params, tokens, every, arm),
        "top_k": compare_gradients(params, tokens, size, arm)["all"],
    }


def compare_gradients(params, tokens, size: moe_lm.Size, arm: moe_lm.Arm) -> dict[str, float]:
    with jax.default_matmul_precision("highest"):
        exact = gradient_of(moe_lm.F32, size)(params, tokens)
    sums = sums_of_products(gradient_of(arm, size)(params, tokens), exact)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(three, np.float64)
        for path, three in jax.tree_util.tree_leaves_with_path(sums)
    }
    named = {"all": np.sum(list(named.values()), axis=0), **named}
    return {name: round(float(ab / np.sqrt(aa * bb)), 6) for name, (ab, aa, bb) in named.items()}


# ---- What is stored -----------------------------------------------------------------------------


def stored(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def store(run: dict, path: pathlib.Path) -> None:
    kept = [r for r in stored(path) if (r["arm"], r["seed"]) != (run["arm"], run["seed"])]
    lines = (json.dumps(r) for r in [*kept, run])
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def report(path: pathlib.Path) -> None:
    """Prints the table of gaps and saves the curves beside the results."""
    by_arm: dict[str, dict[int, dict]] = {}
    for run in stored(path):
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    print("| arm | seed | trained | held-out | gap | ms a step | cosine at start | at end |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for arm, seed in itertools.product(by_arm, range(10)):
        run = by_arm[arm].get(seed)
        if run:
            start, end = (run["cosine"].get(when, {}).get("all", "") for when in ("start", "end"))
            print(f"| {arm} | {seed} | {last(run):.4f} | {run['held_out']:.4f} | "
                  f"{gap(run, by_arm.get(BESIDE.get(arm), {}).get(seed))} | {run['ms_a_step']} | "
                  f"{start} | {end} |")  # fmt: skip
    plot(by_arm, path.with_suffix(".png"))


def last(run: dict) -> float:
    """The mean of the last tenth of the run."""
    return float(np.mean(run["losses"][-max(1, len(run["losses"]) // 10) :]))


def gap(run: dict, other: dict | None) -> str:
    return "" if other is None else f"{100 * (last(run) / last(other) - 1):+.3f} %"


def smooth(run: dict) -> np.ndarray:
    window = min(5, len(run["losses"]))
    return np.convolve(run["losses"], np.ones(window) / window, "valid")


def plot(by_arm: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for arm, color in COLORS.items():
        for index, (seed, run) in enumerate(by_arm.get(arm, {}).items()):
            x = EVERY * np.arange(1, len(run["losses"]) + 1)
            left.plot(x, run["losses"], color=color, lw=0.8, label=None if index else arm)
            other = by_arm.get(BESIDE.get(arm), {}).get(seed)
            if other:
                ratio = 100 * (smooth(run) / smooth(other) - 1)
                right.plot(x[-len(ratio) :], ratio, color=color, lw=0.8)
    left.set(xlabel="step", ylabel="loss, nats per byte", yscale="log")
    right.set(xlabel="step", ylabel="gap to the run beside it, of the same seed, %")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="*", default=[], help="arm:seed")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a model that trains on a CPU")
    add = parser.add_argument
    add("--watch", type=int, default=0, help="store how alike columns are, every so many steps")
    add("--no-cosines", dest="cosines", action="store_false", help="no float32 gradients beside")
    add("--resume", action="store_true", help="leave out the runs that are stored")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    size = TINY if options.tiny else LARGE
    done = [f"{r['arm']}:{r['seed']}" for r in stored(options.out)] if options.resume else []
    for run in options.runs:
        if run not in done:
            name, seed = run.split(":")
            store(train(name, int(seed), size, options), options.out)
    if options.report:
        report(options.out)


if __name__ == "__main__":
    main()
