"""The router's logits and their gradients against float64, beside float32 products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import mesh_of, place
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_fp8gemm._moe import gate, order, routing
from jax_fp8gemm._moe.gate import gate_logits, parts

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def in_float32(x, kernel):
    """What the router did before: products of float32 without tensor cores."""
    return jnp.dot(x.astype(F32), kernel.astype(F32), precision="highest")


def operands(key, t, h, e, dtype=BF16, kernel_dtype=F32):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (t, h)).astype(dtype)
    kernel = (jax.random.normal(keys[1], (h, e)) * h**-0.5).astype(kernel_dtype)
    return x, kernel, jax.random.normal(keys[2], (t, e))


def step(function):
    """Returns the jitted logits with both gradients, of x, kernel and the logits' cotangent."""

    @jax.jit
    def run(x, kernel, d):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(d)

    return run


def exact(x, kernel, d) -> tuple[np.ndarray, ...]:
    x, kernel, d = (np.asarray(a, np.float64) for a in (x, kernel, d))
    return x @ kernel, d @ kernel.T, x.T @ d


def error(got, right) -> float:
    """Returns the error relative to the result's norm."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - right) / np.linalg.norm(right))


# ---- accuracy -----------------------------------------------------------------------------------

# Tokens, width, experts. The last is odd: its sums are padded to be cut.
SHAPES = [(1536, 1536, 128), (256, 7168, 256), (1031, 2 * 1031, 24)]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_at_most_those_of_float32_products(key, shape, dtype):
    given = operands(key, *shape, dtype)
    got, before = step(gate_logits)(*given), step(in_float32)(*given)
    for ours, theirs, right in zip(got, before, exact(*given), strict=True):
        assert ours.dtype == theirs.dtype
        # A bf16 gradient has the error of its last rounding, 1.7e-3, and 1e-5 of that beside it.
        assert error(ours, right) <= 1.0001 * error(theirs, right)


@pytest.mark.parametrize("kernel_dtype", [BF16, F16], ids=lambda d: d.__name__)
def test_kernels_of_16_bits(key, kernel_dtype):
    given = operands(key, 96, 200, 24, BF16, kernel_dtype)
    got, before = step(gate_logits)(*given), step(in_float32)(*given)
    for ours, theirs, right in zip(got, before, exact(*given), strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, right) <= 1.01 * error(theirs, right)  # sums in another order


@pytest.mark.parametrize("shape, top_k", [((4096, 1536, 128), 8), ((1024, 7168, 256), 8)], ids=str)
def test_choices_are_those_of_float64(key, shape, top_k):
    x, kernel, _ = operands(key, *shape)
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    right = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    ours, theirs = (
        jax.lax.top_k(jax.jit(f)(x, kernel), top_k)[1] for f in (gate_logits, in_float32)
    )
    wrong = [int((np.asarray(found) != right).any(1).sum()) for found in (ours, theirs)]
    assert wrong[0] <= wrong[1]


LOOP_OF_1536 = 6.5e-7  # the error of a float32 loop over k = 1536


def of_a_tensor_core(a, b, dims):
    """A model of a tensor core's GEMM: 16 of k are added to the sum, which is then cut off, not
    rounded, to float32 (Khattak & Mikaitis, arXiv 2512.07004, on the H100)."""

    def multiply(a, b):
        out = np.zeros((len(a), len(b)), np.float32)
        for start in range(0, a.shape[1], 16):
            total = out.astype(np.float64)
            total += a[:, start : start + 16] @ b[:, start : start + 16].T
            out = total.astype(np.float32)
            away = np.abs(out.astype(np.float64)) > np.abs(total)
            out = np.where(away, np.nextafter(out, np.float32(0)), out)
        return out

    def run(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        (ca, cb), (batch_a, batch_b) = dims
        if batch_a:  # one batch dim: its pieces one after the other
            lead = (np.moveaxis(x, d, 0) for x, d in ((a, batch_a[0]), (b, batch_b[0])))
            inner = tuple(c[0] - (c[0] > d[0]) for c, d in ((ca, batch_a), (cb, batch_b)))
            pieces = [
                multiply(*(np.moveaxis(x, c, -1) for x, c in zip(pair, inner, strict=True)))
                for pair in zip(*lead, strict=True)
            ]
            return np.stack(pieces)
        free_b = [size for d, size in enumerate(b.shape) if d not in cb]
        a, b = (
            np.moveaxis(x, c, range(-len(c), 0)).reshape(-1, np.prod([x.shape[d] for d in c]))
            for x, c in ((a, ca), (b, cb))
        )
        return multiply(a, b).reshape(len(a), *free_b)

    return jax.pure_callback(run, jax.eval_shape(lambda a, b: dot(a, b, dims), a, b), a, b)


dot = functools.partial(jax.lax.dot_general, preferred_element_type=F32)


def test_long_sums_on_a_tensor_core(key, monkeypatch):
    """Sums of any length stay as good as short ones, and so below those of a float32 loop."""
    monkeypatch.setattr(gate, "_dot", of_a_tensor_core)
    x, kernel, d = operands(key, 4096, 40, 24)  # long for the kernel's gradient
    y, pull = jax.vjp(gate_logits, x, kernel)
    right = exact(x, kernel, d)
    assert error(y, right[0]) < LOOP_OF_1536 and error(pull(d)[1], right[2]) < LOOP_OF_1536
    for h in (1536, 7168):  # long for the logits
        x, kernel, _ = operands(key, 64, h, 24)
        right = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        assert error(gate_logits(x, kernel), right) < LOOP_OF_1536
    monkeypatch.setattr(gate, "LONGEST_SUM", 1 << 20)
    assert error(gate_logits(x, kernel), right) > 10 * LOOP_OF_1536  # what the pieces are for


def test_a_float32_loop_over_1536_has_the_error_that_the_bound_says(key):
    x, kernel, _ = operands(key, 64, 1536, 24)
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    out = np.zeros((64, 24), np.float32)
    for i in range(1536):  # a fused multiply-add rounds once
        out = (out + np.outer(x[:, i], kernel[i])).astype(np.float32)
    assert 0.9 * LOOP_OF_1536 < error(out, x @ kernel) < 1.2 * LOOP_OF_1536


# ---- parts --------------------------------------------------------------------------------------


def sums_of_parts(x) -> np.ndarray:
    return sum(np.asarray(part, np.float64) for part in jax.jit(parts)(x))


def test_float32_numbers_are_the_sum_of_their_parts():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)
    x = bits.view(np.float32)
    size = np.abs(x)
    x = x[np.isfinite(x) & (size > 2.0**-100) & (size < 3.38e38)]
    assert len(jax.jit(parts)(x)) == 3
    np.testing.assert_array_equal(sums_of_parts(x), x.astype(np.float64))


def test_every_float16_number_is_the_sum_of_its_parts():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    assert len(jax.jit(parts)(x)) == 2
    np.testing.assert_array_equal(sums_of_parts(x), x.astype(np.float64))


def test_parts_at_the_ends_of_the_range():
    largest = float(jnp.finfo(BF16).max)
    x = np.array([np.inf, -np.inf, 3.4e38, largest, np.nan, 1e-40, 0], np.float32)
    hi, mid, lo = (np.asarray(part, np.float32) for part in jax.jit(parts)(x))
    np.testing.assert_array_equal(hi[:5], [np.inf, -np.inf, np.inf, largest, np.nan])
    assert not mid[:5].any() and not lo[:5].any()  # Inf - Inf would be NaN
    assert np.abs(hi[5:] + mid[5:] + lo[5:] - x[5:]).max() <= 2.0**-126


def test_nan_and_inf_stay_with_their_token(key):
    x, kernel, d = operands(key, 6, 40, 8)
    clean = step(gate_logits)(x, kernel, d)
    broken = step(gate_logits)(x.at[2, 3].set(jnp.nan).at[4, 0].set(jnp.inf), kernel, d)
    assert np.isnan(broken[0][2]).all() and not np.isfinite(broken[0][4]).any()
    others = np.array([0, 1, 3, 5])
    np.testing.assert_array_equal(broken[0][others], clean[0][others])
    np.testing.assert_array_equal(broken[1], clean[1])  # x has no part in its own gradient
    infinite = gate_logits(jnp.ones((2, 8), BF16), jnp.ones((8, 3)).at[1, 1].set(jnp.inf))
    np.testing.assert_array_equal(infinite, [[8, np.inf, 8]] * 2)


# ---- in programs --------------------------------------------------------------------------------


def check(got, expected, bound=1e-6):
    """Results equal up to the order of sums; bf16 ones up to a step of their last bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        step_of = 2.0**-8 if a.dtype == BF16 else bound
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= step_of * np.abs(b).max()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize(
    "specs",  # of x, of kernel, of the logits
    [
        (("data",), (), ("data",)),
        ((), (None, "data"), (None, "data")),
        (("data",), (None, "model"), ("data", "model")),
        ((None, "seq"), (), ()),
    ],
    ids=str,
)
def test_on_a_mesh(key, kind, specs):
    given = operands(key, 2056, 64, 24)  # sums over tokens are cut in pieces
    expected = step(gate_logits)(*given)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        x, kernel, d = place(mesh, given, *specs)
        got = step(gate_logits)(x, kernel, d)
    check(got, expected)
    if kind == AxisType.Explicit:
        for result, like in zip(got, (d, x, kernel), strict=True):
            assert result.sharding.is_equivalent_to(like.sharding, 2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(key, check_vma):
    x, kernel, d = operands(key, 64, 48, 24)
    mapped = jax.shard_map(
        gate_logits,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    check(step(mapped)(x, kernel, d), step(gate_logits)(x, kernel, d))


def test_vmap_and_no_jit(key):
    given = [jnp.stack([a, 2 * a]) for a in operands(key, 20, 48, 6)]
    mapped = jax.vmap(step(gate_logits))(*given)
    check(mapped, jax.tree.map(lambda a, b: jnp.stack([a, b]), *map(step(gate_logits), *given)))
    shared = jax.jit(jax.vmap(gate_logits, (0, None)))(given[0], given[1][0])
    check(shared[1], gate_logits(given[0][1], given[1][0]))
    with jax.disable_jit():
        check(gate_logits(given[0][0], given[1][0]), shared[0])


@pytest.mark.parametrize("dtype", [BF16, F32], ids=lambda d: d.__name__)
def test_with_64_bits_and_strict_promotion(key, dtype):
    given = operands(key, 1100, 30, 10, dtype)
    expected = step(gate_logits)(*given)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("tensorfloat32"),
    ):
        got = step(gate_logits)(*given)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_second_derivatives_in_reverse_mode(key):
    x, kernel, _ = operands(key, 12, 20, 6, F32)

    def twice(function):
        loss = lambda *both: jnp.tanh(function(*both)).sum()  # noqa: E731
        norm = lambda *both: (jax.grad(loss, 0)(*both) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(norm, (0, 1)))(x, kernel)

    check(twice(gate_logits), twice(in_float32), 1e-5)


def test_no_tokens_and_one_token(key):
    for t in (0, 1):
        given = operands(key, t, 24, 6)
        assert [a.shape for a in step(gate_logits)(*given)] == [(t, 6), (t, 24), (24, 6)]
    assert not step(gate_logits)(*operands(key, 0, 24, 6))[2].any()


# ---- choices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_one_maximum_after_the_other_is_top_k(key, monkeypatch, top_k):
    """Ties, zeros, infinities and NaN included."""
    monkeypatch.setattr(routing, "MANY_SCORES", 0)
    scores = jnp.round(4 * jax.random.normal(key, (200, 24))) / 4
    odd = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, 1e-45, -1.0, 1.0])
    scores = scores.at[:20].set(jax.random.choice(key, odd, (20, 24)))
    scores = scores.at[20].set(jnp.nan).at[21].set(-jnp.inf).at[22].set(-jnp.nan)
    got = jax.jit(routing._choose, static_argnums=1)(scores, top_k)
    expected = jax.jit(jax.lax.top_k, static_argnums=1)(scores, top_k)[1]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32


