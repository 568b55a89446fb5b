"""Zeros where a GEMM has nothing to multiply: every element once, and no other one.

Run on the CPU by tests/emulation, and looked for in the code for a GPU.
"""

import ctypes
import re
import shutil

import numpy as np
import pytest
from emulation import emulate
from test_compiler import disassembler

from jax_fp8gemm._bind import native
from jax_fp8gemm._select.problem import GemmConfig, Problem, attributes

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif("error" in native.nvrtc_facts(), reason="NVRTC is not installed"),
]
PERSISTENT = GemmConfig("persistent", 128, 112, 4)
FEW_ROWS = GemmConfig("few_rows", 64, 24, 4)


def wanted_of(problem: Problem, config: GemmConfig, **options: bool) -> dict:
    found = attributes(problem, config, **options)
    return {k: v if isinstance(v, str) else int(v) for k, v in found.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zeros")


def run(
    problem: Problem, config: GemmConfig, groups: np.ndarray, folder, **options: bool
) -> np.ndarray:
    """Returns which elements of the result are zero; the others must be as they were."""
    wanted = wanted_of(problem, config, **options)
    own = folder / "_".join(map(str, wanted.values()))
    if not own.exists():
        text = native.compile(wanted)["source"]
        head = text[text.index("namespace") : text.index("}  // namespace")]
        spec = head[: head.index("__device__")] + "}\n"
        emulate.compile_program(
            f'#include "params.cuh"\n{spec}#include "ptx.cuh"\n#include "zeros.h"\n', own
        )
    lead = (problem.g,) if problem.variant == "ragged_contracting" else ()
    bits = np.uint32 if problem.out == "f32" else np.uint16
    out = emulate.Buffer((*lead, problem.m, problem.n), bits)
    given = emulate.Buffer(groups.shape, np.int32, groups)
    sizes = (ctypes.c_int(x) for x in (problem.m, problem.n, problem.k, problem.g))
    message = emulate.load(own).launch(
        ctypes.c_void_p(out.address), ctypes.c_void_p(given.address), *sizes
    )
    assert not message, message.decode()
    assert out.intact() and given.intact()
    zero = out.array == 0
    assert np.all(zero | (out.array == np.iinfo(bits).max))  # whole, or as before
    return zero


# n: rows are 16 bytes wide, 4 bytes, or 2; a tail of columns
@pytest.mark.parametrize("n", [200, 130, 77])
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("config", [PERSISTENT, FEW_ROWS], ids=lambda c: c.kernel)
def test_rows_past_the_groups(config, out, n, folder):
    problem = Problem("ragged", 300, n, 256, 3, out=out)
    sizes = np.array([70, 0, 61], np.int32)
    zero = run(problem, config, sizes, folder)
    assert zero[131:].all() and not zero[:131].any()


@pytest.mark.parametrize("groups", [3, 31, 32, 64])  # a warp looks at 32 of them at a time
@pytest.mark.parametrize("config", [PERSISTENT, FEW_ROWS], ids=lambda c: c.kernel)
def test_rows_past_the_groups_that_nobody_reads_are_left(config, groups, folder):
    problem = Problem("ragged", 300, 200, 256, groups)
    sizes = np.full(groups, 130 // groups, np.int32)
    assert run(problem, config, sizes, folder)[sizes.sum() :].all()
    assert not run(problem, config, sizes, folder, leave_rest=True).any()


@pytest.mark.parametrize("n", [200, 130])
def test_padding_and_groups_without_any_k(n, folder):
    contiguous = Problem("contiguous", 384, n, 256, 2)
    groups = np.repeat(np.array([1, -1, 0], np.int32), 128)
    zero = run(contiguous, PERSISTENT, groups, folder)
    assert (zero == (groups < 0)[:, None]).all()
    contracting = Problem("ragged_contracting", 100, n, 256, 3, "1x128_1x128")
    zero = run(contracting, PERSISTENT, np.array([128, 0, 128], np.int32), folder)
    assert zero[1].all() and not zero[[0, 2]].any()


def test_a_thread_writes_sixteen_bytes(tmp_path):
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    import subprocess

    def stores(variant: str, **options: bool) -> int:
        problem = Problem(variant, 4096, 4096, 2048, 8)
        config = GemmConfig("persistent", 128, 128, 4)
        made = native.compile(wanted_of(problem, config, **options))
        cubin = tmp_path / f"{variant}.cubin"
        cubin.write_bytes(made["cubin"])
        command = [tool, "-c", "-ndf", "-novliw", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return len(re.findall(r"\bSTG\.E\.128\b", sass))

    assert stores("ragged") and stores("contiguous")
    assert not stores("masked")  # which never has rows of zeros
    assert not stores("ragged", leave_rest=True)
