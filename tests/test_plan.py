"""The plan of kernels: what shared memory holds, which configs there can be, who agrees on it."""

import itertools
import pathlib
import re
import shutil
import subprocess
import time

import pytest

from jax_fp8gemm._core.extension import extension

KERNELS = pathlib.Path(__file__).parent.parent / "csrc" / "kernels"
PROBLEM = {
    "variant": "dense",
    "lhs_scale": "1x128",
    "rhs_scale": "128x128",
    "rhs": "fp8",
    "out": "bf16",
    "accumulate": 0,
    "aligned": 1,
}
CAST = {"variant": "ragged", "rhs": "bf16"}
CONFIG = {
    "kernel": "persistent",
    "block_m": 128,
    "block_n": 128,
    "stages": 4,
    "multicast": "none",
    "split_k": 1,
    "group_m": 8,
}
FEW_ROWS = {"kernel": "few_rows", "block_m": 64, "block_n": 64}
SHIFT = 2**32  # an integer of 64 bits that becomes another one in 32


def plan(problem=None, config=None, **steps) -> dict:
    """Returns the plan of one config, by name."""
    (found,) = extension.plan(
        PROBLEM | (problem or {}), [tuple((CONFIG | (config or {})).values())], **steps
    )
    names = ("reason", "shared_bytes", "threads", "cluster_size", "registers", "store")
    return dict(zip(names, found, strict=True))


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# ---- What shared memory holds --------------------------------------------------------------------

NOTES = 4 * (32 + 8)  # notes of blocks, and a barrier of each
BARRIERS = 2 * 8  # of a stage

LAID_OUT = {
    "persistent": (
        {},
        {},
        [
            ("stages: tiles, 128 scales of rows, 4 of blocks with room for 128 bytes",
             4 * (128 * 128 + 128 * 128 + 4 * 128 + 128 + BARRIERS)),
            ("two warpgroups' results on their way out", 2 * 64 * 128 * 2),
        ],
        {"threads": 384, "cluster_size": 1, "registers": 128, "store": "tma"},
    ),
    "straight_from_registers": (
        {"aligned": 0},
        {"multicast": "lhs"},
        [("stages", 4 * (128 * 128 + 128 * 128 + 4 * 128 + 128 + BARRIERS))],
        {"threads": 384, "cluster_size": 2, "registers": 128, "store": "direct"},
    ),
    "three_warpgroups": (
        {"variant": "ragged"},
        {"block_m": 192, "block_n": 112},
        [
            ("stages: scales of four more rows than 192",
             4 * (192 * 128 + 112 * 128 + round_up(4 * 196, 128) + 128 + BARRIERS)),
            ("three warpgroups' results on their way out", 3 * 64 * 112 * 2),
        ],
        {"threads": 512, "cluster_size": 1, "registers": 112, "store": "tma"},
    ),
    "few_rows": (
        {},
        FEW_ROWS | {"block_n": 8},
        [
            ("stages", 4 * (64 * 128 + 8 * 128 + 4 * 64 + 128 + BARRIERS)),
            ("each of two warpgroups receives 64 rows of 8 columns", 2 * 64 * 8 * 4),
        ],
        {"threads": 320, "cluster_size": 1, "registers": 8, "store": "direct"},
    ),
    "split_k": (
        {},
        FEW_ROWS | {"stages": 8, "split_k": 4},
        [
            ("stages", 8 * (64 * 128 + 64 * 128 + 4 * 64 + 128 + BARRIERS)),
            ("from 7 others, 64 rows of 8 columns; a barrier", 2 * 7 * 64 * 8 * 4 + 128),
        ],
        {"threads": 320, "cluster_size": 4, "registers": 64, "store": "direct"},
    ),
    "cast": (
        CAST,
        {"stages": 2},
        [
            ("stages: rhs in core matrices with gaps; scales of three more rows than 128",
             2 * (128 * 128 + round_up(16 * 73 * 16, 1024) + round_up(4 * 132, 128) + 128 + 16)),
            ("two slots of bf16, their contents, largest magnitudes, barriers",
             round_up(2 * 128 * 128 * 2 + 2 * 4 + 2 * 4 * 4 + 3 * 2 * 8 + 2 * 8, 128)),
            ("results", 2 * 64 * 128 * 2),
        ],
        {"threads": 512, "cluster_size": 2, "registers": 128, "store": "tma"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAID_OUT)
def test_shared_memory_is_the_sum_of_what_it_holds(name):
    problem, config, parts, numbers = LAID_OUT[name]
    total = round_up(sum(size for _, size in parts) + NOTES, 1024)
    assert plan(problem, config) == {"reason": None, "shared_bytes": total, **numbers}


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ({}, (256, 8, 0, 32)),
        ({"type": "f32"}, (256, 6, 0, 32)),
        ({"transposed": 1}, (256, 3, 0, 128)),
        ({"source": "fp8", "transposed": 1, "aligned": 0}, (256, 1, 0, 128)),
        ({"source": "swiglu", "transposed": 1}, (256, 2, 2 * 128 * 128 * 2, 128)),
        (
            {"source": "swiglu_backward", "transposed": 1},
            # operands of 16 warps, twice; transposed tiles; scales of columns; four tiles' places
            # and three barriers
            (512, 1, round_up(2 * 16 * 4192 + 3 * 128 * 132 + 4 * 16 + 3 * 8, 128), 128),
        ),
    ],
)
def test_plans_of_casts(attributes, expected):
    assert extension.cast_plan(CAST_CALL | attributes) == expected


