"""Linen layers against the layers of Flax that they stand in for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import FORWARD, GRADIENT, dense_moe
from jax.sharding import PartitionSpec
from numerics import calc_diff

import jax_fp8gemm as fp8
from jax_fp8gemm.linen import Fp8Dense, Fp8DenseGeneral, Fp8MoE, quantize_kernels

P = PartitionSpec


def same(got, expected):
    """Same names, shapes, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Mlp(nn.Module):
    """Unnamed layers, as a checkpoint's names depend on them."""

    dense: type
    general: type
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = self.dense(130, dtype=self.dtype)(x)
        x = self.general((4, 24), dtype=self.dtype)(jnp.tanh(x))
        x = self.general(60, axis=(-2, -1), dtype=self.dtype, use_bias=False)(x)
        return self.dense(33, dtype=self.dtype, use_bias=False)(x)


def loss_and_gradients(model):
    @jax.jit
    def run(params, x, dy):
        y, pull = jax.vjp(lambda params, x: model.apply(params, x), params, x)
        return y, *pull(dy.astype(y.dtype))

    return run


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (4, 32, 64))


def test_same_tree_initial_values_and_nearly_the_same_results(x):
    """Checkpoint of one, apply of the other: four products after each other."""
    plain = Mlp(nn.Dense, nn.DenseGeneral, jnp.bfloat16)
    model = Mlp(Fp8Dense, Fp8DenseGeneral, jnp.bfloat16)
    params = plain.init(jax.random.key(0), x)
    same(model.init(jax.random.key(0), x), params)
    dy = jax.random.normal(jax.random.key(1), (4, 32, 33))
    y, grads, dx = loss_and_gradients(model)(params, x, dy)
    exact = Mlp(nn.Dense, nn.DenseGeneral, jnp.float32)
    expected, exact_grads, exact_dx = loss_and_gradients(exact)(params, x, dy)
    assert y.dtype == jnp.bfloat16 and dx.dtype == x.dtype
    assert calc_diff(y, expected) < 4 * 1.1e-3 and calc_diff(dx, exact_dx) < 8 * 1.1e-3
    assert jax.tree.structure(grads) == jax.tree.structure(exact_grads)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        assert got.dtype == jnp.float32 and calc_diff(got, wanted) < 8 * 1.1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_one_layer(x, dtype):
    layer = Fp8Dense(96, dtype=dtype)
    params = nn.Dense(96).init(jax.random.key(0), x)
    params["params"]["bias"] += 0.5
    dy = jax.random.normal(jax.random.key(1), (4, 32, 96))
    got = loss_and_gradients(layer)(params, x, dy)
    expected = loss_and_gradients(nn.Dense(96))(params, x, dy)
    assert got[0].dtype == (dtype or jnp.float32)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 1.1e-3


def test_kernel_gradients_are_not_rounded_to_bf16(x):
    """Of the layers here; nn.Dense with the bare hook rounds them, because it casts its kernel."""

    def gradient(layer):
        params = layer.init(jax.random.key(0), x)
        return jax.grad(lambda p: (layer.apply(p, x).astype(jnp.float32) ** 2).sum())(params)

    def rounded(layer):
        dw = gradient(layer)["params"]["kernel"]
        assert dw.dtype == jnp.float32
        return bool((dw == dw.astype(jnp.bfloat16)).all())

    assert not rounded(Fp8Dense(48, dtype=jnp.bfloat16))
    assert rounded(nn.Dense(48, dtype=jnp.bfloat16, dot_general=fp8.fp8_dot_general))


@pytest.mark.parametrize(
    "hook",
    [{"dot_general": fp8.fp8_dot_general}, {"dot_general_cls": lambda: fp8.fp8_dot_general}],
    ids=["dot_general", "dot_general_cls"],
)
def test_hooks_of_unchanged_layers(x, hook):
    params = nn.Dense(96).init(jax.random.key(0), x)
    y = nn.Dense(96, **hook).apply(params, x)
    np.testing.assert_array_equal(y, fp8.fp8_matmul(x, params["params"]["kernel"]))
    general = nn.DenseGeneral((2, 48), **hook)
    y = general.apply(general.init(jax.random.key(0), x), x)
    assert y.shape == (4, 32, 2, 48)


