"""The benchmark scripts run: on a CPU, small, with a device clock that stands still."""

import concurrent.futures
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import subprocess
import sys
import types

import deep_gemm_stub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._bind import quantize_op
from jax_fp8gemm._core import reference
from jax_fp8gemm._ops import casts
from jax_fp8gemm._select import choice
from jax_fp8gemm._select.choice import file_name
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import shapes, timing

SCRIPTS = (
    "quantize", "moe_layer", "train_moe", "train_step", "protocol", "pallas_peer", "moe_lm",
    "gemm", "grouped", "gemm_rows", "deepgemm_peer", "plot", "before_after", "watch",
    "router", "shared_columns", "readme", "load_checkpoint", "config_times", "fit_cost", "decode",
    "files", "model", "exchange",
)  # fmt: skip
BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
OURS = [("fp8_quantize", 1.0), ("fp8_gemm", 2.0)]
THEIRS = [("void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 4096u>(float*)", 3.0), ("copy", 1.0)]


@pytest.fixture
def load(monkeypatch):
    """Returns a function that imports a script; times are 1 µs of casts and 2 µs of GEMMs.

    A peer's GEMM takes 3 µs; 1 µs of copies comes with it.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def standing_clock(contenders, reps, burst=False, **how):
        timing.launch_order(list(contenders), reps, burst)
        for run in contenders.values():
            jax.block_until_ready(run())
        return {
            name: [THEIRS if isinstance(name, tuple) and name[1] == "peer" else OURS] * reps
            for name in contenders
        }

    monkeypatch.setattr(timing, "device_kernels", standing_clock)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def small_cases(script) -> list:
    """Returns one case of every family, odd sizes among them."""
    problem = Problem
    grouped = [
        problem("contiguous", 700, 136, 256, 3),
        problem("ragged", 700, 136, 256, 3),
        problem("masked", 90, 136, 256, 3),
        problem("ragged_contracting", 72, 136, 1280, 3, "1x128_1x128", "f32"),
    ]
    sizes = script.made_up.group_sizes
    return [
        script.Case("dense", problem("dense", 67, 136, 272)),
        script.Case("one row", problem("dense", 1, 352, 176)),
        script.Case("gradient", problem("dense", 72, 136, 384, 1, "1x128_1x128", "f32")),
        *(script.Case(p.variant, p, sizes(p)) for p in grouped),
    ]


def test_every_family_is_timed_beside_a_live_deepgemm(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", deep_gemm_stub.torch())
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm_stub.deep_gemm())
    script, peer = load("gemm_rows"), load("deepgemm_peer")
    cases = small_cases(script)
    compiling = peer.Compiling(
        [case.job for case in cases], concurrent.futures.ThreadPoolExecutor(1)
    )  # fmt: skip
    assert len(compiling.futures) == 6  # ragged groups are padded to those of contiguous
    rows = script.measure(cases, compiling, reps=3)
    assert [row["op"] for row in rows] == [case.op for case in cases]
    for row in rows:  # the GEMM alone on both sides; copies of flushed operands are no work
        assert (row["us"], row["peer_us"], row["same_run"]) == (2.0, 3.0, True), row
        assert row["peer_version"] == "tokenspeed-deepgemm 0.stub"
        assert row["error"] < 1e-5 and row["peer_error"] < 1e-5, row
    assert "padded" in {row["op"]: row["peer"] for row in rows}["ragged"]


def test_without_deepgemm_the_rows_have_no_peer(load, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # an import of it fails
    script = load("gemm_rows")
    cases = small_cases(script)[:1]
    (row,) = script.measure(cases, script.ready(cases), reps=3)
    assert "peer" not in row and row["us"] == 2.0
    assert "DeepGEMM is no peer here" in capsys.readouterr().out


def test_a_wrong_peer_is_left_out(load, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", deep_gemm_stub.torch())
    wrong = deep_gemm_stub.deep_gemm()
    wrong.fp8_gemm_nt = lambda lhs, rhs, out, **how: None
    monkeypatch.setitem(sys.modules, "deep_gemm", wrong)
    script, peer = load("gemm_rows"), load("deepgemm_peer")
    (row,) = script.measure(small_cases(script)[:1], peer.Compiling([]), reps=3)
    assert "peer" not in row and "the peer is left out" in capsys.readouterr().out


def test_both_sides_take_turns_in_a_burst_of_their_shape():
    names = [("a", "ours"), ("a", "peer"), ("b", "ours")]
    order = timing.launch_order(names, 2, [names[:2], names[2:]])
    assert [name for name, _ in order] == [*names[:2], *names[:2], names[2], names[2]]
    assert [rest for _, rest in order] == [True, False, False, False, True, False]
    apart = timing.launch_order(names[:2], 2, True)
    assert [name for name, _ in apart] == [names[0], names[0], names[1], names[1]]
    together = timing.launch_order(names[:2], 2, False)
    assert [name for name, _ in together] == names[:2] * 2
    assert not any(rest for _, rest in together)
    with pytest.raises(ValueError, match="one burst"):
        timing.launch_order(names, 2, [names[:2]])


def test_a_trace_is_cut_at_the_flushes():
    flush, reading = ("loop_shift_left_fusion", 90.0), ("input_reduce_fusion", 80.0)
    theirs = ("void deep_gemm::sm90_fp8_gemm_1d1d_impl<4096u>", 7.0)
    events = [("wrapped_iota", 3.0), flush, ("fp8_gemm", 5.0), flush, theirs, ("fill", 1.0)]
    launches = timing.between_flushes(events)
    assert launches == [[("fp8_gemm", 5.0)], [theirs, ("fill", 1.0)]]
    assert timing.sums(launches) == [5.0, 8.0]
    assert timing.sums(launches, timing.KERNEL) == [5.0, 7.0]
    small = ("input_reduce_fusion_1", 2.0)
    events = [reading, small, ("fp8_gemm", 5.0), reading, small, ("fp8_gemm", 6.0)]
    assert timing.sums(timing.between_flushes(events, "read")) == [5.0, 6.0]


def test_drawn_shapes_are_in_no_tuned_table():
    found = shapes.drawn()
    assert found == shapes.drawn() and found != shapes.drawn(seed=1)
    assert len({(s.m, s.n, s.k) for s in found}) == len(found) >= 40
    assert all(s.k % 16 == s.n % 8 == 0 and 1 <= s.m <= shapes.MOST_ROWS for s in found)
    assert sum(s.k % 128 > 0 for s in found) >= 3 and sum(s.n % 128 > 0 for s in found) >= 2
    assert min(s.m for s in found) < 8 and max(s.m for s in found) > 8192
    for card in shapes.CARDS:
        path = pathlib.Path(choice.__file__).parent / f"tuned/{file_name(card)}.json"
        tuned = {(row["n"], row["k"]) for row in json.loads(path.read_text())}
        assert not tuned & {(layer.n, layer.k) for layer in shapes.LAYERS}


def test_a_summary_tells_the_mean_the_worst_and_how_often_slower(load, capsys):
    protocol = load("protocol")
    live = {"us": 2.0, "tflops": 1, "peer": "DeepGEMM", "same_run": True}
    rows = [{"op": f"drawn: {i}", "peer_us": us, **live} for i, us in enumerate((1.0, 4.0, 4.0))]
    rows.append({"op": "drawn: of another day", "peer_us": 9.0, **live, "same_run": False})
    text = protocol.summary(rows, "drawn: ")
    assert "geometric mean 1.260, worst 0.500, slower in 1 of 3 rows" in text
    assert protocol.summary(rows, "dense: ") == ""
    assert text in capsys.readouterr().out


def test_the_picture_has_live_peers_alone(load):
    pytest.importorskip("matplotlib")
    rows = [{"op": "dense: a", "same_run": True}, {"op": "dense: b", "peer_us": 1.0}]
    assert list(load("plot").live(rows)) == ["dense: a"]


def test_the_version_of_cudnn_is_named_beside_ragged_dot(load):
    protocol = load("protocol")
    said = protocol.beside("jax.lax.ragged_dot", [3.0, 1.0, 2.0])
    assert said["peer_us"] == 2.0 and said["peer_version"].startswith(
        f"jax {jax.__version__}, cuDNN"
    )
    assert protocol.version_of("bf16 dot") == f"jax {jax.__version__}"


def test_dense_shapes_are_timed(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    script = load("gemm")
    rows = script.products("dense: kv_down_m64")
    assert [row["op"] for row in rows] == ["dense: kv_down_m64"]
    assert {"us", "p10", "p90", "tflops", "gbs", "roofline", "config", "scales"} <= set(rows[0])


def test_the_command_sums_up_each_kind_of_row(load, monkeypatch, tmp_path, capsys):
    script, path = load("gemm"), tmp_path / "rows.json"
    problem = Problem("dense", 72, 136, 384, 1, "1x128_1x128", "f32")
    ops = ("gradient: a", "no scale shared, gradient: a")
    made = [script.row(problem, op, [2.0], **script.beside("DeepGEMM", [3.0])) for op in ops]
    monkeypatch.setattr(script, "products", lambda only: made)
    options = ["--only", "products", "--rows", "gradient", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["gemm.py", *options])
    script.main()
    assert [row["op"] for row in json.loads(path.read_text())] == list(ops)
    printed = capsys.readouterr().out
    for op in ops:
        assert f"== {op[:-1]}DeepGEMM µs / ours: geometric mean 1.500" in printed


def test_two_checkouts_are_timed_in_turn(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "before_after.py"), sys.executable, sys.executable]
    command += ["--tiny", "--only", "gemm 16x", "--rounds", "2", "--reps", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = json.loads(out.read_text())
    assert len(rows) == 4 and all(row["same_bits"] for row in rows)
    assert all(
        row["ratio"] == pytest.approx(row["old_us"] / row["new_us"], rel=0.02) for row in rows
    )
    assert "geometric mean" in done.stdout


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


def test_what_an_exchange_costs_on_one_gpu(load, tmp_path, monkeypatch, capsys):
    script = load("exchange")
    sizes = script.Sizes(t=24, h=256, f=128, own=2, top_k=2, nodes=4)
    shape = (3, 90, 40, 136, 256)
    monkeypatch.setattr(script, "Sizes", lambda: sizes)
    monkeypatch.setattr(script, "GEMMS", [shape])
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["exchange.py", "--out", str(path)])
    script.main()
    rows = json.loads(path.read_text())
    assert len(rows) == 3 + 6 + 1
    assert all(row["us"] in (2.0, 3.0) and row["p10"] <= row["p90"] for row in rows)
    by_op = {row["op"].removeprefix("exchange: "): row for row in rows}
    row_bytes = 256 + 4 * (2 + 2 + 2)  # FP8, a scale for 128 numbers, two choices and weights
    assert by_op["pack"]["bytes"] == 2 * 24 * row_bytes
    assert by_op["unpack"]["bytes"] == 2 * 48 * row_bytes  # of both devices' tokens
    beside = [row for row in rows if "ratio" in row]
    assert [row["ratio"] for row in beside] == [1.0] * 4
    assert {row["target_ratio"] for row in beside} == {1.03, 1.02}
    # A table of all rows comes last.
    printed = capsys.readouterr().out.splitlines()[-10:]
    assert [line.split("exchange: ")[1] for line in printed] == list(by_op)
    slow = dict(beside[0], ratio=1.031)
    assert ": NO " in script.table([slow]) and ": yes" in script.table(beside[:1])
    # The programs do what their rows say.
    _, programs = script.gemm_programs(shape)
    alone, zeros, left, _ = (run(*given) for run, given in programs.values())
    np.testing.assert_array_equal(zeros[:40], alone)
    np.testing.assert_array_equal(left[:40], alone)
    assert not zeros[40:].any() and jnp.isnan(left[40:]).all()


def test_the_router_beside_what_it_was(load, monkeypatch):
    script = load("router")
    monkeypatch.setattr(script, "SAMPLE", 20)
    rows = [row for part in script.parts("", [script.Shape(70, 40, 12, 3)]) for row in part]
    assert len({row["op"] for row in rows}) == len(rows) == 6
    ours, before = rows[:2]
    assert (ours["us"], ours["peer"], ours["peer_us"], ours["kernels"]) == (3.0, "float32", 3.0, 2)
    for name in ("error_logits", "error_dkernel"):
        assert ours[name] <= before[name] < 1e-6
    assert 1e-3 < ours["error_dx"] < 1.0001 * before["error_dx"]
    assert ours["tokens_that_choose_otherwise"] == 0
    assert rows[4]["same_bits"] and "same_bits" not in rows[5]


def test_each_card_has_its_own_results(load, monkeypatch):
    protocol = load("protocol")
    assert protocol.results().name == "cpu.json"
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    card = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert protocol.results().name == "nvidia-h200.json"


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
    assert all(ours[when]["all"] > 0.99 for when in ("start", "end")) and not control
    table = capsys.readouterr().out
    assert "| fp8 | 0 |" in table and path.with_suffix(".png").exists()


def test_runs_with_and_without_shared_scales_are_paired_and_resumed(load, tmp_path, monkeypatch):
    script = load("train_moe")
    path, text = tmp_path / "runs.json", script.moe_lm.corpus(2 << 20)
    monkeypatch.setattr(script.moe_lm, "corpus", lambda: text)
    arms = ["fp8:0", "fp8_again:0"]
    command = ["--tiny", "--steps", "2", "--sequences", "4", "--watch", "2", "--no-cosines"]
    command += ["--resume", "--out", str(path), "--runs"]
    for runs in (arms[:1], arms):
        monkeypatch.setattr(sys, "argv", ["train_moe.py", *command, *runs])
        script.main()
        first = json.loads(path.read_text())[0]
    stored = {run["arm"]: run for run in json.loads(path.read_text())}
    assert len(stored) == 2 and stored["fp8"] == first  # it did not run again
    again = stored["fp8_again"]
    assert [again[k] for k in ("losses", "last_loss", "columns")] == [
        first[k] for k in ("losses", "last_loss", "columns")
    ]
    assert list(first["columns"]) == ["0", "2"] and not first["cosine"]
    matrices = first["columns"]["2"].values()
    for matrix in matrices:
        assert 0.9 < matrix["whole"] <= matrix["shared"] <= 1 and matrix["nonfinite_tiles"] == 0
    assert 0 < max(matrix["underflow"] for matrix in matrices) < 0.1


@pytest.mark.parametrize("name, shares", [("fp8", True), ("fp8_own_scales", False)])
def test_an_arm_has_the_scales_that_its_name_says(load, monkeypatch, name, shares):
    train_moe = load("train_moe")
    arm, asked = train_moe.arm_of(name, train_moe.TINY, 4), []
    cast = quantize_op.CastSpec
    monkeypatch.setattr(casts, "CastSpec", lambda **how: asked.append(how) or cast(**how))
    params = train_moe.moe_lm.init(jax.random.key(0), train_moe.TINY)
    tokens = jnp.zeros((4, train_moe.TINY.context + 1), jnp.uint8)
    jax.clear_caches()  # backward rules are jitted: another test's would not ask again
    loss = functools.partial(train_moe.moe_lm.loss, size=train_moe.TINY, arm=arm)
    jax.eval_shape(jax.grad(lambda p: loss(p, tokens)[0]), params)
    assert asked and any(how.get("shared_columns") for how in asked) == shares


def test_the_model_that_is_watched_has_the_same_gradients(load):
    watch, size = load("watch"), load("train_moe").TINY
    params = watch.moe_lm.init(jax.random.key(0), size)
    tokens = jax.random.randint(jax.random.key(1), (3, size.context + 1), 0, 256).astype("uint8")
    seen = []
    arm = watch.watched(lambda name, x, dy, sizes: seen.append((name, x.shape, dy.shape)))
    found, plain = (
        jax.grad(lambda p, arm=arm: watch.moe_lm.loss(p, tokens, size, arm)[0])(params)
        for arm in (arm, watch.moe_lm.BF16)
    )
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    rows, w, f = 3 * size.context, size.width, size.hidden
    assert {name: shapes for name, *shapes in seen} == {
        "qkv": [(rows, w), (rows, 3 * w)],
        "out": [(rows, w), (rows, w)],
        "gate": [(2 * rows, w), (2 * rows, f)],
        "up": [(2 * rows, w), (2 * rows, f)],
        "down": [(2 * rows, f), (2 * rows, w)],
    }


def test_blocks_that_share_in_every_step_are_counted_by_groups(load):
    watch = load("watch")
    scale = np.ones((256, 5), np.float32)
    scale[3, 1] = 2.0  # the first 128 columns, in the second step
    sizes = np.array([130, 0, 100])  # two steps, none, one; two steps are left over
    group = watch.group_of_steps(sizes, 5)
    assert group.tolist() == [0, 0, 2, -1, -1]
    assert watch.shares(scale, group) == {"blocks": 5 / 6, "whole": 3 / 4}
    assert watch.shares(scale, np.zeros(5, int)) == {"blocks": 0.9, "whole": 0.5}


def test_errors_of_shared_scales_are_those_of_the_cast(load):
    script = load("shared_columns")
    draw = np.random.default_rng(0)
    x, dy = draw.normal(size=(256, 40)), script.MADE_UP["normal, at the limit"](draw, 256, 256, 12)
    exact = x.T @ dy
    left = fp8.dequantize(fp8.quantize_transposed(jnp.asarray(x, jnp.float32)))
    for spread, shared in ((reference.SHARED_SPREAD, False), (12, True)):
        scale = script.scales_of(dy, spread)
        assert (np.ptp(scale.reshape(2, 128, 2), axis=1) == 0).all() == shared
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "SHARED_SPREAD", spread)
            columns = jnp.asarray(dy, jnp.float32)
            q = reference.quantize(columns.T, (1, 128), "pow2", shared=True)
        right = np.asarray(reference.dequantize(*q, (1, 128)), np.float64)
        np.testing.assert_array_equal(script.rounded(dy, scale).T, right)
        dw = np.asarray(left, np.float64) @ right.T
        (found,) = script.errors(x, dy, [spread])
        columns = np.linalg.norm(dw - exact, axis=0) / np.linalg.norm(exact, axis=0)
        assert found["worst"] == pytest.approx(columns.max())
        total = np.linalg.norm(dw - exact) / np.linalg.norm(exact)
        assert found["total"] == pytest.approx(total)
        assert (found["increase"] > 0.1) == shared


def test_the_stored_rows_are_of_the_rule_that_is_used(load):
    """No column's error grows by more than 3 %, and one power of two more would break that."""
    readme = load("readme")
    assert readme.CHOSEN == reference.SHARED_SPREAD
    found = readme.of_data(readme.stored("shared_columns.json"))
    most = {
        spread: max(rows[spread]["increase"] for data, rows in found.items() if "limit" not in data)
        for spread in (readme.CHOSEN, readme.CHOSEN + 1)
    }
    assert most[readme.CHOSEN] <= 0.03 < most[readme.CHOSEN + 1]


