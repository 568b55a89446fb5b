"""DeepGEMM's names: argument meaning as there, results returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff, exact

import jax_fp8gemm as fp8
from jax_fp8gemm import deep_gemm
from jax_fp8gemm._select.problem import Problem
from jax_fp8gemm._tools.operands import random_operands


def pairs(*operands):
    return [(q.qvalue, q.scale) for q in operands]


def test_dense():
    lhs, rhs = random_operands(Problem("dense", 30, 136, 384))
    out = deep_gemm.gemm_fp8_fp8_bf16_nt(*pairs(lhs, rhs))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, fp8.gemm(lhs, rhs))


def test_contiguous():
    problem = Problem("contiguous", 300, 136, 384, 3)
    lhs, rhs, rows = random_operands(problem)
    out = deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(*pairs(lhs, rhs), rows)
    expected = exact("contiguous", lhs, rhs, rows, problem.tiles)
    assert out.dtype == jnp.bfloat16 and calc_diff(out.astype(jnp.float32), expected) < 1e-5
    assert rows.shape[0] % deep_gemm.get_m_alignment_for_contiguous_layout() == 0


def test_masked():
    lhs, rhs, counts = random_operands(Problem("masked", 20, 136, 384, 3))
    out = deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(*pairs(lhs, rhs), counts, 20)
    for group, count in enumerate(np.asarray(counts)):
        alone = fp8.gemm(fp8.QArray(*(x[group] for x in (lhs.qvalue, lhs.scale))),
                         fp8.QArray(*(x[group] for x in (rhs.qvalue, rhs.scale))))  # fmt: skip
        np.testing.assert_array_equal(out[group, :count], alone[:count])


@pytest.mark.parametrize("with_c", [False, True])
def test_k_grouped(with_c):
    problem = Problem("ragged_contracting", 40, 136, 512, 3, "1x128_1x128", "f32")
    lhs, rhs, ks = random_operands(problem, np.array([128, 0, 384], np.int32))
    c = jnp.ones((3, 40, 136)) if with_c else None
    out = deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*pairs(lhs, rhs), ks, c)
    expected = exact("ragged_contracting", lhs, rhs, ks, problem.tiles) + (1 if with_c else 0)
    assert out.dtype == jnp.float32 and calc_diff(out, expected) < 1e-12


def test_number_of_multiprocessors_reaches_the_program():
    lhs, rhs = random_operands(Problem("dense", 30, 136, 384))
    try:
        deep_gemm.set_num_sms(20)
        assert deep_gemm.get_num_sms() == 20
        traced = jax.jit(deep_gemm.gemm_fp8_fp8_bf16_nt).trace(*pairs(lhs, rhs))
        assert "num_sms = 20" in traced.lower(lowering_platforms=("cuda",)).as_text()
    finally:
        deep_gemm.set_num_sms(None)
    with pytest.raises(ValueError, match="num_sms is not a positive integer"):
        deep_gemm.set_num_sms(0)


def test_helpers():
    assert deep_gemm.ceil_div(7, 4) == 2
    assert deep_gemm.get_tma_aligned_size(7, 4) == 8 and deep_gemm.get_tma_aligned_size(9, 1) == 16
    x = jnp.ones((7, 3))
    assert deep_gemm.get_col_major_tma_aligned_tensor(x) is x
