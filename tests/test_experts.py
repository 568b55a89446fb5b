"""expert_ffn against float32, and against its own data flow written as a loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import FORWARD, GRADIENT, dense_ffn, make_kernels
from numerics import calc_diff

import jax_fp8gemm as fp8
from jax_fp8gemm._core import reference

T, H, F, E = 40, 128, 128, 5
NAMES = ("y", "x", "weights", "wi_0", "wi_1", "wo")


def tokens(key, t=T, h=H, dtype=jnp.float32):
    keys = jax.random.split(key)
    return [jax.random.normal(k, (t, h)).astype(dtype) for k in keys]


def choices(key, t=T, top_k=2, e=E):
    """Experts without repetition, and weights."""
    experts = jnp.argsort(jax.random.uniform(key, (t, e)), axis=1)[:, :top_k]
    return experts, jax.random.uniform(key, (t, top_k), minval=0.1)


def with_gradients(function):
    """Returns y and the gradients to x, gate_weights, wi_0, wi_1, wo, in one jitted call."""

    @jax.jit
    def run(x, experts, weights, kernels, dy):
        y, pull = jax.vjp(lambda x, w, ws: function(x, experts, w, ws), x, weights, kernels)
        dx, d_weights, d_kernels = pull(dy.astype(y.dtype))
        return y, dx, d_weights, d_kernels.wi_0, d_kernels.wi_1, d_kernels.wo

    return run


block = with_gradients(fp8.expert_ffn)
tight_block = with_gradients(functools.partial(fp8.expert_ffn, capacity=12))
roomy_block = with_gradients(functools.partial(fp8.expert_ffn, capacity=2 * T))
dense_block = with_gradients(dense_ffn)


def check(got, expected):
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.shape == b.shape, name
        assert np.isfinite(np.asarray(a, np.float32)).all(), name
        assert calc_diff(a, b) < (FORWARD if name == "y" else GRADIENT), (name, calc_diff(a, b))


PATTERNS = {
    "mixed": lambda experts: experts,
    "all_to_one": lambda experts: jnp.full_like(experts, 3).at[:, 1].set(-1),
    "twice_the_same": lambda experts: experts.at[:, 1].set(experts[:, 0]),
    "two_experts_empty": lambda experts: experts % 3,
    "some_to_nobody": lambda experts: jnp.where(experts == 2, E, experts),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_against_float32_with_all_gradients(key, pattern):
    experts, weights = choices(key)
    experts = PATTERNS[pattern](experts)
    x, dy = tokens(key)
    kernels = make_kernels(key, E, H, F)
    got = block(x, experts, weights, kernels, dy)
    check(got, dense_block(x, experts, weights, kernels, dy))
    idle = [i for i in range(E) if not (experts == i).any()]
    assert bool(idle) == (pattern not in ("mixed", "twice_the_same"))
    for gradient in got[3:]:
        assert not np.asarray(gradient[jnp.array(idle, int)]).any()


@pytest.mark.parametrize(
    "t, h, f, e, top_k",
    [(1, 72, 40, 3, 3), (33, 200, 130, 2, 1)],
    ids=["one_token_every_expert", "f_past_a_block"],
)
def test_odd_sizes(key, t, h, f, e, top_k):
    experts, weights = choices(key, t, top_k, e)
    x, dy = tokens(key, t, h)
    kernels = make_kernels(key, e, h, f)
    got = block(x, experts, weights, kernels, dy)
    expected = dense_block(x, experts, weights, kernels, dy)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        # Few numbers: their errors average out less. 0.01 is 14 % in the norm.
        assert a.shape == b.shape and calc_diff(a, b) < 1e-2, (name, calc_diff(a, b))


def real(x, tile=(1, 128)):
    return fp8.dequantize(fp8.quantize(x, tile))


def by_hand(x, experts, weights, kernels, dy):
    """The data flow with plain products, one expert after the other; rounded to FP8 where it is."""
    wi_0, wi_1, wo = (real(getattr(kernels, name), (128, 128)) for name in NAMES[3:])
    f32 = functools.partial(jnp.dot, precision="highest")
    bf16 = lambda v: v.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    xq, dyq = real(x), real(dy)
    y, dx = jnp.zeros_like(x), jnp.zeros_like(x)
    d_weights, gradients = jnp.zeros_like(weights), []
    for i in range(E):
        token, choice = np.nonzero(np.asarray(experts) == i)
        weight = weights[token, choice][:, None]
        h = [bf16(f32(xq[token], w[i])) for w in (wi_0, wi_1)]
        y = y.at[token].add(f32(real(weight * jax.nn.silu(h[0]) * h[1]), wo[i]))
        da = bf16(f32(dyq[token], wo[i].T))
        act, pull = jax.vjp(lambda g, u, w: w * jax.nn.silu(g) * u, *map(real, h), weight)
        d_gate, d_up, d_weight = pull(da)
        d_weights = d_weights.at[token, choice].set(d_weight[:, 0])
        dx = dx.at[token].add(f32(real(d_gate), wi_0[i].T) + f32(real(d_up), wi_1[i].T))
        along = lambda v: real(v.T)  # noqa: E731
        dwo = f32(along(act), along(dy[token]).T)
        gradients.append([*(f32(along(xq[token]), along(d).T) for d in (d_gate, d_up)), dwo])
    return y, dx, d_weights, *(jnp.stack(parts) for parts in zip(*gradients, strict=True))


def test_is_the_data_flow_that_is_documented(key):
    """Far closer than FP8 is to float32: what is left is the bf16 of the last products' rows."""
    experts, weights = choices(key)
    x, dy = tokens(key)
    kernels = make_kernels(key, E, H, F)
    got = block(x, experts, weights, kernels, dy)
    expected = by_hand(x, experts, weights, kernels, dy)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert calc_diff(a, b) < 1e-5, (name, calc_diff(a, b))


