"""DeepGEMM's names: argument meaning as there, results returned."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import random_operands
from numerics import calc_diff, exact

import jax_fp8gemm as fp8
from jax_fp8gemm import deep_gemm
from jax_fp8gemm._select.problem import Problem


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
    out = deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*pairs(lhs, rhs), ks, c=c)
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


# ---- today's names ------------------------------------------------------------------------------


def turned(pair):
    return tuple(jnp.swapaxes(x, -1, -2) for x in pair)


def test_dense_of_any_major_order():
    lhs, rhs = random_operands(Problem("dense", 30, 136, 384))
    a, b = pairs(lhs, rhs)
    expected = fp8.gemm(lhs, rhs)
    for name, operands in {
        "nt": (a, b), "nn": (a, turned(b)), "tn": (turned(a), turned(b)), "tt": (turned(a), b),
    }.items():  # fmt: skip
        out = getattr(deep_gemm, f"fp8_gemm_{name}")(*operands, compiled_dims="nk")
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_accumulation(dtype):
    lhs, rhs = random_operands(Problem("dense", 30, 136, 384, scales="1x128_1x128"))
    c = jax.random.normal(jax.random.key(0), (30, 136)).astype(dtype)
    out = deep_gemm.fp8_gemm_nt(*pairs(lhs, rhs), c=c, recipe=(1, 1, 128))
    expected = fp8.gemm(lhs, rhs, init=c.astype(jnp.float32), out_dtype=jnp.float32).astype(dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected)
    if dtype == jnp.float32:
        wgrad = deep_gemm.wgrad_gemm_fp8_fp8_fp32_nt(*pairs(lhs, rhs), c=c)
        np.testing.assert_array_equal(wgrad, expected)


def test_contiguous_by_the_ends_of_groups():
    """Groups of 130, 0 and 128 rows begin at multiples of 128."""
    rows = jnp.array([0] * 130 + [-1] * 126 + [2] * 128 + [-1] * 128)
    lhs, rhs, _ = random_operands(Problem("contiguous", 300, 136, 384, 3))
    a, b = (lhs.qvalue[:512], lhs.scale[:512]), (rhs.qvalue, rhs.scale)
    a = tuple(jnp.pad(x, ((0, 512 - x.shape[0]), (0, 0))) for x in a)
    expected = deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, rows)
    assert jnp.any(expected[129]) and not jnp.any(expected[130:256])
    ends = jnp.array([130, 256, 384])
    for name, matrices in (("nt", b), ("nn", turned(b))):
        run = getattr(deep_gemm, f"m_grouped_fp8_gemm_{name}_contiguous")
        out = run(a, matrices, ends, use_psum_layout=True)
        np.testing.assert_array_equal(out, expected)


def k_grouped_operands(sizes):
    x, y = (jax.random.normal(jax.random.key(i), (sum(sizes), n)) for i, n in ((1, 40), (2, 24)))
    casts = [deep_gemm.per_channel_cast_to_fp8(z, True) for z in (x, y)]
    groups = (
        np.split(np.asarray(x), np.cumsum(sizes)[:-1]),
        np.split(np.asarray(y), np.cumsum(sizes)[:-1]),
    )
    return casts, np.stack([a.T @ b for a, b in zip(*groups, strict=True)])


def flattened(pair, sizes):
    """DeepGEMM's layout: the [m, k] of one group after another."""
    parts = jnp.split(pair[0], np.cumsum(sizes)[:-1])
    return jnp.concatenate([part.T.reshape(-1) for part in parts]), pair[1].T


def test_groups_along_k_in_three_layouts():
    sizes = [128, 0, 384]
    (a, b), exact_floats = k_grouped_operands(sizes)
    c = jnp.ones((3, 40, 24))
    tn = deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, sizes, c=c)
    assert calc_diff(tn - 1, exact_floats) < 2e-3
    ends = deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, [128, 128, 512], use_psum_layout=True)
    flat = [flattened(pair, sizes) for pair in (a, b)]
    nt = deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*flat, sizes, c=c)
    wgrad = [(q, scale.T) for q, scale in flat]
    old = deep_gemm.k_grouped_wgrad_gemm_fp8_fp8_fp32_nt(*wgrad, sizes, c=c)
    for other in (ends + 1, nt, old):
        np.testing.assert_allclose(other, tn, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="needs its groups' k on the host"):
        jax.jit(deep_gemm.k_grouped_fp8_gemm_nt_contiguous)(*flat, jnp.array(sizes))
    with pytest.raises(ValueError, match="a does not fit ks"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*flat, [128, 0, 256])