def test_large_batches_take_their_choices_by_maxima(key):
    scores = jax.random.uniform(key, (routing.MANY_SCORES // 64, 64))
    text = jax.jit(routing._choose, static_argnums=1).lower(scores, 4).as_text()
    assert "top_k" not in text and "sort" not in text
    np.testing.assert_array_equal(routing._choose(scores, 4), jax.lax.top_k(scores, 4)[1])
    assert "top_k" in jax.jit(routing._choose, static_argnums=1).lower(scores, 17).as_text()
    assert "top_k" in jax.jit(routing._choose, static_argnums=1).lower(scores[1:], 4).as_text()


def test_a_router_is_exported_for_any_number_of_tokens(key):
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 8"), F32)
    run = jax.jit(lambda logits: routing.route(logits, 3))
    exported = jax.export.export(run)(tokens)
    logits = jax.random.normal(key, (5, 8))
    np.testing.assert_array_equal(exported.call(logits).expert_index, run(logits).expert_index)
    np.testing.assert_allclose(exported.call(logits).aux_loss, run(logits).aux_loss, rtol=1e-6)


@pytest.mark.parametrize(
    "experts, dtype", [(3, "ui8"), (255, "ui8"), (256, "ui16"), (70000, "ui32")]
)
def test_rows_are_sorted_by_the_narrowest_keys(key, experts, dtype):
    chosen = jax.random.randint(key, (50, 4), -2, experts + 2)
    run = jax.jit(order.permutation_of, static_argnums=1)
    text = run.lower(chosen, experts).as_text()
    assert text.count("stablehlo.sort") == 1 and f"tensor<200x{dtype}>" in text
    permutation = run(chosen, experts)
    flat = np.asarray(chosen).ravel()
    flat = np.where((flat >= 0) & (flat < experts), flat, experts)
    np.testing.assert_array_equal(permutation.order, np.argsort(flat, kind="stable"))
    sizes = np.bincount(flat, minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(permutation.group_sizes, sizes)
    assert permutation.order.dtype == permutation.group_sizes.dtype == jnp.int32
