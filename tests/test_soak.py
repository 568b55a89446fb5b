"""The soak on a CPU: it passes, its records add up, and it finds what is planted in the reference.

On a Hopper GPU tests/soak/plant.py plants faults in the kernels.
"""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from soak import plant, record
from soak.casts import Cast, Swiglu
from soak.draw import Draw
from soak.gemms import DIMS, Gemm
from soak.gradients import Gradients
from soak.programs import Calls, loop
from soak.sharded import STRATEGIES, Sharded

from jax_fp8gemm._core import reference

HERE = pathlib.Path(__file__).parent
SHAPE = {"m": 9, "n": 7, "k": 272}
CASTING = {"m": 9, "n": 256, "k": 48, "g": 3}


@pytest.fixture(scope="module")
def run():
    """The module of the program, which sets flags of XLA that a running process has read."""
    flags, path = os.environ.get("XLA_FLAGS"), list(sys.path)
    yield importlib.import_module("soak.run")
    os.environ["XLA_FLAGS"], sys.path[:] = flags or "", path


def wrong(check, repeats: int = 6) -> int:
    return int(np.sum(np.asarray(loop((check,), repeats)(3, 0)) > 0))


# ---- what is right is right ---------------------------------------------------------------------


def gemms() -> list[Gemm]:
    """Every variant with extremes, init, other scales, casts before and inside the GEMM."""
    found = []
    for variant in DIMS:
        g = 1 if variant == "dense" else 3
        scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
        options = {"g": g, "scales": scales, "extremes": True}
        found.append(Gemm(variant, **SHAPE, **options))
        options |= {"scales": "row_row", "extremes": False, "out": "f32", "init": True}
        found.append(Gemm(variant, **SHAPE, **options))
    found.append(Gemm("ragged_contracting", **SHAPE, g=3, scales="row_row", extremes=True))
    found.append(Gemm("batched", **SHAPE, g=3, scales="tensor_tensor", cast=True))
    found.append(Gemm("ragged", **CASTING, rhs="bf16_transposed", pair=True, extremes=True))
    found.append(Gemm("masked", **CASTING, rhs="bf16", cast=True))
    found.append(Gemm("ragged", **SHAPE, g=3, extremes=True, leave_rest=True))
    found.append(Gemm("ragged", **CASTING, rhs="bf16_transposed", leave_rest=True))
    return found


OTHERS = [
    Gradients(9, 7, 33),
    Gradients(40, 7, 33, g=3, dtype="f32", residuals="fp8"),
    Gradients(40, 32, 48, g=3, cast_in_gemm=True),
    Cast("quantize", 9, 150, tile="128x128", extremes=True),
    Cast("quantize", 9, 150, dtype="f16", tile="row", rounding="none"),
    Cast("rows", 9, 150, g=3, index=True, extremes=True),
    Cast("both", 40, 33, dtype="f32", g=3, rounding="none"),
    Cast("transposed", 40, 33, tile="128x128"),
    Cast("requantize", 40, 33, g=3),
    Cast("both", 40, 150, share=True, extremes=True),
    Cast("requantize", 140, 33, g=3, share=True),
    Swiglu(9, 33, g=3),
    Swiglu(40, 128, backward=True, rounding="none", g=3),
    *(Sharded(64, 128, 128, split=split) for split in STRATEGIES),
    Sharded(1024, 16, 32, dtype="f32", residuals="fp8", split="data"),
]


# Shards of small products are no whole blocks of scales.
gathers = pytest.mark.filterwarnings("ignore:.*a mesh axis splits a block")


@gathers
@pytest.mark.parametrize("check", [*gemms(), *OTHERS], ids=str)
def test_the_reference_has_no_fault(check):
    assert not wrong(check)


def test_single_calls_take_the_memory_that_they_are_given():
    for check in (Gemm("dense", **SHAPE, out="f32", init=True), Gradients(9, 7, 33)):
        run = Calls(check)
        assert [run(1, index) for index in range(3)] == [(0, 0)] * 3


def test_programs_are_those_of_the_seed():
    first, again, other = (Draw(seed) for seed in (5, 5, 6))
    programs = [first.program() for _ in range(200)]
    assert programs == [again.program() for _ in range(200)]
    assert programs != [other.program() for _ in range(200)]
    checks = [check for program in programs for check in program]
    assert {check.variant for check in checks if isinstance(check, Gemm)} == set(DIMS)
    assert {type(check) for check in checks} == {Gemm, Gradients, Cast, Swiglu}
    gemms = [check for check in checks if isinstance(check, Gemm)]
    for field in ("scales", "out", "init", "rhs", "cast", "pair", "extremes", "leave_rest"):
        assert len({getattr(check, field) for check in gemms}) > 1, field
    kernels = {check.config.kernel for check in gemms if check.config}
    assert kernels == {"persistent", "few_rows"}


# ---- what is wrong is found ---------------------------------------------------------------------


def one_element(out: jax.Array) -> jax.Array:
    at = (0,) * out.ndim
    return out.at[at].set(2 * out[at] + 1)


def last_row(out: jax.Array) -> jax.Array:
    """A row that was not written, and has what was there before."""
    return out.at[..., -1, :].set(jnp.nan)


