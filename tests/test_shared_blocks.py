"""Weights whose blocks of scales lie on several devices: bits of one device, and FP8 travels.

XLA's CPU backend widens FP8 to f16 for the transfer.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives, gathered, near
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.gathered import _said as said
from jax_fp8gemm._bind.partition import shardy_rule
from jax_fp8gemm._bind.quantize_op import CastSpec, sharding_rule

BLOCKS = (128, 128)
KINDS = (AxisType.Auto, AxisType.Explicit)


def mesh_of(kind: AxisType = AxisType.Auto, **sizes: int):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def same(got, expected) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_array_equal(a, b)


@pytest.fixture(autouse=True)
def without_warnings():
    said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def weights(*shape: int, dtype=jnp.float32) -> jax.Array:
    """Of magnitudes that differ from row to row, so that a part's own scale would be another."""
    keys = jax.random.split(jax.random.key(3))
    rows = jnp.exp2(jax.random.randint(keys[0], (shape[-2], 1), -12, 12).astype(jnp.float32))
    return (jax.random.normal(keys[1], shape) * rows).astype(dtype)


# ---- the casts -----------------------------------------------------------------------------------

# Shape, sharding, and mesh: shards of 16, 32, 64, 96, 192, 3 rows; tails; columns; both; two axes.
CASTS = {
    "rows_16": ((128, 256), ("data",), {"data": 8}),
    "rows_32": ((256, 256), ("data",), {"data": 8}),
    "rows_64": ((512, 200), ("data",), {"data": 8}),
    "rows_96": ((768, 256), ("data",), {"data": 8}),
    "rows_192": ((1536, 256), ("data",), {"data": 8}),
    "rows_3": ((24, 130), ("data",), {"data": 8}),
    "columns_64": ((256, 512), (None, "data"), {"data": 8}),
    "columns_192": ((100, 384), (None, "data"), {"data": 2}),
    "both": ((96, 384), ("data", "model"), {"data": 4, "model": 2}),
    "rows_beside_whole_blocks": ((96, 512), ("data", "model"), {"data": 4, "model": 2}),
    "two_axes": ((640, 256), (("data", "seq"),), {"data": 2, "seq": 2, "model": 2}),
    "experts": ((4, 96, 256), ("expert", "data"), {"expert": 2, "data": 4}),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_copies_are_those_of_one_device_and_only_maxima_travel(name, kind):
    shape, spec, sizes = CASTS[name]
    mesh, w = mesh_of(kind, **sizes), weights(*shape)
    run = jax.jit(functools.partial(fp8.quantize_both, tile=BLOCKS))
    expected = run(w)
    at = NamedSharding(mesh, P(*spec))
    with jax.set_mesh(mesh):
        made = run.lower(jax.device_put(w, at)).compile()
        got = made(jax.device_put(w, at))
    same(got, expected)
    assert got[0].qvalue.sharding.is_equivalent_to(at, w.ndim)
    found = collectives(made.as_text())
    blocks = [-(-size // 128) for size in shape[-2:]]
    assert [kind for kind, _ in found].count("all-reduce") == 1
    for _, arrays in found:  # of scales, or of maxima: no more than one for each block
        assert all(np.prod(dims) <= np.prod([*shape[:-2], *blocks]) for _, dims in arrays)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("rounding", ["pow2", "none"])
def test_every_dtype_and_rounding(dtype, rounding):
    mesh, w = mesh_of(data=8), weights(640, 192, dtype=jnp.float32)
    w = (w / 64).astype(dtype)
    run = jax.jit(functools.partial(fp8.quantize_both, tile=BLOCKS, scale_rounding=rounding))
    same(run(jax.device_put(w, NamedSharding(mesh, P("data")))), run(w))


def test_zeros_nan_and_infinity():
    mesh, w = mesh_of(data=8), weights(384, 512)
    w = w.at[:128, :128].set(0).at[130, 130].set(jnp.nan).at[300, 5].set(-jnp.inf)
    w = w.at[:128, 256:384].set(1e-42)  # below float32's normal numbers
    run = jax.jit(functools.partial(fp8.quantize, tile=BLOCKS))
    got, expected = run(jax.device_put(w, NamedSharding(mesh, P("data")))), run(w)
    same(got, expected)
    scale = np.asarray(got.scale)
    assert scale[0, 0] == 1 and np.isnan(scale[1, 1]) and np.isnan(scale[2, 0])
    assert np.isfinite(scale[[0, 0, 1, 2], [1, 2, 0, 1]]).all()


def test_without_shardy():
    mesh, w = mesh_of(data=8), weights(384, 256)
    run = jax.jit(functools.partial(fp8.quantize_both, tile=BLOCKS))
    expected = run(w)
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        got = jax.jit(run)(jax.device_put(w, NamedSharding(mesh, P("data"))))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    same(got, expected)


def test_vmap_and_matrices_that_are_split_beside_their_rows():
    mesh, w = mesh_of(expert=2, data=4), weights(4, 96, 256)
    (placed,) = [jax.device_put(w, NamedSharding(mesh, P("expert", "data")))]
    run = jax.jit(jax.vmap(functools.partial(fp8.quantize_transposed, tile=BLOCKS)))
    same(run(placed), run(w))


def test_what_else_is_cut_keeps_its_rule():
    """Rows of 1x128, gathered rows and groups need whole blocks; halves stay side by side."""
    for fields in ({}, {"transposed": True}, {"tile": BLOCKS, "gather": True}):
        assert not sharding_rule(CastSpec(**fields), 3, True).shared
    blocks = CastSpec(tile=BLOCKS, transposed=True)
    assert sharding_rule(blocks, 3, True).shared == {"m", "k"}
    assert sharding_rule(CastSpec(tile=BLOCKS, pair=True), 3, True).shared == {"m"}
    rule, shapes = sharding_rule(CastSpec(tile=BLOCKS), 2, True), [(768, 1024)]
    assert shardy_rule(rule, shapes, [2, 2])[0] == "(mb mi) (kb ki) -> (mb mi) (kb ki), mb kb"
    assert shardy_rule(rule, shapes, [2, 8])[0] == "m (kb ki) -> m (kb ki), only0 kb"


# ---- training ------------------------------------------------------------------------------------


def integers(seed: int, *shape: int) -> jax.Array:
    """Small ones times powers of two: every sum of products is exact, in any order."""
    values, powers = (
        jax.random.randint(key, shape, low, high)
        for key, (low, high) in zip(
            jax.random.split(jax.random.key(seed)), ((-4, 5), (0, 3)), strict=True
        )
    )
    return values * jnp.exp2(powers.astype(jnp.float32))


def step(x, w, dy):
    y, pull = jax.vjp(fp8.fp8_matmul, x, w)
    return (y, *pull(dy))


def compiled(mesh, arrays, specs):
    x, w, y = (NamedSharding(mesh, P(*spec)) for spec in specs)
    placed = [jax.device_put(a, at) for a, at in zip(arrays, (x, w, y), strict=True)]
    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=(y, x, w)).lower(*placed).compile(), placed


@pytest.mark.parametrize(
    "dim, kind", [("k", AxisType.Auto), ("n", AxisType.Auto), ("k", AxisType.Explicit)], ids=str
)
@pytest.mark.parametrize("rows", [16, 32, 64, 96, 192])
def test_fsdp_of_small_shards_gathers_fp8(rows, dim, kind):
    mesh, wide = mesh_of(kind, data=8), 8 * rows
    k, n = (wide, 144) if dim == "k" else (144, wide)
    arrays = integers(0, 1024, k), integers(1, k, n), integers(2, 1024, n)
    w_spec = ("data",) if dim == "k" else (None, "data")
    run, placed = compiled(mesh, arrays, (("data",), w_spec, ("data",)))
    got = run(*placed)
    same(got, jax.jit(step)(*arrays))
    assert got[2].sharding.is_equivalent_to(placed[1].sharding, 2)
    moved = gathered(run.as_text())
    blocks = -(-wide // 128) * 2
    assert sorted(dtype for dtype, dims in moved if np.prod(dims) > blocks) == ["f16", "f16"]
    assert sorted(np.prod(dims) for dtype, dims in moved if dtype == "f16") == [k * n] * 2


@pytest.mark.parametrize("k", [24, 40, 1000])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_number_of_rows(k, kind):
    """Also where the GEMM fills k with zeros to a multiple of 16."""
    mesh = mesh_of(kind, data=8)
    arrays = integers(0, 1024, k), integers(1, k, 72), integers(2, 1024, 72)
    run, placed = compiled(mesh, arrays, (("data",), ("data",), ("data",)))
    same(run(*placed), jax.jit(step)(*arrays))
    moved = [dtype for dtype, dims in gathered(run.as_text()) if np.prod(dims) >= k * 72]
    assert set(moved) <= {"f16", "u8"}


def test_a_tensor_axis_beside_fsdp():
    """n over model in whole blocks, k over data in shards of 48 rows."""
    mesh = mesh_of(data=4, model=2)
    arrays = integers(0, 512, 192), integers(1, 192, 512), integers(2, 512, 512)
    run, placed = compiled(mesh, arrays, (("data",), ("data", "model"), ("data", "model")))
    same(run(*placed), jax.jit(step)(*arrays))
    moved = {dtype for dtype, dims in gathered(run.as_text()) if np.prod(dims) > 8}
    assert moved == {"f16"}


def test_a_weight_that_alone_is_split_travels_in_fp8_with_a_warning():
    """No other axis takes the data axis from k: the GEMM says what it gathers, and its bytes."""
    mesh, w = mesh_of(data=8), integers(1, 192, 256)
    x = integers(0, 64, 192)
    with pytest.warns(UserWarning, match=r"k=192 over data .* rhs e4m3\[256, 192\], 49152 bytes"):
        y = jax.jit(fp8.fp8_matmul)(x, jax.device_put(w, NamedSharding(mesh, P("data"))))
    same(y, fp8.fp8_matmul(x, w))


def test_experts_that_fsdp_splits_into_small_shards():
    """Gate and up in one copy; h of 64 on a device, f of down likewise."""
    mesh, e, h, f = mesh_of(expert=2, data=4), 4, 256, 256
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((64, h), (h, e), (e, h, f), (e, h, f), (e, f, h))
    x, gate_kernel, wi_0, wi_1, wo = (
        jax.random.normal(k, s) / 8 for k, s in zip(keys, shapes, strict=True)
    )
    kernels = fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    dy = jax.random.normal(jax.random.key(1), x.shape)

    def loss(kernels):
        options = {"expert_axis": "expert", "token_axes": ("data", "expert"), "mesh": mesh}
        y, _ = fp8.moe(x, gate_kernel, kernels, top_k=2, cast_in_gemm=False, **options)
        return (y * dy).sum(), y

    def run(spec: P):
        placed = jax.device_put(kernels, NamedSharding(mesh, spec))
        made = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(placed).compile()
        (_, y), gradients = made(placed)
        return y, gradients, gathered(made.as_text())

    y, gradients, moved = run(P("expert", "data"))
    expected_y, expected, _ = run(P("expert"))
    same(y, expected_y)
    assert near(gradients, expected)
    assert {dtype for dtype, dims in moved if np.prod(dims) >= e // 2 * h * f} == {"f16"}
