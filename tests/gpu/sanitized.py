"""Small programs of every family of kernels, for compute-sanitizer: sanitized.py FAMILY [--apart]

Prints how many launches of the library's kernels there were. With --apart operands are results of
another program, so that each has an allocation of its own. Else casts of the same program make
them.
"""

import dataclasses
import pathlib
import sys

import jax

sys.path.insert(1, str(pathlib.Path(__file__).parent.parent))
from soak.casts import Cast, Swiglu
from soak.gemms import Gemm
from soak.programs import key_of

from jax_fp8gemm import GemmConfig
from jax_fp8gemm._core.layout import round_up
from jax_fp8gemm._select.problem import Problem, why_illegal

TARGETS = ("jax_fp8gemm_gemm_v1", "jax_fp8gemm_quantize_v1")
# Scales, type of the result, whether it is added to init.
FORMS = (
    ("1x128_128x128", "bf16", False),
    ("1x128_1x128", "f32", True),
    ("row_row", "f32", False),
    ("tensor_tensor", "bf16", False),
)
PERSISTENT = (
    GemmConfig("persistent", 256, 128, 3, "lhs"),
    GemmConfig("persistent", 128, 192, 3, "rhs"),
    GemmConfig("persistent", 128, 144, 3),
    GemmConfig("persistent", 192, 128, 3, "rhs"),
)
FEW_ROWS = (
    GemmConfig("few_rows", 64, 56, 4),
    GemmConfig("few_rows", 64, 32, 2, split_k=2),
    GemmConfig("few_rows", 64, 72, 2, split_k=4),
    GemmConfig("few_rows", 128, 40, 2),
)
# `contiguous` takes blocks of 128 rows.
ANY_GROUPS = (*PERSISTENT[:2], PERSISTENT[-1], GemmConfig("persistent", 128, 96, 3, "lhs"))
GROUPED = ("batched", "ragged", "contiguous", "masked", "ragged_contracting")


def gemms(variants, configs, m: int, k: int, forms=FORMS) -> list[Gemm]:
    """Returns every legal GEMM: m and n are no multiples of anything, k has a tail."""
    found = []
    for variant in variants:
        sizes = {"m": m, "n": 131, "k": k, "g": 1 if variant == "dense" else 3}
        if variant == "ragged_contracting":
            sizes |= {"m": 70, "k": 528}
        for config in configs:
            for scales, out, init in forms:
                n = 136 if out == "bf16" else 131  # leaves by the copy engine, or not
                form = sizes | {"n": n, "scales": scales, "out": out}
                problem = Problem(variant, **form, accumulate=init)
                by_block = variant == "ragged_contracting" and scales == "1x128_128x128"
                if not by_block and why_illegal(problem, config) is None:
                    found.append(Gemm(variant, **form, init=init, config=config))
    return found


def casting() -> list[Gemm]:
    """No more steps of k than stages: see tests/gpu/test_casting_gpu.py."""
    return [
        Gemm(variant, 150, 256, 256, g=3, rhs=rhs, pair=pair)
        for variant in ("ragged", "masked")
        for rhs in ("bf16", "bf16_transposed")
        for pair in (False, True)
    ]


def casts() -> list[Cast]:
    """Every source and every copy, with groups and through an index."""
    found = [
        Cast("quantize", 150, 136, dtype=dtype, tile=tile, rounding=rounding)
        for tile in ("1x128", "128x128", "row")
        for dtype, rounding in (("bf16", "pow2"), ("f32", "none"))
    ]
    found += [Cast(kind, 150, 136, "f16") for kind in ("transposed", "both", "requantize")]
    found += [Cast(kind, 150, 131, tile="128x128") for kind in ("transposed", "both")]
    found += [Cast(kind, 150, 136, share=True) for kind in ("transposed", "requantize")]
    for kind in ("rows", "transposed", "both", "requantize"):
        found.append(Cast(kind, 300, 136, g=4, index=kind != "transposed"))
    return found


def swiglus() -> list[Swiglu]:
    return [
        Swiglu(150, 128, backward=backward, rounding=rounding, g=g)
        for backward in (False, True)
        for rounding, g in (("pow2", 4), ("none", 0))
    ]


FAMILIES = {
    "persistent": lambda: gemms(["dense"], PERSISTENT, 270, 272),
    "few_rows": lambda: gemms(
        ["dense", "batched", "ragged", "masked"], FEW_ROWS, 5, 656, FORMS[:2]
    ),
    "grouped": lambda: gemms(GROUPED, ANY_GROUPS, 270, 272, FORMS[:2]),
    "casting": casting,
    "casts": casts,
    "swiglu": swiglus,
}


def launches(compiled) -> int:
    text = compiled.as_text()
    return sum(text.count(f'custom_call_target="{target}"') for target in TARGETS)


def settled(checks: list) -> list:
    """Returns them so that a kernel reads nothing but what a kernel of ours has written.

    GEMMs get operands from casts, and scales need no padding, which is read and never used. Then
    scales go from kernel to kernel as they lie: initcheck takes some that XLA's transpose has just
    written for unwritten. One scale for a whole matrix is XLA's work, so these are left out.
    """
    found = []
    for check in checks:
        sizes = {"m": round_up(check.m, 4)}
        if isinstance(check, Gemm):
            sizes |= {"n": round_up(check.n, 8), "k": round_up(check.k, 512), "cast": True}
        if getattr(check, "scales", "") != "tensor_tensor":
            found.append(dataclasses.replace(check, **sizes))
    return found


def run(checks: list, apart: bool) -> int:
    """Runs all checks once, and returns how many kernels of the library that were."""
    checks = checks if apart else settled(checks)

    def make(seed):
        return [check.make(key_of(seed, i)) for i, check in enumerate(checks)]

    def multiply(made):
        return [check.run(one) for check, one in zip(checks, made, strict=True)]

    if not apart:
        whole = jax.jit(lambda seed: multiply(make(seed))).lower(0).compile()
        jax.block_until_ready(whole(0))
        return launches(whole)
    first = jax.jit(make).lower(0).compile()
    made = jax.block_until_ready(first(0))
    second = jax.jit(multiply).lower(made).compile()
    jax.block_until_ready(second(made))
    return launches(first) + launches(second)


if __name__ == "__main__":
    print("launches", run(FAMILIES[sys.argv[1]](), "--apart" in sys.argv), flush=True)
