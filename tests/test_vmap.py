"""jax.vmap of everything, over any subset of the operands, against a loop over the elements."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import gathered, near
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from made_up import random_operand
from numerics import by_name

import jax_fp8gemm as fp8
from jax_fp8gemm._core.variants import SCALES, VARIANTS

B, G, N = 3, 4, 24
GROUPED = [name for name, row in VARIANTS.items() if row.group_operand]
BLOCKS, LINES, ROWS, TENSOR = "1x128_128x128", "1x128_1x128", "row_row", "tensor_tensor"
# What each variant's group operand is of three elements: rows past the groups, empty groups, no
# rows at all, sizes that are negative or too large.
SIZES = np.array([[7, 0, 20, 3], [0, 0, 0, 0], [-5, 31, 2, 90]], np.int32)
STEPS = np.array([[128, 0, 200, 3], [0, 0, 0, 0], [-5, 129, 900, 5]], np.int32)
MAP = np.array([[2] * 128 + [0] * 9 + [-1] * 5, [-1] * 142, [3] * 100 + [-1] * 28 + [1] * 14])
OPERANDS = {  # m, k and the group operand
    "ragged": (40, 144, SIZES),
    "contiguous": (142, 144, MAP.astype(np.int32)),
    "masked": (32, 144, SIZES),
    "ragged_contracting": (24, 528, STEPS),
}


def subsets(*names):
    """Returns every way to batch some of the operands, as in_axes."""
    found = itertools.product((0, None), repeat=len(names))
    cases = [axes for axes in found if any(axis == 0 for axis in axes)]
    ids = ["+".join(n for n, axis in zip(names, axes, strict=True) if axis == 0) for axes in cases]
    return [pytest.param(axes, id=name) for axes, name in zip(cases, ids, strict=True)]


@functools.cache
def jitted(function):
    return jax.jit(function)


def loop(function, operands, axes):
    """Returns the results of all elements, one after the other; compiled once for all subsets."""
    found = []
    for i in range(B):
        pick = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        own = [pick(x) if axis == 0 else x for x, axis in zip(operands, axes, strict=True)]
        found.append(jitted(function)(*own))
    return jax.tree.map(lambda *ys: jnp.stack(ys), *found)


def chosen(batch, axes):
    """Returns the batch of operands, but its last element alone where it is not batched."""
    return [
        one if axis == 0 else jax.tree.map(lambda x: x[-1], one)
        for one, axis in zip(batch, axes, strict=True)
    ]


def check(function, batch, axes, bound: float = 1e-5):
    """vmap of `function` is the loop."""
    operands = chosen(batch, axes)
    got, expected = jax.jit(jax.vmap(function, axes))(*operands), loop(function, operands, axes)
    types = [jax.tree.map(lambda y: (y.shape, y.dtype), tree) for tree in (got, expected)]
    assert jax.tree.flatten(types[0]) == jax.tree.flatten(types[1])
    floats = [jax.tree.map(lambda y: y.astype(jnp.float32), tree) for tree in (got, expected)]
    for a, b in zip(*map(jax.tree.leaves, floats), strict=True):
        if np.asarray(b).any():
            assert near(a, b, bound)
        else:
            assert not np.asarray(a).any()


# ---- gemm ---------------------------------------------------------------------------------------


@functools.cache
def gemms(variant: str, scales: str):
    """Returns `gemm` of a variant, zero where it is undefined, and a batch of its operands."""
    m, k, groups = OPERANDS[variant]
    row, tiles = VARIANTS[variant], SCALES[scales]
    shapes = {"m": m, "n": N, "k": k, "g": G}
    made = [
        random_operand(i, (B, *(shapes[c] for c in dims)), tile)
        for i, (dims, tile) in enumerate(zip((row.lhs, row.rhs), tiles, strict=True))
    ]
    shape = (B, *(shapes[c] for c in row.out))
    init = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))

    def run(lhs, rhs, groups, init=None):
        given = by_name(variant, groups)
        out = fp8.gemm(lhs, rhs, **given, variant=variant, out_dtype=jnp.float32, init=init)
        inside = (
            jnp.arange(m)[None, :, None] < groups[:, None, None] if variant == "masked" else True
        )
        return jnp.where(inside, out, 0)

    return run, (*made, jnp.asarray(groups), init)


@pytest.mark.parametrize("axes", subsets("lhs", "rhs", "groups"))
@pytest.mark.parametrize("variant", GROUPED)
def test_gemm(variant, axes):
    run, batch = gemms(variant, LINES if variant == "ragged_contracting" else BLOCKS)
    check(run, batch[:3], axes)


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize("scales", [ROWS, TENSOR])
def test_gemm_with_other_scales(variant, scales):
    run, batch = gemms(variant, scales)
    check(run, batch[:3], (0, None if variant == "masked" else 0, 0))


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (None, None, None, 0)], ids=["all", "init"])
@pytest.mark.parametrize("variant", GROUPED)
def test_gemm_with_init(variant, axes):
    run, batch = gemms(variant, LINES)
    check(run, batch, axes)


def test_only_some_arrays_of_an_operand_are_batched():
    run, (lhs, rhs, sizes, _) = gemms("ragged", BLOCKS)
    one = jax.tree.map(lambda x: x[0], (lhs, rhs))
    mixed = [fp8.QArray(q.qvalue, many.scale) for q, many in zip(one, (lhs, rhs), strict=True)]
    axes = (fp8.QArray(None, 0), fp8.QArray(None, 0), None)
    got = jax.jit(jax.vmap(run, axes))(*mixed, sizes[0])
    left, right = (fp8.QArray(jnp.stack([q.qvalue] * B), q.scale) for q in mixed)
    many = jnp.stack([sizes[0]] * B)
    assert near(got, jax.jit(jax.vmap(run))(left, right, many))


def kernels_of(function, *shapes) -> list[str]:
    """Returns the custom calls of a program for CUDA, and "while" for each loop."""
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"@jax_fp8gemm_(gemm|quantize)_v1\(|stablehlo.(while)", text)
    return sorted(kernel or loop for kernel, loop in names)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0)], ids=["all", "shared matrices"])
@pytest.mark.parametrize("variant", GROUPED)
def test_a_batch_of_gemms_is_one_kernel(variant, axes):
    run, batch = gemms(variant, LINES)
    found = kernels_of(jax.vmap(jax.vmap(run, axes), axes), *_twice(chosen(batch[:3], axes), axes))
    assert found.count("gemm") == 1


def _twice(operands, axes):
    """Returns types of the operands under two vmaps of five and `B` elements."""
    lead = [(5,) if axis == 0 else () for axis in axes]
    return [
        jax.tree.map(lambda x, dims=dims: jax.ShapeDtypeStruct((*dims, *x.shape), x.dtype), one)
        for one, dims in zip(operands, lead, strict=True)
    ]


def test_shared_matrices_are_not_copied():
    run, batch = gemms("masked", BLOCKS)
    axes = (0, None, 0)
    text = jax.jit(jax.vmap(run, axes)).trace(*chosen(batch[:3], axes)).lower().as_text()
    assert f"tensor<{B}x{G}x{N}x144x" not in text and f"tensor<{B * G}x{N}x144x" not in text


# ---- casts --------------------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(1), (B, 40, 256), jnp.bfloat16)
INDEX = jnp.array([[3, 0, 39, 3, 7], [99, -4, 1, 2, 3], [0, 1, 2, 3, 4]])
SWIGLU = jax.random.uniform(jax.random.key(2), (B, 40))
CASTS = {  # function of x, group sizes, index and row weights
    "rows": lambda x, s, i, w: fp8.quantize_rows(x, index=i),
    "rows by groups": lambda x, s, i, w: inside(fp8.quantize_rows(x, group_sizes=s), s),
    "swiglu": lambda x, s, i, w: fp8.swiglu_quantize(x, w),
    "swiglu by groups": lambda x, s, i, w: inside(fp8.swiglu_quantize(x, w, group_sizes=s), s),
    "transposed": lambda x, s, i, w: fp8.quantize_transposed(x, group_sizes=s),
    "fp8": lambda x, s, i, w: fp8.requantize(fp8.quantize(x), group_sizes=s, index=i),
}


def inside(q, sizes):
    """The rows of the groups; others hold anything."""
    rows = jnp.arange(len(q.qvalue)) < jnp.clip(sizes, 0, None).sum()
    return fp8.QArray(jnp.where(rows[:, None], q.qvalue, 0), jnp.where(rows[:, None], q.scale, 0))


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (None, 0, 0, 0), (0, None, None, None)], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_casts(name, axes):
    check(CASTS[name], (X, jnp.asarray(SIZES), INDEX, SWIGLU), axes, bound=0)


# ---- fp8_ragged_dot -----------------------------------------------------------------------------


@functools.cache
def gradients(function, *argnums):
    """Returns `function`'s result and gradients of a sum that uses every element."""

    def loss(*operands):
        y = function(*operands)
        return (y.astype(jnp.float32) ** 2).sum(), y

    return jax.value_and_grad(loss, argnums, has_aux=True)