def test_layers_scanned_and_rematerialised(x):
    x = x[0]

    def stacked(dense, remat):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(dense(64, dtype=jnp.bfloat16)(x)).astype(x.dtype), None

        layer = nn.remat(Layer, prevent_cse=False) if remat else Layer
        return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="layers"
        )

    params = stacked(nn.Dense, True).init(jax.random.key(0), x, None)
    same(stacked(Fp8Dense, True).init(jax.random.key(0), x, None), params)

    def gradient(dense, remat):
        model = stacked(dense, remat)
        return jax.jit(jax.grad(lambda p: (model.apply(p, x, None)[0] ** 2).sum()))(params)

    got = gradient(Fp8Dense, True)
    same(got, gradient(Fp8Dense, False))
    expected = gradient(nn.Dense, True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 6 * 1.1e-3


def test_sharding_metadata(x):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    boxed = Fp8Dense(96, kernel_init=init).init(jax.random.key(0), x)
    assert nn.get_partition_spec(boxed)["params"]["kernel"] == P("embed", "mlp")
    plain = nn.Dense(96, kernel_init=init)
    y = Fp8Dense(96, kernel_init=init).apply(plain.init(jax.random.key(0), x), x)
    assert calc_diff(y, plain.apply(boxed, x)) < 1.1e-3
    wi = nn.with_partitioning(nn.initializers.lecun_normal(), ("expert", None, "mlp"))
    boxed = jax.eval_shape(Fp8MoE(4, 64, 2, wi_init=wi).init, jax.random.key(0), x)
    assert nn.get_partition_spec(boxed)["params"]["wi_1"] == P("expert", None, "mlp")


def test_weights_held_in_fp8(x):
    """Bits of the layer that quantizes its float kernel on its way."""
    layer = Fp8Dense(200, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]
    params["bias"] += 0.5
    held = quantize_kernels({"up": params, "other": {"kernel": jnp.ones((3, 3))}}, _is_up)
    assert held["params"]["other"]["kernel"].shape == (3, 3)
    inference = Fp8Dense(200, dtype=jnp.bfloat16, quantized=True)
    own = {name: tree["up"] for name, tree in held.items()}
    like = inference.init(jax.random.key(0), x)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), own) == jax.tree.map(
        lambda a: (a.shape, a.dtype), like
    )
    assert set(own["params"]) == {"bias"}  # nothing else is for an optimizer
    assert own["quantized"]["qvalue"].dtype == jnp.float8_e4m3fn
    got = jax.jit(inference.apply)(own, x)
    np.testing.assert_array_equal(got, jax.jit(layer.apply)({"params": params}, x))


class Attention(nn.Module):
    """The projections of attention: to heads, and from heads."""

    quantized: bool = False

    @nn.compact
    def __call__(self, x):
        options = {"dtype": jnp.bfloat16, "quantized": self.quantized}
        options["bias_init"] = nn.initializers.normal(1.0)
        heads = Fp8DenseGeneral((5, 40), name="query", **options)(x)
        return Fp8DenseGeneral(72, axis=(-2, -1), name="out", **options)(heads)


def quantized_pair(layer, x):
    """Returns results of a layer with float kernels, and of the one that holds them in FP8."""
    params = layer.init(jax.random.key(0), x)["params"]
    inference = layer.clone(quantized=True)
    like = jax.eval_shape(inference.init, jax.random.key(0), x)
    held = quantize_kernels(nn.meta.unbox(params), like=like)
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, nn.meta.unbox(like))
    y = jax.jit(layer.apply)({"params": params}, x)
    assert np.asarray(y).any()
    return y, jax.jit(inference.apply)(held, x), held


def test_projections_to_heads_and_from_heads_held_in_fp8(x):
    """Bits of the float layer; the FP8 weights are matrices, as in checkpoints."""
    expected, y, held = quantized_pair(Attention(), x)
    np.testing.assert_array_equal(y, expected)
    assert held["quantized"]["query"]["qvalue"].shape == (200, 64)
    assert held["quantized"]["out"]["qvalue"].shape == (72, 200)
    assert held["quantized"]["out"]["scale"].shape == (1, 2)
    assert set(held["params"]["query"]) == {"bias"}


