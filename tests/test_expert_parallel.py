"""moe over the devices of a mesh axis: equal to moe on one device, with all gradients."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_moe import FORWARD, dense_ffn, make_kernels, make_shared
from jax.sharding import Mesh, PartitionSpec
from numerics import calc_diff

import jax_fp8gemm as fp8
from jax_fp8gemm._moe.exchange import make_slots

P = PartitionSpec
T, H, F, E, TOP_K = 32, 128, 128, 8, 3
SPLIT = {"x": P("x"), "gate_kernel": P(), "kernels": P("x")}


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("x",))


@pytest.fixture(scope="module")
def parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (T, H), jnp.bfloat16)
    gate_kernel = jax.random.normal(keys[1], (H, E)) * 2 / H**0.5
    kernels, shared = make_kernels(keys[2], E, H, F), make_shared(keys[3], H, F, jnp.bfloat16)
    return {"x": x, "gate_kernel": gate_kernel, "kernels": kernels}, shared


def layer(parameters, shared=None, **options):
    y, routing = fp8.moe(**parameters, shared=shared, top_k=TOP_K, **options)
    return y, routing.aux_loss + routing.z_loss


def spread(devices: int, check_vma: bool = True, **options):
    """Returns `layer` over as many devices."""
    return jax.shard_map(
        functools.partial(layer, expert_axis="x", **options),
        mesh=mesh_of(devices),
        in_specs=(SPLIT, P()),
        out_specs=(P("x"), P()),
        check_vma=check_vma,
    )


def spread_with_dropped(devices: int, **options):
    """Returns moe's y and Routing.dropped, over as many devices."""

    def run(parameters):
        y, routing = fp8.moe(**parameters, top_k=TOP_K, expert_axis="x", **options)
        return y, jnp.int32(0) if routing.dropped is None else routing.dropped

    mesh = mesh_of(devices)
    return jax.shard_map(run, mesh=mesh, in_specs=(SPLIT,), out_specs=(P("x"), P()))


def with_gradients(function):
    towards = jax.random.normal(jax.random.key(9), (T, H))

    def loss(parameters, shared):
        y, extra = function(parameters, shared)
        return (y * towards).sum() + 3 * extra, (y, extra)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.fixture(scope="module")
def alone(parameters):
    """y, the losses and the gradients on one device."""
    (_, results), gradients = with_gradients(layer)(*parameters)
    return results, gradients


@pytest.mark.parametrize(
    "exchange, wire, check_vma",
    [
        ("all_gather", "fp8", False),
        ("all_gather", "bf16", True),
        ("all_to_all", "fp8", True),
        ("all_to_all", "bf16", False),
    ],
)
def test_equals_one_device_with_all_gradients(parameters, alone, exchange, wire, check_vma):
    """Tokens are rounded to FP8 once, before or after the wire; results travel as bf16, which
    costs a calc_diff of 2⁻¹⁸ at most for each of their roundings; gradients of weights take no
    such way, and their FP8 numbers are the same."""
    options = {"exchange": exchange, "wire": wire, "check_vma": check_vma}
    (_, (y, extra)), (gradients, shared) = with_gradients(spread(4, **options))(*parameters)
    (expected_y, expected_extra), (expected, expected_shared) = alone
    np.testing.assert_allclose(extra, expected_extra, rtol=1e-5)
    assert y.dtype == jnp.bfloat16 and calc_diff(y, expected_y) < 1e-5
    assert calc_diff(gradients["x"], expected["x"]) < 2e-5
    assert calc_diff(gradients["gate_kernel"], expected["gate_kernel"]) < 1e-10
    for name in ("wi_0", "wi_1", "wo"):
        got, right = (getattr(one["kernels"], name) for one in (gradients, expected))
        assert calc_diff(got, right) < 1e-10, name
    pairs = jax.tree.leaves(shared), jax.tree.leaves(expected_shared)
    for a, b in zip(*pairs, strict=True):
        assert calc_diff(a, b) < 1e-5  # added up in bf16, the kernels' dtype


def test_one_expert_on_each_of_eight_devices(parameters, alone):
    y, _ = jax.jit(spread(8, exchange="all_to_all"))(*parameters)
    assert calc_diff(y, alone[0][0]) < 1e-5