def ragged(k: int = 48, n: int = N, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 2)
    lhs = jax.random.normal(keys[0], (B, 40, k), dtype)
    rhs = jax.random.normal(keys[1], (B, G, k, n), dtype)
    return lhs, rhs, jnp.asarray(SIZES)


@pytest.mark.parametrize("axes", subsets("lhs", "rhs", "group_sizes"))
def test_ragged_dot_and_its_gradients(axes):
    check(gradients(fp8.fp8_ragged_dot, 0, 1), ragged(), axes)


def test_ragged_dot_that_casts_in_the_gemm():
    batch = ragged(n=32, dtype=jnp.bfloat16)
    check(gradients(fp8.fp8_ragged_dot, 0, 1), batch, (0, None, 0), 1e-2)


def test_gradient_of_a_vmap():
    lhs, rhs, sizes = ragged()
    shared = rhs[0]

    def loss(many, lhs, rhs):
        return (many(lhs, rhs, sizes) ** 2).sum()

    many = jax.vmap(fp8.fp8_ragged_dot, (0, None, 0))
    each = lambda a, b, s: jax.lax.map(lambda t: fp8.fp8_ragged_dot(t[0], b, t[1]), (a, s))  # noqa: E731
    got, expected = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1))) for f in (many, each))
    assert near(got(lhs, shared), expected(lhs, shared))


