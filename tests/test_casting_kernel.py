"""What casts weights in a GEMM, run on the CPU by tests/emulation: to the bit."""

import ctypes
import shutil

import ml_dtypes
import numpy as np
import pytest
from emulation import emulate

from jax_fp8gemm._bind import native
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.layout import BLOCKS
from jax_fp8gemm._select.problem import GemmConfig, Problem, attributes

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


POINTERS, NUMBERS = ("values", "scales", "blocks"), ("capacity", "count")
FIELDS = [(n, ctypes.c_void_p) for n in POINTERS] + [(n, ctypes.c_int) for n in NUMBERS]
Results = type("Results", (ctypes.Structure,), {"_fields_": FIELDS})  # as casting.h has it


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("casting")


def build(rhs: str, folder) -> ctypes.CDLL:
    """Compiles the specification that NVRTC would get, and the casting warps behind it."""
    own = folder / rhs
    if not own.exists():
        problem = Problem("ragged", 300, 256, 256, 4, rhs=rhs)
        config = GemmConfig("persistent", 128, 128, 2)
        wanted = attributes(problem, config)
        wanted = {k: v if isinstance(v, str) else int(v) for k, v in wanted.items()}
        text = native.compile(wanted)["source"]
        head = text[text.index("namespace") : text.index("}  // namespace")]
        spec = head[: head.index("__device__")] + "}\n"
        emulate.compile_program(
            f'#include "params.cuh"\n{spec}#include "ptx.cuh"\n#include "casting.h"\n', own
        )
    return emulate.load(own)


def cast(library, weights, sizes, m: int, n: int, k: int, reverse: bool):
    """Returns (group, row, step) of every tile in order, the tiles, and their scales."""
    g, rows, columns = weights[0].shape
    most = 100
    values = emulate.Buffer((most, 128, 128), np.uint8)
    scales, blocks = emulate.Buffer((most,), np.float32), emulate.Buffer((most, 3), np.int32)
    results = Results(values.address, scales.address, blocks.address, most, 0)
    left, right = (emulate.Buffer(w.shape, np.uint16, w) for w in (weights[0], weights[-1]))
    given = emulate.Buffer(sizes.shape, np.int32, sizes)
    ends = left.address, right.address if len(weights) == 2 else left.address
    numbers = (ctypes.c_int(x) for x in (g, rows, columns, m, n, k))
    message = library.launch(
        *map(ctypes.c_void_p, ends), *numbers, ctypes.c_void_p(given.address),
        ctypes.byref(results), int(reverse),
    )  # fmt: skip
    assert not message, message.decode()
    assert values.intact() and scales.intact() and blocks.intact()
    count = results.count
    return blocks.array[:count], values.array[:count], scales.array[:count]


def padded(x, *shape):
    return np.pad(x, [(0, most - size) for most, size in zip(shape, x.shape, strict=True)])


# rhs, number of arrays, n, k: edges of tiles, one step of k alone, halves
CASES = [
    ("bf16", 1, 144, 272),
    ("bf16", 1, 72, 128),
    ("bf16", 2, 80, 512),
    ("bf16_transposed", 1, 144, 272),
    ("bf16_transposed", 1, 264, 80),
    ("bf16_transposed", 2, 512, 48),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_tiles_are_those_of_quantizing(case, reverse, folder):
    rhs, arrays, n, k = case
    sizes, m = np.array([130, 0, 7], np.int32), 300  # and rows past the groups
    rng = np.random.default_rng(0)
    transposed = rhs == "bf16_transposed"
    shape = (3, k, n) if transposed else (3, n, k)
    w = rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 1, shape)
    w[0, :100, :50] *= 1e-36  # denormals too
    w[2, :60, -20:] = 0
    w[0, 5, -3], w[2, -1, -1] = np.nan, np.inf
    w = w.astype(ml_dtypes.bfloat16)
    halves = [h.view(np.uint16) for h in np.split(w, arrays, axis=-1)]
    where, tiles, scales = cast(build(rhs, folder), halves, sizes, m, n, k, reverse)

    matrix = np.swapaxes(w, 1, 2) if transposed else w
    steps, blocks = max(2, -(-k // 128)), -(-n // 128)
    expected = [
        (group, 128 * block, step)
        for group, rows in ((0, 2), (2, 1))  # blocks of 128 rows of lhs
        for block in range(blocks)
        for _ in range(rows)
        for step in range(steps)
    ]
    assert sorted(map(tuple, where.tolist())) == sorted(expected)
    for (group, row, step), tile, scale in zip(where, tiles, scales, strict=True):
        block = matrix[group, row : row + 128, 128 * step : 128 * step + 128]
        q, s = reference.quantize(padded(block, 128, 128), BLOCKS, "pow2")
        np.testing.assert_array_equal(np.asarray(s).reshape(()), scale)
        got, right = tile.view(ml_dtypes.float8_e4m3fn), np.asarray(q)
        np.testing.assert_array_equal(got.astype(np.float32), right.astype(np.float32))
