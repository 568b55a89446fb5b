"""The command that fills the kernel cache for a program, without a GPU."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm import __main__ as command
from jax_fp8gemm._bind import native
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools import warm as warm_module
from jax_fp8gemm._tools.warm import warm

CARD = "NVIDIA H200"
ARGS = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((64, 512), (512, 256))]


@pytest.fixture
def compiled(monkeypatch) -> list[dict]:
    """Nothing is compiled: gets the attributes of each kernel that would be."""
    found: list[dict] = []

    def compile(attributes):
        found.append(attributes)
        text = str(attributes.get("kernel", "cast")) + str(attributes.get("block_n"))
        return {"origin": "disk" if "kernel" in attributes else "nvrtc", "source": text}

    monkeypatch.setattr(warm_module.native, "compile", compile)
    return found


def test_every_kernel_is_made_once_and_counted(compiled, capsys):
    def twice(x, w):
        return fp8.fp8_matmul(x, w) + fp8.fp8_matmul(x + 1, w)

    assert warm(jax.jit(twice), *ARGS, device=CARD) == {"nvrtc": 1, "disk": 1}
    gemms = [a for a in compiled if "kernel" in a]
    assert (len(gemms), len(compiled)) == (1, 3)  # casts of x and w
    assert gemms[0]["block_n"] == select(Problem("dense", 64, 256, 512)).block_n
    out = capsys.readouterr().out
    assert out.startswith("1 found on disk\n1 compiled\nkernels for NVIDIA H200 are in ")


def test_configs_are_those_of_the_card(compiled):
    card, other = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    m, n, k = 1024, 7168, 2048
    configs = [select(Problem("dense", m, n, k, device=device)) for device in (card, other)]
    assert configs[0] != configs[1]
    args = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((m, k), (k, n))]
    for device, config in zip((card, other), configs, strict=True):
        compiled.clear()
        warm(fp8.fp8_matmul, *args, device=device)
        (gemm,) = (a for a in compiled if "kernel" in a)
        assert (gemm["block_m"], gemm["block_n"], gemm["stages"], gemm["group_m"]) == (
            (config.block_m, config.block_n, config.stages, config.group_m)
        )


def test_kernels_of_a_program_that_is_cut_up(compiled):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((8 * 64, 512), jnp.bfloat16, sharding=at)
    warm(fp8.fp8_matmul, x, ARGS[1], device=CARD)
    (gemm,) = (a for a in compiled if "kernel" in a)
    assert gemm["kernel"] == select(Problem("dense", 64, 256, 512)).kernel == "few_rows"


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"compile: the program has no kernels of ours.\n  got"):
        warm(jnp.sin, ARGS[0], device=CARD)
    nowhere = native.cache_folder()._replace(path="", warning="none")
    monkeypatch.setattr(warm_module.native, "cache_folder", lambda: nowhere)
    with pytest.raises(ValueError, match=r"compile: there is no place for kernels.\n  got  "):
        warm(fp8.fp8_matmul, *ARGS, device=CARD)


def test_errors_of_the_command(capsys):
    assert command.main(["compile", "no_such_module:f"]) == 1
    assert capsys.readouterr().err.startswith("compile: module 'no_such_module' cannot be")


@pytest.mark.skipif("error" in native.nvrtc_facts(), reason="NVRTC is not installed")
def test_a_second_process_finds_the_kernels_on_disk(tmp_path):
    (tmp_path / "step_to_compile.py").write_text(
        "import jax, jax.numpy as jnp, jax_fp8gemm as fp8\n"
        "def program():\n"
        "    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 512), (512, 256)))\n"
        "    return jax.jit(fp8.fp8_matmul), x, w\n"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_FP8GEMM_CACHE_DIR": str(tmp_path / "kernels"),
        "PYTHONPATH": os.pathsep.join(
            [str(tmp_path), str(pathlib.Path(fp8.__file__).parent.parent)]
        ),
    }
    run = [sys.executable, "-m", "jax_fp8gemm", "compile", "step_to_compile:program"]
    for expected in ("3 compiled", "3 found on disk"):
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[0] == expected
        assert re.search(r"compiling  \[#{30}\] 3/3 in \d+ s\n", done.stderr)
    assert len(list((tmp_path / "kernels").glob("*.kernel"))) == 3
