"""Adapters: each is called as the other library calls it, and its products are FP8's, bit for bit.

Where MaxText is not installed, stand-ins call its hooks as its layers do.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff

import jax_fp8gemm as fp8

ADAPTERS = pathlib.Path(__file__).parent.parent / "examples" / "adapters"
NAMES = {"qwix_provider": "qwix", "tokamax_ragged_dot": "tokamax", "maxtext_fp8": "flax"}


def load(name: str):
    pytest.importorskip(NAMES[name], reason=f"{NAMES[name]} is not installed")
    spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(key, *shape, dtype=jnp.float32):
    return jax.random.normal(key, shape).astype(dtype)


def equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_adapters_are_short_and_all_are_tested():
    files = {path.stem: path for path in ADAPTERS.glob("*.py")}
    assert set(files) == set(NAMES)
    for path in files.values():
        assert len(path.read_text().splitlines()) < 120, path.name


@pytest.mark.parametrize("name", ["qwix_provider", "maxtext_fp8"])
def test_a_wish_for_a_sharding_is_not_lost(key, name):
    adapter = load(name)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        wish = jax.NamedSharding(mesh, jax.P("x", None))
        x, w = (jax.device_put(normal(key, 64, 64), jax.P()) for _ in range(2))
        y = adapter.dot_general(x, w, (((1,), (0,)), ((), ())), out_sharding=wish)
        assert jax.typeof(y).sharding.spec == wish.spec


# ---- qwix ---------------------------------------------------------------------------------------


def qwix_provider(**rule):
    import qwix

    return load("qwix_provider").Fp8Provider([qwix.QuantizationRule(**rule)])


def quantized(model, provider, *inputs):
    import qwix

    return qwix.quantize_model(model, provider, *inputs)


def qwix_of(model, *inputs, **rule):
    return quantized(model, qwix_provider(**rule), *inputs)


def linen_model():
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(48, use_bias=False, name="up")(x)
            x = nn.Einsum((48, 32), "bn,nd->bd", use_bias=False, name="mix")(x)
            return nn.Dense(16, use_bias=False, name="down")(x)

    return Model()


def test_qwix_gives_matching_modules_of_a_linen_model_to_fp8(key):
    load("qwix_provider")
    model, x = linen_model(), normal(key, 24, 64)
    params = model.init(key, x)
    up, mix, down = (params["params"][name]["kernel"] for name in ("up", "mix", "down"))
    plain = model.apply(params, x)
    chosen = qwix_of(model, module_path="up|mix")

    def by_hand(up, mix, down):
        return fp8.fp8_matmul(fp8.fp8_matmul(x, up), mix) @ down

    def loss(params, apply):
        return (apply(params, x) ** 2).sum()

    equal(chosen.apply(params, x), by_hand(up, mix, down))
    assert 0 < calc_diff(chosen.apply(params, x), plain) < 5e-3
    got = jax.grad(loss)(params, chosen.apply)["params"]
    expected = jax.grad(lambda w: (by_hand(*w) ** 2).sum())((up, mix, down))
    equal([got[name]["kernel"] for name in ("up", "mix", "down")], list(expected))
    equal(model.apply(params, x), plain)  # the model itself is as it was


WEIGHTS = {  # of Gemma: einsum, activation, weight
    "BTD,NDH->BTNH": ((2, 12, 64), (4, 64, 16)),
    "BSD,CKDH->CBSKH": ((2, 12, 64), (2, 2, 64, 16)),
    "BTNH,NHD->BTD": ((2, 12, 4, 16), (4, 16, 64)),
    "BTF,NFH->BTNH": ((2, 12, 64), (2, 64, 128)),
}


@pytest.mark.parametrize("spec", WEIGHTS)
@pytest.mark.parametrize("weight_first", [False, True])
def test_qwix_finds_the_weight_on_either_side(key, spec, weight_first):
    load("qwix_provider")
    import flax.linen as nn

    x, w = (normal(key, *shape) for shape in WEIGHTS[spec])
    operands, out = spec.split("->")
    swapped = ",".join(operands.split(",")[::-1]) + "->" + out

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.zeros, WEIGHTS[spec][1])
            return jnp.einsum(swapped, w, x) if weight_first else jnp.einsum(spec, x, w)

    provider = qwix_provider(module_path=".*")
    y = quantized(Model(), provider).apply({"params": {"w": w}}, x)
    exact = functools.partial(fp8.fp8_dot_general, precision=None)
    assert list(provider.report.values()) == ["FP8"]
    np.testing.assert_array_equal(y, jnp.einsum(spec, x, w, _dot_general=rhs_is_weight(exact, w)))


def rhs_is_weight(product, w):
    """As the provider does, but by hand: the weight is brought to the right."""

    def run(lhs, rhs, numbers, precision=None, preferred_element_type=None, **kw):
        (a, b), (batch, rhs_batch) = numbers
        assert not batch and not rhs_batch
        if rhs.shape == w.shape:
            return product(lhs, rhs, numbers)
        y, own = product(rhs, lhs, ((b, a), ((), ()))), rhs.ndim - len(b)
        return jnp.moveaxis(y, range(own, y.ndim), range(y.ndim - own))

    return run


def test_qwix_reports_once_what_stays(key, caplog):
    load("qwix_provider")
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, counts):
            table = self.param("table", nn.initializers.ones, (4, 3), jnp.int32)
            y = nn.Dense(32, use_bias=False, name="up")(x)
            return y, counts @ table, jnp.einsum("mk,nk->mn", y, y)

    x, counts = normal(key, 24, 64), jnp.ones((2, 4), jnp.int32)
    provider = qwix_provider(module_path=".*")
    model = quantized(Model(), provider)
    params = model.init(key, x, counts)
    for _ in range(2):
        y, _, scores = model.apply(params, x, counts)
    equal(scores, jnp.einsum("mk,nk->mn", y, y))
    assert provider.report == {"up [64, 32]": "FP8", " [4, 3]": "its operands are not floats"}
    assert [record.message for record in caplog.records] == [
        "not in FP8:\n [4, 3]: its operands are not floats"
    ]


# qwix 0.1.8 calls a method of flax that is deprecated since 0.12.
@pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")
def test_qwix_gives_an_nnx_model_to_fp8(key):
    load("qwix_provider")
    from flax import nnx

    layer, x = nnx.Linear(64, 48, use_bias=False, rngs=nnx.Rngs(0)), normal(key, 24, 64)
    chosen = qwix_of(layer, x)
    equal(chosen(x), fp8.fp8_matmul(x, layer.kernel[...]))
    other = qwix_of(layer, x, op_names=("ragged_dot",))
    equal(other(x), layer(x))


def test_qwix_leaves_what_fp8_does_not_take(key):
    load("qwix_provider")
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, q, w, experts, sizes):
            scores = jnp.einsum("bqd,bkd->bqk", q, q)  # a batch dim: attention
            counts = jax.lax.dot_general(sizes, sizes, (((0,), (0,)), ((), ())))  # integers
            return scores, counts, jax.lax.ragged_dot(w, experts, sizes)

    q, w, experts = normal(key, 2, 8, 16), normal(key, 24, 32), normal(key, 2, 32, 16)
    sizes = jnp.array([9, 11])
    scores, counts, ragged = qwix_of(Model()).apply({}, q, w, experts, sizes)
    equal(scores, jnp.einsum("bqd,bkd->bqk", q, q))
    assert int(counts) == 9 * 9 + 11 * 11
    equal(ragged, fp8.fp8_ragged_dot(w, experts, sizes))


# ---- tokamax ------------------------------------------------------------------------------------


def test_tokamax_calls_fp8(key):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    import tokamax

    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 11])

    def product(x, w, **kw):
        return tokamax.ragged_dot(x, w, sizes, implementation=[adapter], **kw)

    equal(product(x, w), fp8.fp8_ragged_dot(x, w, sizes))
    bf16 = {"preferred_element_type": jnp.bfloat16}
    equal(product(x, w, **bf16), fp8.fp8_ragged_dot(x, w, sizes, **bf16))
    expected = jax.nn.silu(fp8.fp8_ragged_dot(x, w, sizes)).astype(jnp.bfloat16)
    equal(product(x, w, activation=jax.nn.silu, **bf16), expected)
    equal(*(
        jax.jit(jax.grad(lambda x, w, f=f: (f(x, w) ** 2).sum(), (0, 1)))(x, w)
        for f in (product, lambda x, w: fp8.fp8_ragged_dot(x, w, sizes))
    ))  # fmt: skip


def test_tokamax_goes_on_where_fp8_stops(key, monkeypatch):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    import qwix
    import tokamax

    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 17])
    q = qwix.quantize(w, jnp.int8, channelwise_axes=(0, 2))
    with pytest.raises(NotImplementedError, match="quantizes floats itself"):
        tokamax.ragged_dot(x, q, sizes, implementation=[adapter])
    monkeypatch.setattr("sys.argv", ["tokamax"])  # its own implementations parse it
    chosen = tokamax.ragged_dot(x, q, sizes, implementation=[adapter, "xla"])
    equal(chosen, tokamax.ragged_dot(x, q, sizes, implementation="xla"))


@pytest.mark.parametrize("held", [slice(0, 2), slice(1, 3)])
def test_tokamax_groups_from_an_offset(key, held):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    x, w, sizes = normal(key, 24, 64), normal(key, 3, 64, 48), jnp.array([7, 0, 11])
    call = functools.partial(
        adapter,
        x,
        w[held],
        group_sizes=sizes,
        ragged_dot_dimension_numbers=general(([1], [1]), [0]),
        group_offset=jnp.array([held.start]),
    )
    expected = fp8.fp8_ragged_dot(x, w[held], sizes, group_offset=held.start)
    equal(call(zero_initialize=True), expected)
    with pytest.raises(NotImplementedError, match="no fuse_gateup_activation"):
        call(fuse_gateup_activation="silu")
    with pytest.raises(NotImplementedError, match="FP8 has one precision"):
        call(precision=jax.lax.Precision.HIGHEST)


def general(contracting, group) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )


def test_tokamax_transposed_matrices(key):
    adapter = load("tokamax_ragged_dot").fp8_implementation
    from tokamax import RaggedDotGroupSizes

    x, w = normal(key, 24, 64), normal(key, 3, 48, 64)
    sizes = RaggedDotGroupSizes(jnp.array([7, 0, 11]), 24)
    y = adapter(
        x, w, group_sizes=sizes, ragged_dot_dimension_numbers=general(([1], [2]), [0])
    )  # fmt: skip
    equal(y, fp8.fp8_ragged_dot(x, w.swapaxes(1, 2), sizes.value))
    with pytest.raises(NotImplementedError, match="groups of rows alone"):
        adapter(x, x, group_sizes=sizes, ragged_dot_dimension_numbers=general(([0], [0]), []))


# ---- MaxText ------------------------------------------------------------------------------------


def dense_as_maxtext_does(quant, x, kernel, axis):
    """Its linen layer: a class for the kernel's axes, an instance, then lax.dot_general's call."""
    cls = quant.dot_general_cls(mesh_axes=("embed", "mlp"))
    return cls()(x, kernel, ((axis, tuple(range(len(axis)))), ((), ())), precision=None)


@pytest.mark.parametrize(
    "x, kernel, axis",
    [((2, 12, 64), (64, 48), (2,)), ((2, 12, 64), (64, 4, 16), (2,)),
     ((2, 12, 4, 16), (4, 16, 48), (2, 3))],
)  # fmt: skip
def test_maxtext_dense_layers(key, x, kernel, axis):
    quant = load("maxtext_fp8").Fp8BlockQuantization()
    from flax import linen as nn

    x, kernel = normal(key, *x), normal(key, *kernel)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense_as_maxtext_does(quant, x, kernel, axis)

    variables = Layer().init(key, x)
    assert not jax.tree.leaves(variables)  # no state
    k = int(np.prod([x.shape[i] for i in axis]))
    expected = fp8.fp8_matmul(x.reshape(-1, k), kernel.reshape(k, -1))
    y, _ = Layer().apply(variables, x, mutable=["aqt"])
    equal(y, expected.reshape(2, 12, *kernel.shape[len(axis) :]))


def test_maxtext_nnx_layers(key):
    quant = load("maxtext_fp8").Fp8BlockQuantization()
    from flax import nnx

    x, kernel = normal(key, 8, 64), normal(key, 64, 48)
    numbers = (((1,), (0,)), ((), ()))
    layer = nnx.bridge.ToNNX(quant.dot_general_cls(mesh_axes=())(), rngs=nnx.Rngs(0))
    layer.lazy_init(x, kernel, numbers, precision=None)
    equal(layer(x, kernel, numbers, precision=None), fp8.fp8_matmul(x, kernel))


# MaxText 0.2.5 uses what JAX and flax have deprecated.
@pytest.mark.filterwarnings("ignore")
def test_maxtext_itself(key):
    reason = "maxtext is not installed"
    linears = pytest.importorskip("maxtext.layers.linears", reason=reason)
    from flax import nnx

    quant, x = load("maxtext_fp8").Fp8BlockQuantization(), normal(key, 2, 12, 64)
    how = {"quant": quant, "rngs": nnx.Rngs(0)}
    heads = linears.DenseGeneral(64, (4, 16), kernel_axes=("embed", "heads", "kv"), **how)
    out = linears.DenseGeneral((4, 16), 48, axis=(-2, -1), kernel_axes=("heads", "kv", "e"), **how)
    w0, w1 = heads.kernel[...].reshape(64, 64), out.kernel[...].reshape(64, 48)
    equal(out(heads(x)), fp8.fp8_matmul(fp8.fp8_matmul(x, w0), w1))
    got = nnx.grad(lambda layer: layer(x).sum())(heads)["kernel"][...]
    equal(got.reshape(64, 64), jax.grad(lambda w: fp8.fp8_matmul(x, w).sum())(w0))


def test_maxtext_router_keeps_its_precision(key):
    quant = load("maxtext_fp8").Fp8BlockQuantization()
    x, kernel = normal(key, 8, 12, 64), normal(key, 64, 4)
    numbers = (((2,), (0,)), ((), ()))
    router = quant.dot_general_cls(mesh_axes=("embed", None))()
    equal(router(x, kernel, numbers, precision=None), jax.lax.dot_general(x, kernel, numbers))


def test_maxtext_ring_of_experts(key):
    """Each device has all rows, 4 of 8 experts, and the index of its first."""
    gmm = load("maxtext_fp8").gmm
    x, w = normal(key, 64, 32), normal(key, 8, 32, 16)
    sizes = jnp.array([8, 4, 0, 12, 7, 9, 10, 11])
    whole = fp8.fp8_ragged_dot(x, w, sizes)
    own = np.arange(64)[:, None] >= int(sizes[:4].sum())
    equal(gmm(x, w[4:], sizes, group_offset=jnp.int32(4)), jnp.where(own, whole, 0))


@pytest.mark.filterwarnings("ignore")
def test_maxtext_gate_itself(key):
    moe = pytest.importorskip("maxtext.layers.moe", reason="maxtext is not installed")
    from flax import nnx

    quant, x = load("maxtext_fp8").Fp8BlockQuantization(), normal(key, 2, 12, 64)
    how = {"quant": quant, "rngs": nnx.Rngs(0), "kernel_axes": ("embed", None), "mesh": None}
    gate = moe.GateLogit(64, 4, "mixtral-8x7b", **how)
    equal(gate(x)[0], x @ gate.kernel[...])


def test_maxtext_einsum(key):
    quant = load("maxtext_fp8").Fp8BlockQuantization()
    x, w = normal(key, 2, 12, 64), normal(key, 64, 4, 16)
    for einsum in (quant.einsum(mesh_axes=("embed",)), quant.einsum(dtype=jnp.float32)):
        y = einsum("bsd,dnh->bsnh", x, w)
        equal(y, fp8.fp8_matmul(x, w.reshape(64, 64)).reshape(2, 12, 4, 16))
    experts = normal(key, 2, 64, 48)
    equal(einsum("ecd,edf->ecf", x, experts), jnp.einsum("ecd,edf->ecf", x, experts))


def gmm_as_maxtext_does(gmm, quant, inputs, kernel, group_sizes):
    """The keywords of its sparse layer, dtypes asked of the quantization."""
    quantizer = quant.quant_dg.fwd.dg_quantizer
    return gmm(
        lhs=inputs,
        rhs=kernel,
        group_sizes=group_sizes,
        preferred_element_type=jnp.bfloat16,
        tiling=(512, 1024, 1024) * 3,
        group_offset=0,
        lhs_quantize_dtype=quantizer.lhs.numerics.get_dtype(),
        rhs_quantize_dtype=quantizer.rhs.numerics.get_dtype(),
        use_qwix_quantization=False,
        use_tokamax_backend=False,
        weight_gather_axes=[],
        lhs_vma_axes=(),
        rhs_vma_axes=(),
        use_gmm_v2=False,
        interpret=True,
    )


def test_maxtext_experts(key):
    adapter = load("maxtext_fp8")
    quant, sizes = adapter.Fp8BlockQuantization(), jnp.array([7, 0, 11])
    x, w = normal(key, 24, 64, dtype=jnp.bfloat16), normal(key, 3, 64, 48, dtype=jnp.bfloat16)

    def theirs(x, w):
        return gmm_as_maxtext_does(adapter.gmm, quant, x, w, sizes)

    def ours(x, w):
        return fp8.fp8_ragged_dot(x, w, sizes)

    equal(theirs(x, w), ours(x, w))
    equal(*(jax.grad(lambda x, w, f=f: f(x, w).sum(), (0, 1))(x, w) for f in (theirs, ours)))
    y = adapter.gmm(x, w.swapaxes(1, 2), sizes, transpose_rhs=True)
    equal(y, fp8.fp8_ragged_dot(x, w, sizes, preferred_element_type=jnp.float32))
    for name, value in {
        "existing_out": y, "partial_sum": y,
        "weight_gather_axes": [("fsdp", 1)],
    }.items():  # fmt: skip
        with pytest.raises(NotImplementedError, match=name):
            adapter.gmm(x, w, sizes, **{name: value})


# ---- haliax -------------------------------------------------------------------------------------


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
