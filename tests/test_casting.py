"""GEMMs that cast their weights: the numbers of those that take FP8 copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_fp8gemm as fp8
from jax_fp8gemm._ops import weights as ops_weights
from jax_fp8gemm._ops.gemm import multiply_casting

P = PartitionSpec
G, M = 3, 90
SIZES = np.array([40, 0, 33], np.int32)
# transposed, number of arrays, k, n
CASES = [(False, 1, 272, 144), (True, 1, 144, 272), (False, 2, 512, 80), (True, 2, 80, 512)]


def case(transposed: bool, arrays: int, k: int, n: int, variant: str = "ragged", g: int = G):
    """Returns lhs, weights, and the one matrix [g, n, k] that they stand for."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows, columns = (k, n) if transposed else (n, k)
    shape = (g, rows, columns // arrays)
    weights = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:arrays])
    whole = jnp.concatenate(weights, -1)
    lhs = jax.random.normal(keys[2], (M, k) if variant == "ragged" else (g, 50, k), jnp.bfloat16)
    return fp8.quantize(lhs), weights, jnp.swapaxes(whole, 1, 2) if transposed else whole


def equal(got, expected) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("variant", ["ragged", "masked"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_is_the_gemm_of_quantized_weights(shape, variant):
    lhs, weights, whole = case(*shape, variant)
    sizes = jnp.asarray(SIZES)
    casting = functools.partial(multiply_casting, transposed=shape[0], variant=variant)
    rhs = fp8.quantize(whole, (128, 128))
    equal(jax.jit(casting)(lhs, weights, sizes), fp8.gemm(lhs, rhs, sizes, variant=variant))


def test_a_batch_of_masked_gemms_is_one_of_more_groups():
    shape = CASES[3]
    lhs, weights, _ = case(*shape, "masked", g=4)
    lhs, weights = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (lhs, weights))
    sizes = jnp.array([[10, 0], [50, 7]])
    casting = functools.partial(multiply_casting, transposed=True, variant="masked")
    got = jax.vmap(casting)(lhs, weights, sizes)
    each = [casting(*jax.tree.map(lambda x, i=i: x[i], (lhs, weights, sizes))) for i in range(2)]
    equal(got, jnp.stack(each))


def test_sizes_beyond_int32_are_clipped():
    _, (w,), _ = case(*CASES[1])
    x = jax.random.normal(jax.random.key(3), (M, w.shape[1]), jnp.bfloat16)
    casting = functools.partial(fp8.fp8_ragged_dot, cast_in_gemm=True)
    huge, most = np.array([2**32 - 2, 0, 0], np.uint32), np.array([M, 0, 0], np.int32)
    equal(casting(x, w, jnp.asarray(huge)), casting(x, w, jnp.asarray(most)))


def test_weights_reach_the_kernel_as_they_are():
    lhs, weights, _ = case(*CASES[3])
    run = jax.jit(functools.partial(multiply_casting, transposed=True))
    text = run.trace(lhs, weights, SIZES).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "@jax_fp8gemm_gemm_v1" in line]
    assert 'rhs = "bf16_transposed"' in call
    assert call.count("tensor<3x80x256xbf16>") == 2  # both halves


def two_devices():
    return jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))


# What is cut of lhs [m, k], and of the last two dims of the weights.
CUTS = [((), ("x", None)), ((), (None, "x")), ((None, "x"), ()), (("x",), ("x", None))]


@pytest.mark.filterwarnings("ignore:.*a mesh axis splits a dim")  # so it is gathered
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("arrays", [1, 2])
def test_cut_up_over_devices(arrays, transposed, cut):
    lhs, weights, _ = case(transposed, arrays, 512, 512)
    lhs = jax.tree.map(lambda x: x[:88], lhs)
    run = jax.jit(functools.partial(multiply_casting, transposed=transposed))
    expected = run(lhs, weights, SIZES)
    mesh = two_devices()
    lhs_cut, weights_cut = (NamedSharding(mesh, P(*spec)) for spec in (cut[0], (None, *cut[1])))
    placed = jax.device_put(lhs, lhs_cut), jax.device_put(weights, weights_cut)
    got = np.asarray(run(*placed, SIZES), np.float32)
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("residuals", ["fp8_t", "fp8", "input"])
def test_ragged_dot_gives_the_same_bits_either_way(residuals):
    keys = jax.random.split(jax.random.key(2), 3)
    shapes = (M, 144), (G, 144, 80), (M, 80)
    x, w, dy = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))

    def run(x, w, sizes, dy, wanted=None):
        multiply = functools.partial(fp8.fp8_ragged_dot, residuals=residuals, cast_in_gemm=wanted)
        y, pull = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
        return y, *pull(dy)

    given, plain = (x, w, jnp.asarray(SIZES), dy), functools.partial(run, wanted=False)
    assert casts(run, *given) and not casts(plain, *given)
    equal(jax.jit(run)(*given), jax.jit(plain)(*given))
    f32 = functools.partial(fp8.fp8_ragged_dot, preferred_element_type=jnp.float32)
    assert not casts(f32, x, w, given[2])
    assert not casts(fp8.fp8_ragged_dot, x, w[..., :72], given[2])


