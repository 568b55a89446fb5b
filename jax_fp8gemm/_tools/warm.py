"""Fills the cache of compiled kernels for a program, on a machine with a GPU or without one."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax

from jax_fp8gemm._bind import native
from jax_fp8gemm._bind.gemm_op import GEMM, attributes_for
from jax_fp8gemm._bind.op import Call
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.progress import Progress
from jax_fp8gemm._tools.programs import calls_of

ORIGINS = {"nvrtc": "compiled", "disk": "found on disk"}


def warm(function: Callable, *args: Any, device: str) -> dict[str, int]:
    """Compiles the kernels of a program that are not on disk yet, and prints how many there were.

    Args:
      function: see `calls_of`.
      args: see `calls_of`.
      device: name of the card that the program is for, as JAX says it.

    Returns:
      How many kernels are of each origin: "nvrtc" for those just compiled, or "disk".

    Raises:
      ValueError: there is no compiler, the program has no kernels, or there is no folder to keep
        them in.
    """
    facts = native.cache_folder()
    if not facts.path:
        fix = "set JAX_FP8GEMM_CACHE_DIR to an absolute path"
        fail("compile", "there is no place for kernels.", facts.warning, "a folder", fix)
    calls = calls_of(function, *args)
    kernels = list({str(x): x for x in (_attributes(call, device) for call in calls)}.values())
    if not kernels:
        fix = "pass a function that calls gemm, fp8_matmul, fp8_ragged_dot or a layer"
        expected = "a call of this library"
        fail("compile", "the program has no kernels of ours.", f"{function}", expected, fix)
    progress = Progress("compiling", len(kernels))
    found: dict[str, str] = {}  # the origin of each program text: calls may share a kernel
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(native.compile, kernel) for kernel in kernels]
        for future in concurrent.futures.as_completed(futures):
            made = future.result()
            found[made["source"]] = made["origin"]
            progress.step()
    origins = dict(collections.Counter(found.values()))
    for origin, count in sorted(origins.items()):
        print(f"{count} {ORIGINS[origin]}")
    print(f"kernels for {device} are in {facts.path}")
    return origins


def _attributes(call: Call, device: str) -> dict[str, Any]:
    if call.op is GEMM:
        return attributes_for(device, call.spec, call.operands)
    operands = cast(Sequence[jax.Array], call.operands)  # their types are enough
    return dict(call.op.attributes(call.spec, operands))
