"""`python -m jax_fp8gemm`: what is here, what is missing, and whether the kernels work."""

import contextlib
import platform
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8gemm._bind.native import cache_folder, compile, device_facts, nvrtc_facts
from jax_fp8gemm._core.version import __version__
from jax_fp8gemm._ops.gemm import gemm
from jax_fp8gemm._ops.quantize import quantize
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import Problem, attributes


def line(name: str, value: object) -> None:
    print(f"{name:12} {value}")


def fix_of(error: str) -> str:
    """Returns the last part of a four-part message, what to do, after what was found."""
    got, fix = (error.split(f"\n  {part} ")[1].split("\n")[0].strip() for part in ("got", "fix"))
    return f"{got}; {fix}"


def devices() -> bool:
    """Prints the GPUs and the driver; returns whether a Hopper GPU is there."""
    facts = device_facts()
    if "error" in facts:
        line("device", f"no GPU: {fix_of(facts['error'])}")
        return False
    line("driver", f"CUDA {facts['driver']}")
    for device in facts["devices"]:
        hopper = device["compute_capability"] == "9.0"
        note = "" if hopper else ": the kernels need compute capability 9.0 (H100, H200)"
        line("device", f"{device['name']}, {device['compute_capability']}{note}")
    return any(device["compute_capability"] == "9.0" for device in facts["devices"])


def toolchain() -> bool:
    """Prints the run-time compiler and the cache; returns whether kernels can be compiled."""
    facts = nvrtc_facts()
    if "error" in facts:
        line("compiler", f"missing: {fix_of(facts['error'])}")
    else:
        line("compiler", f"NVRTC {facts['version']} from {facts['path']}")
    cache = cache_folder()
    line("cache", (cache.path or "none") + (f": {fix_of(cache.warning)}" if cache.warning else ""))
    return "error" not in facts


def compile_check() -> None:
    """Compiles, or loads, one kernel."""
    problem = Problem("dense", 4096, 4096, 7168)
    made = compile(attributes(problem, select(problem)))
    line("kernel", f"from {made['origin']} in {1e3 * made['seconds']:.1f} ms")


def product_check() -> bool:
    """Multiplies once, and compares with float64; returns whether the product is right."""
    keys = jax.random.split(jax.random.key(0))
    lhs = quantize(jax.random.normal(keys[0], (200, 512)))
    rhs = quantize(jax.random.normal(keys[1], (136, 512)), (128, 128))
    out = gemm(lhs, rhs, out_dtype=jnp.float32)
    exact = np.asarray(jax.device_get(lhs.qvalue), np.float64).reshape(200, 4, 128)
    exact = exact * np.asarray(lhs.scale, np.float64)[:, :, None]
    other = np.asarray(jax.device_get(rhs.qvalue), np.float64).reshape(136, 4, 128)
    scale = np.repeat(np.asarray(rhs.scale, np.float64), 128, 0)[:136]
    expected = np.einsum("mbk,nbk->mn", exact, other * scale[:, :, None])
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    where = next(iter(out.devices())).device_kind
    line("product", f"on {where}, relative error {error:.1e}")
    return bool(error < 1e-3)


def main() -> int:
    line("jax_fp8gemm", __version__)
    line("versions", f"jax {jax.__version__}, Python {platform.python_version()}")
    hopper, compiler = devices(), toolchain()
    if compiler:
        compile_check()
    kernels = hopper and compiler and jax.default_backend() == "gpu"
    on_cpu = jax.default_device(jax.devices("cpu")[0])
    with contextlib.nullcontext() if kernels else on_cpu:
        good = product_check()
    if not good:
        line("result", "WRONG PRODUCT: please report this")
    elif kernels:
        line("result", "kernels run on this GPU")
    else:
        needed = "a Hopper GPU, NVRTC, and jax[cuda12] or jax[cuda13]"
        line("result", f"the reference runs on the CPU; kernels need {needed}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
