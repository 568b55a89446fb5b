"""Quantizing kernels on the GPU: right to the bit, on poisoned memory, twice the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulation import emulate
from quantize_cases import (
    DENSE,
    GROUPED,
    SWIGLU,
    compare,
    compare_swiglu,
    dense_cases,
    grouped_cases,
    raw,
    swiglu_cases,
    written,
)
from sanitizer import sanitize
from test_gemm_gpu import poison

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.op import bind_primitive
from jax_fp8gemm._bind.quantize_op import QUANTIZE
from jax_fp8gemm._core.layout import BLOCKS
from jax_fp8gemm._tools.shapes import GROUPS


@functools.partial(jax.jit, static_argnames="spec")
def kernel(*operands, spec):
    return bind_primitive(QUANTIZE, spec, operands)


def run(spec, given) -> dict:
    """What the kernel writes, on poisoned memory."""
    poison()
    results = map(np.asarray, kernel(*given, spec=spec))
    return written(spec, given, zip(emulate.result_names(spec), results, strict=True))[0]


@pytest.mark.parametrize("extremes", [False, True], ids=["finite", "nan_inf"])
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, extremes):
    spec, dtype = DENSE[name]
    for given in dense_cases(spec, dtype, extremes):
        for _ in range(2):
            compare(spec, given, run(spec, given))


@pytest.mark.parametrize("name", GROUPED)
def test_grouped(name):
    spec, dtype = GROUPED[name]
    for given in grouped_cases(spec, dtype, [groups for groups in GROUPS if groups.m]):
        for _ in range(2):
            compare(spec, given, run(spec, given))


@pytest.mark.parametrize("name", SWIGLU)
def test_swiglu(name):
    spec, dtype = SWIGLU[name]
    cases = list(swiglu_cases(spec, dtype))
    same = [compare_swiglu(spec, given, run(spec, given)) for given in cases]
    assert np.mean(np.concatenate(same)) > 0.99  # exp and 1 / x are approximate


@pytest.mark.parametrize("tile", [(1, 128), BLOCKS], ids=str)
def test_large_arrays_have_the_bits_of_the_reference(tile):
    """[4096, 7168] on the GPU by the kernel and by XLA."""
    from jax_fp8gemm._core import reference

    x = jax.random.normal(jax.random.key(0), (4096, 7168), jnp.bfloat16)
    rows, columns = jax.jit(lambda x: fp8.quantize_both(x, tile))(x)
    again = jax.jit(lambda x: fp8.quantize_both(x, tile))(x)
    for y, (turned, got) in zip((x, x.T), enumerate((rows, columns)), strict=True):
        q, scale = jax.jit(lambda y: reference.quantize(y, tile, "pow2"))(y)
        np.testing.assert_array_equal(raw(got.qvalue), raw(q))
        np.testing.assert_array_equal(np.asarray(got.scale), np.asarray(scale))
        np.testing.assert_array_equal(raw(got.qvalue), raw(again[turned].qvalue))


def test_rows_past_two_to_the_31():
    """More elements than an int32 counts: [300000, 7424] has 2.2e9."""
    x = jnp.ones((300_000, 7424), jnp.bfloat16).at[-1, -1].set(3.0)
    rows, columns = jax.jit(fp8.quantize_both)(x)
    assert float(fp8.dequantize(fp8.QArray(rows.qvalue[-1:], rows.scale[-1:]))[0, -1]) == 3.0
    last = fp8.QArray(columns.qvalue[-1:], columns.scale[-1:])
    assert float(fp8.dequantize(last)[0, 299_999]) == 3.0
    assert not np.asarray(columns.qvalue[-1, 300_000:], np.float32).any()


def test_more_tiles_than_a_grid_has_in_y():
    x = jax.random.normal(jax.random.key(0), (70_000, 2, 16), jnp.bfloat16)
    many, one = jax.jit(fp8.quantize)(x), jax.jit(fp8.quantize)(x.reshape(-1, 16))
    np.testing.assert_array_equal(raw(many.qvalue).reshape(-1, 16), raw(one.qvalue))
    np.testing.assert_array_equal(np.asarray(many.scale).reshape(-1, 1), np.asarray(one.scale))


SANITIZED = """
import jax, jax.numpy as jnp, jax_fp8gemm as fp8
x = jax.random.normal(jax.random.key(0), (300, 272), jnp.bfloat16)
h, weight = x[:, :256], jnp.ones(300)
sizes, index = jnp.array([131, 0, 40, 70]), jnp.arange(300)[::-1]
done = [
    fp8.quantize_both(x), fp8.quantize_both(x, (128, 128)), fp8.quantize_both(x[:, :131]),
    fp8.quantize_both(x, group_sizes=sizes, index=index),
    jax.jit(lambda x: fp8.requantize(fp8.quantize(x), group_sizes=sizes))(x),
    fp8.swiglu_quantize_both(h, weight, group_sizes=sizes),
    jax.jit(lambda h: fp8.swiglu_backward(fp8.quantize(h), h[:, :128], weight, sizes))(h),
]
jax.block_until_ready(done)
print("finished")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool):
    sanitize(tool, SANITIZED, "fp8_quantize")


def test_sanitizer_sees_nothing_read_that_was_not_written():
    """The tool must see who writes, so it looks at every kernel.

    XLA's own read what lies past the groups, when they copy a whole result: only ours count.

    NOTE: FP8 operands are made in the program that takes them, so that scales go from kernel to
    kernel: the tool takes some that XLA's transpose has just written for unwritten.
    """
    report = sanitize("initcheck", SANITIZED, None)
    found = re.findall(r"Uninitialized.*\n.*fp8_(?:.*\n)*?=========\s*\n", report)
    assert not found, found[0]
