"""MaxText's quantization and gmm, bit for bit as FP8's products.

Where MaxText is not installed, stand-ins call the hooks as its layers do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import equal, load, normal

import jax_fp8gemm as fp8


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
