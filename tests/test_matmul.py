"""fp8_matmul: values, gradients and transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff

import jax_fp8gemm as fp8


def operands(key, m, k, n, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    shapes = ((m, k), (k, n), (m, n))
    return [
        jax.random.normal(s, shape).astype(dtype) for s, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("m, k, n", [(256, 512, 384), (100, 300, 77), (1, 16, 1), (3, 7, 130)])
@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
def test_forward_and_gradients_are_near_the_exact_ones(key, m, k, n, scale_rounding):
    x, w, dy = operands(key, m, k, n)
    y, pull = jax.vjp(functools.partial(fp8.fp8_matmul, scale_rounding=scale_rounding), x, w)
    dx, dw = pull(dy)
    # Quantization gives 6e-4 to 7e-4 on large random products; single elements scatter.
    bound = 1.1e-3 if m * n * k > 1e5 else 6e-3
    for got, expected in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        assert calc_diff(got, expected) < bound


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("w_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(key, x_dtype, w_dtype):
    x, w, _ = operands(key, 32, 64, 48)
    x, w = x.astype(x_dtype), w.astype(w_dtype)
    y, pull = jax.vjp(fp8.fp8_matmul, x, w)
    assert y.dtype == jnp.result_type(x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert (dx.dtype, dw.dtype) == (x_dtype, w_dtype)
    y = fp8.fp8_matmul(x, w, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32


def test_leading_dims_and_empty_batch(key):
    x, w, _ = operands(key, 24, 64, 48)
    many = fp8.fp8_matmul(x.reshape(2, 3, 4, 64), w)
    np.testing.assert_array_equal(many.reshape(24, 48), fp8.fp8_matmul(x, w))
    assert fp8.fp8_matmul(x[0], w).shape == (48,)
    assert fp8.fp8_matmul(x[:0], w).shape == (0, 48)
    dx, dw = jax.grad(lambda x, w: fp8.fp8_matmul(x, w).sum(), (0, 1))(x[:0], w)
    assert dx.shape == (0, 64) and not np.asarray(dw).any()


@pytest.mark.parametrize("k, n", [(0, 48), (64, 0)])
def test_nothing_to_sum_and_no_columns(k, n):
    x, w = jnp.ones((4, k)), jnp.ones((k, n))
    y, pull = jax.vjp(fp8.fp8_matmul, x, w)
    np.testing.assert_array_equal(y, jnp.zeros((4, n)))
    for gradient, like in zip(pull(jnp.ones((4, n))), (x, w), strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(like))


def test_gradient_to_w_is_exact_for_powers_of_two():
    x = jnp.exp2(jnp.arange(32 * 64) % 5).reshape(32, 64)
    dy = jnp.exp2(-(jnp.arange(32 * 48) % 7.0)).reshape(32, 48)
    w = jnp.exp2(jnp.arange(64 * 48) % 3.0).reshape(64, 48)
    y, pull = jax.vjp(fp8.fp8_matmul, x, w)
    dx, dw = pull(dy)
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-6)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_of_nothing(axes):
    x, w = jnp.ones((4, 16)), jnp.ones((16, 8))
    x, w = (y if axis is None else y[None][:0] for y, axis in zip((x, w), axes, strict=True))
    grad = jax.grad(lambda x, w: fp8.fp8_matmul(x, w).sum(), (0, 1))
    assert jax.vmap(fp8.fp8_matmul, axes)(x, w).shape == (0, 4, 8)
    dx, dw = jax.vmap(grad, axes)(x, w)
    assert (dx.shape, dw.shape) == ((0, 4, 16), (0, 16, 8))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_vmap_and_vmap_of_grad(key, axes):
    xs = jax.random.normal(key, (3, 32, 64))
    ws = jax.random.normal(key, (3, 64, 128))
    x = xs[0] if axes[0] is None else jnp.moveaxis(xs, 0, axes[0])
    w = ws[0] if axes[1] is None else jnp.moveaxis(ws, 0, axes[1])
    grad = jax.grad(lambda x, w: (fp8.fp8_matmul(x, w) ** 2).sum(), (0, 1))
    ys = jax.vmap(fp8.fp8_matmul, axes)(x, w)
    dxs, dws = jax.vmap(grad, axes)(x, w)
    for i in range(3):
        xi = xs[0 if axes[0] is None else i]
        wi = ws[0 if axes[1] is None else i]
        np.testing.assert_allclose(ys[i], fp8.fp8_matmul(xi, wi), rtol=1e-5, atol=1e-4)
        dx, dw = grad(xi, wi)
        np.testing.assert_allclose(dxs[i], dx, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dws[i], dw, rtol=1e-4, atol=1e-3)


POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "named": jax.checkpoint_policies.save_only_these_names("fp8_matmul_x", "fp8_matmul_w"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_scan_over_layers_with_remat_gives_the_same_bits(key, policy):
    x, _, _ = operands(key, 32, 64, 64)
    ws = 16 * jax.random.normal(key, (3, 64, 64))  # large enough for e4m3 numbers above 240

    def layer(x, w):
        return jnp.tanh(fp8.fp8_matmul(x, w)), None

    def loss(ws, layer):
        return (jax.lax.scan(layer, x, ws)[0] ** 2).sum()

    plain = jax.jit(jax.grad(functools.partial(loss, layer=layer)))(ws)
    remat = jax.checkpoint(layer, policy=POLICIES[policy])
    again = jax.jit(jax.grad(functools.partial(loss, layer=remat)))(ws)
    assert np.isfinite(np.asarray(plain)).all()
    np.testing.assert_array_equal(plain, again)


def test_control_flow(key):
    x, w, _ = operands(key, 16, 64, 64)
    step = lambda x: jnp.tanh(fp8.fp8_matmul(x, w))  # noqa: E731
    looped = jax.lax.fori_loop(0, 3, lambda _, x: step(x), x)
    np.testing.assert_array_equal(
        jax.jit(lambda x: step(step(step(x))))(x), jax.jit(lambda: looped)()
    )
    out = jax.lax.cond(x[0, 0] > 10, lambda x: x, step, x)
    assert out.shape == x.shape


def test_gradient_accumulation_matches_the_full_batch(key):
    x, w, dy = operands(key, 512, 64, 48)
    full = jax.vjp(fp8.fp8_matmul, x, w)[1](dy)[1]
    parts = [
        jax.vjp(fp8.fp8_matmul, x[i : i + 128], w)[1](dy[i : i + 128])[1]
        for i in range(0, 512, 128)
    ]
    np.testing.assert_allclose(full, sum(parts), rtol=1e-5, atol=1e-4)


def test_small_gradients_survive(key):
    x, w, dy = operands(key, 128, 64, 48)
    dx, dw = jax.vjp(fp8.fp8_matmul, x, w)[1](1e-12 * dy)
    assert calc_diff(1e12 * dw, x.T @ dy) < 1.1e-3 and calc_diff(1e12 * dx, dy @ w.T) < 1.1e-3


@pytest.mark.parametrize("product", ["dense", "ragged"])
def test_columns_of_gradients_share_scales_unless_told_not_to(key, product):
    """Off: the bits of per-column scales. On: those of the gradient's shared copy, as rhs."""
    x, w, dy = operands(key, 256, 128, 256)
    dy = dy * jnp.exp2(jnp.arange(256) % 8.0)  # columns apart, but close enough
    sizes = jnp.array([256], jnp.int32)

    def dw(**options):
        if product == "dense":
            return jax.vjp(lambda w: fp8.fp8_matmul(x, w, **options), w)[1](dy)[0]
        run = lambda w: fp8.fp8_ragged_dot(x, w[None], sizes, **options)  # noqa: E731
        return jax.vjp(run, w)[1](dy)[0]

    def by_hand(**options):
        rhs = fp8.quantize_transposed(dy, **options)
        return fp8.gemm(fp8.quantize_transposed(x), rhs, out_dtype=jnp.float32)

    on, off = by_hand(shared_columns=True), by_hand()
    assert not np.array_equal(on, off)
    np.testing.assert_array_equal(dw(), on)
    np.testing.assert_array_equal(dw(shared_columns=False), off)
    exact = x.T @ dy
    assert calc_diff(on, exact) < 1.1 * calc_diff(off, exact)
    rounding = {"scale_rounding": "none"}  # nothing is shared then
    np.testing.assert_array_equal(dw(**rounding), dw(**rounding, shared_columns=False))


def test_jacrev(key):
    x, w, _ = operands(key, 2, 16, 3)
    jacobian = jax.jacrev(fp8.fp8_matmul)(x, w)
    assert jacobian.shape == (2, 3, 2, 16)
    np.testing.assert_array_equal(jacobian[0, :, 1], 0.0)


def test_with_64_bits_enabled_results_have_32(key):
    x, w = jax.random.normal(key, (4, 40)), jax.random.normal(key, (40, 24))
    sizes = jnp.array([3])
    with jax.enable_x64(True):
        for rows in (0, 4):
            run = lambda x, w: fp8.fp8_matmul(x, w) + fp8.fp8_ragged_dot(x, w[None], sizes)  # noqa: E731
            y, pull = jax.vjp(run, x[:rows], w)
            assert (y.shape, y.dtype) == ((rows, 24), jnp.float32)
            assert all(gradient.dtype == jnp.float32 for gradient in pull(y))
            assert fp8.quantize(x[:rows]).scale.dtype == jnp.float32
