"""Layers of nnx against the layers of Flax that they stand in for."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import FORWARD, GRADIENT, dense_moe
from flax import nnx
from jax.sharding import PartitionSpec
from numerics import calc_diff

import jax_fp8gemm as fp8
from jax_fp8gemm.nnx import Fp8Linear, Fp8LinearGeneral, Fp8MoE, convert

P = PartitionSpec
BF16 = {"preferred_element_type": jnp.bfloat16}


class Mlp(nnx.Module):
    def __init__(self, linear, rngs, **options):
        self.blocks = nnx.List([linear(64, 64, rngs=rngs, **options) for _ in range(2)])
        self.head = linear(64, 33, use_bias=False, rngs=rngs, **options)
        self.tied = self.blocks[0]  # one layer in two places

    def __call__(self, x):
        for layer in (*self.blocks, self.tied):
            x = jnp.tanh(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (4, 32, 64))


@nnx.jit
def run(model, x, dy):
    """y, and the gradients to parameters and x."""

    def loss(model, x):
        y = model(x)
        return (y * dy).astype(jnp.float32).sum(), y

    gradients, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, *gradients


def leaves(model):
    return nnx.to_pure_dict(nnx.state(model))


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_same_tree_and_initial_values():
    got, expected = Mlp(Fp8Linear, nnx.Rngs(0)), Mlp(nnx.Linear, nnx.Rngs(0))
    same(leaves(got), leaves(expected))
    nnx.update(got, nnx.state(Mlp(nnx.Linear, nnx.Rngs(1))))  # a checkpoint
    same(leaves(got), leaves(Mlp(nnx.Linear, nnx.Rngs(1))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_one_layer(x, dtype):
    dy = jax.random.normal(jax.random.key(1), (4, 32, 96))
    bias_init = nnx.initializers.constant(0.5)
    got = run(Fp8Linear(64, 96, dtype=dtype, bias_init=bias_init, rngs=nnx.Rngs(0)), x, dy)
    expected = run(nnx.Linear(64, 96, bias_init=bias_init, rngs=nnx.Rngs(0)), x, dy)
    assert got[0].dtype == (dtype or jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[1:])} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 1.1e-3


def test_kernel_gradients_are_not_rounded_to_bf16(x):
    """Of the layers here; nnx.Linear with the bare hook rounds them: it casts its kernel."""

    def rounded(linear, **hook):
        layer = linear(64, 48, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **hook)
        dw = run(layer, x, jnp.ones((4, 32, 48)))[1].kernel[...]
        assert dw.dtype == jnp.float32
        return bool((dw == dw.astype(jnp.bfloat16)).all())

    assert not rounded(Fp8Linear)
    assert rounded(nnx.Linear, dot_general=fp8.fp8_dot_general)


def test_hooks_of_unchanged_layers(x):
    layer = nnx.Linear(64, 96, dot_general=fp8.fp8_dot_general, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x), fp8.fp8_matmul(x, layer.kernel[...]))
    for hook in (
        {"dot_general": fp8.fp8_dot_general},
        {"dot_general_cls": lambda: fp8.fp8_dot_general},
    ):
        general = nnx.LinearGeneral(64, (2, 48), rngs=nnx.Rngs(0), **hook)
        np.testing.assert_array_equal(general(x).reshape(4, 32, 96), layer(x))


def test_convert_replaces_layers_and_shares_their_params(x):
    model = Mlp(nnx.Linear, nnx.Rngs(0), dtype=jnp.bfloat16)
    made = convert(model, where=lambda path, linear: "head" not in path)
    assert {type(layer) for layer in made.blocks} == {Fp8Linear}
    assert type(made.head) is nnx.Linear and type(model.blocks[0]) is nnx.Linear
    assert made.tied is made.blocks[0]
    assert made.blocks[1].kernel is model.blocks[1].kernel
    same(leaves(made), leaves(model))
    made = convert(model)
    assert type(made.head) is Fp8Linear and made.head.bias is None
    dy = jax.random.normal(jax.random.key(1), (4, 32, 33))
    got = run(made, x, dy)
    same(got, run(Mlp(Fp8Linear, nnx.Rngs(0), dtype=jnp.bfloat16), x, dy))
    expected = run(Mlp(nnx.Linear, nnx.Rngs(0)), x, dy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 8 * 1.1e-3  # four products one after the other


def test_layers_scanned_and_rematerialised(x):
    x = x[0]

    def gradient(linear, remat):
        @nnx.vmap(in_axes=0)
        def make(rngs):
            return linear(64, 64, dtype=jnp.bfloat16, rngs=rngs)

        def layer(x, model):
            return jnp.tanh(model(x)).astype(x.dtype)

        step = nnx.scan(
            nnx.remat(layer) if remat else layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        stack = make(nnx.Rngs(0).split(3))
        return nnx.to_pure_dict(nnx.jit(nnx.grad(lambda stack: step(x, stack).sum()))(stack))

    got = gradient(Fp8Linear, True)
    same(got, gradient(Fp8Linear, False))
    expected = gradient(nnx.Linear, True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 6 * 1.1e-3


def test_sharding_metadata(x):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
    experts = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("expert", None, "mlp"))
    with nnx.use_eager_sharding(False):
        layer = Fp8Linear(64, 96, kernel_init=init, rngs=nnx.Rngs(0))
        linear = nnx.Linear(64, 96, kernel_metadata={"out_sharding": ("a", "b")}, rngs=nnx.Rngs(0))
        made = convert(nnx.Sequential(linear)).layers[0]
        moe = Fp8MoE(64, 128, 4, top_k=2, init={"wi_1": experts}, rngs=nnx.Rngs(0))
    assert nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value() == P("embed", "mlp")
    assert nnx.get_partition_spec(nnx.state(made))["kernel"].get_value() == P("a", "b")
    assert nnx.get_partition_spec(nnx.state(moe))["wi_1"].get_value() == P("expert", None, "mlp")


def test_weights_held_in_fp8(x):
    """Bits of the layer that quantizes its float kernel on its way."""
    bias_init = nnx.initializers.constant(0.5)
    layer = Fp8Linear(64, 200, dtype=jnp.bfloat16, bias_init=bias_init, rngs=nnx.Rngs(0))
    q = fp8.quantize(layer.kernel[...].T, (128, 128))
    held = Fp8Linear.from_quantized(q, layer.bias[...])
    assert set(leaves(held)) == {"qvalue", "scale", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(held, nnx.Param))) == {"bias"}  # what is trained
    got = nnx.jit(lambda layer, x: layer(x))(held, x)
    np.testing.assert_array_equal(got, nnx.jit(lambda layer, x: layer(x))(layer, x))
    without = nnx.merge(*nnx.split(Fp8Linear.from_quantized(q)))
    np.testing.assert_array_equal(without(x) + jnp.bfloat16(0.5), got)


def to_fp8(layer, **options):
    """Returns the layer that holds the weight of an Fp8LinearGeneral in FP8."""
    k = np.prod(layer.in_features)
    q = fp8.quantize(layer.kernel[...].reshape(k, -1).T, (128, 128))
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return Fp8LinearGeneral.from_quantized(q, layer.bias[...], **sizes, **options)


def test_general_layers_are_those_of_flax(x):
    how = {"axis": (-2, -1), "bias_init": nnx.initializers.constant(0.5), "rngs": nnx.Rngs(0)}
    x = x.reshape(4, 8, 4, 64)
    got = Fp8LinearGeneral((4, 64), (3, 50), dtype=jnp.bfloat16, **how)
    expected = nnx.LinearGeneral((4, 64), (3, 50), **(how | {"rngs": nnx.Rngs(0)}))
    same(leaves(got), leaves(expected))
    dy = jax.random.normal(jax.random.key(1), (4, 8, 3, 50))
    got, expected = run(got, x, dy), run(expected, x, dy)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[1:])} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert calc_diff(a, b) < 1.1e-3


def test_attention_held_in_fp8(x):
    """All four projections of nnx.MultiHeadAttention: bits of float ones, which are quantized."""
    options = {"dtype": jnp.bfloat16, "bias_init": nnx.initializers.normal(0.1)}
    model = nnx.MultiHeadAttention(5, 64, 200, decode=False, **options, rngs=nnx.Rngs(0))
    held = nnx.clone(model)
    for name, axis in (("query", -1), ("key", -1), ("value", -1), ("out", (-2, -1))):
        own = getattr(model, name)
        floats = Fp8LinearGeneral(
            own.in_features, own.out_features, axis=axis, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        floats.kernel, floats.bias = own.kernel, own.bias
        setattr(model, name, floats)
        setattr(held, name, to_fp8(floats, axis=axis))
    assert held.out.qvalue.shape == (64, 200) and held.query.scale.shape == (2, 1)
    assert set(nnx.to_pure_dict(nnx.state(held, nnx.Param))["out"]) == {"bias"}
    got, expected = (nnx.jit(lambda model, x: model(x))(m, x) for m in (held, model))
    assert np.asarray(expected).any()
    np.testing.assert_array_equal(got, expected)


def test_layers_held_in_fp8_take_an_out_sharding(x):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    q = fp8.quantize(jax.random.normal(jax.random.key(0), (256, 64)), (128, 128))
    plain = Fp8Linear.from_quantized(q)
    general = Fp8LinearGeneral.from_quantized(q, in_features=64, out_features=(4, 64))
    layers = (plain, P(None, "x", "y")), (general, P("x", None, "y", None))
    for layer, spec in layers:
        graph, state = nnx.split(layer)
        run = lambda state, x, at: nnx.merge(graph, state)(x, at)  # noqa: B023, E731
        expected = jax.jit(run, static_argnums=2)(state, x, None)
        with jax.set_mesh(mesh):
            cut = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), state)
            y = jax.jit(run, static_argnums=2)(cut, jax.sharding.reshard(x, P("x")), spec)
        assert y.sharding.spec == spec
        np.testing.assert_array_equal(y, expected)


def test_layers_in_a_scan_held_in_fp8(x):
    """Made by nnx.vmap from stacked QArrays, and run by nnx.scan."""
    x = x[0].astype(jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = jnp.stack([jax.random.normal(key, (200, 64)) for key in keys])
    back = jnp.stack([jax.random.normal(key, (64, 200)) for key in keys]) / 14
    up, down = (fp8.quantize(w, (128, 128)) for w in (kernels, back))
    floats = [jnp.swapaxes(w, 1, 2) for w in (kernels, back)]

    @nnx.vmap
    def make(up, down):
        general = Fp8LinearGeneral.from_quantized(up, in_features=64, out_features=(5, 40))
        sizes = {"in_features": (5, 40), "out_features": 64, "axis": (-2, -1)}
        return general, Fp8LinearGeneral.from_quantized(down, **sizes)

    @nnx.vmap
    def make_plain(up, down):
        return Fp8Linear.from_quantized(up), Fp8Linear.from_quantized(down)

    def step(x, layers):
        return jnp.tanh(layers[1](layers[0](x)))

    expected = x
    for w_up, w_down in zip(*floats, strict=True):
        expected = jnp.tanh(fp8.fp8_matmul(fp8.fp8_matmul(expected, w_up, **BF16), w_down, **BF16))
    scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    for stack in (make(up, down), make_plain(up, down)):
        assert stack[0].scale.shape == (3, 2, 1)
        np.testing.assert_array_equal(nnx.jit(scan)(x, stack), expected)


def test_experts_in_a_scan_held_in_fp8(x):
    """Stacked ExpertKernels with biases, as three layers one after the other."""
    x, (layers, e, h, f) = x[0].astype(jnp.bfloat16), (3, 4, 64, 72)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"wi_0": (e, f, h), "wi_1": (e, f, h), "wo": (e, h, f)}
    kernels = fp8.ExpertKernels(
        wo_bias=jax.random.normal(keys[3], (layers, e, h)),
        **{
            name: fp8.quantize(jax.random.normal(key, (layers, *shape)) / 8, (128, 128))
            for key, (name, shape) in zip(keys[:3], shapes.items(), strict=True)
        },
    )
    gates = jax.random.normal(keys[0], (layers, h, e))
    make = nnx.vmap(lambda gate, kernels: Fp8MoE.from_quantized(gate, kernels, top_k=2))
    scan = nnx.scan(lambda x, m: m(x)[0], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    expected = x
    for i in range(layers):
        one = jax.tree.map(operator.itemgetter(i), kernels)
        expected = fp8.moe(expected, gates[i], one, top_k=2)[0]
    np.testing.assert_array_equal(nnx.jit(scan)(x, make(gates, kernels)), expected)


def test_errors_of_general_layers_held_in_fp8():
    q = fp8.quantize(jnp.ones((256, 64)), (128, 128))
    sizes = {"in_features": 64, "out_features": (4, 64)}
    with pytest.raises(ValueError, match=r"q does not fit the features(?s:.*)q \[64, 256\]"):
        Fp8LinearGeneral.from_quantized(q, in_features=(4, 64), out_features=64)
    with pytest.raises(ValueError, match=r"bias does not fit q(?s:.*)bias \[4, 64\]"):
        Fp8LinearGeneral.from_quantized(q, jnp.ones((64, 4)), **sizes)
    assert Fp8LinearGeneral.from_quantized(q, jnp.ones(256), **sizes).bias.shape == (4, 64)


def test_errors_of_from_quantized():
    rows = fp8.quantize(jnp.ones((256, 64)))
    with pytest.raises(
        ValueError, match=r"(?s)from_quantized: q is not a matrix.*quantize\(kernel.T"
    ):
        Fp8Linear.from_quantized(rows)
    blocks = fp8.quantize(jnp.ones((256, 64)), (128, 128))
    with pytest.raises(ValueError, match=r"bias \[256\]"):
        Fp8Linear.from_quantized(blocks, jnp.ones(64))


# ---- the mixture of experts ---------------------------------------------------------------------

E, H, F = 4, 64, 128


@pytest.mark.parametrize("fs", [0, 32])
def test_moe_is_near_the_dense_one(x, fs):
    how = {"top_k": 2, "score_function": "sigmoid", "routed_scaling_factor": 2.0}
    layer = Fp8MoE(H, F, E, shared_features=fs, rngs=nnx.Rngs(0), **how)
    params = leaves(layer)
    shared = {"shared_wi_0": (H, fs), "shared_wi_1": (H, fs), "shared_wo": (fs, H)}
    shapes = {"gate_kernel": (H, E), "wi_0": (E, H, F), "wi_1": (E, H, F), "wo": (E, F, H)}
    assert {k: v.shape for k, v in params.items()} == {**shapes, **(shared if fs else {})}
    bias = jnp.array([0.3, -0.2, 0.0, 0.1])
    dy = jax.random.normal(jax.random.key(1), x.shape)

    def exact(params):
        def made(prefix=""):
            names = ("wi_0", "wi_1", "wo")
            return fp8.ExpertKernels(**{name: params[prefix + name] for name in names})

        given = x.reshape(-1, H), params["gate_kernel"], made(), made("shared_") if fs else None
        y, routing = dense_moe(*given, bias=bias, **how)
        return y.reshape(x.shape), routing

    def loss(result):
        y, routing = result
        return (y * dy).sum() + routing.aux_loss, (y, routing)

    grad = nnx.jit(nnx.grad(lambda layer: loss(layer(x, bias)), has_aux=True))
    got, (y, routing) = grad(layer)
    expected, (exact_y, _) = jax.jit(jax.grad(lambda p: loss(exact(p)), has_aux=True))(params)
    assert calc_diff(y, exact_y) < FORWARD and routing.expert_index.shape == (128, 2)
    got = nnx.to_pure_dict(got)
    for name in params:
        assert got[name].dtype == jnp.float32
        assert calc_diff(got[name], expected[name]) < GRADIENT, name


def test_an_initialiser_of_no_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"Fp8MoE: unknown names in init\.\n  got +wi\n"):
        Fp8MoE(H, F, E, top_k=2, init={"wi": nnx.initializers.zeros_init()}, rngs=nnx.Rngs(0))


def test_an_option_that_moe_has_not_is_an_error():
    with pytest.raises(ValueError, match=r"Fp8MoE: unknown names in options\.\n  got +scores\n"):
        Fp8MoE(H, F, E, top_k=2, scores="sigmoid", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="score is score_function now"):
        Fp8MoE(H, F, E, top_k=2, score="sigmoid", rngs=nnx.Rngs(0))


def test_what_a_moe_layer_is_may_be_a_static_argument(x):
    layer = Fp8MoE(H, F, E, top_k=2, rngs=nnx.Rngs(0))
    run = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x)[0], static_argnums=0)
    np.testing.assert_array_equal(run(*nnx.split(layer), x), layer(x)[0])


def test_a_model_is_converted_before_it_has_numbers(x):
    made = nnx.eval_shape(lambda: Mlp(nnx.Linear, nnx.Rngs(0)))
    graph, _ = nnx.split(convert(made))
    _, state = nnx.split(convert(Mlp(nnx.Linear, nnx.Rngs(0))))
    y = nnx.merge(graph, state)(x)
    np.testing.assert_array_equal(y, convert(Mlp(nnx.Linear, nnx.Rngs(0)))(x))


def test_moe_over_devices_equals_that_of_one(x):
    x = x.astype(jnp.bfloat16)
    layer = Fp8MoE(H, F, E, top_k=2, expert_axis="x", rngs=nnx.Rngs(0))
    alone = Fp8MoE(H, F, E, top_k=2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    split = jax.tree.map(lambda w: P("x") if w.ndim == 3 else P(), state)
    spread = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x)[0],
        mesh=jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(split, P("x")),
        out_specs=P("x"),
    )
    y, (expected, _) = jax.jit(spread)(state, x), nnx.jit(lambda m, x: m(x))(alone, x)
    assert y.dtype == jnp.bfloat16
    assert calc_diff(y, expected) < 1e-5  # roundings to bf16 of sums over devices