CAST_CALL = {
    "source": "float",
    "type": "bf16",
    "tile": "1x128",
    "pow2": 1,
    "rows": 1,
    "transposed": 0,
    "grouped": 0,
    "gather": 0,
    "pair": 0,
    "aligned": 1,
}


# ---- Which configs there can be ------------------------------------------------------------------

ILLEGAL = [
    ({}, {"kernel": "wide"}, "kernel must be persistent or few_rows"),
    ({}, {"multicast": "both"}, "multicast must be none, lhs or rhs"),
    ({}, {"block_m": 96}, "block_m must be 64, 128, 192 or 256"),
    ({}, {"block_n": 12}, "block_n must be a multiple of 8, from 8 to 256"),
    ({}, {"stages": 1}, "stages must be from 2 to 64"),
    ({}, {"split_k": 3}, "split_k must be 1, 2 or 4"),
    ({}, {"group_m": 0}, "group_m must be from 1 to 65536"),
    ({"lhs_scale": "128x128"}, {}, "lhs takes scales per row or per tensor"),
    ({"accumulate": 1}, {}, "only an f32 output can accumulate"),
    ({"rhs": "bf16"}, {}, "a bf16 rhs must have groups"),
    (CAST | {"rhs_scale": "1x128"}, {}, "a bf16 rhs is cast with scales of 128x128"),
    ({}, {"block_m": 64}, "block_m of the persistent kernel must be 128, 192 or 256"),
    ({}, {"block_n": 24}, "block_n of the persistent kernel must be a multiple of 16"),
    ({}, {"split_k": 2}, "only the few_rows kernel takes split_k"),
    (CAST, {"block_n": 64}, "a bf16 rhs needs block_n 128"),
    (CAST, {"block_m": 192}, "a bf16 rhs needs block_m 128 or 256"),
    (CAST, {"multicast": "lhs"}, "a bf16 rhs takes no multicast"),
    ({}, {"block_n": 176}, "such a block_n may touch three blocks of scales; two is the most"),
    (
        {"variant": "contiguous"},
        {"block_m": 256, "stages": 2},
        "the contiguous variant needs block_m 128",
    ),
    (
        {"variant": "contiguous"},
        {"block_m": 192},
        "the contiguous variant needs block_m 128",
    ),
    (
        {"variant": "contiguous"},
        {"multicast": "rhs"},
        "the contiguous variant cannot multicast rhs",
    ),
    (CAST, FEW_ROWS, "a bf16 rhs needs the persistent kernel"),
    ({"variant": "contiguous"}, FEW_ROWS, "the few_rows kernel does not take this variant"),
    (
        {},
        FEW_ROWS | {"block_m": 256},
        "block_m of the few_rows kernel must be 64 or 128",
    ),
    (
        {},
        FEW_ROWS | {"block_m": 192},
        "block_m of the few_rows kernel must be 64 or 128",
    ),
    ({}, FEW_ROWS | {"block_n": 136}, "block_n of the few_rows kernel must be at most 128"),
    ({}, FEW_ROWS | {"multicast": "lhs"}, "the few_rows kernel takes no multicast"),
    ({}, FEW_ROWS | {"stages": 5}, "the few_rows kernel needs an even number of stages"),
    (
        {"variant": "ragged"},
        FEW_ROWS | {"split_k": 2},
        "split_k needs a variant whose number of blocks is known; group sizes are not",
    ),
    ({}, FEW_ROWS | {"split_k": 4}, "split_k is more than the steps of k"),
    ({}, {"stages": 9}, "such a config needs more than 227 KiB of shared memory"),
    ({}, FEW_ROWS | {"block_m": 128, "block_n": 128}, "such a config needs too many registers"),
    ({}, {"block_m": 192, "block_n": 144}, "such a config needs too many registers"),
]