def test_a_training_step_beside_bf16(load, monkeypatch):
    script = load("train_step")
    bf16, ours = script.rows(importlib.import_module("train_moe").TINY, 2)
    assert bf16["peer"] == "fp8" and ours["tokens"] == 64
    assert all(row["us"] > 0 and row["bytes_peak"] > 0 for row in (bf16, ours))


def test_loading_is_timed_beside_a_plain_read_of_the_same_bytes(load, tmp_path):
    pytest.importorskip("safetensors")
    script = load("load_checkpoint")
    rows = script.measure(reps=1, scale=0.02)
    names = [f"load checkpoint: {name}" for name in ("block FP8", "MXFP4 to E4M3")]
    states = ("cold", "warm")
    assert [row["op"] for row in rows] == [f"{name}, {state}" for name in names for state in states]
    assert all(row["us"] > 0 and row["peer_us"] > 0 and row["same_run"] for row in rows)
    script.write_block_fp8(tmp_path, 0.02)
    ours = [jax.tree.leaves(tensors) for tensors in script.ours(tmp_path)]
    both = [
        sum(x.nbytes for x in jax.tree.leaves(arrays)) for arrays in (ours, script.plain(tmp_path))
    ]
    assert both[0] == both[1] > 3e5


# ---- configs and their choice -------------------------------------------------------------------


