"""Prepared weights, and what is kept for the backward pass: the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8

RESIDUALS = ("fp8_t", "fp8", "input")


def operands(key, m=96, k=160, n=80, g=None):
    keys = jax.random.split(key, 3)
    lead = () if g is None else (g,)
    return (
        jax.random.normal(keys[0], (m, k)),
        jax.random.normal(keys[1], (*lead, k, n)),
        jax.random.normal(keys[2], (m, n)),
    )


def equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_prepared_weight_gives_the_same_bits_and_gradients(key):
    x, w, dy = operands(key)

    def both(x, w, prepare):
        def product(x, w):
            return fp8.fp8_matmul(x, fp8.prepare_weight(w) if prepare else w)

        y, pull = jax.vjp(product, x, w)
        return y, pull(dy)

    equal(both(x, w, False), both(x, w, True))


def test_a_prepared_group_of_weights_gives_the_same_bits_and_gradients(key):
    x, w, dy = operands(key, g=3)
    sizes = jnp.array([40, 0, 50])

    def both(prepare):
        def product(x, w):
            return fp8.fp8_ragged_dot(x, fp8.prepare_weight(w) if prepare else w, sizes)

        y, pull = jax.vjp(product, x, w)
        return y, pull(dy)

    equal(both(False), both(True))


def test_microbatches_quantize_a_weight_once(key):
    x, w, _ = operands(key, m=512)

    def loss(w, prepare):
        wq = fp8.prepare_weight(w) if prepare else w
        ys = jax.lax.map(lambda x: fp8.fp8_matmul(x, wq), x.reshape(4, 128, -1))
        return (ys**2).sum()

    gradients = [jax.grad(functools.partial(loss, prepare=p))(w) for p in (False, True)]
    equal(*gradients)
    text = jax.jit(jax.grad(functools.partial(loss, prepare=True))).trace(w)
    text = text.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('tile = "128x128"') == 1  # outside of the loop


def test_fp8_weights_without_floats_serve_inference(key):
    x, w, dy = operands(key)
    stored = fp8.prepare_weight(fp8.quantize(w.T, (128, 128)))
    assert stored.w is None and stored.shape == w.shape
    np.testing.assert_array_equal(
        fp8.fp8_matmul(x, stored, preferred_element_type=jnp.float32), fp8.fp8_matmul(x, w)
    )
    dx = jax.vjp(lambda x: fp8.fp8_matmul(x, stored), x)[1](dy)[0]
    assert dx.shape == x.shape
    leaves, tree = jax.tree.flatten(stored)
    equal(jax.jit(lambda p: p)(stored), jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_kept_does_not_change_gradients(key, residuals, grouped):
    x, w, dy = operands(key, g=3 if grouped else None)
    sizes = jnp.array([40, 0, 50])

    def product(x, w, residuals):
        if grouped:
            return fp8.fp8_ragged_dot(x, w, sizes, residuals=residuals)
        return fp8.fp8_matmul(x, w, residuals=residuals)

    default = jax.vjp(functools.partial(product, residuals="fp8_t"), x, w)[1](dy)
    got = jax.vjp(functools.partial(product, residuals=residuals), x, w)[1](dy)
    np.testing.assert_array_equal(got[0], default[0])
    if residuals == "input":
        np.testing.assert_array_equal(got[1], default[1])
    else:  # rows were rounded before they were turned: once more error, no other
        assert np.linalg.norm(got[1] - default[1]) < 0.04 * np.linalg.norm(default[1])


@pytest.mark.parametrize("residuals", RESIDUALS)
def test_residuals_have_the_names_that_policies_use(key, residuals):
    x, w, _ = operands(key)
    names = jax.checkpoint_policies.save_only_these_names("fp8_matmul_x", "fp8_matmul_w")

    def saved(policy):
        layer = jax.checkpoint(
            lambda x, w: fp8.fp8_matmul(x, w, residuals=residuals), policy=policy
        )
        _, pull = jax.vjp(layer, x, w)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))

    assert saved(names) != saved(None)
    layer = jax.checkpoint(lambda x, w: fp8.fp8_matmul(x, w, residuals=residuals), policy=names)
    plain = functools.partial(fp8.fp8_matmul, residuals=residuals)
    equal(*(jax.grad(lambda x, w, f=f: (f(x, w) ** 2).sum(), (0, 1))(x, w) for f in (layer, plain)))
