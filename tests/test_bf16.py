"""precision="bf16": the same parameters with GEMMs by XLA in bf16, close to float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import place
from dense_moe import dense_ffn, make_kernels, make_shared
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import calc_diff
from test_experts import calls, choices, tokens
from test_fp8_experts import held

import jax_fp8gemm as fp8
from jax_fp8gemm import linen as fp8_linen

# bf16 rounds each operand by 2^-9 at most, FP8 costs 6e-4 for each GEMM.
BOUND = 3e-5
H, F, E = 64, 96, 4


def value_and_gradients(function, *arguments):
    """Returns the result, and the gradients to all arguments for a gradient that is not flat."""
    y, pull = jax.vjp(function, *arguments)
    return y, *pull(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


def close(got, expected, bound=BOUND):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert calc_diff(a, b) < bound


def names(function, *arguments) -> set[str]:
    return {name for name, _ in calls(jax.make_jaxpr(function)(*arguments).jaxpr)}


def test_matmul(key):
    x, w = jax.random.normal(key, (3, 5, H)), jax.random.normal(key, (H, F))
    matmul = functools.partial(fp8.fp8_matmul, precision="bf16")
    close(value_and_gradients(matmul, x, w), value_and_gradients(jnp.dot, x, w))
    assert "jax_fp8gemm_gemm" not in names(matmul, x, w)
    close(matmul(x, fp8.prepare_weight(w)), x @ w)
    q = fp8.quantize(w.T, (128, 128))
    close(matmul(x[0, 0], fp8.prepare_weight(q)), x[0, 0] @ fp8.dequantize(q).T)


def test_ragged_dot(key):
    """Sizes past the rows are cut off, and NaN in rows past the groups reaches nothing."""
    x, w = jax.random.normal(key, (12, H)), jax.random.normal(key, (3, H, F))
    sizes = jnp.array([3, -1, 5], jnp.int8)
    expected = value_and_gradients(
        lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([3, 0, 5]), precision="highest"), x, w
    )
    run = functools.partial(fp8.fp8_ragged_dot, group_sizes=sizes, precision="bf16")
    close(value_and_gradients(run, x.at[8:].set(jnp.nan), w), expected)


@pytest.mark.parametrize("batch", [(), (0,)])
def test_dot_general_of_layers(key, batch):
    x, w = jax.random.normal(key, (2, 3, H)), jax.random.normal(key, (2, H, F)[1 - len(batch) :])
    numbers = ((2,), (len(batch),)), (batch, batch)
    run = lambda f, **o: value_and_gradients(lambda x, w: f(x, w, numbers, **o), x, w)  # noqa: E731
    close(run(fp8.fp8_dot_general, precision="bf16"), run(jax.lax.dot_general))
    layer = fp8_linen.Fp8Dense(F, precision="bf16")
    variables = layer.init(key, x)
    assert "jax_fp8gemm_gemm" not in names(layer.apply, variables, x)
    quantized = fp8_linen.quantize_kernels(variables["params"])
    y = fp8_linen.Fp8Dense(F, precision="bf16", quantized=True).apply(quantized, x)
    assert calc_diff(y, layer.apply(variables, x)) < 1e-3


@pytest.mark.parametrize("options", [{}, {"capacity": 30}])
def test_experts(key, options):
    kernels = make_kernels(key, E, H, F)
    experts, weights = choices(key, 30, 2, E)
    experts = experts.at[3].set(-1)
    x, _ = tokens(key, 30, H)
    run = functools.partial(fp8.expert_ffn, precision="bf16", **options)
    expected = value_and_gradients(lambda x, w, k: dense_ffn(x, experts, w, k), x, weights, kernels)
    got = jax.jit(functools.partial(value_and_gradients, lambda x, w, k: run(x, experts, w, k)))
    close(got(x, weights, kernels), expected)
    assert "jax_fp8gemm_gemm" not in names(run, x, experts, weights, kernels)
    close(run(x, experts, weights, fp8.prepare_experts(kernels)), expected[0])
    q = held(kernels)
    floats = jax.tree.map(lambda w: jnp.swapaxes(w, 1, 2), jax.tree.map(
        fp8.dequantize, q, is_leaf=lambda a: isinstance(a, fp8.QArray)
    ))  # fmt: skip
    close(run(x, experts, weights, q), dense_ffn(x, experts, weights, floats))


@pytest.mark.parametrize(
    "exchange, axis_type", [("all_gather", AxisType.Explicit), ("all_to_all", AxisType.Auto)]
)
def test_over_a_mesh(key, exchange, axis_type):
    """Routed and shared experts on eight devices, forward and backward, as on one."""
    x, _ = tokens(key, 16, H)
    gate = jax.random.normal(key, (H, 8)) / H**0.5
    parameters = x, gate, make_kernels(key, 8, H, F), make_shared(key, H, F)

    def run(*parameters, **options):
        def y(x, gate, kernels, shared):
            call = functools.partial(fp8.moe, top_k=2, precision="bf16", **options)
            return call(x, gate, kernels, shared=shared)[0]

        return value_and_gradients(y, *parameters)

    expected = jax.jit(run)(*parameters)
    mesh = jax.make_mesh((4, 2), ("expert", "model"), axis_types=(axis_type,) * 2)
    options = {"expert_axis": "expert", "tensor_axis": "model", "exchange": exchange}
    arrays = place(mesh, parameters, P("expert"), P(), P("expert"), P())
    close(jax.jit(functools.partial(run, mesh=mesh, **options))(*arrays), expected)


def test_an_unknown_precision_is_an_error(key):
    with pytest.raises(ValueError, match="precision is unknown"):
        fp8.fp8_matmul(jnp.ones((2, 4)), jnp.ones((4, 2)), precision="tf32")
    operands = jnp.ones((2, 4)), jnp.ones((1, 4, 2)), np.array([2])
    with pytest.raises(NotImplementedError, match="FP8 has one precision"):  # one of lax's
        fp8.fp8_ragged_dot(*operands, precision="tf32")


def test_bf16_is_not_batch_invariant():
    options = {"precision": "bf16", "batch_invariant": True}
    with pytest.raises(ValueError, match="fp8_matmul: XLA's products are not batch_invariant"):
        fp8.fp8_matmul(jnp.ones((2, 4)), jnp.ones((4, 2)), **options)
    with pytest.raises(ValueError, match="fp8_ragged_dot: XLA's"):
        fp8.fp8_ragged_dot(jnp.ones((2, 4)), jnp.ones((1, 4, 2)), np.array([2]), **options)