@pytest.mark.parametrize("problem, config, reason", ILLEGAL, ids=[x[2] for x in ILLEGAL])
def test_every_reason_is_given(problem, config, reason):
    assert plan(problem, config, steps=3)["reason"] == reason


def test_no_reason_is_without_a_test():
    text = (KERNELS / "plan.cuh").read_text()
    names = ("out_of_range", r"why_illegal\w*")
    found = set()
    for name in names:
        bodies = re.findall(rf"{name}\((?:const GemmSpec& )\w+.*?\n\}}\n", text, re.S)
        found |= {words for body in bodies for words in re.findall(r'return "(.+?)";', body)}
    tested = {reason for _, _, reason in ILLEGAL}
    assert len(found) > 20 and found <= tested


NUMBERS = (-(2**70), -(2**31), -1, 0, 1, SHIFT + 4, 2**31 - 1, 2**70)


@pytest.mark.parametrize("name", ["block_m", "block_n", "stages", "split_k", "group_m"])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kernel", ["persistent", "few_rows"])
def test_any_integer_has_an_answer(kernel, name, number):
    config = {"kernel": kernel, name: number}
    if (name, number) not in (("split_k", 1), ("group_m", 1)):
        assert name in plan({}, config)["reason"]
        configs = [tuple((CONFIG | config).values())]
        fits = name == "stages" and number > 0 and kernel == "persistent"
        assert (extension.deepest(PROBLEM, configs)[0] > 0) == (fits and number > 1)


def test_the_deepest_ring_is_the_last_that_fits():
    configs = [CONFIG | FEW_ROWS | {"stages": most} for most in (2, 3, 9, 16)]
    assert extension.deepest(PROBLEM, [tuple(c.values()) for c in configs]) == [2, 2, 8, 12]
    for most in range(2, 12):
        config = CONFIG | {"stages": most}
        (stages,) = extension.deepest(PROBLEM, [tuple(config.values())])
        assert plan({}, {"stages": stages})["reason"] is None
        assert stages == most or plan({}, {"stages": stages + 1})["reason"]


