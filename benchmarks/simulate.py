"""Predicts DeepSeek-V3's layer of experts over many devices, from stored times and link speeds.

    python benchmarks/simulate.py

What it assumes stands in docs/simulation.md, beside the table that it makes.
"""

import dataclasses
import json
import math
import pathlib

NVLINK = 450e9  # bytes a second into one GPU: H200, NVLink 4, 18 links of 25 GB/s
NETWORK = 50e9  # likewise, from GPUs of other nodes: one port of 400 Gbit/s for each GPU
NODE = 8  # GPUs of one node

H, TOP_K, EXPERTS, TOKENS = 7168, 8, 256, 4096  # DeepSeek-V3; tokens of one GPU
GROUPS, TOP_GROUPS = 8, 4  # a token's experts are in half of the groups

STORED = pathlib.Path(__file__).parent / "results/nvidia-h200.json"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Time of forward and backward on one GPU: a·rows + b·experts + c, in ms."""

    row: float
    expert: float
    rest: float

    def ms(self, rows: float, experts: float) -> float:
        return self.row * rows + self.expert * experts + self.rest


def fitted(rows: list[dict] | None = None) -> Layer:
    """Fits Layer to the stored times of `expert_ffn` with 8192 and 32768 rows."""
    import numpy as np

    rows = json.loads(STORED.read_text()) if rows is None else rows
    chosen = [r for r in rows if r["op"].startswith("MoE layer,") and r["m"] in (8192, 32768)]
    chosen = [r for r in chosen if r["op"].endswith(": fp8 expert_ffn") and r["n"] == 2048]
    matrix = np.array([[r["m"], r["g"], 1.0] for r in chosen])
    times = np.array([r["us"] / 1e3 for r in chosen])
    # By relative error: small layers count as much as large ones.
    found, *_ = np.linalg.lstsq(matrix / times[:, None], np.ones(len(times)), rcond=None)
    return Layer(*map(float, found))


def bytes_of_a_token() -> float:
    """What one token is on the wire, there and back, forward and backward."""
    fp8_row = H + H // 128 * 4  # its FP8 numbers and their scales
    choices = TOP_K * (4 + 4)  # experts and their weights
    sent = 2 * fp8_row + choices  # x forward, dy backward
    returned = 2 * 2 * H + TOP_K * 4  # y and dx in bf16, the weights' gradients
    return sent + returned


def share_of_devices(devices: int) -> float:
    """The part of all devices that a token's experts are on, on average."""
    own, group = EXPERTS // devices, EXPERTS // GROUPS
    whole = max(1, own // group)  # groups of a device, or the one that its experts are of
    left, reached = group * TOP_GROUPS, 0.0
    for chosen in range(1, min(whole, TOP_GROUPS) + 1):
        ways = math.comb(whole, chosen) * math.comb(GROUPS - whole, TOP_GROUPS - chosen)
        missed = math.comb(left - chosen * min(own, group), TOP_K) / math.comb(left, TOP_K)
        reached += ways / math.comb(GROUPS, TOP_GROUPS) * (1 - missed)
    return reached


def wire_ms(devices: int, exchange: str) -> float:
    """The time of all bytes of a layer on the wire, one behind the other."""
    near, far = min(devices, NODE) - 1, max(0, devices - NODE)
    each = TOKENS * bytes_of_a_token()
    if exchange == "all_gather":  # what comes into a node comes once, by all of its ports
        return 1e3 * each * ((near + far) / NVLINK + far / (NODE * NETWORK))
    return 1e3 * each * share_of_devices(devices) * (near / NVLINK + far / NETWORK)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one layer, forward and backward, in ms."""

    devices: int
    exchange: str
    alone: float  # one GPU with its own experts and as many rows
    wire: float

    @property
    def exposed(self) -> float:
        """Nothing is hidden."""
        return self.alone + self.wire

    @property
    def hidden(self) -> float:
        """All that can be hidden is: the wire or the GEMMs, whichever takes longer."""
        return max(self.alone, self.wire)


def predict(devices: int, exchange: str, experts: int | None = None) -> Prediction:
    own = EXPERTS // devices if experts is None else experts
    alone = fitted().ms(TOKENS * TOP_K, own)
    return Prediction(devices, exchange, alone, wire_ms(devices, exchange))


def table() -> str:
    lines = [
        "| GPUs | experts a GPU | exchange | GEMMs and casts, ms | wire, ms | nothing hidden | × | "
        "all hidden | × |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for devices in (8, 16, 32, 64, 128, 256):
        for exchange in ("all_gather", "all_to_all"):
            p = predict(devices, exchange)
            lines.append(
                f"| {devices} | {EXPERTS // devices} | `{exchange}` | {p.alone:.2f} | {p.wire:.2f} "
                f"| {p.exposed:.2f} | {p.exposed / p.alone:.2f} "
                f"| {p.hidden:.2f} | {p.hidden / p.alone:.2f} |"
            )
    return "\n".join(lines) + "\n"


def two() -> str:
    """The prediction for two GPUs with 8 experts each, in words."""
    p = predict(2, "all_gather", experts=8)
    return (
        f"For two GPUs with 8 experts each it predicts {p.alone:.2f} + {p.wire:.2f} = "
        f"{p.exposed:.2f} ms with nothing hidden, {p.exposed / p.alone:.2f} times one GPU.\n"
    )


def text() -> str:
    return f"{table()}\n{two()}"


if __name__ == "__main__":
    print(fitted())
    print(text())
