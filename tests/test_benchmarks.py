"""The benchmark scripts run: on a CPU, small, with a device clock that stands still."""

import importlib
import json
import math
import pathlib
import sys
import types

import jax
import pytest

from jax_fp8gemm import tuning
from jax_fp8gemm._select.choice import file_name

SCRIPTS = "quantize", "moe_layer", "train_moe", "train_step", "protocol", "pallas_peer", "moe_lm"
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Returns a function that imports a script; times are 1 µs of casts and 2 µs of products."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def standing_clock(contenders, reps, **how):
        for run in contenders.values():
            jax.block_until_ready(run())
        return {name: [[("fp8_quantize", 1.0), ("fp8_gemm", 2.0)]] * reps for name in contenders}

    monkeypatch.setattr(tuning, "device_kernels", standing_clock)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_casts_and_products_with_casts(load, monkeypatch):
    script = load("quantize")
    monkeypatch.setattr(script, "TOKENS", 256)
    monkeypatch.setattr(script, "WIDTH", 512)
    rows = [row for part in script.parts("") for row in part]
    ops = [row["op"] for row in rows]
    assert len(set(ops)) == len(ops) > 12
    by_op = {row["op"]: row for row in rows}
    # bf16 in, FP8 out, a float32 scale for 128 numbers.
    assert by_op["quantize: 1x128 rows"]["bytes"] == 256 * 512 * (2 + 1 + 4 / 128)
    assert by_op["forward + backward: bf16 jnp.dot"]["peer"] == "fp8_matmul"


def test_a_layer_beside_its_peers(load, tmp_path):
    script = load("moe_layer")
    rows = script.layer(8, 64, 128, 128)
    peers = ["fp8 expert_ffn", "jax.lax.ragged_dot", "fp8 expert_ffn, weights copied"]
    assert [row["op"].split(": ")[1] for row in rows] == peers
    path = tmp_path / "rows.json"
    script.save(rows, str(path))
    script.save(rows, str(path))  # in place of the stored ones
    assert len(json.loads(path.read_text())) == 3


def test_each_card_has_its_own_results(load, monkeypatch):
    protocol = load("protocol")
    assert protocol.results().name == "cpu.json"
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert protocol.deepgemm(1.0) == {}  # its times are those of an H200
    card = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert protocol.results().name == "nvidia-h200.json"
    assert protocol.deepgemm(1.0)["peer_us"] == 1.0 and protocol.deepgemm(None) == {}


def test_training_runs_are_stored_one_by_one_and_reported(load, tmp_path, monkeypatch, capsys):
    script = load("train_moe")
    path = tmp_path / "runs.json"
    text = script.moe_lm.corpus(2 << 20)
    monkeypatch.setattr(script.moe_lm, "corpus", lambda: text)
    for runs in (["fp8:0"], ["control:0", "--report"]):
        sizes = ["--tiny", "--steps", "4", "--sequences", "4", "--out", str(path)]
        monkeypatch.setattr(sys, "argv", ["train_moe.py", *sizes, "--runs", *runs])
        script.main()
    stored = json.loads(path.read_text())
    assert [run["arm"] for run in stored] == ["fp8", "control"]
    assert all(math.isfinite(run["held_out"]) for run in stored)
    ours, control = (run["cosine"] for run in stored)
    assert all(ours[when]["all"] > 0.99 and not control[when] for when in ("start", "end"))
    table = capsys.readouterr().out
    assert "| fp8 | 0 |" in table and path.with_suffix(".png").exists()


def test_a_training_step_beside_bf16(load, monkeypatch):
    script = load("train_step")
    bf16, ours = script.rows(importlib.import_module("train_moe").TINY, 2)
    assert bf16["peer"] == "fp8" and ours["tokens"] == 64
    assert all(row["us"] > 0 and row["bytes_peak"] > 0 for row in (bf16, ours))