# ---- capacity -----------------------------------------------------------------------------------


def test_room_for_all_is_dropless(key):
    experts, weights = choices(key)
    x, dy = tokens(key)
    kernels = make_kernels(key, E, H, F)
    got = roomy_block(x, experts, weights, kernels, dy)
    for a, b in zip(got, block(x, experts, weights, kernels, dy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_later_rows_over_capacity_are_dropped(key):
    experts, weights = choices(key)
    experts = experts.at[:, 0].set(1)  # far more than 12
    x, dy = tokens(key)
    kernels = make_kernels(key, E, H, F)
    kept, counts = np.zeros(experts.shape, bool), np.zeros(E, int)
    for pair, expert in np.ndenumerate(np.asarray(experts)):
        kept[pair] = counts[expert] < 12
        counts[expert] += 1
    assert 0 < kept.sum() < kept.size and min(counts) < 12
    got = tight_block(x, experts, weights, kernels, dy)
    check(got, dense_block(x, jnp.where(kept, experts, E), weights, kernels, dy))
    assert not np.asarray(got[2])[~kept].any()
    nobody = ~kept.any(1)
    assert nobody.any() and not np.asarray(got[0])[nobody].any()
    assert not np.asarray(got[1])[nobody].any()


def test_nan_in_a_token_reaches_its_own_results_alone(key):
    experts, weights = choices(key)
    x, dy = tokens(key)
    kernels = make_kernels(key, E, H, F)
    for run in (block, tight_block):
        clean = run(x, experts, weights, kernels, dy)
        dirty = run(x.at[3, 7].set(jnp.nan), experts, weights, kernels, dy)
        others = jnp.arange(T) != 3
        for a, b in zip(dirty[:3], clean[:3], strict=True):
            np.testing.assert_array_equal(a[others], b[others])
        assert np.isnan(np.asarray(dirty[0][3])).all()
        away = [i for i in range(E) if i not in np.asarray(experts[3]).tolist()]
        for a, b in zip(dirty[3:], clean[3:], strict=True):
            np.testing.assert_array_equal(a[jnp.array(away)], b[jnp.array(away)])


@pytest.mark.parametrize("capacity", [None, 12])
def test_what_kernels_leave_unwritten_reaches_nothing(key, monkeypatch, capacity):
    """As on a GPU: NaN in what `masked` does not compute, and in quantized rows past the groups."""
    t, plain, copies = 26, reference.PRODUCTS["masked"], reference.copies
    jax.clear_caches()  # references that other tests traced, and below those that this one traced

    def masked(multiply, lhs, rhs, sizes):
        rows = jnp.arange(lhs.shape[1])[:, None] < sizes[:, None, None]
        return jnp.where(rows, plain(multiply, lhs, rhs, sizes), jnp.nan)

    def grouped(x, *args, group_sizes, **kwargs):
        found = copies(x, *args, group_sizes=group_sizes, **kwargs)
        if group_sizes is not None and kwargs["rows"]:
            rows = jnp.arange(found[1].shape[-1])
            found[1] = jnp.where(rows < group_sizes.sum(), found[1], jnp.nan)
        return found

    monkeypatch.setitem(reference.PRODUCTS, "masked", masked)
    monkeypatch.setattr(reference, "copies", grouped)
    experts, weights = choices(key, t)
    experts = PATTERNS["some_to_nobody"](experts)
    assert np.bincount(experts.ravel(), minlength=E).max() <= 12 < experts.size
    x, dy = tokens(key, t)
    kernels = make_kernels(key, E, H, F)
    run = with_gradients(functools.partial(fp8.expert_ffn, capacity=capacity))
    got = run(x, experts, weights, kernels, dy)
    jax.clear_caches()
    check(got, dense_block(x, experts, weights, kernels, dy))


# ---- types and transformations ------------------------------------------------------------------


def test_dtypes_of_results_and_gradients(key):
    experts, weights = choices(key)
    x, dy = tokens(key, dtype=jnp.bfloat16)
    kernels = make_kernels(key, E, H, F)
    half = dataclasses.replace(kernels, wo=kernels.wo.astype(jnp.float16))
    got = block(x, experts, weights, half, dy)
    names = [str(a.dtype) for a in got]
    assert names == ["bfloat16", "bfloat16", "float32", "float32", "float32", "float16"]
    check(got, dense_block(x, experts, weights, kernels, dy))


def test_no_tokens(key):
    kernels = make_kernels(key, E, H, F)
    none = jnp.zeros((0, 2))
    got = block(jnp.zeros((0, H)), none.astype(int), none, kernels, jnp.zeros((0, H)))
    assert got[0].shape == (0, H) and got[3].shape == (E, H, F)
    assert not any(np.asarray(a).any() for a in got[3:])


POLICIES = {
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "x_and_h": jax.checkpoint_policies.save_only_these_names("moe_x", "moe_h"),
    "named": jax.checkpoint_policies.save_only_these_names("moe_x", "moe_h", "moe_weights"),
}


@pytest.fixture(scope="module")
def stacked():
    """Two layers; numbers so large that FP8 uses its whole range."""
    key = jax.random.key(1)
    layers = [make_kernels(k, E, H, F) for k in jax.random.split(key)]
    kernels = jax.tree.map(lambda *w: 30 * jnp.stack(w), *layers)
    x, _ = tokens(key)
    experts, weights = choices(key)

    def loss(kernels, policy=None, remat=False):
        layer = lambda x, w: (jnp.tanh(fp8.expert_ffn(x, experts, weights, w)), None)  # noqa: E731
        layer = jax.checkpoint(layer, policy=policy) if remat else layer
        return (jax.lax.scan(layer, x, kernels)[0] ** 2).sum()

    return loss, kernels, jax.jit(jax.grad(loss))(kernels)


@pytest.mark.parametrize("policy", POLICIES)
def test_scan_with_remat_gives_the_same_bits(stacked, policy):
    loss, kernels, plain = stacked
    run = functools.partial(loss, policy=POLICIES[policy], remat=True)
    pairs = jax.tree.leaves(jax.jit(jax.grad(run))(kernels)), jax.tree.leaves(plain)
    for a, b in zip(*pairs, strict=True):
        assert np.asarray(b).any()
        np.testing.assert_array_equal(a, b)


def test_prepared_weights_serve_all_microbatches(key):
    experts, weights = choices(key)
    x, _ = tokens(key)
    kernels = make_kernels(key, E, H, F)
    halves = jax.tree.map(lambda a: a.reshape(2, T // 2, -1), (x, experts, weights))

    def loss(kernels, prepare):
        given = fp8.prepare_experts(kernels) if prepare else kernels
        part = lambda total, one: (total + (fp8.expert_ffn(*one, given) ** 2).sum(), None)  # noqa: E731
        return jax.lax.scan(part, 0.0, halves)[0]

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    pairs = jax.tree.leaves(run(kernels, True)), jax.tree.leaves(run(kernels, False))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_second_derivative_is_a_clear_error(key):
    experts, weights = choices(key, 4)
    x, _ = tokens(key, 4)
    kernels = make_kernels(key, E, H, F)
    slope = jax.grad(lambda x: fp8.expert_ffn(x, experts, weights, kernels).sum())
    with pytest.raises(NotImplementedError, match="first derivatives"):
        jax.grad(lambda x: slope(x).sum())(x)


def calls(jaxpr) -> list[tuple[str, str]]:
    """Returns each primitive of a program and of those in it, with the variant of a GEMM."""
    found = []
    for eqn in jaxpr.eqns:
        variant = getattr(eqn.params.get("spec"), "variant", None)
        found.append((eqn.primitive.name, "" if variant is None else variant.name))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += calls(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("policy, again", [("nothing", 1), ("x_and_h", 0), ("everything", 0)])
def test_all_gemms_are_in_fp8_and_none_is_done_again(key, policy, again):
    """Two forward, five backward; gate and up once more where SwiGLU's input was not kept."""
    experts, weights = choices(key)
    x, _ = tokens(key)
    remat = jax.checkpoint(fp8.expert_ffn, policy=POLICIES[policy])
    slope = jax.grad(lambda x, kernels: (remat(x, experts, weights, kernels) ** 2).sum(), (0, 1))
    found = calls(jax.jit(slope).trace(x, make_kernels(key, E, H, F)).jaxpr)
    assert found.count(("jax_fp8gemm_gemm", "ragged")) == 4 + again
    assert found.count(("jax_fp8gemm_gemm", "ragged_contracting")) == 3
    assert not any(name in ("dot_general", "ragged_dot_general") for name, _ in found)
