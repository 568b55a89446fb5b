"""The quantizing kernels: run on the CPU by tests/emulation, bit for bit, and compiled."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from quantize_cases import (
    BF16,
    DENSE,
    F16,
    F32,
    GROUPED,
    SWIGLU,
    backward,
    bits,
    compare,
    compare_swiglu,
    dense_cases,
    expected,
    floats,
    fp8,
    grouped_cases,
    operands,
    quantized,
    raw,
    shares,
    swiglu,
    swiglu_cases,
    written,
)

from jax_fp8gemm._bind import native
from jax_fp8gemm._bind.quantize_op import QUANTIZE, CastSpec
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS
from jax_fp8gemm._core.qarray import FP8
from jax_fp8gemm._core.reference import SHARED_SPREAD
from jax_fp8gemm._tools.shapes import GROUPS, Groups

pytestmark = pytest.mark.skipif(
    "error" in native.nvrtc_facts(),
    reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulation")


def emulated(folder, spec, operands) -> dict:
    """What a kernel writes; nowhere else, and the same bits whichever thread comes first."""
    library = emulate.build(spec, operands, folder)
    first = emulate.run(library, spec, operands, reverse=False)
    again = emulate.run(library, spec, operands, reverse=True)
    for name, x in first.items():
        np.testing.assert_array_equal(raw(x), raw(again[name]), f"{name}: order of threads")
    found, others = written(spec, operands, first)
    assert np.all(others == emulate.POISON), "written past the groups"
    for x in jax.tree.leaves(found):
        assert np.all(~raw(x)), "not written"
    return found


# ---- Tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extremes", [False, True], ids=["finite", "nan_inf"])
@pytest.mark.parametrize("name", DENSE)
def test_dense(folder, name, extremes):
    spec, dtype = DENSE[name]
    for given in dense_cases(spec, dtype, extremes):
        compare(spec, given, emulated(folder, spec, given))


# Instead of 512 groups, which take long here: still more than two warps of them.
SEVENTY = Groups("seventy_groups", tuple(i * 7 % 5 for i in range(70)), 150)
PLACES = [g for g in GROUPS if g.m and g.name != "many_groups"] + [SEVENTY]


@pytest.mark.parametrize("name", GROUPED)
def test_grouped(folder, name):
    spec, dtype = GROUPED[name]
    for given in grouped_cases(spec, dtype, PLACES):
        compare(spec, given, emulated(folder, spec, given))


def test_gather_without_groups(folder):
    for spec in (floats(copies="rows", gather=True), fp8(gather=True)):
        given = operands(5, spec, (1, 131, 77), BF16)
        compare(spec, given, emulated(folder, spec, given))


def test_denormals_are_numbers(folder):
    spec = floats(scale_rounding="none", copies="rows")
    x = np.full((1, 3, 16), 1e-40, F32)
    x[:, 1, :2] = 1e-38, -3e-39
    compare(spec, [x], emulated(folder, spec, [x]))


@pytest.mark.parametrize("name", SWIGLU)
def test_swiglu_is_that_of_float64(folder, name):
    spec, dtype = SWIGLU[name]
    cases = list(swiglu_cases(spec, dtype))
    same = [compare_swiglu(spec, case, emulated(folder, spec, case)) for case in cases]
    assert np.mean(np.concatenate(same)) > 0.995


@pytest.mark.parametrize("apart", [0, SHARED_SPREAD, SHARED_SPREAD + 1])
@pytest.mark.parametrize("odd", [None, np.nan, np.inf], ids=str)
def test_columns_share_a_scale_up_to_the_spread(folder, apart, odd):
    """By the kernel and by the reference; columns of zeros do not count, NaN and Inf do."""
    x = np.ones((1, 128, 136), F32)
    x[:, :, 40] = 2.0**-apart
    x[:, :, 41] = 0
    if odd is not None:
        x[:, 7, 99] = odd
    spec = floats(copies="transposed", shared_columns=True)
    (_, scale) = emulated(folder, spec, [x])["transposed"]
    own = np.ones((136, 1), F32) * 2.0**-8
    if apart > SHARED_SPREAD or odd is not None:
        own[40], own[41] = 2.0 ** (-8 - apart), 1
    if odd is not None:
        own[99] = np.nan
    np.testing.assert_array_equal(scale[0], own)
    by_jnp = QUANTIZE.reference(spec, [jnp.asarray(x)])[1]
    np.testing.assert_array_equal(np.asarray(by_jnp)[0].T, own)


@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("sizes", [(), (30, 0, 70)], ids=["dense", "grouped"])
@pytest.mark.parametrize("source", ["float", "fp8", "swiglu", "swiglu_backward"])
def test_numpy_and_the_reference_agree(source, sizes, share):
    if share and source == "swiglu":
        pytest.skip("its transposed copy is an lhs")
    rows, grouped = source != "fp8", bool(sizes)
    spec = CastSpec(
        source=source, rows=rows, transposed=True, grouped=grouped, shared_columns=share
    )
    given = operands(1, spec, (1, 100, 256), BF16, sizes)
    results = QUANTIZE.reference(spec, [jnp.asarray(x) for x in given])
    right_copies = expected(spec, given)
    found = results[: 2 * len(right_copies) : 2]
    for (name, right), q in zip(right_copies.items(), found, strict=True):
        ours = quantized(right.astype(F32), ROW_BLOCKS, "pow2", shares(spec, name))[0]
        same = bits(np.asarray(q))[:, : right.shape[1], : right.shape[2]] == bits(ours)
        assert same.mean() > 0.995 if "swiglu" in source else same.all()


def test_the_emulation_sees_harm(folder):
    """A result one row too small, an unaligned operand: what a GPU would write over or stop at."""
    spec = floats(copies="rows")
    x = np.ones((1, 5, 16), BF16)
    library = emulate.build(spec, [x], folder)
    for harm, message in (("m", "wrote beyond rows"), ("x", "misaligned")):
        with pytest.raises(AssertionError, match=message):
            emulate.run(library, spec, [x], reverse=False, harm={harm: 2})


# ---- Compiled ------------------------------------------------------------------------------------

TOKENS = [dict(grouped=g, gather=i) for g, i in itertools.product((False, True), repeat=2)]
COMPILED = [
    *[(floats(copies=c, **t), BF16) for c in ("rows", "both") for t in TOKENS],
    *[(floats(copies=c, scale_rounding="none"), d) for c in ("rows", "both") for d in (F16, F32)],
    *[(floats(copies="transposed", grouped=g), BF16) for g in (False, True)],
    *[(floats(BLOCKS, copies=c), d) for c in ("rows", "both") for d in (BF16, F32)],
    *[(floats(tile, pair=True), BF16) for tile in (ROW_BLOCKS, BLOCKS)],
    *[(fp8(**t), FP8) for t in TOKENS],
    *[(swiglu(transposed=t, grouped=True), d) for t in (False, True) for d in (BF16, F16)],
    *[(swiglu(transposed=t, scale_rounding="none"), BF16) for t in (False, True)],
    *[(fp8(scale_rounding="none", **t), FP8) for t in TOKENS],
    *[(backward(scale_rounding=s, grouped=True), FP8) for s in ("pow2", "none")],
    *[(floats(shared_columns=True, **t), BF16) for t in TOKENS],
    *[(fp8(shared_columns=True, **t), FP8) for t in TOKENS],
    (backward(grouped=True, shared_columns=True), FP8),
]
SIZES = [(spec, 512) for spec in COMPILED] + [(spec, 509) for spec in COMPILED[::3]]


@pytest.mark.parametrize(
    "wanted",
    [emulate.specification(*spec, 512, k) for spec, k in SIZES],
    ids=lambda wanted: "-".join(map(str, wanted.values())),
)
def test_kernels_have_no_stack_and_no_spills(wanted):
    log = native.compile(wanted)["log"]
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log)
