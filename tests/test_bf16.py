"""precision="bf16": the same parameters with GEMMs by XLA in bf16, close to float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import place
from dense_moe import dense_ffn, make_kernels, make_shared
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numerics import calc_diff
from test_experts import calls, choices, tokens
from test_fp8_experts import held

import jax_fp8gemm as fp8
from jax_fp8gemm import linen as fp8_linen
from jax_fp8gemm import nnx as fp8_nnx

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


def dequantized(kernel, k):
    """A kernel whose first dims are k, after a cast to FP8 and back."""
    q = fp8.quantize(kernel.reshape(k, -1).T, (128, 128))
    return q, fp8.dequantize(q).T.reshape(kernel.shape)


def test_dense_layers_of_linen(key):
    """With float kernels and with FP8 ones, to heads and from heads, against those of Flax."""
    x = jax.random.normal(key, (5, 4, H // 4))
    for ours, theirs in [
        (fp8_linen.Fp8Dense(F, precision="bf16"), nn.Dense(F)),
        (fp8_linen.Fp8DenseGeneral((3, 32), precision="bf16"), nn.DenseGeneral((3, 32))),
        (
            fp8_linen.Fp8DenseGeneral(F, axis=(-2, -1), precision="bf16"),
            nn.DenseGeneral(F, axis=(-2, -1)),
        ),
    ]:
        k = H if getattr(theirs, "axis", -1) == (-2, -1) else H // 4
        params = ours.init(key, x)["params"]
        run = lambda layer, p, x: layer.apply({"params": p}, x)  # noqa: E731
        grads = [
            value_and_gradients(functools.partial(run, layer), params, x)
            for layer in (ours, theirs)
        ]
        close(*grads)
        assert "jax_fp8gemm_gemm" not in names(functools.partial(run, ours), params, x)
        held = ours.clone(quantized=True)
        variables = fp8_linen.quantize_kernels(params, like=jax.eval_shape(held.init, key, x))
        assert "jax_fp8gemm_gemm" not in names(held.apply, variables, x)
        params = params | {"kernel": dequantized(params["kernel"], k)[1]}
        close(held.apply(variables, x), run(theirs, params, x))


def test_dense_layers_of_nnx(key):
    x = jax.random.normal(key, (5, H))
    sizes = {"in_features": H, "out_features": (3, 32)}
    for ours, theirs, options in [
        (fp8_nnx.Fp8Linear, nnx.Linear, {}),
        (fp8_nnx.Fp8LinearGeneral, nnx.LinearGeneral, sizes),
    ]:
        of = options or {"in_features": H, "out_features": F}
        layer = ours(**of, precision="bf16", rngs=nnx.Rngs(0))
        plain = theirs(**of, rngs=nnx.Rngs(0))
        run = lambda layer, x: layer(x)  # noqa: E731
        close(*(value_and_gradients(functools.partial(run, one), x) for one in (layer, plain)))
        assert "jax_fp8gemm_gemm" not in names(layer, x)
        q, kernel = dequantized(layer.kernel[...], H)
        held = ours.from_quantized(q, layer.bias[...], dtype=None, precision="bf16", **options)
        assert "jax_fp8gemm_gemm" not in names(held, x)
        plain.kernel = nnx.Param(kernel)
        close(held(x), plain(x))


def test_layers_of_experts(key):
    """Bits of moe in bf16, with float kernels and with FP8 ones."""
    x, _ = tokens(key, 8, H)
    sizes = {"top_k": 2, "precision": "bf16", "shared_features": F}
    layer = fp8_linen.Fp8MoE(E, F, **sizes)
    params = layer.init(key, x)["params"]
    made = fp8_nnx.Fp8MoE(H, F, E, **sizes, rngs=nnx.Rngs(0))
    for name, value in params.items():
        setattr(made, name, nnx.Param(value))
    of = lambda end: {n: params[end + n] for n in ("wi_0", "wi_1", "wo")}  # noqa: E731
    routed, shared = (fp8.ExpertKernels(**of(end)) for end in ("", "shared_"))
    gate, how = params["gate_kernel"], {"top_k": 2, "precision": "bf16"}
    expected = fp8.moe(x, gate, routed, shared=shared, **how)[0]
    run = lambda p, x: layer.apply({"params": p}, x)[0]  # noqa: E731
    for y in (run(params, x), made(x)[0]):
        np.testing.assert_array_equal(y, expected)
    assert "jax_fp8gemm_gemm" not in names(run, params, x)

    expected = fp8.moe(x, gate, held(routed), shared=held(shared), **how)[0]
    quantized = fp8_linen.quantize_kernels(params)
    apply = lambda v, x: layer.clone(quantized=True).apply(v, x)[0]  # noqa: E731
    given = held(routed), {"shared": held(shared), "dtype": None, **how}
    made = fp8_nnx.Fp8MoE.from_quantized(gate, given[0], **given[1])
    for y in (apply(quantized, x), made(x)[0]):
        np.testing.assert_array_equal(y, expected)
    assert "jax_fp8gemm_gemm" not in names(apply, quantized, x)


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