@pytest.mark.parametrize("axis, batch_dims", [((1, -1), ()), ((-1, 1), (0,)), (3, (0, 1))])
def test_any_dims_of_a_layer_held_in_fp8(x, axis, batch_dims):
    """Each of batch_dims has a weight of its own."""
    x = x.reshape(2, 4, 16, 64)
    init = nn.with_partitioning(nn.initializers.normal(1.0), ("n",))
    layer = Fp8DenseGeneral((3, 50), axis=axis, batch_dims=batch_dims, bias_init=init)
    expected, y, _ = quantized_pair(layer, x)
    np.testing.assert_array_equal(y, expected)


def test_layers_in_a_scan_held_in_fp8(x):
    """A stack has the dim of layers first, in numbers and in scales."""

    class Layer(nn.Module):
        quantized: bool = False

        @nn.compact
        def __call__(self, x, _):
            options = {"dtype": jnp.bfloat16, "quantized": self.quantized}
            y = Fp8Dense(200, **options)(x)
            y = Fp8DenseGeneral((2, 72), use_bias=False, **options)(y)
            y = Fp8DenseGeneral(64, axis=(-2, -1), **options)(y)
            y = y + Fp8MoE(4, 72, 2, use_bias=True, shared_features=40, **options)(y)[0]
            return jnp.tanh(y), None

    class Stack(nn.Module):
        quantized: bool = False

        @nn.compact
        def __call__(self, x):
            axes, metadata = {"params": 0, "quantized": 0}, {nn.PARTITION_NAME: None}
            scanned = nn.scan(
                Layer, axes, split_rngs={"params": True}, length=3, metadata_params=metadata
            )
            return scanned(self.quantized, name="layers")(x, None)[0]

    expected, y, held = quantized_pair(Stack(), x[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(y, expected)
    layers = held["quantized"]["layers"]
    assert layers["Dense_0"]["scale"].shape == (3, 2, 1)
    assert layers["DenseGeneral_0"]["qvalue"].shape == (3, 144, 200)
    assert layers["Fp8MoE_0"]["wi_0_qvalue"].shape == (3, 4, 72, 64)
    some = np.asarray(layers["Dense_0"]["qvalue"].astype(jnp.float32))
    assert (some[0] != some[1]).any()


def test_projections_held_in_fp8_on_explicit_axes():
    """Tokens over x, heads over y."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = jax.random.normal(jax.random.key(0), (4, 128, 128))
    layer = Fp8DenseGeneral((2, 128), quantized=True)
    floats = Fp8DenseGeneral((2, 128)).init(jax.random.key(1), x)["params"]
    held = quantize_kernels(floats, like=jax.eval_shape(layer.init, jax.random.key(0), x))
    expected = jax.jit(layer.apply)(held, x)
    with jax.set_mesh(mesh):
        cut = jax.tree.map(lambda w: jax.sharding.reshard(w, P("y")), held)
        y = jax.jit(layer.apply)(cut, jax.sharding.reshard(x, P("x")))
    assert y.sharding.spec == P("x", None, "y", None)
    np.testing.assert_array_equal(y, expected)


def test_errors_of_layers_held_in_fp8(x):
    layer = Fp8DenseGeneral(48, quantized=True)
    like = layer.init(jax.random.key(0), x)
    kernel = {"kernel": jnp.ones((3, 64, 48))}
    with pytest.raises(ValueError, match=r"kernel does not fit like\.\n  got .*(?s:.*)  fix  "):
        quantize_kernels(kernel, like=like)
    with pytest.raises(ValueError, match=r"two arguments say what to convert(?s:.*)  fix  "):
        quantize_kernels(kernel, lambda path: True, like=like)
    with pytest.raises(ValueError, match=r"Fp8DenseGeneral: dot_general is not called"):
        layer.clone(dot_general_cls=lambda: fp8.fp8_dot_general).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"batch_dims are not the first dims(?s:.*)  fix  "):
        layer.clone(batch_dims=(1,)).init(jax.random.key(0), x)


def test_quantizing_nothing_is_said():
    with pytest.warns(UserWarning, match="(?s)nothing was quantized.*kernels that stay: up/kernel"):
        quantize_kernels({"up": {"kernel": jnp.ones((3, 3))}}, lambda path: False)
    with pytest.raises(TypeError, match="quantize_kernels: params is not a dict"):
        quantize_kernels(jnp.ones((3, 3)))


def _is_up(path):
    return path == ("up",)


# ---- the mixture of experts ---------------------------------------------------------------------

E, H, F, TOP_K = 4, 64, 128, 2


def test_moe_is_near_the_dense_one(x):
    layer = Fp8MoE(
        E, F, TOP_K, score_function="sigmoid", routed_scaling_factor=2.0, shared_features=32
    )
    params = layer.init(jax.random.key(0), x)
    names = {k: v.shape for k, v in params["params"].items()}
    assert names == {
        "gate_kernel": (H, E),
        **{"wi_0": (E, H, F), "wi_1": (E, H, F), "wo": (E, F, H)},
        **{"shared_wi_0": (H, 32), "shared_wi_1": (H, 32), "shared_wo": (32, H)},
    }
    assert 0.8 < float(params["params"]["wi_0"].std()) * H**0.5 < 1.2  # fan-in of one expert
    bias = jnp.array([0.3, -0.2, 0.0, 0.1])
    dy = jax.random.normal(jax.random.key(1), x.shape)

    def exact(params):
        p = params["params"]
        kernels, shared = (
            fp8.ExpertKernels(**{name: p[prefix + name] for name in ("wi_0", "wi_1", "wo")})
            for prefix in ("", "shared_")
        )
        how = {"score_function": "sigmoid", "routed_scaling_factor": 2.0, "bias": bias}
        tokens = x.reshape(-1, H)
        y, routing = dense_moe(tokens, p["gate_kernel"], kernels, shared, top_k=TOP_K, **how)
        return y.reshape(x.shape), routing

    def run(function):
        def loss(params):
            y, routing = function(params)
            return (y * dy).sum() + routing.aux_loss, (y, routing)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, (y, routing)), got = run(lambda p: layer.apply(p, x, bias))
    (_, (exact_y, exact_routing)), expected = run(exact)
    assert calc_diff(y, exact_y) < FORWARD
    np.testing.assert_array_equal(routing.expert_index, exact_routing.expert_index)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and calc_diff(a, b) < GRADIENT


def test_moe_over_devices_equals_that_of_one(x):
    x = x.astype(jnp.bfloat16)
    layer = Fp8MoE(E, F, TOP_K, expert_axis="x", dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)  # outside of shard_map: all experts
    split = {"params": {"gate_kernel": P(), "wi_0": P("x"), "wi_1": P("x"), "wo": P("x")}}
    spread = jax.shard_map(
        lambda params, x: layer.apply(params, x)[0],
        mesh=jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(split, P("x")),
        out_specs=P("x"),
    )
    y = jax.jit(spread)(params, x)
    alone, _ = jax.jit(layer.clone(expert_axis=None).apply)(params, x)
    assert y.dtype == jnp.bfloat16
    assert calc_diff(y, alone) < 1e-5  # roundings to bf16 of sums over devices
    with pytest.raises(ValueError, match="no mesh axis 'x' here"):
        layer.apply(params, x)


@pytest.mark.parametrize("axis", [-1, (-2, -1)])
def test_a_gpu_program_has_our_products_and_no_others(x, axis):
    layer = Fp8DenseGeneral(48, axis=axis, dtype=jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    energy = lambda params, x: (layer.apply(params, x) ** 2).sum()  # noqa: E731
    traced = jax.jit(jax.grad(energy, (0, 1))).trace(params, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @jax_fp8gemm_gemm_v1") == 3  # forward, dx, dw
    assert "dot_general" not in text


def test_layers_on_explicit_axes():
    """Data and tensor parallel: tokens over x, features over y."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = jax.random.normal(jax.random.key(0), (4, 128, 128))

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Fp8DenseGeneral((2, 128), use_bias=False)(x), Fp8Dense(256)(x)

    model = Two()
    params = model.init(jax.random.key(1), x)

    def run(params, x):
        h, y = model.apply(params, x)
        return (h**2).sum() + (y**2).sum(), (h, y)

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    expected = run(params, x)
    with jax.set_mesh(mesh):
        cut = jax.tree.map(
            lambda w: jax.sharding.reshard(w, P(*[None] * (w.ndim - 1), "y")), params
        )
        kernel = params["params"]["DenseGeneral_0"]["kernel"]
        cut["params"]["DenseGeneral_0"]["kernel"] = jax.sharding.reshard(kernel, P(None, "y"))
        got = run(cut, jax.sharding.reshard(x, P("x")))
    (_, (h, y)), (_, dx) = got
    assert h.sharding.spec == P("x", None, "y", None) and y.sharding.spec == P("x", None, "y")
    assert dx.sharding.spec == P("x", None, None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and calc_diff(a, b) < 1e-5
