"""batch_invariant: a row has the same bits, however many rows stand beside it.

On a CPU the reference runs. tests/gpu has the same for kernels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm._moe.gate import gate_logits
from jax_fp8gemm._moe.ordered import softmax_by_halves, sum_by_halves
from jax_fp8gemm._select.candidates import candidates
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import GemmConfig, Problem, why_illegal
from jax_fp8gemm._tools.measure import configs_to_try

H, F, E = 256, 128, 8


def draws(*shapes, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, dims) for key, dims in zip(keys, shapes, strict=True)]


# ---- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(2112, 7168), (7168, 2048), (576, 7168)])
def test_every_number_of_rows_gets_the_order_of_the_persistent_kernel(n, k):
    """Its steps of k are added one after the other. The few-rows kernel adds two sums or more."""
    problem = Problem("dense", 1, n, k, batch_invariant=True)
    rows = [*range(1, 65, 3), *(2**i + j for i in range(6, 12) for j in (0, 1, 63)), 4096]
    chosen = {m: select(dataclasses.replace(problem, m=m)) for m in rows}
    assert {config.kernel for config in chosen.values()} == {"persistent"}
    assert {config.split_k for config in chosen.values()} == {1}
    usual = select(dataclasses.replace(problem, batch_invariant=False))
    assert usual.kernel == "few_rows"


def test_no_other_kernel_is_a_candidate_or_legal():
    few = GemmConfig("few_rows", 64, 32, 4)
    plain = Problem("dense", 64, 2112, 7168)
    same = dataclasses.replace(plain, batch_invariant=True)
    assert few.kernel in {c.kernel for c in candidates(plain)} and why_illegal(plain, few) is None
    for found in (candidates(same), configs_to_try(same, 8)):
        assert {c.kernel for c in found} == {"persistent"}
    assert "in another order" in str(why_illegal(same, few))


def test_a_config_with_another_order_is_refused_with_the_reason():
    x, w = (jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((64, 512), (128, 512)))

    def run(x, w):
        config = GemmConfig("few_rows", 64, 32, 4)
        q, r = fp8.quantize(x), fp8.quantize(w, (128, 128))
        return fp8.gemm(q, r, config=config, batch_invariant=True)

    with pytest.raises(ValueError, match="batch_invariant needs the persistent kernel"):
        jax.jit(run).trace(x, w).lower(lowering_platforms=("cuda",))


def test_the_choice_reaches_the_forward_gemm_alone():
    args = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in ((8, 2048), (2048, 1024))]

    def kernels(same):
        step = jax.grad(lambda x, w: fp8.fp8_matmul(x, w, batch_invariant=same).sum(), (0, 1))
        both = jax.jit(lambda x, w: (fp8.fp8_matmul(x, w, batch_invariant=same), step(x, w)[0]))
        text = both.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "@jax_fp8gemm_gemm_v1" in line]
        return sorted("few_rows" in call for call in calls)

    assert all(kernels(False))
    assert kernels(True) == [False, True]  # y; dx as ever


# ---- the reference ------------------------------------------------------------------------------


def check_rows(function, x, rows) -> None:
    """Checks that the first rows are those of all rows, for several numbers of them."""
    run = jax.jit(function)
    whole = run(x)
    for m in rows:
        for part, all_of_it in zip(
            jax.tree.leaves(run(x[:m])), jax.tree.leaves(whole), strict=True
        ):
            np.testing.assert_array_equal(part, all_of_it[:m], err_msg=str(m))


def test_the_reference_of_a_gemm_from_1_to_64_rows():
    """All in one program, because compiling is what takes time."""
    x, w = draws((64, 1024), (1024, 384))
    rhs = fp8.quantize(w.T, (128, 128))

    @jax.jit
    def every(x):
        run = lambda m: fp8.gemm(fp8.quantize(x[:m]), rhs, batch_invariant=True)  # noqa: E731
        return [run(m) for m in range(1, 65)]

    with_all = every(x)
    for m, out in enumerate(with_all, 1):
        np.testing.assert_array_equal(out, with_all[-1][:m], err_msg=str(m))


def test_the_plain_reference_would_fail():
    """On a CPU one row gets another order of sums; else the tests here could not fail."""
    x, w = draws((64, 1024), (1024, 384))
    with pytest.raises(AssertionError):
        check_rows(lambda x: fp8.fp8_matmul(x, w), x, [1])


@pytest.mark.parametrize("variant", ["batched", "masked", "contiguous"])
def test_the_reference_of_other_variants(variant):
    x, w = draws((3, 65, 256), (3, 128, 256))
    rhs = fp8.quantize(w, (128, 128))

    def run(x):
        m = x.shape[0]
        if variant == "contiguous":
            groups = jnp.ones(m, jnp.int32)
            return fp8.gemm(
                fp8.quantize(x[:, 0]), rhs, groups=groups, variant=variant, batch_invariant=True
            )
        sizes = (jnp.full(3, m),) if variant == "masked" else ()
        lhs = fp8.quantize(jnp.moveaxis(x, 0, 1))
        return jnp.moveaxis(fp8.gemm(lhs, rhs, *sizes, variant=variant, batch_invariant=True), 1, 0)

    check_rows(run, jnp.moveaxis(x, 1, 0), [1, 3, 64])


@pytest.mark.parametrize("cast", [True, False])
def test_the_reference_of_a_ragged_dot(cast):
    x, w = (a.astype(jnp.bfloat16) for a in draws((65, 256), (3, 256, 128)))

    def run(x):
        sizes = jnp.array([0, x.shape[0], 0])
        return fp8.fp8_ragged_dot(x, w, sizes, cast_in_gemm=cast, batch_invariant=True)

    check_rows(run, x, [1, 3, 64])


def test_rows_are_the_same_with_and_without_a_gradient():
    """Training and serving agree: the forward pass of a step has the bits of inference."""
    x, w = draws((64, 384), (384, 192))

    def matmul(x):
        return fp8.fp8_matmul(x, w, batch_invariant=True)

    served = jax.jit(matmul)(x[:1])
    trained, _ = jax.jit(lambda x: jax.vjp(matmul, x))(x)
    np.testing.assert_array_equal(trained[:1], served)


# ---- the router ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("h", [100, 2500])
def test_logits_do_not_depend_on_other_tokens_and_are_exact(h, dtype):
    x, kernel = draws((65, h), (h, 24))
    x = x.astype(dtype)
    check_rows(lambda x: gate_logits(x, kernel, True), x, [1, 2, 7, 64])
    right = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    got = np.asarray(jax.jit(lambda x: gate_logits(x, kernel, True))(x), np.float64)
    assert np.linalg.norm(got - right) <= 6e-8 * np.linalg.norm(right)  # a rounding to float32


def test_sums_of_logits_are_exact_in_any_order():
    """So the bits do not depend on what multiplies: k in another order gives the same."""
    x, kernel = draws((9, 1024), (1024, 24))
    order = jax.random.permutation(jax.random.key(3), 1024)
    run = jax.jit(lambda x, kernel: gate_logits(x, kernel, True))
    np.testing.assert_array_equal(run(x[:, order], kernel[order]), run(x, kernel))


@pytest.mark.parametrize("size", [3e38, 1e-30, 0.0])
def test_logits_of_extreme_numbers(size):
    x = jnp.full((2, 16), size, jnp.float32)
    got = gate_logits(x, jnp.full((16, 3), 2.0**-5), True)
    np.testing.assert_allclose(got, np.asarray(x[:, :3], np.float64) / 2, rtol=1e-6)


def test_a_token_with_nan_leaves_others_alone():
    x, kernel = draws((4, 64), (64, 8))
    broken = x.at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf)
    got, right = gate_logits(broken, kernel, True), gate_logits(x, kernel, True)
    assert not np.isfinite(got[1:3]).any()
    np.testing.assert_array_equal(got[::3], right[::3])


def test_gradients_of_exact_logits_are_the_usual_ones():
    x, kernel, d = draws((16, 64), (64, 8), (16, 8))
    for ours, theirs in zip(
        *(jax.vjp(lambda *a: gate_logits(*a, same), x, kernel)[1](d) for same in (True, False)),  # noqa: B023
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_sums_by_halves():
    for n in (1, 2, 3, 7, 24):
        (x,) = draws((5, n))
        np.testing.assert_allclose(sum_by_halves(x), x.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(softmax_by_halves(x), jax.nn.softmax(x), rtol=1e-6)
        gradients = [
            jax.grad(lambda x: (f(x) ** 2).sum())(x)  # noqa: B023
            for f in (softmax_by_halves, jax.nn.softmax)
        ]
        np.testing.assert_allclose(*gradients, atol=1e-6)


# ---- layers -------------------------------------------------------------------------------------


def layer(t=20, **options):
    x, gate, wi_0, wi_1, wo = draws((t, H), (H, E), (E, H, F), (E, H, F), (E, F, H))
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    options = {"top_k": 2, "batch_invariant": True, **options}

    def run(x):
        y, routing = fp8.moe(x, gate, kernels, **options)
        return y, routing.expert_index, routing.gate_weights

    return run, x


def test_a_layer_from_1_to_20_tokens():
    (shared,) = [fp8.ExpertKernels(wi_0=a, wi_1=b, wo=c) for a, b, c in
                 [draws((H, F), (H, F), (F, H), seed=1)]]  # fmt: skip
    run, x = layer(shared=shared)
    check_rows(run, x, [1, 3, 20])


def test_tokens_of_all_to_all_do_not_depend_on_others():
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    run, x = layer(16, expert_axis="expert", exchange="all_to_all", mesh=mesh)
    x = jax.device_put(x, NamedSharding(mesh, P("expert")))
    whole = jax.jit(run)(x)
    other = jax.jit(run)(jnp.concatenate([x[:2], x[8:10]]))
    for part, all_of_it in zip(other, whole, strict=True):
        np.testing.assert_array_equal(part[:2], all_of_it[:2])
        np.testing.assert_array_equal(part[2:], all_of_it[8:10])


@pytest.mark.parametrize(
    "options, error, what",
    [
        ({"capacity_factor": 1.0}, ValueError, "other tokens decide"),
        ({"device_capacity_factor": 2.0}, ValueError, "other tokens decide"),
        ({"tensor_axis": "a"}, NotImplementedError, "summed by a collective"),
        ({"expert_axis": "a"}, NotImplementedError, "summed by a collective"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant"),
    ],
)
def test_a_layer_that_cannot_promise_it_raises(options, error, what):
    run, x = layer(4, **options)
    with pytest.raises(error, match=what):
        jax.eval_shape(run, x)


def test_expert_ffn_that_cannot_promise_it_raises():
    x, wi_0, wi_1, wo = draws((4, H), (E, H, F), (E, H, F), (E, F, H))
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    index, weights = jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1))
    with pytest.raises(ValueError, match="expert_ffn: other tokens decide"):
        fp8.expert_ffn(x, index, weights, kernels, capacity=2, batch_invariant=True)


def test_k_is_not_cut_over_devices():
    """What is sharded by k is gathered: no device adds up a part of a sum."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    x, w = draws((16, 1024), (1024, 128))
    placed = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in ((x, P(None, "model")), (w, P("model")))
    ]
    for same, reduced in ((True, False), (False, True)):
        run = jax.jit(lambda x, w: fp8.fp8_matmul(x, w, batch_invariant=same))  # noqa: B023
        with pytest.warns(UserWarning) if same else pytest.MonkeyPatch.context():
            text = run.lower(*placed).compile().as_text()
        assert ("all-reduce" in text) == reduced
