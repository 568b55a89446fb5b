"""Which measured row serves a problem, and when the model decides."""

import dataclasses
import json

import pytest

from jax_fp8gemm._select import choice
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import file_name, select
from jax_fp8gemm._select.cost import ranked
from jax_fp8gemm._select.problem import GemmConfig, Problem

PROBLEM = Problem("dense", 1200, 512, 1024, 1, "1x128_1x128", "f32")
KEY = ("dense", 512, 1024, 1, "1x128_1x128", "f32")
# No candidates, so that the model does not choose them.
SMALL = GemmConfig("persistent", 128, 16, 2)
LARGE = GemmConfig("persistent", 128, 16, 3)
ILLEGAL = GemmConfig("persistent", 128, 16, 2, split_k=2)


@pytest.fixture
def tuned(monkeypatch):
    """Puts rows {m: config} of one key into the table of every device."""

    def put(rows: dict, key: tuple = KEY):
        monkeypatch.setattr(choice, "_tuned", lambda device: {key: rows})

    return put


def modelled(problem: Problem) -> GemmConfig:
    return ranked(problem, candidates(problem))[0]


def test_the_nearest_row_serves_by_the_ratio_of_m(tuned):
    for rows in ({1030: SMALL, 1150: LARGE}, {1150: LARGE, 1030: SMALL}):
        tuned(rows)
        assert select(dataclasses.replace(PROBLEM, m=1080)) == SMALL  # 1.049 and 1.065
        assert select(dataclasses.replace(PROBLEM, m=1100)) == LARGE  # 1.068 and 1.045


def test_a_row_serves_up_to_half_as_much_again_either_way(tuned):
    tuned({85: SMALL})
    for m, served in {57: True, 56: False, 127: True, 128: False}.items():
        problem = dataclasses.replace(PROBLEM, m=m)
        assert select(problem) == (SMALL if served else modelled(problem)), m


def test_a_row_of_exactly_the_ratio_serves(tuned):
    tuned({96: SMALL})
    assert select(dataclasses.replace(PROBLEM, m=64)) == SMALL


def test_a_row_serves_as_many_blocks_as_it_was_measured_with(tuned):
    tuned({1024: SMALL})  # eight blocks of 128 rows
    for m, served in {1024: True, 897: True, 896: False, 1025: False}.items():
        problem = dataclasses.replace(PROBLEM, m=m)
        assert select(problem) == (SMALL if served else modelled(problem)), m


def test_a_row_that_is_not_legal_is_passed_over(tuned):
    """It may be from other sizes of k, or of an older release."""
    tuned({1200: ILLEGAL, 1160: LARGE})
    assert select(PROBLEM) == LARGE
    tuned({1200: ILLEGAL})
    assert select(PROBLEM) == modelled(PROBLEM)


def test_a_row_serves_its_own_problem_alone(tuned):
    tuned({1200: SMALL})
    assert select(PROBLEM) == SMALL
    changes = {"n": 640, "k": 2048, "scales": "row_row", "out": "bf16", "variant": "batched"}
    for name, value in changes.items():
        other = dataclasses.replace(PROBLEM, **{name: value})
        assert select(other) == modelled(other), name
    groups = dataclasses.replace(PROBLEM, variant="batched", g=2)
    tuned({1200: SMALL}, ("batched", *KEY[1:]))
    assert select(groups) == modelled(groups)
    assert select(dataclasses.replace(groups, g=1)) == SMALL


def test_kernels_that_cast_are_not_tuned(tuned):
    casting = Problem("ragged", 1024, 512, 1024, 2, rhs="bf16")
    rows = {1024: GemmConfig("persistent", 128, 128, 2)}
    tuned(rows, ("ragged", 512, 1024, 2, casting.scales, "bf16"))
    assert select(casting) == modelled(casting) != rows[1024]
    assert select(dataclasses.replace(casting, rhs="fp8")) == rows[1024]


def test_the_choice_and_where_it_is_from_are_printed_on_request(tuned, monkeypatch, capsys):
    tuned({1200: SMALL})
    for value, printed in {"1": True, "0": False, "": False}.items():
        monkeypatch.setenv("JAX_FP8GEMM_PRINT_CONFIGS", value)
        select(PROBLEM)
        select(dataclasses.replace(PROBLEM, n=640))
        err = capsys.readouterr().err
        assert ("(tuned)" in err and "(model)" in err) == printed == bool(err)
    monkeypatch.delenv("JAX_FP8GEMM_PRINT_CONFIGS")
    select(PROBLEM)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("  (NVIDIA) GH200_480GB! ", "nvidia-gh200-480gb"),
    ],
)
def test_names_of_files_of_devices(device, name):
    assert file_name(device) == name


def test_a_device_without_a_table_has_that_of_the_h200():
    h200 = choice._tuned("NVIDIA H200")
    assert choice._tuned("NVIDIA H800") == h200 != choice._tuned("NVIDIA H100 80GB HBM3")
    folder = choice.pathlib.Path(choice.__file__).parent / "tuned"
    rows = json.loads((folder / "nvidia-h200.json").read_text())
    assert sum(map(len, h200.values())) == len(rows)
    row = rows[0]
    key = tuple(row[name] for name in ("variant", "n", "k", "g", "scales", "out"))
    assert h200[key][row["m"]].block_n == row["block_n"]