def test_nested_vmaps_of_different_operands():
    lhs, rhs, sizes = ragged()
    outer = jax.vmap(jax.vmap(fp8.fp8_ragged_dot, (0, None, None)), (None, 0, 0))
    got = jax.jit(outer)(lhs, rhs, sizes)
    expected = jax.jit(
        lambda: [[fp8.fp8_ragged_dot(a, rhs[i], sizes[i]) for a in lhs] for i in range(B)]
    )()
    assert near(got, jnp.stack([jnp.stack(row) for row in expected]))


@pytest.mark.parametrize("axes", subsets("lhs", "rhs", "group_sizes")[:3])
def test_vmap_of_nothing(axes):
    operands = [x[:0] if axis == 0 else x[0] for x, axis in zip(ragged(), axes, strict=True)]
    y = jax.vmap(fp8.fp8_ragged_dot, axes)(*operands)
    assert y.shape == (0, 40, N)
    (_, y), (dlhs, drhs) = jax.vmap(gradients(fp8.fp8_ragged_dot, 0, 1), axes)(*operands)
    assert y.shape == (0, 40, N) and dlhs.shape == (0, 40, 48) and drhs.shape == (0, G, 48, N)


def test_garbage_past_the_groups_stays_in_no_element():
    lhs, rhs, sizes = ragged()
    past = jnp.arange(40) >= jnp.clip(sizes, 0, None).sum(1, keepdims=True)
    dirty = jnp.where(past[:, :, None], jnp.nan, lhs)
    run = jax.jit(jax.vmap(gradients(fp8.fp8_ragged_dot, 0, 1)))
    for a, b in zip(jax.tree.leaves(run(dirty, rhs, sizes)), jax.tree.leaves(run(lhs, rhs, sizes))):  # noqa: B905
        np.testing.assert_array_equal(a, b)


