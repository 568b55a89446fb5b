"""The provider for qwix: linen and nnx models get FP8's products, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import equal, load, normal
from numerics import calc_diff

import jax_fp8gemm as fp8


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
    equal([got[name]["kernel"] for name in ("up", "mix")], list(expected[:2]))
    np.testing.assert_allclose(got["down"]["kernel"], expected[2], rtol=1e-4, atol=1e-4)  # XLA's
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
    stayed = {" [4, 3]": "its operands are not floats", " [24, 32]": "no weight is found in it"}
    assert provider.report == {"up [64, 32]": "FP8"} | stayed
    said = "\n".join(f"{name}: {why}" for name, why in stayed.items())
    assert [record.message for record in caplog.records] == [f"not in FP8:\n{said}"]


def test_qwix_calls_by_keyword(key):
    """As jnp.dot, Gemma and MaxText call."""
    load("qwix_provider")
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            w = self.param("w", nn.initializers.normal(), (64, 32))
            experts = self.param("experts", nn.initializers.normal(), (2, 64, 32))
            numbers = (((1,), (0,)), ((), ()))
            return (
                jax.lax.dot_general(lhs=x, rhs=w, dimension_numbers=numbers),
                jnp.dot(x, w),
                jnp.dot(x[:, :32], w.T),
                jax.lax.ragged_dot(
                    lhs=x, rhs=experts, group_sizes=sizes, preferred_element_type=jnp.bfloat16
                ),
            )

    x, sizes = normal(key, 24, 64), jnp.array([9, 11])
    provider = qwix_provider(module_path=".*")
    model = quantized(Model(), provider)
    params = model.init(key, x, sizes)
    w, experts = params["params"]["w"], params["params"]["experts"]
    general, dot, transposed, ragged = model.apply(params, x, sizes)
    equal(general, fp8.fp8_matmul(x, w))
    equal(dot, fp8.fp8_matmul(x, w))
    equal(transposed, jnp.dot(x[:, :32], w.T))  # a changed weight is not found, and reported
    equal(ragged, fp8.fp8_ragged_dot(x, experts, sizes, None, jnp.bfloat16))
    assert provider.report == {
        " [64, 32]": "FP8", " [32, 64]": "no weight is found in it", " [2, 64, 32]": "FP8"
    }  # fmt: skip


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