def test_configs_to_time_are_of_every_variant_and_legal(load):
    script = load("config_times")
    problems = script.drawn(3, 0.05)
    assert problems == script.drawn(3, 0.05) != script.drawn(4, 0.05)
    variants = {"dense", "ragged", "masked", "contiguous", "ragged_contracting"}
    assert {p.variant for p in problems} == variants and {p.out for p in problems} == {
        "bf16",
        "f32",
    }
    draw = np.random.default_rng(0)
    for problem in problems:
        configs = script.configs_of(problem, draw)
        assert len(set(configs)) == len(configs) <= script.CONFIGS + 1
        assert all(choice.why_illegal(problem, config) is None for config in configs)
        assert problem.n * problem.k <= script.MOST_WEIGHTS


def test_one_program_has_every_config_as_a_branch(load, monkeypatch):
    script = load("config_times")
    monkeypatch.setattr(script, "POOL", 1 << 16)
    pool, draw = script.Pool(), np.random.default_rng(0)
    problems = [case.problem for case in small_cases(load("grouped"))]
    for problem in problems:
        operands, out = script.operands_of(pool, problem)
        types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        configs = script.configs_of(problem, draw)[:4]
        run = script.branches(problem, configs, out)
        lowered = run.trace(jax.ShapeDtypeStruct((), jnp.int32), *types)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@jax_fp8gemm_gemm_v1(") == len(configs)
        if problem.variant == "ragged_contracting":
            assert out == (3, 72, 136)


def test_a_fit_finds_what_the_model_hides(load, monkeypatch):
    """Timings made by constants with another clock are fitted again from those of today."""
    script = load("fit_cost")
    data = script.read().part(True)
    few = slice(0, int(data.starts[30]))
    features = {name: x[few] for name, x in vars(data.features).items()}
    slow = dataclasses.replace(script.H200, arrival=4 * script.H200.arrival)
    small = script.Data(
        script.Features(**features), script.microseconds(script.Features(**features), slow),
        data.starts[:30], data.family[:30], np.ones(30, bool),
    )  # fmt: skip
    assert script.regrets(small, slow).max() == 1.0 < script.regrets(small, script.H200).max()
    fitted = script.fit(small, rounds=((0.02, 0.1),), sweeps=1)
    before, after = (script.loss(small, x, 0.02, 0.1) for x in (script.H200, fitted))
    assert after < before / 2


def test_a_layer_with_fp8_weights_beside_its_limits(load, monkeypatch, tmp_path, capsys):
    script = load("decode")
    sizes = {"hidden_size": 256, "heads": 2, "q_rank": 128, "expert_features": 128, "experts": 16}
    v3 = dataclasses.replace(script.model.V3, **sizes, top_k=4)
    monkeypatch.setattr(script.model, "V3", v3)
    for name, value in {"WIDTH": 256, "HIDDEN": 128, "EXPERTS": 16, "TOP_K": 4, "SEQUENCES": 4,
                        "KEPT": 32, "PROMPT": 16}.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    out = tmp_path / "rows.json"
    script.main(["--tokens", "1", "8", "--out", str(out)])
    rows = {row["op"]: row for row in json.loads(out.read_text())}
    assert len(rows) == 4 and all(row["us"] == 3.0 for row in rows.values())
    few = rows["MoE layer with FP8 weights, 8 tokens"]
    one = 3 * 256 * 128
    nbytes = (few["experts"] + 1) * one * (1 + 4 / 128**2) + 4 * 256 * 16 + 4 * 8 * 256
    assert 4 <= few["experts"] <= 16 and few["bytes"] == round(nbytes)
    assert few["flops"] == 2 * one * 8 * 5
    assert "whole layer, prefill, 16 tokens" in capsys.readouterr().out