def test_beside_an_axis_of_data(parameters, alone):
    """Weights are the same on both halves of "data": their gradients are summed over it."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "x"))
    body = functools.partial(layer, expert_axis="x")

    def mean_of_losses(*args):
        y, extra = body(*args)
        return y, jax.lax.pmean(extra, "data")

    inputs = {**SPLIT, "x": P(("data", "x"))}
    split = jax.shard_map(
        mean_of_losses, mesh=mesh, in_specs=(inputs, P()), out_specs=(P(("data", "x")), P())
    )
    (_, (y, _)), (gradients, _) = with_gradients(split)(*parameters)
    (expected_y, _), (expected, _) = alone
    assert calc_diff(y, expected_y) < 1e-5
    for name in ("wi_0", "wi_1", "wo"):
        got, right = (getattr(one["kernels"], name) for one in (gradients, expected))
        assert calc_diff(got, right) < 1e-10, name


def on_the_wire(text: str) -> list[str]:
    """Returns the collectives of a StableHLO text that move tokens, with what they are given."""
    pattern = r'stablehlo\.(all_gather|all_to_all|reduce_scatter)"[\s\S]*?: \(tensor<([^>]+)>'
    return sorted(f"{name} {kind}" for name, kind in re.findall(pattern, text))


@pytest.mark.parametrize("wire", ["fp8", "bf16"])
def test_what_is_on_the_wire(parameters, wire):
    """Forward x with its choices, and back y; backward dy, and back dx and weights' gradients.

    A device has T / 4 tokens. What goes together goes in words of four bytes.
    """

    def trace(**options):
        run = with_gradients(spread(4, wire=wire, **options))
        return on_the_wire(run.lower(*parameters).as_text())

    x = (H + 4 * H // 128) // 4 if wire == "fp8" else H // 2
    dy = f"{x}xui32" if wire == "fp8" else f"{H}xbf16"
    there, back = [f"{x + 2 * TOP_K}xui32", dy], [f"{H}xbf16", f"{H}xbf16", f"{TOP_K}xf32"]
    expected = [f"all_gather {T // 4}x{row}" for row in there]
    expected += [f"reduce_scatter {T}x{row}" for row in back]
    assert trace() == sorted(expected)
    expected = [f"all_to_all {T}x{row}" for row in there + back]
    assert trace(exchange="all_to_all") == sorted(expected)


def test_what_remembers_tokens_sends_them_once(parameters):
    """A policy that saves "moe_x" saves the choices that came with it, and nothing goes twice."""

    def count(policy):
        names = jax.checkpoint_policies.save_only_these_names(*policy)
        run = jax.checkpoint(spread(4), policy=names)
        return len(on_the_wire(with_gradients(run).lower(*parameters).as_text()))

    assert count(("moe_x", "moe_h")) == 5  # as without jax.checkpoint
    assert count(()) == 6


def test_a_bound_on_the_rows_of_a_device(parameters, alone):
    """Exact while it is not exceeded, with all gradients."""
    named, _ = parameters
    y, dropped = jax.jit(spread_with_dropped(4, device_capacity_factor=3.0))(named)
    assert int(dropped) == 0 and calc_diff(y, fp8.moe(**named, top_k=TOP_K)[0]) < 1e-5
    run = with_gradients(spread(4, device_capacity_factor=3.0))
    gradients, expected = run(*parameters)[1][0], alone[1][0]
    for name in ("wi_0", "wi_1", "wo"):
        got, right = (getattr(one["kernels"], name) for one in (gradients, expected))
        assert calc_diff(got, right) < 1e-10, name
    assert calc_diff(gradients["gate_kernel"], expected["gate_kernel"]) < 1e-10


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_rows_past_the_bound_of_a_device(parameters, exchange):
    """First choices go before second ones. The rest adds nothing, has no gradient, is counted."""
    named, _ = parameters
    routing = fp8.moe(**named, top_k=TOP_K)[1]
    kept, most = np.asarray(routing.expert_index).copy(), math.ceil(0.8 * T * TOP_K / 4)
    for device in range(4):
        taken = 0
        for j, t in itertools.product(range(TOP_K), range(T)):
            here = kept[t, j] // (E // 4) == device
            taken += here
            if here and taken > most:
                kept[t, j] = E
    assert (kept == E).any()
    bounded = spread_with_dropped(4, device_capacity_factor=0.8, exchange=exchange)

    def of_one(named):
        return fp8.expert_ffn(named["x"], kept, routing.gate_weights, named["kernels"])

    y, dropped = jax.jit(bounded)(named)
    assert int(dropped) == (kept == E).sum()
    assert calc_diff(y, of_one(named)) < 1e-5
    towards = jax.random.normal(jax.random.key(9), (T, H))
    gradients = [
        jax.jit(jax.grad(lambda named, run=run: (run(named) * towards).sum()))(named)["kernels"]
        for run in (lambda named: bounded(named)[0], of_one)
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert calc_diff(a, b) < 1e-10


def test_memory_does_not_grow_with_the_devices_where_rows_are_bounded(parameters):
    """The GEMMs have as many rows as the bound, and not all rows of all devices."""

    def text(**options):
        return jax.jit(spread_with_dropped(8, **options)).lower(parameters[0]).as_text()

    every, most = f"<{T * TOP_K}x{2 * F}x", f"<{2 * T * TOP_K // 8}x{2 * F}x"
    assert every in text()
    bounded = text(device_capacity_factor=2.0)
    assert most in bounded and every not in bounded


def test_capacity_with_all_gather_drops_the_same_rows(parameters):
    y, _ = jax.jit(functools.partial(layer, capacity_factor=0.7))(*parameters)
    split, _ = jax.jit(spread(4, capacity_factor=0.7))(*parameters)
    dropless, _ = jax.jit(layer)(*parameters)
    assert calc_diff(split, y) < 1e-5 and calc_diff(y, dropless) > 1e-2


def test_capacity_with_all_to_all_drops_tokens_of_a_full_device(parameters):
    """A device takes 5 of another's 8 tokens: 0.7 · 8 · 3 / 4, rounded up."""
    named, _ = parameters
    capacity = 5
    split, _ = jax.jit(spread(4, exchange="all_to_all", capacity_factor=0.7))(named, None)
    routing = fp8.moe(**named, top_k=TOP_K)[1]
    kept = np.asarray(routing.expert_index).copy()
    for source in range(4):
        own = slice(source * T // 4, (source + 1) * T // 4)
        for device in range(4):
            here = kept[own] // (E // 4) == device
            late = np.cumsum(here.any(1)) > capacity
            kept[own][here & late[:, None]] = E
    assert (kept == E).any()
    expected = dense_ffn(named["x"], kept, routing.gate_weights, named["kernels"])
    assert calc_diff(split, expected) < FORWARD


def test_slots_against_a_loop(key):
    experts = np.asarray(jax.random.randint(key, (19, 4), -1, 10))
    devices, capacity, own = 3, 6, 3  # the numbers -1 and 9 are no experts
    slots = make_slots(jnp.array(experts), own, devices, capacity)
    token = np.full(devices * capacity, 19)
    slot = np.full((19, devices), devices * capacity)
    for device in range(devices):
        taken = 0
        for t, row in enumerate(experts):
            mine = [j for j, i in enumerate(row) if device * own <= i < (device + 1) * own]
            if mine and taken < capacity:
                token[device * capacity + taken] = t
                slot[t, device] = device * capacity + taken
                taken += 1
    np.testing.assert_array_equal(slots.token, token)
    np.testing.assert_array_equal(slots.slot, slot)
    assert (token < 19).all()  # every device was full
    few = make_slots(jnp.array(experts[:, :2]), 1, 9, 19)  # of many devices: the smallest slots
    every = make_slots(jnp.array(np.tile(experts[:, :2], 5)), 1, 9, 19)
    assert few.slot.shape == (19, 2) and every.slot.shape == (19, 9)
    np.testing.assert_array_equal(few.slot, np.sort(every.slot, 1)[:, :2])
    np.testing.assert_array_equal(few.token, every.token)


def test_experts_that_do_not_split(parameters):
    named, _ = parameters
    six = {**named, "gate_kernel": named["gate_kernel"][:, :6]}
    whole = {**SPLIT, "kernels": P()}
    run = jax.shard_map(
        lambda p: layer(p, expert_axis="x")[0],
        mesh=mesh_of(4),
        in_specs=(whole,),
        out_specs=P("x"),
    )
    with pytest.raises(ValueError) as info:
        run(six)
    assert str(info.value) == (
        "moe: 6 experts do not split over 4 devices.\n"
        "  got       6 experts, mesh axis 'x' of 4 devices\n"
        "  expected  num_experts % 4 == 0\n"
        "  fix       use a multiple of 4 experts, or fewer devices for them"
    )


@pytest.mark.parametrize(
    "options, text",
    [
        ({"expert_axis": "x"}, "no mesh axis 'x' here."),
        ({"exchange": "ring"}, "exchange is unknown."),
        ({"wire": "int8"}, "wire is unknown."),
    ],
)
def test_errors(parameters, options, text):
    with pytest.raises(ValueError, match=text) as info:
        fp8.moe(**parameters[0], top_k=TOP_K, **options)
    assert all(part in str(info.value) for part in ("\n  got ", "\n  expected ", "\n  fix "))
