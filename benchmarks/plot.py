"""Draws docs/speed.png from stored results: `python benchmarks/plot.py`."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from protocol import HERE

RESULTS = HERE / "results/nvidia-h200.json"

KINDS = {  # how ops of stored rows begin: what a reader sees
    "dense: ": "dense",
    "drawn: ": "dense,\nnot tuned",
    "gradient: ": "weight\ngradient",
    "grouped: contiguous": "contiguous",
    "grouped: ragged_4": "ragged",
    "grouped: ragged_8": "ragged",
    "grouped: masked": "masked",
    "grouped: ragged_contracting": "ragged\ncontracting",
}
LAYER = "MoE layer, 8 experts, 32768 rows, forward + backward: "
PEERS = {
    "beside bf16 dot: ffn_up_m4096": "bf16 dot\n4096×4096×7168",
    "beside dequantize, bf16 dot: ffn_up_m4096": "dequantize,\nbf16 dot",
    "beside torch._scaled_mm, 1x128 by 128x128: ffn_up_m4096": "torch\n_scaled_mm",
    "beside Pallas ragged_dot_mgpu: 8x4096 7168x2048": "Pallas ragged_dot\n(weights in FP8 before)",
    "beside jax.lax.ragged_dot: 8x4096 7168x2048": "lax.ragged_dot\n(weights in FP8 before)",
    "forward + backward: bf16 jnp.dot": "bf16 dot, with gradients\n16384×4096×7168",
    LAYER + "Pallas ragged_dot_mgpu, tuned": "MoE layer, with gradients:\nPallas",
    LAYER + "jax.lax.ragged_dot": "MoE layer, with gradients:\nlax.ragged_dot",
}


def times_faster(row: dict) -> float:
    """How many times faster we are: `peer` is somebody else's, or ours in a row of theirs."""
    ours = row["peer"].startswith("fp8")
    return row["us"] / row["peer_us"] if ours else row["peer_us"] / row["us"]


def live(rows: list[dict]) -> dict[str, dict]:
    """Returns rows by op whose peer ran in the same process; times of another day are no peer.

    Rows older than the mark `same_run` ran beside every peer but those of torch, DeepGEMM too.
    """

    def beside(row: dict) -> bool:
        peer = row.get("peer") or "DeepGEMM"
        return row.get("same_run") or not peer.startswith(("DeepGEMM", "torch"))

    return {row["op"]: row for row in rows if beside(row)}


def main() -> None:
    rows = live(json.loads(RESULTS.read_text()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=(3, 2))
    names = list(dict.fromkeys(KINDS.values()))
    for prefix, name in KINDS.items():
        found = [r for op, r in rows.items() if op.startswith(prefix)]
        at = names.index(name)
        spread = [at + 0.5 * (i / max(len(found) - 1, 1) - 0.5) for i in range(len(found))]
        left.scatter(spread, [r["peer_us"] / r["us"] for r in found], s=14, color="tab:blue")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("speed, DeepGEMM = 1")
    left.set_title("every shape of the tables, in turn with DeepGEMM (torch)")
    shown = {label: times_faster(rows[op]) for op, label in PEERS.items() if op in rows}
    right.barh(list(shown), list(shown.values()), color="tab:orange")
    for at, ratio in enumerate(shown.values()):
        right.text(ratio, at, f" {ratio:.1f}×", va="center")
    right.set_xlim(0, 1.25 * max(shown.values(), default=1))
    right.invert_yaxis()
    right.set_title("times faster than")
    figure.suptitle("jax_fp8gemm on one NVIDIA H200")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs/speed.png", dpi=110)


if __name__ == "__main__":
    main()
