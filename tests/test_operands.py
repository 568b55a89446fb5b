"""Operands and results of custom calls: taken as this package makes them, and refused otherwise."""

import ctypes
import functools
import pathlib
import shutil
import subprocess

import jax
import pytest
from test_plan import CAST_CALL, CONFIG, FEW_ROWS, PROBLEM

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

ROOT = pathlib.Path(__file__).parent.parent
# XLA_FFI_DataType of xla/ffi/api/c_api.h
TYPES = {"s32": 4, "f16": 10, "f32": 11, "bf16": 16, "e4m3": 20}
FEW = PROBLEM | CONFIG | FEW_ROWS
PERSISTENT = PROBLEM | CONFIG


@pytest.fixture(scope="session")
def check(tmp_path_factory):
    """Returns check(handler, attributes, operands, results): the error, or ""."""
    folder = tmp_path_factory.mktemp("operands")

    @functools.cache
    def library(handler: str):
        sources = ["attributes", "gemm_spec", "quantize_spec", "ffi_buffers", "ffi_common"]
        command = [
            "g++", "-std=c++20", "-O0", "-fPIC", "-shared", "-o", folder / f"{handler}.so",
            f'-DHANDLER="{handler}.cpp"', *["-DGEMM"] * (handler == "ffi_gemm"),
            f"-I{ROOT / 'csrc'}", f"-isystem{jax.ffi.include_dir()}",
            ROOT / "tests/emulation/operands.cpp",
            *[ROOT / f"csrc/{name}.cpp" for name in sources],
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = ctypes.CDLL(str(folder / f"{handler}.so"), mode=1)  # lazy: no driver, no compiler
        found.check.restype = ctypes.c_char_p
        return found

    def run(handler: str, attributes: dict, operands: list[str], results: list[str]) -> str:
        lines = ["\n".join(f"{k} {v}" for k, v in attributes.items())]
        lines += ["\n".join(map(buffer, x)) for x in (operands, results)]
        return library(handler).check(*(line.encode() for line in lines)).decode()

    return run


def buffer(text: str) -> str:
    """ "e4m3 8 128" with the number of the type, and an address; "@1" is another one."""
    kind, *sizes = text.split()
    address = 256 * int(sizes.pop()[1:]) if sizes[-1].startswith("@") else 256
    return f"{TYPES[kind]} {address} {' '.join(sizes)}"


LHS, LHS_SCALE = "e4m3 40 256", "f32 2 40"
OUT = "bf16 40 384"
W, W_SCALE = "e4m3 3 384 256", "f32 3 3 4"  # three groups
SIZES = "s32 3"
CAST = {"variant": "ragged", "rhs": "bf16", "stages": 2}
TURNED = CAST | {"rhs": "bf16_transposed"}
F32 = {"out": "f32"}
TAKEN = {
    "dense": (FEW, [LHS, "e4m3 384 256", LHS_SCALE, "f32 3 4"], [OUT]),
    "init": (
        FEW | F32 | {"accumulate": 1},
        [LHS, "e4m3 384 256", LHS_SCALE, "f32 3 4", "f32 40 384"],
        ["f32 40 384"],
    ),
    "ragged": (FEW | {"variant": "ragged"}, [LHS, W, LHS_SCALE, W_SCALE, SIZES], [OUT]),
    "contiguous": (
        PERSISTENT | {"variant": "contiguous"},
        [LHS, W, LHS_SCALE, W_SCALE, "s32 40"],
        [OUT],
    ),
    "masked": (
        FEW | {"variant": "masked"},
        ["e4m3 3 40 256", W, "f32 3 2 40", W_SCALE, SIZES],
        ["bf16 3 40 384"],
    ),
    "ragged_contracting": (
        PERSISTENT | F32 | {"variant": "ragged_contracting", "rhs_scale": "1x128"},
        [LHS, "e4m3 384 256", LHS_SCALE, "f32 2 384", SIZES],
        ["f32 3 40 384"],
    ),
    "batched_tensors": (
        FEW | {"variant": "batched", "lhs_scale": "tensor", "rhs_scale": "tensor"},
        ["e4m3 3 40 256", W, "f32 3 1 4", "f32 3 1 4"],
        ["bf16 3 40 384"],
    ),
    "bf16": (PERSISTENT | CAST, [LHS, "bf16 3 384 256", LHS_SCALE, SIZES], [OUT]),
    "bf16_transposed": (PERSISTENT | TURNED, [LHS, "bf16 3 256 384", LHS_SCALE, SIZES], [OUT]),
    "bf16_pair": (
        PERSISTENT | CAST | {"pair": 1},
        [LHS, *["bf16 3 384 128"] * 2, LHS_SCALE, SIZES],
        [OUT],
    ),
    "bf16_transposed_pair": (
        PERSISTENT | TURNED | {"pair": 1},
        ["e4m3 40 256", *["bf16 3 256 256"] * 2, LHS_SCALE, SIZES],
        ["bf16 40 512"],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_operands_of_every_variant_are_taken(check, name):
    assert check("ffi_gemm", *TAKEN[name]) == ""


@pytest.mark.parametrize("name", TAKEN)
def test_no_buffer_may_lack_or_be_of_another_shape_or_type(check, name):
    attributes, operands, results = TAKEN[name]
    every = [*operands, *results]
    for i, text in enumerate(every):
        kind, *sizes = text.split()
        wrong = {"bf16": "f16", "f16": "bf16"}.get(kind, "bf16")
        for other in (
            " ".join([wrong, *sizes]),
            " ".join([kind, *sizes, "1"]),
            " ".join([kind, *sizes[:-1], str(int(sizes[-1]) + 4)]),
        ):
            changed = [*every[:i], other, *every[i + 1 :]]
            error = check("ffi_gemm", attributes, changed[:-1], changed[-1:])
            assert "jax_fp8gemm: test: " in error and "\n  fix       " in error, (i, other)
    assert "no operand" in check("ffi_gemm", attributes, operands[:-1], results)
    assert "no result" in check("ffi_gemm", attributes, operands, [])
    assert "too many buffers" in check("ffi_gemm", attributes, [*operands, "s32 1"], results)


def replaced(name: str, **changes) -> tuple:
    attributes, operands, results = TAKEN[name]
    operands = [changes.pop(f"at{i}", x) for i, x in enumerate(operands)]
    results = [changes.pop("out", results[0])]
    return attributes | changes, operands, results


@pytest.mark.parametrize(
    "call, words",
    [
        (replaced("init", at4="f32 40 384 @2"), "init is not aliased"),
        (replaced("dense", at1="e4m3 380 256", out="bf16 40 380", aligned=1, kernel="persistent",
                  block_m=128), "rows of the output are not aligned"),
        (replaced("masked", at0=f"e4m3 3 {2**30} 256"), "2^31 - 2048 rows"),
        (replaced("bf16_pair", at1="bf16 3 384 136", at2="bf16 3 384 136"), "k differs"),
        (replaced("bf16", at1="bf16 3 384 512"), "k differs"),
        (replaced("bf16_transposed_pair", at1="bf16 3 256 192", at2="bf16 3 256 192",
                  out="bf16 40 384"), "cannot be copied"),
        (replaced("bf16_pair", pair=0), "k differs"),
        (replaced("bf16_transposed", pair=1), "the right half of rhs does not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_named(check, call, words):
    assert words in check("ffi_gemm", *call)


BACKWARD = CAST_CALL | {"source": "swiglu_backward", "transposed": 1, "grouped": 1}
CASTS = {
    "rows": (CAST_CALL, ["bf16 2 40 256"], ["e4m3 2 40 256", "f32 2 2 40"]),
    "pair": (CAST_CALL | {"pair": 1}, ["bf16 1 40 128"] * 2, ["e4m3 1 40 256", "f32 1 2 40"]),
    "fp8_gather": (
        CAST_CALL | {"source": "fp8", "gather": 1, "transposed": 1},
        ["e4m3 1 40 256", "f32 1 2 40", "s32 80"],
        ["e4m3 1 80 256", "f32 1 2 80", "e4m3 1 256 128", "f32 1 1 256"],
    ),
    "backward": (
        BACKWARD,
        ["e4m3 1 40 512", "f32 1 4 40", "bf16 1 40 256", "f32 40", "s32 3"],
        ["e4m3 1 40 512", "f32 1 4 40", *["e4m3 1 256 384", "f32 1 3 256"] * 3, "f32 2 40"],
    ),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_take_their_buffers_and_no_others(check, name):
    attributes, operands, results = CASTS[name]
    assert check("ffi_quantize", attributes, operands, results) == ""
    for i, text in enumerate(results):
        kind, *sizes = text.split()
        other = " ".join([kind, *sizes[:-1], str(int(sizes[-1]) + 4)])
        changed = [*results[:i], other, *results[i + 1 :]]
        assert "\n  fix       " in check("ffi_quantize", attributes, operands, changed), other
    assert "no operand" in check("ffi_quantize", attributes, operands[:-1], results)
    assert "no result" in check("ffi_quantize", attributes, operands, results[:-1])
    assert "too many" in check("ffi_quantize", attributes, operands, [*results, "s32 1"])


def test_swiglu_needs_two_halves(check):
    operands = ["bf16 1 40 255", "f32 40"]
    results = ["e4m3 1 40 127", "f32 1 1 40"]
    assert "two halves" in check(
        "ffi_quantize", CAST_CALL | {"source": "swiglu"}, operands, results
    )