@pytest.mark.parametrize("expr", ["bhr,hdr->bhd", "bhd,hdr->bhr", "bhd,bhr->hdr"])
def test_einsum(expr):
    left, right = expr.split("->")[0].split(",")
    sizes = {"b": 128, "h": 2, "d": 160, "r": 256}
    x, y = (
        jax.random.normal(jax.random.key(i), [sizes[letter] for letter in letters])
        for i, letters in enumerate((left, right))
    )
    if left == right[:2] + "d" or right[0] == "b":  # both are scaled along b
        a, b = (heads(deep_gemm.per_channel_cast_to_fp8, z) for z in (x, y))
        recipe = {"recipe": (1, 1, 128)}
    else:
        a = heads(lambda z: deep_gemm.per_token_cast_to_fp8(z, False), x)
        b = jax.vmap(lambda z: deep_gemm.per_block_cast_to_fp8(z, False))(y)
        recipe = {}
    out = deep_gemm.fp8_einsum(expr, a, b, out_dtype=jnp.float32, **recipe)
    exact_floats = jnp.einsum(expr, x, y)
    assert calc_diff(out, exact_floats) < 2e-3
    added = deep_gemm.fp8_einsum(expr, a, b, c=jnp.ones_like(out), **recipe)
    np.testing.assert_allclose(added, out + 1, rtol=1e-5, atol=1e-4)


def heads(cast, x):
    """Casts each head of [b, h, k]."""
    if cast is deep_gemm.per_channel_cast_to_fp8:
        return jax.vmap(lambda z: cast(z, True), 1, 1)(x)
    return jax.vmap(cast, 1, 1)(x)


def test_casts():
    x = jax.random.normal(jax.random.key(0), (256, 272))
    for rounding, ue8m0 in (("none", False), ("pow2", True)):
        q, scale = deep_gemm.per_token_cast_to_fp8(x, ue8m0)
        expected = fp8.quantize(x, scale_rounding=rounding)
        np.testing.assert_array_equal(q, expected.qvalue)
        np.testing.assert_array_equal(scale, expected.scale)
        q, scale = deep_gemm.per_channel_cast_to_fp8(x, ue8m0)
        columns = fp8.quantize(x.T, scale_rounding=rounding)
        np.testing.assert_array_equal(q, columns.qvalue.T)
        np.testing.assert_array_equal(scale, columns.scale.T)
    q, scale = deep_gemm.per_block_cast_to_fp8(x, False)
    assert q.shape == x.shape and scale.shape == (2, 3)
    for wrong in (
        lambda: deep_gemm.per_block_cast_to_fp8(x, False, 32),
        lambda: deep_gemm.per_token_cast_to_fp8(x, True, 128, True),
        lambda: deep_gemm.set_mk_alignment_for_contiguous_layout(64),
    ):
        with pytest.raises(NotImplementedError):
            wrong()
    with pytest.raises(ValueError, match="k is not a multiple of 128"):
        deep_gemm.per_channel_cast_to_fp8(x[:200], False)


def test_calc_diff():
    x = jax.random.normal(jax.random.key(0), (64,))
    assert deep_gemm.calc_diff(x, x) == 0 and deep_gemm.calc_diff(0 * x, 0 * x) == 0
    np.testing.assert_allclose(deep_gemm.calc_diff(x, 1.01 * x), calc_diff(x, 1.01 * x), rtol=1e-3)


A = jnp.zeros((16, 128), jnp.float8_e4m3fn), jnp.ones((16, 1))
D = jnp.zeros((16, 16), jnp.bfloat16)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: deep_gemm.fp8_gemm_nt(A, A, D), r"write d = fp8_gemm_nt\(a, b\)"),
        (lambda: deep_gemm.fp8_gemm_tn(A, A, d=D), r"got +d=(.|\n)*write d = fp8_gemm_tn"),
        (lambda: deep_gemm.gemm_fp8_fp8_bf16_nt(A, A, D), "write out = gemm_fp8_fp8_bf16_nt"),
        (lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(A, A, D, [128], D), "ks, c=c"),
        (lambda: deep_gemm.fp8_gemm_nt(A[0], A), "fp8_gemm_nt: a has no scales"),
        (lambda: deep_gemm.fp8_gemm_nt(A, A, recipe=(1, 2, 128)), "Hopper has no such scales"),
        (lambda: deep_gemm.fp8_gemm_nt(A, A, recipe=(1, 128, 128)), "not as the recipe says"),
        (lambda: deep_gemm.fp8_gemm_nt(A, A, scale=2), "no argument 'scale'"),
        (lambda: deep_gemm.fp8_gemm_nt(A, A, c=D, out_dtype=jnp.float32), "c has another dtype"),
        (lambda: deep_gemm.fp8_einsum("bm,bn->mn", A, A), "no such expression"),
    ],
)  # fmt: skip
def test_errors_say_what_to_write(call, text):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=text):
        call()


def test_the_page_has_every_public_name():
    root = pathlib.Path(__file__).parent.parent
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", (root / "docs/deep_gemm.md").read_text(), re.M)
    said = {name: where for names, where in rows for name in re.findall(r"`(\w+)`", names)}
    theirs = (root / "tests/data/deep_gemm_names.txt").read_text().split()
    assert set(said) == set(theirs)
    here = {name for name, where in said.items() if where == "here"}
    assert here == set(deep_gemm.__all__)
