"""The expert block and prepared weights on the GPU, beside the reference on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff
from xla_options import AS_USERS

import jax_fp8gemm as fp8
from jax_fp8gemm._moe.gate import gate_logits

T, H, F, E, TOP_K = 300, 256, 384, 6, 2


def layer(dtype=jnp.bfloat16, t=T, h=H, f=F, e=E):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (t, h), (t, h), (e, h, f), (e, h, f), (e, f, h)
    dy, x, wi_0, wi_1, wo = (
        jax.random.normal(key, shape).astype(dtype) * shape[-2] ** -0.5
        for key, shape in zip(keys[:5], shapes, strict=True)
    )
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    return dy, x, fp8.route(2 * jax.random.normal(keys[5], (t, e)), TOP_K), kernels


@functools.partial(jax.jit, static_argnames=("capacity",))
def both(dy, x, routing, kernels, capacity=None):
    def block(x, weights, kernels):
        return fp8.expert_ffn(x, routing.expert_index, weights, kernels, capacity=capacity)

    y, pull = jax.vjp(block, x, routing.gate_weights, kernels)
    return y, *jax.tree.leaves(pull(dy))


@pytest.mark.parametrize("capacity", [None, 64])
def test_results_and_gradients_are_those_of_the_reference(capacity):
    given = layer()
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        expected = both(*jax.device_put(given, cpu), capacity)
    for got, right in zip(both(*given, capacity), expected, strict=True):
        # Sums in another order round bf16 numbers differently, some of which then change in FP8.
        assert calc_diff(got.astype(jnp.float32), right.astype(jnp.float32)) < 5e-4


@pytest.mark.parametrize("sizes", [{}, {"t": 16384, "h": 1024, "f": 1024, "e": 16}], ids=str)
def test_runs_give_the_same_bits(sizes):
    given = layer(**sizes)
    first = both(*given)
    for _ in range(3):
        for a, b in zip(first, both(*given), strict=True):
            np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (a, b)))


def test_other_choices_between_two_runs_of_one_program():
    """Group sizes live on the device: one executable, captured or not, serves them all."""
    dy, x, routing, kernels = layer()
    first = both(dy, x, routing, kernels)[0]
    turned = dataclasses.replace(routing, expert_index=(routing.expert_index + 1) % E)
    other = both(dy, x, turned, jax.tree.map(lambda w: jnp.roll(w, 1, axis=0), kernels))[0]
    np.testing.assert_array_equal(*(np.asarray(y, np.float32) for y in (first, other)))


@pytest.mark.parametrize("residuals", ["fp8_t", "fp8", "input"])
def test_residuals_and_prepared_weights(residuals):
    dy, x, _, kernels = layer()
    w, dy = kernels.wi_0[0], jnp.ones((T, F), jnp.bfloat16)

    @jax.jit
    def gradients(x, w):
        plain = lambda x, w: fp8.fp8_matmul(x, w, residuals=residuals)  # noqa: E731
        prepared = lambda x, w: plain(x, fp8.prepare_weight(w))  # noqa: E731
        return [jax.vjp(f, x, w)[1](dy) for f in (plain, prepared)]

    plain, prepared = gradients(x, w)
    for a, b in zip(plain, prepared, strict=True):
        np.testing.assert_array_equal(*(np.asarray(y, np.float32) for y in (a, b)))
    exact = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    assert calc_diff(plain[1].astype(jnp.float32), exact) < 2e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(24576, 1536, 128), (4096, 7168, 256)], ids=str)
def test_the_router_is_as_exact_as_float32_products(shape, dtype):
    """Logits and both gradients against float64, beside products without tensor cores."""
    t, h, e = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (t, h)).astype(dtype)
    kernel, d = jax.random.normal(keys[1], (h, e)) * h**-0.5, jax.random.normal(keys[2], (t, e))

    def in_float32(x, kernel):
        return jnp.dot(x.astype(jnp.float32), kernel, precision="highest")

    def errors(function):
        forward = lambda *both: jax.vjp(function, *both)  # noqa: E731
        y, pull = jax.jit(forward, compiler_options=AS_USERS)(x, kernel)
        got = (y, *jax.jit(pull, compiler_options=AS_USERS)(d))
        pairs = zip(got, right, strict=True)
        return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]

    wide = [np.asarray(a, np.float64) for a in (x, kernel, d)]
    right = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
    ours, theirs = errors(gate_logits), errors(in_float32)
    assert ours[0] <= theirs[0], (ours, theirs)
    assert ours[1] <= 1.0001 * theirs[1], (ours, theirs)
    # XLA cuts float32 sums over tokens as well, and more often where the result is small.
    assert ours[2] <= max(theirs[2], 6e-7), (ours, theirs)