def test_a_program_on_several_devices_gathers_fp8_copies():
    _, weights, _ = case(*CASES[1])
    given = jnp.ones((M, 144), jnp.bfloat16), *weights, jnp.asarray(SIZES)
    mesh = two_devices()
    placed = jax.device_put(given, NamedSharding(mesh, P()))
    assert casts(fp8.fp8_ragged_dot, *given) and not casts(fp8.fp8_ragged_dot, *placed)
    assert casts(functools.partial(fp8.fp8_ragged_dot, cast_in_gemm=True), *placed)
    with jax.set_mesh(mesh):
        assert not casts(fp8.fp8_ragged_dot, *given)


# ---- The expert block ---------------------------------------------------------------------------

T, H, F, E, TOP_K = 48, 144, 256, 4, 2


def both(x, routing, dy, kernels, **options):
    """Returns y and all gradients of an expert block."""

    def block(x, weights, kernels):
        return fp8.expert_ffn(x, routing.expert_index, weights, kernels, **options)

    y, pull = jax.vjp(block, x, routing.gate_weights, kernels)
    return y, pull(dy)


def operands():
    keys = jax.random.split(jax.random.key(1), 6)
    shapes = (T, H), (T, H), (E, H, F), (E, H, F), (E, F, H)
    x, dy, wi_0, wi_1, wo = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=False)
    )
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    return x, fp8.route(jax.random.normal(keys[5], (T, E)), TOP_K), dy, kernels


def casts(run, *given) -> bool:
    """Whether no copies of the weights are made."""
    return "bf16_transposed" in str(jax.jit(lambda *args: run(*args)).trace(*given).jaxpr)


@pytest.mark.parametrize("capacity", [None, 20])
def test_a_block_gives_the_same_bits_either_way(capacity):
    given = operands()
    casting, plain = (
        functools.partial(both, capacity=capacity, cast_in_gemm=wanted) for wanted in (True, False)
    )
    assert casts(casting, *given) and not casts(plain, *given)
    equal(jax.jit(casting)(*given), jax.jit(plain)(*given))


def test_when_weights_are_cast_in_gemms(monkeypatch):
    x, routing, _, kernels = operands()

    def chosen(kernels, **options):
        run = functools.partial(fp8.expert_ffn, **options)
        return casts(run, x, routing.expert_index, routing.gate_weights, kernels)

    assert chosen(kernels)
    with jax.set_mesh(two_devices()):
        assert not chosen(kernels) and chosen(kernels, cast_in_gemm=True)
    assert not chosen(kernels, scale_rounding="none")
    assert not chosen(jax.tree.map(lambda w: w.astype(jnp.float32), kernels))
    wi_0, wi_1, wo = kernels.wi_0[..., :192], kernels.wi_1[..., :192], kernels.wo[:, :192]
    assert not chosen(fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo))
    assert not chosen(fp8.prepare_experts(kernels))
    monkeypatch.setattr(ops_weights, "CAST_ROWS", T * TOP_K // E - 1)
    assert not chosen(kernels)


def test_inside_shard_map_weights_are_this_device_s():
    x, _, _, kernels = operands()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    layer = functools.partial(fp8.moe, top_k=TOP_K, expert_axis="x")
    run = jax.shard_map(
        lambda *args: layer(*args)[0],
        mesh=mesh,
        in_specs=(P("x"), P(), P("x")),
        out_specs=P("x"),
    )
    gate_kernel = jnp.ones((H, E))
    assert casts(run, x, gate_kernel, kernels)