def test_scan_and_remat_of_a_vmap():
    lhs, rhs, sizes = ragged(k=N)

    def loss(rhs, run):
        layer = jax.checkpoint(lambda x, _: (run(x, rhs, sizes), None))
        return (jax.lax.scan(layer, lhs, None, length=2)[0] ** 2).sum()

    def twice(x, w, s):
        return fp8.fp8_ragged_dot(fp8.fp8_ragged_dot(x, w, s), w, s)

    got = jax.jit(jax.grad(lambda w: loss(w, jax.vmap(fp8.fp8_ragged_dot))))(rhs)
    alone = jax.grad(lambda w, x, s: (twice(x, w, s) ** 2).sum())
    expected = jax.jit(lambda: jax.lax.map(lambda t: alone(*t), (rhs, lhs, sizes)))()
    assert near(got, expected)


# ---- experts ------------------------------------------------------------------------------------

T, H, F, TOP_K = 16, 32, 128, 2


def layer():
    """Returns x, gate_kernel and kernels of a batch of layers."""
    keys = jax.random.split(jax.random.key(4), 5)
    x = jax.random.normal(keys[0], (B, T, H))
    gate = jax.random.normal(keys[1], (B, H, G))
    shapes = {"wi_0": (H, F), "wi_1": (H, F), "wo": (F, H)}
    kernels = {
        name: jax.random.normal(key, (B, G, *shape)) / 8
        for (name, shape), key in zip(shapes.items(), keys[2:], strict=True)
    }
    return x, gate, fp8.ExpertKernels(**kernels)


def choices():
    x, _, kernels = layer()
    index = jax.random.randint(jax.random.key(5), (B, T, TOP_K), -1, G)
    return x, index, jax.random.uniform(jax.random.key(6), index.shape), kernels


FFNS = {capacity: functools.partial(fp8.expert_ffn, capacity=capacity) for capacity in (None, 6)}
SUBSETS = {
    "all": (0, 0, 0, 0),
    "tokens": (0, 0, 0, None),
    "kernels": (None, None, None, 0),
    "expert_index": (None, 0, None, None),
}


@pytest.mark.parametrize(
    ("capacity", "batched"), [(6, "all"), (6, "tokens"), *((None, name) for name in SUBSETS)][:-1]
)
def test_expert_ffn_and_its_gradients(batched, capacity):
    check(gradients(FFNS[capacity], 0, 2, 3), choices(), SUBSETS[batched], 1e-3)


def whole_layer(x, gate, kernels):
    y, routing = fp8.moe(x, gate, kernels, top_k=TOP_K)
    return y + routing.aux_loss + routing.z_loss


@pytest.mark.parametrize("axes", [(0, 0, 0), (None, 0, None)], ids=["all", "gate_kernel"])
def test_moe_and_its_gradients(axes):
    check(gradients(whole_layer, 0, 1, 2), layer(), axes, 1e-3)


def test_prepared_and_shared_kernels():
    x, gate, kernels = layer()
    one = jax.tree.map(lambda w: w[:, 0], kernels)

    def run(x, gate, kernels, shared):
        return fp8.moe(x, gate, fp8.prepare_experts(kernels), top_k=TOP_K, shared=shared)[0]

    check(run, (x, gate, kernels, one), (0, None, 0, 0), 1e-3)


def test_parts_of_the_layer():
    x, gate, kernels = layer()

    def run(x, gate, w):
        routing = fp8.route(x @ gate, TOP_K)
        rows, permutation = fp8.permute(x, routing.expert_index, G)
        rows = fp8.fp8_ragged_dot(rows, w, permutation.group_sizes)
        return fp8.unpermute(rows, permutation, TOP_K), routing

    check(run, (x, gate, kernels.wi_0), (0, 0, 0), 1e-3)