@pytest.fixture
def break_gemm(monkeypatch):
    """Returns a function that plants a fault in every product of the reference."""

    def plant_fault(fault):
        right = reference.gemm
        monkeypatch.setattr(reference, "gemm", lambda *a, **options: fault(right(*a, **options)))
        jax.clear_caches()

    yield plant_fault
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("fault", [one_element, last_row])
@pytest.mark.parametrize("variant", DIMS)
def test_a_fault_of_every_variant_is_found(variant, fault, break_gemm):
    break_gemm(fault)
    scales = "1x128_1x128" if variant == "ragged_contracting" else "1x128_128x128"
    assert wrong(Gemm(variant, **SHAPE, g=3 if variant != "dense" else 1, scales=scales))


@gathers
@pytest.mark.parametrize("split", STRATEGIES)
def test_a_fault_over_devices_is_found(split, break_gemm):
    break_gemm(one_element)
    assert wrong(Sharded(64, 128, 128, split=split), 2)


@gathers
def test_a_run_over_devices(run, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    options = ["--programs", "2", "--sharded", "--seconds", "300", "--record", str(path)]
    assert run.main(options) == 0
    (row,) = record.read(path)["runs"]
    assert row["programs"] == 2 and row["calls"] == 0
    assert row["products"] and all("over devices" in name for name in row["products"])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert run.main(options) == 2


def test_a_fault_of_a_cast_is_found(monkeypatch):
    right = reference.quantize

    def off_by_a_step(*args, **options):
        q, scale = right(*args, **options)
        bits = jax.lax.bitcast_convert_type(q, jnp.uint8)
        bits = bits.at[..., 0, 0].set(bits[..., 0, 0] ^ 1)
        return jax.lax.bitcast_convert_type(bits, q.dtype), scale

    monkeypatch.setattr(reference, "quantize", off_by_a_step)
    jax.clear_caches()
    found = [wrong(check) for check in OTHERS if isinstance(check, Cast) and check.m == 40]
    monkeypatch.undo()
    jax.clear_caches()
    assert all(found)


def test_a_write_past_the_end_is_found():
    run = Calls(Gemm("dense", **SHAPE))
    three = run._allocate(run._make(1, 0))[0]
    before = three[0].at[-1, -1].set(0)
    _, changed = run._judge(run._make(1, 0), [three[1]], [before, three[2]])
    assert int(changed) == 1


def test_a_planted_fault_ends_the_run_with_its_smallest_case(run, break_gemm, tmp_path, capsys):
    break_gemm(one_element)
    path = tmp_path / "record.json"
    options = ["--programs", "3", "--threads", "1", "--seconds", "300", "--record", str(path)]
    assert run.main(options) == 1
    (row,) = record.read(path)["runs"]
    assert row["faults"] >= 3 and row["programs"] == 3  # it goes on after the first
    printed = capsys.readouterr().out.split("smallest fault: ")[1].splitlines()[0]
    smallest = json.loads(printed)
    assert smallest["work"] == min(one["work"] for one in row["found"])
    assert run.main(["--reproduce", printed]) == 1


# ---- records ------------------------------------------------------------------------------------


def test_records_add_up(run, tmp_path, capsys):
    path = tmp_path / "record.json"
    options = ["--threads", "1", "--seconds", "300", "--record", str(path)]
    for seed, programs in (("1", "3"), ("2", "2")):
        assert run.main([*options, "--seed", seed, "--programs", programs]) == 0
    stored = record.read(path)
    other = {**stored["runs"][0], "digest": "of other sources"}
    record.write(path, {**stored, "runs": [*stored["runs"], other]})
    capsys.readouterr()
    assert run.main(["--summary", "--record", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = stored["runs"]
    assert (found["runs"], found["programs"], found["faults"]) == (2, 5, 0)
    assert found["products"] == sum(sum(row["products"].values()) for row in rows) > 0
    assert found["products"] == sum(found["by_variant"].values())
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.1)


def test_a_terminated_run_leaves_its_record(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, str(HERE / "soak/run.py"), "--seconds", "400", "--record", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 300
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
    (row,) = record.read(path)["runs"]
    assert process.returncode == 128 + signal.SIGTERM
    assert row["programs"] >= 1 and row["digest"] == record.digest() and not row["faults"]


def test_the_digest_is_that_of_the_sources(tmp_path):
    for folder in ("csrc/kernels", "jax_fp8gemm"):
        (tmp_path / folder).mkdir(parents=True)
    source = tmp_path / "csrc/kernels/a.cuh"
    source.write_text("one")
    before = record.digest(tmp_path)
    (tmp_path / "jax_fp8gemm/notes.txt").write_text("no source")
    assert record.digest(tmp_path) == before
    source.write_text("two")
    assert record.digest(tmp_path) != before


def test_faults_can_be_planted_in_the_kernels(tmp_path):
    plant.copy_sources(tmp_path / "tree")
    for name, (file, _) in plant.FAULTS.items():
        plant.plant(tmp_path / "tree", name)
        changed = [
            path.name
            for path in sorted((tmp_path / "tree/csrc/kernels").iterdir())
            if path.read_bytes() != (record.ROOT / "csrc/kernels" / path.name).read_bytes()
        ]
        assert changed == [file]
