"""Several GPUs of one host: each gives the same bits, and together what one gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import count, place
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from made_up import random_operands
from numerics import calc_diff
from processes import losses_of_two

import jax_fp8gemm as fp8
from jax_fp8gemm._select.problem import Problem

P = PartitionSpec
B, S, K, N = 8, 256, 1024, 2048
TOKENS, H, F, EXPERTS, TOP_K = 512, 256, 384, 8, 2


@pytest.fixture(scope="module")
def mesh():
    """All devices in a row."""
    if len(jax.devices()) < 2:
        pytest.skip("one GPU: these tests want two or more of one host")
    return jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Auto,))


def test_every_device_gives_the_same_bits(mesh):
    operands = random_operands(Problem("dense", 300, 512, 1024))
    results = [
        np.asarray(jax.jit(fp8.gemm)(*jax.device_put(operands, device)), np.float32)
        for device in mesh.devices
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# Shardings of x [b, s, k], w [k, n] and y [b, s, n]; kinds of collectives of forward and backward.
STRATEGIES = {
    "data": (("x",), (), ("x",), {"all-reduce"}),
    "columns": ((), (None, "x"), (None, None, "x"), {"all-reduce"}),
    "rows": ((None, None, "x"), ("x",), (), {"all-reduce"}),
    "fsdp": (("x",), ("x",), ("x",), {"all-gather", "reduce-scatter"}),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_sharded_product_and_its_gradients(mesh, name):
    *specs, kinds = STRATEGIES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, S, K), (K, N), (B, S, N)
    given = [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]

    def step(x, w, dy):
        y, pull = jax.vjp(fp8.fp8_matmul, x, w)
        return y, *pull(dy)

    x_at, w_at, y_at = (NamedSharding(mesh, P(*spec)) for spec in specs)
    placed = place(mesh, given, *specs)
    run = jax.jit(step, out_shardings=(y_at, x_at, w_at)).lower(*placed).compile()
    assert set(count(run.as_text())) == kinds
    for got, expected in zip(run(*placed), jax.jit(step)(*given), strict=True):
        assert calc_diff(got, expected) < 1e-5


def layer(x, gate_kernel, kernels, **options):
    return fp8.moe(x, gate_kernel, kernels, top_k=TOP_K, **options)[0]


def with_gradients(function):
    def loss(*parameters):
        y = function(*parameters)
        return (y.astype(jnp.float32) ** 2).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("wire", ["fp8", "bf16"])
def test_experts_split_over_devices(mesh, exchange, wire):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (TOKENS, H), (H, EXPERTS), (EXPERTS, H, F), (EXPERTS, H, F), (EXPERTS, F, H)
    x, gate_kernel, wi_0, wi_1, wo = (
        jax.random.normal(key, shape, jnp.bfloat16) * shape[-2] ** -0.5
        for key, shape in zip(keys, shapes, strict=True)
    )
    given = x, gate_kernel, fp8.ExpertKernels(wi_0=wi_0, wi_1=wi_1, wo=wo)
    options = {"expert_axis": "x", "exchange": exchange, "wire": wire}
    split = jax.shard_map(
        functools.partial(layer, **options),
        mesh=mesh,
        in_specs=(P("x"), P(), P("x")),
        out_specs=P("x"),
    )
    (_, y), gradients = with_gradients(split)(*given)
    (_, expected_y), expected = with_gradients(layer)(*given)
    # The gradient that comes in is 2y, whose bf16 roundings another way of adding up changes.
    assert calc_diff(y, expected_y) < 1e-4
    pairs = jax.tree.leaves(gradients), jax.tree.leaves(expected)
    for got, right in zip(*pairs, strict=True):
        assert calc_diff(got, right) < 5e-4


PROCESS = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), local_device_ids=[int(sys.argv[2])])
assert len(jax.local_devices()) == 1 and len(jax.devices()) == 2
from test_examples import load
print("losses", *load("06_sharded").main(steps=3, width=512, hidden=512))
"""


def test_two_processes_with_a_gpu_each(mesh):
    losses = losses_of_two(PROCESS, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert losses[2] < losses[0]