# ---- Parsers refuse what no kernel can be --------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"group_m": 0}, "group_m must be from 1"),
        ({"group_m": -1}, "group_m must be from 1"),
        ({"group_m": 2**30}, "group_m must be from 1"),
        ({"stages": SHIFT + 4}, "attribute stages is out of range"),
        ({"block_n": 2**31 - 1}, "block_n must be a multiple of 8"),
        ({"block_m": 2**70}, "attribute block_m is out of range"),
        ({"num_sms": -1}, "attribute num_sms is out of range"),
        ({"accumulate": 2}, "attribute accumulate is out of range"),
        ({"pair": 1}, "only a bf16 rhs can be a pair"),
        ({"leave_rest": 1}, "only the ragged variant can leave rows past its groups"),
        ({"variant": "ragged", "leave_rest": 2}, "attribute leave_rest is out of range"),
        ({"num_sms": "all"}, "attribute num_sms has the wrong type"),
        ({"aligned": None}, "attribute aligned is missing"),
    ],
    ids=str,
)
def test_what_no_kernel_can_be_is_an_error_at_once(change, words):
    wanted = {k: v for k, v in (PROBLEM | CONFIG | change).items() if v is not None}
    start = time.perf_counter()
    with pytest.raises(ValueError) as info:
        extension.compile(wanted)
    assert time.perf_counter() - start < 1
    for part in (words, "\n  got       ", "\n  expected  ", "\n  fix       "):
        assert part in str(info.value)
    assert len(str(info.value)) < 1000


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rows": 0}, "rows, or the transposed copy"),
        ({"source": "fp8", "pair": 1}, "only floats can lie in two arrays"),
        ({"source": "swiglu", "type": "f32"}, "floats of 16 bits"),
        ({"tile": "1xk", "grouped": 1}, "only of floats, as they lie"),
        ({"source": "swiglu_backward"}, "writes all copies"),
        ({"shared_columns": 1}, "only columns of 1x128"),
        ({"shared_columns": 1, "transposed": 1, "pow2": 0}, "only columns of 1x128"),
        ({"shared_columns": 2}, "attribute shared_columns is out of range"),
        ({"rows": 7}, "attribute rows is out of range"),
        ({"tile": "tensor"}, "attribute tile has an unknown value"),
    ],
    ids=str,
)
def test_casts_that_no_kernel_can_do_are_errors(change, words):
    with pytest.raises(ValueError, match=words):
        extension.compile(CAST_CALL | change)


# ---- Kernels agree -------------------------------------------------------------------------------


def legal_plans() -> list[tuple[dict, int]]:
    """Returns specs of all kinds and their bytes of shared memory."""
    problems = [
        {},
        {"out": "f32", "accumulate": 1, "lhs_scale": "tensor", "rhs_scale": "tensor"},
        {"out": "f32", "rhs_scale": "1x128"},
        {"variant": "ragged"},
        CAST,
        CAST | {"out": "f32", "aligned": 0},
    ]
    sizes = [("persistent", m) for m in (128, 192, 256)] + [("few_rows", m) for m in (64, 128)]
    columns, stages, splits = (8, 24, 48, 80, 96, 128, 160, 192), (2, 3, 4, 7, 10), (1, 2, 4)
    found = []
    for problem, (kernel, m), n, depth, split in itertools.product(
        problems, sizes, columns, stages, splits
    ):
        config = {"kernel": kernel, "block_m": m, "block_n": n, "stages": depth, "split_k": split}
        made = plan(problem, config)
        if made["reason"] is None:
            found.append((PROBLEM | problem | CONFIG | config, made["shared_bytes"]))
    return found


def enumerator(word: str) -> str:
    """k1x128 for "1x128", kBf16 for "bf16", kFewRows for "few_rows"."""
    return "k" + "".join(part[:1].upper() + part[1:] for part in word.split("_"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_struct_is_as_large_as_planned(tmp_path: pathlib.Path):
    types = {"lhs_scale": "ScaleTile", "rhs_scale": "ScaleTile"}
    text = '#include "shared_memory.cuh"\nusing namespace fp8gemm;\n'
    plans = legal_plans()
    for spec, size in plans:
        spec = {"leave_rest": 0} | spec  # an attribute only where it is true
        fields = [
            f".{name} = {types.get(name, name.capitalize())}::{enumerator(spec[name])}"
            if isinstance(spec[name], str)
            else f".{name} = {spec[name]}"
            for name in spec_fields()
        ]
        text += f"static_assert(sizeof(SharedMemory<GemmSpec{{{', '.join(fields)}}}>) == {size});\n"
    assert len(plans) > 200
    for name in ("params.cuh", "plan.cuh", "shared_memory.cuh"):
        shutil.copy(KERNELS / name, tmp_path)
    (tmp_path / "ptx.cuh").write_text("#pragma once\n#define FP8GEMM_DEVICE\n")
    (tmp_path / "sizes.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-fsyntax-only", "sizes.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def spec_fields() -> list[str]:
    """Returns the fields of GemmSpec in order."""
    text = (KERNELS / "params.cuh").read_text()
    (body,) = re.findall(r"struct GemmSpec \{(.*?)\n\};", text, re.S)
    return re.findall(r"^ *\w+ (\w+);", body, re.M)
