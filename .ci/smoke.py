"""What an installed package must do on a machine without a GPU. .ci/test_dist.py runs it."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8gemm as fp8
from jax_fp8gemm._core.extension import extension


def loss(x: jax.Array, w: jax.Array) -> jax.Array:
    return (fp8.fp8_matmul(x, w).astype(jnp.float32) ** 2).sum()


def check_product() -> None:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (200, 256), jnp.bfloat16)
    w = jax.random.normal(keys[1], (256, 136), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    gradients = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    expected = 2 * exact @ np.asarray(w, np.float64).T, 2 * np.asarray(x, np.float64).T @ exact
    pairs = [(jax.jit(fp8.fp8_matmul)(x, w), exact), *zip(gradients, expected, strict=True)]
    for found, right in pairs:
        error = np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
        assert error < 0.1, error  # three bits of mantissa: 0.04 for normal numbers


def check_program() -> None:
    """A program for CUDA names the kernels, on a machine without a CUDA plugin too."""
    x, w = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 384), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "jax_fp8gemm_gemm_v1" in text and "jax_fp8gemm_quantize_v1" in text


def check_errors() -> None:
    """C++ exceptions become Python's: their types are known across the C++ library's border."""
    try:
        extension.compile({"kernel": "none"})
    except ValueError as error:
        assert str(error), "an error without text"
    else:
        raise AssertionError("a kernel without a name was compiled")


def check_report(nvrtc: str) -> None:
    command = [sys.executable, "-m", "jax_fp8gemm"]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0 and "result" in report.stdout, report.stdout + report.stderr
    if nvrtc:  # a kernel is compiled by the NVRTC of this CUDA
        assert f"NVRTC {nvrtc}." in report.stdout and "kernel " in report.stdout, report.stdout
    print(report.stdout, end="")


def main(nvrtc: str = "") -> None:
    assert "site-packages" in str(pathlib.Path(fp8.__file__)), fp8.__file__
    assert not os.environ.get("PATH"), "nothing on PATH may be needed"
    check_product()
    check_program()
    check_errors()
    check_report(nvrtc)


if __name__ == "__main__":
    main(*sys.argv[1:])
