"""haliax's calls of fp8_dot_general, bit for bit as fp8_matmul."""

import functools

import jax
import jax.numpy as jnp
import pytest
from adapters import equal, normal
from numerics import calc_diff

import jax_fp8gemm as fp8


# haliax 1.4.dev453 uses what JAX has deprecated.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("out_first", [False, True])
def test_haliax_dot(key, out_first):
    hax = pytest.importorskip("haliax", reason="haliax is not installed")
    Batch, Position, Embed = hax.make_axes(Batch=2, Position=12, Embed=64)
    Heads, Head = hax.make_axes(Heads=4, Head=16)
    scale = jnp.exp2(jnp.arange(12))[:, None]  # rows and blocks get other scales
    x = hax.named(normal(key, 2, 12, 64) * scale, (Batch, Position, Embed))
    w = hax.random.normal(key, (Embed, Heads, Head))
    expected = fp8.fp8_matmul(x.array, w.array.reshape(64, 64)).reshape(2, 12, 4, 16)
    w = w.rearrange((Heads, Head, Embed)) if out_first else w
    y = hax.dot(x, w, axis=Embed, dot_general=fp8.fp8_dot_general)
    assert y.axes == (Batch, Position, Heads, Head)
    equal(y.array, expected)


@pytest.mark.filterwarnings("ignore")
def test_haliax_linear(key):
    """The layer keeps `dot_general` as a leaf of its tree: equinox's transforms see past it."""
    hax = pytest.importorskip("haliax", reason="haliax is not installed")
    import equinox as eqx

    Batch, Embed, Mlp = hax.make_axes(Batch=24, Embed=64, Mlp=48)
    x = hax.random.normal(key, (Batch, Embed))
    make = functools.partial(hax.nn.Linear.init, Embed, Mlp, key=key, use_bias=False)
    layer = make(dot_general=fp8.fp8_dot_general)
    w = layer.weight.rearrange((Embed, Mlp)).array
    equal(hax.named_jit(layer)(x).array, fp8.fp8_matmul(x.array, w))
    assert 0 < calc_diff(layer(x).array, make()(x).array) < 5e-3
    grads = eqx.filter_grad(lambda layer: (layer(x) ** 2).sum().scalar())(layer)
    expected = jax.grad(lambda w: (fp8.fp8_matmul(x.array, w) ** 2).sum())(w)
    equal(grads.weight.rearrange((Embed, Mlp)).array, expected)


@pytest.mark.filterwarnings("ignore")
def test_haliax_batch_axes(key):
    """With shared axes JAX's einsum may swap the arrays, so either may get the scales of 1x128."""
    hax = pytest.importorskip("haliax", reason="haliax is not installed")
    Heads, Query, Key, Head = hax.make_axes(Heads=3, Query=12, Key=8, Head=64)
    q = hax.named(normal(key, 12, 3, 64), (Query, Heads, Head))
    k = hax.named(normal(jax.random.fold_in(key, 1), 8, 3, 64), (Key, Heads, Head))
    scores = hax.dot(q, k, axis=Head, dot_general=fp8.fp8_dot_general)
    scores = scores.rearrange((Heads, Query, Key)).array
    left, right = (a.rearrange((Heads, ..., Head)).array for a in (q, k))
    numbers = (((2,), (2,)), ((0,), (0,)))
    kept = fp8.fp8_dot_general(left, right, numbers)
    swapped = fp8.fp8_dot_general(right, left, numbers).swapaxes(1, 2)
    assert min(calc_diff(scores, kept), calc_diff(scores, swapped)) < 1e-12
    assert 0 < calc_diff(scores, hax.dot(q, k, axis=Head).rearrange((Heads, ...)).array) < 5e-3