def test_inference_of_a_batch_has_no_loop_around_kernels():
    def run(x, gate, kernels):
        return fp8.moe(x, gate, fp8.prepare_experts(kernels), top_k=TOP_K)[0]

    one = kernels_of(run, *(jax.tree.map(lambda x: x[0], part) for part in layer()))
    many = kernels_of(jax.vmap(run), *layer())
    assert [k for k in many if k != "while"] == [k for k in one if k != "while"]


def test_linen_layer():
    pytest.importorskip("flax")
    from jax_fp8gemm import linen

    module = linen.Fp8MoE(num_experts=G, hidden_features=F, top_k=TOP_K)
    x = layer()[0]
    init = jax.jit(jax.vmap(module.init))
    variables = init(jax.random.split(jax.random.key(0), B), x)
    check(lambda v, x: module.apply(v, x), (variables, x), (0, 0), 1e-3)


def test_nnx_layer():
    pytest.importorskip("flax")
    from flax import nnx

    from jax_fp8gemm import nnx as layers

    @nnx.vmap
    def make(key):
        return layers.Fp8MoE(H, F, G, top_k=TOP_K, rngs=nnx.Rngs(key))

    module, x = make(jax.random.split(jax.random.key(0), B)), layer()[0]
    graph, state = nnx.split(module)
    check(lambda state, x: nnx.merge(graph, state)(x), (state, x), (0, 0), 1e-3)


# ---- meshes -------------------------------------------------------------------------------------


def on_stages(kind: AxisType, tree):
    """Returns a mesh of four stages and two others, and the arrays, one element for each stage."""
    mesh = jax.make_mesh((4, 2), ("stage", "data"), axis_types=(kind,) * 2)
    four = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), tree)
    at = NamedSharding(mesh, P("stage"))
    return mesh, jax.tree.map(lambda x: jax.device_put(x, at), four), four


def each(function, operands):
    return jax.jit(lambda *x: jax.lax.map(lambda one: function(*one), x))(*operands)


@pytest.mark.parametrize(
    ("kind", "axis"), [("Auto", None), ("Auto", "stage"), ("Explicit", "stage")]
)
def test_a_batch_that_lies_on_a_mesh_stays_there(kind, axis):
    mesh, placed, whole = on_stages(AxisType[kind], ragged(k=256, n=256))
    run = gradients(fp8.fp8_ragged_dot, 0, 1)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.vmap(run, spmd_axis_name=axis)).lower(*placed).compile()
    got = program(*placed)
    assert near(got, each(run, whole)) and not gathered(program.as_text())
    assert all(y.sharding.spec[0] == "stage" for y in jax.tree.leaves(got))


def test_a_batch_of_layers_on_stages():
    mesh, placed, whole = on_stages(AxisType.Auto, layer())

    def run(x, gate, kernels):
        return fp8.moe(x, gate, kernels, top_k=TOP_K)[0]

    with jax.set_mesh(mesh):
        got = jax.jit(jax.vmap(run, spmd_axis_name="stage"))(*placed)
    assert near(got, each(run, whole), 1e-3) and got.sharding.spec[0] == "stage"


@pytest.mark.parametrize("inside", [True, False], ids=["vmap inside", "shard_map inside"])
def test_experts_on_devices_under_vmap(inside):
    mesh, _, whole = on_stages(AxisType.Auto, layer())

    def run(x, gate, kernels):
        return fp8.moe(x, gate, kernels, top_k=TOP_K, expert_axis="data")[0]

    def split(function, *lead):
        at = P(*lead, "data")
        return jax.shard_map(function, mesh=mesh, in_specs=(at, P(*lead), at), out_specs=at)

    alone = gradients(split(run), 0, 1, 2)
    if inside:
        got = jax.jit(gradients(split(jax.vmap(run), "stage"), 0, 1, 2))(*whole)[1]
    else:
        got = jax.jit(jax.vmap(alone, spmd_axis_name="stage"))(*whole)[1]
    assert near(got, each(alone, whole)[1], 1e-3)
