"""How work is cut up over a mesh: the plan of each rule, without a program."""

import dataclasses
import functools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8gemm._bind import gemm_op, partition, quantize_op
from jax_fp8gemm._bind.gathered import Gathered, _said
from jax_fp8gemm._bind.gemm_op import GemmSpec
from jax_fp8gemm._bind.partition import (
    Dim,
    Rule,
    Total,
    assign,
    blocked_letters,
    partitioned,
    scale_dims,
    shardy_rule,
    spec_of,
)
from jax_fp8gemm._bind.quantize_op import CastSpec
from jax_fp8gemm._core.variants import SCALES, VARIANTS
from jax_fp8gemm._core.version import __version__

MESH = types.SimpleNamespace(shape={"data": 4, "model": 2, "seq": 3})


def dims(text: str) -> tuple[Dim, ...]:
    """ "m k/128 n/all" as dims."""
    pers = {"": 1, "128": 128, "all": None}
    return tuple(Dim(x[0], pers[x[2:]]) for x in text.split())


def arrays(text: str) -> tuple:
    return tuple(dims(x) for x in text.split(", "))


def rule_of(text: str, voters=((0, 1), (1, 1)), **fields) -> Rule:
    operands, results = text.split(" -> ")
    sets = {k: frozenset(v) if isinstance(v, str) else v for k, v in fields.items()}
    return Rule("test", arrays(operands), arrays(results), voters, **sets)


def text_of(rule: Rule) -> str:
    def array(dims) -> str:
        names = {1: "", 128: "/128", None: "/all"}
        return " ".join(dim.letter + names[dim.per] for dim in dims)

    return f"{', '.join(map(array, rule.operands))} -> {', '.join(map(array, rule.results))}"


DENSE = rule_of("m k, n k, m k/128, n/128 k/128, m n -> m n", summed="k", blocked="nk", added=4)
PLAIN = rule_of("m k, n k -> m n", summed="k")
SHAPES = ((512, 1024), (384, 1024), (512, 8), (3, 8), (512, 384))


# ---- Rules ---------------------------------------------------------------------------------------


def test_scales_have_a_dim_for_each_of_their_array():
    assert scale_dims("gmk", (1, 128)) == dims("g m k/128")
    assert scale_dims("nk", (128, 128)) == dims("n/128 k/128")
    assert scale_dims("gmk", (None, None)) == dims("g m/all k/all")
    assert blocked_letters(*arrays("m k, n/128 k/128, h/all m")) == {"n", "k"}


def test_letters_and_sizes_are_the_operands():
    assert DENSE.letters() == ("m", "k", "n")
    assert DENSE.sizes(SHAPES) == {"m": 512, "k": 1024, "n": 384}
    assert rule_of("m/128 k/all, m k -> m").sizes(((4, 1), (512, 64))) == {"m": 512, "k": 64}


def test_every_operand_has_a_shape():
    with pytest.raises(ValueError, match="shorter"):
        DENSE.sizes(SHAPES[:2])


def test_a_plain_rule_cuts_anything_and_sums_nothing():
    rule = Rule("test", (), (), ())
    assert rule.summed == rule.whole == rule.blocked == frozenset() and rule.added is None
    assert Dim("m").per == 1


def test_rules_and_sums_are_keys_of_caches():
    same = rule_of("m k, n k -> m n", summed="k")
    assert hash(PLAIN) == hash(same) and PLAIN == same != DENSE
    for one, field in ((Dim("m"), "per"), (PLAIN, "op"), (Total((), ("data",)), "axes")):
        hash(one)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field, None)


# ---- Shardy's notation ---------------------------------------------------------------------------


def test_blocks_travel_through_the_operation_whole():
    notation, factors = shardy_rule(DENSE, SHAPES)
    assert notation == ("m (kb ki), (nb ni) (kb ki), m kb, nb kb, m (nb ni) -> m (nb ni)")
    assert factors == {"reduction_factors": ("kb", "ki"), "ki": 128, "ni": 128}


def test_blocks_that_no_scales_count_have_their_number_beside_them():
    """Shardy wants the sizes of factors that never stand alone."""
    notation, factors = shardy_rule(rule_of("m k -> k", blocked="k"), ((4, 384),))
    assert notation == "m (kb ki) -> (kb ki)"
    assert factors == {"reduction_factors": (), "kb": 3, "ki": 128}


def test_scales_may_come_before_their_array():
    rule = rule_of("m k/128, m k -> m", blocked="k")
    notation, factors = shardy_rule(rule, ((4, 2), (4, 256)))
    assert notation == "m kb, m (kb ki) -> m"
    assert factors == {"reduction_factors": (), "ki": 128}
    assert shardy_rule(rule_of("m k -> m"), ((4, 256),))[0] == "m k -> m"  # not blocked


def test_what_cannot_be_cut_has_a_factor_of_its_own_in_every_array():
    """No sharding travels through it; of k = 128 there is one block, and 200 is no blocks."""
    for k in (128, 200):
        rule = rule_of("m k, g m/all k/128 -> g m", blocked="k", whole="g", summed="k")
        notation, factors = shardy_rule(rule, ((4, k), (3, 1, 2)))
        assert notation == "m only0, only1 only2 only3 -> only4 m"
        assert factors == {"reduction_factors": ()}
    whole = rule_of("m k -> m", blocked="k", whole="k")
    assert shardy_rule(whole, ((4, 256),))[0] == "m only0 -> m"


def test_only_contracted_letters_are_summed():
    notation, factors = shardy_rule(rule_of("m h, n h -> m n", summed="h"), ((4, 8), (5, 8)))
    assert (notation, factors) == ("m h, n h -> m n", {"reduction_factors": ("h",)})


# ---- Votes ---------------------------------------------------------------------------------------


def plan(rule: Rule, *offered, sizes=None, mesh=MESH) -> dict:
    """Returns assign's plan; offered: (dims as text, spec) or (dims, spec, votes)."""
    sizes = sizes or dict.fromkeys("mnkg", 3072)
    votes = [(dims(x), P(*spec), *(rest or (1,))) for x, spec, *rest in offered]
    return assign(rule, votes, sizes, mesh)


def test_an_array_keeps_its_sharding():
    assert plan(PLAIN, ("m k", ("data", "model"))) == {"m": ("data",), "k": ("model",)}
    assert plan(PLAIN, ("m k", (("data", "model"),))) == {"m": ("data", "model")}
    assert plan(PLAIN, ("m k", (None, "seq"))) == {"k": ("seq",)}
    assert plan(PLAIN, ("m k", ())) == plan(PLAIN) == {}


def test_each_axis_cuts_the_letter_with_the_most_votes():
    assert plan(PLAIN, ("m k", (None, "data")), ("n k", ("data",)), ("m n", (None, "data"))) == {
        "n": ("data",)
    }
    heavy = plan(PLAIN, ("n k", ("data",), 3), ("m k", ("data",), 1), ("m n", ("data",), 1))
    assert heavy == {"n": ("data",)}
    assert plan(PLAIN, ("n k", ("data",), 2), ("m k", ("data",)), ("m n", ("data",), 2)) == {
        "m": ("data",)
    }


def test_of_as_many_votes_the_first_letter_wins():
    """Rows of the activations stay where they are, and weights are gathered."""
    assert plan(PLAIN, ("n k", ("data",)), ("m k", ("data",))) == {"m": ("data",)}
    assert plan(PLAIN, ("n k", ("data",)), ("m k", (None, "data"))) == {"k": ("data",)}
    assert plan(PLAIN, ("n k", ("data",)), ("m k", ("data",)), ("m n", ("model",))) == {
        "m": ("data", "model")
    }


def test_whole_letters_are_not_cut():
    rule = rule_of("m k, n k -> m n", whole="m")
    assert plan(rule, ("m k", ("data",))) == {}
    assert plan(rule, ("m k", ("data",), 5), ("n k", ("data",))) == {"n": ("data",)}


def test_axes_that_leave_a_remainder_are_dropped_from_the_inner_one_on():
    three = ("m k", (("model", "data", "seq"),))
    for size, axes in {24: ("model", "data", "seq"), 8: ("model", "data"), 2: ("model",),
                       12: ("model",), 3: (), 4: ("model",)}.items():  # fmt: skip
        assert plan(PLAIN, three, sizes={"m": size, "k": 4}) == {"m": axes}


def test_blocked_letters_are_cut_into_whole_blocks():
    rule = rule_of("m k, n k -> m n", blocked="k")
    fits = plan(rule, ("m k", ("data", ("model",))), sizes={"m": 4, "k": 256})
    assert fits == {"m": ("data",), "k": ("model",)}
    split = plan(rule, ("m k", (None, ("model", "data"))), sizes={"m": 4, "k": 1280})
    assert split == {"k": ("model",)}  # ten blocks: five on each of two, but not on eight


def gathered(rule: Rule, *specs: tuple, sizes: dict[str, int]) -> list[Gathered]:
    """What `rule` gathers of e4m3 operands with these shardings, which all vote."""
    shapes = [
        tuple(sizes[d.letter] if d.per == 1 else -(-sizes[d.letter] // d.per) for d in dims)
        for dims in rule.operands
    ]
    voters = [(dims, P(*spec), 1) for dims, spec in zip(rule.operands, specs, strict=True)]
    elected = partition.elect(rule, voters)
    cut = partition.fitted(rule, elected, sizes, MESH)
    given = [
        (
            jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
            P(*spec, *[None] * (len(shape) - len(spec))),
        )
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return partition.find_gathered(rule, elected, cut, MESH, given)


SPLIT_BLOCK = Gathered(
    op="test",
    letter="k",
    size=1280,
    axes=("model", "data"),
    devices=8,
    arrays=("x e4m3[4, 1280], 5120 bytes", "w e4m3[8, 1280], 10240 bytes"),
    whole=False,
)


def test_what_splits_a_block_is_gathered():
    rule = dataclasses.replace(rule_of("m k, n k -> m n", blocked="k"), names=("x", "w"))
    sizes = {"m": 4, "n": 8, "k": 1280}
    (found,) = gathered(rule, (None, ("model", "data")), (None, ("model", "data")), sizes=sizes)
    assert found == SPLIT_BLOCK
    assert not gathered(rule, (None, "model"), (None, "model"), sizes=sizes)
    assert not gathered(rule, ("data",), (), sizes={**sizes, "k": 128})


def test_what_is_whole_is_gathered_and_what_another_letter_outvotes_is_not_named():
    rule = rule_of("m k, g n k, g -> m n", whole="gm")
    sizes = {"m": 4, "n": 8, "k": 16, "g": 2}
    found = gathered(rule, ("data",), ("model", "seq"), ("model",), sizes=sizes)
    assert [(one.letter, one.axes, one.devices, one.whole) for one in found] == [
        ("m", ("data",), 4, True),
        ("g", ("model",), 2, True),
    ]
    assert [one.arrays for one in found] == [
        ("operand 0 e4m3[4, 16], 64 bytes",),
        ("operand 1 e4m3[2, 8, 16], 256 bytes",),  # a vector of groups is not worth a word
    ]
    fsdp = rule_of("m k, n k -> m n", blocked="n")
    assert not gathered(fsdp, ("data",), ("data",), sizes=sizes)
    scales = Rule(
        "test", ((Dim("m"), Dim("k", 128)), dims("m k")), (), ((1, 1),), whole=frozenset("m")
    )
    (found,) = gathered(scales, ("data",), (), sizes={"m": 4, "k": 256}) or (None,)
    assert found is None  # scales are small, and follow their array


def test_a_warning_is_given_once_and_one_of_experts_for_all_their_gemms():
    _said.clear()
    block = SPLIT_BLOCK
    with pytest.warns(UserWarning) as seen:
        block.warn()
    assert str(seen[0].message) == (
        "test: a mesh axis splits a block of scales; the dim is replicated along it.\n"
        "  got       k=1280 over model, data of 8 devices: shards of 160; every device gathers "
        "x e4m3[4, 1280], 5120 bytes; every device gathers w e4m3[8, 1280], 10240 bytes\n"
        "  expected  shards that are multiples of 128\n"
        "  fix       make k a multiple of 1024, or shard another dim over model, data"
    )
    experts = dataclasses.replace(block, op="gemm ragged", letter="g", whole=True)
    with pytest.warns(UserWarning, match=r"pass expert_axis=\('model', 'data'\) to moe"):
        experts.warn()
    other = dataclasses.replace(experts, op="gemm ragged_contracting", arrays=("w e4m3[1], 1",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block.warn()
        other.warn()
    columns = dataclasses.replace(block, op="gemm dense", whole=True)
    for one in (dataclasses.replace(experts, size=4), columns):
        with pytest.warns(UserWarning):
            one.warn()


def test_an_array_has_the_axes_of_its_letters():
    cut = {"m": ("data",), "k": ("model", "seq"), "n": ()}
    assert spec_of(dims("m k"), cut) == P("data", ("model", "seq"))
    assert spec_of(dims("m k/128"), cut) == P("data", ("model", "seq"))
    assert spec_of(dims("m/all k"), cut) == P(None, ("model", "seq"))
    assert spec_of(dims("g n m"), cut) == P(None, None, "data")


# ---- Sums over devices ---------------------------------------------------------------------------


def total(cut: dict, wanted: tuple, rule: Rule = PLAIN, **sizes):
    sizes = dict.fromkeys("mnkl", 24) | sizes
    return partition._total(rule, cut, P(*wanted), sizes, MESH)


def test_without_a_cut_contraction_there_is_no_sum():
    assert total({"m": ("data",)}, ("data",)) == (None, {"m": ("data",)})


def test_a_sum_is_over_the_axes_of_k():
    assert total({"m": ("data",), "k": ("model", "seq")}, ()) == (
        Total((), ("model", "seq")),
        {"m": ("data",)},
    )
    two = rule_of("m k l, n k l -> m n", summed="kl")
    assert total({"l": ("seq",), "k": ("model",)}, (), two)[0] == Total((), ("model", "seq"))


def test_a_sum_is_scattered_where_its_result_is_sharded():
    assert total({"k": ("model",)}, (None, "model")) == (
        Total((("model", 1),), ()),
        {"n": ("model",)},
    )
    both = total({"m": ("data",), "k": ("model", "seq")}, (("data", "model"),))
    assert both == (Total((("model", 0),), ("seq",)), {"m": ("data", "model")})
    two = total({"k": ("model", "seq")}, ("model", "seq"))
    assert two == (Total((("model", 0), ("seq", 1)), ()), {"m": ("model",), "n": ("seq",)})


def test_a_sum_is_scattered_behind_the_axes_that_cut_already_and_in_equal_parts():
    cut = {"m": ("data",), "k": ("model",)}
    plain = (Total((), ("model",)), {"m": ("data",)})
    assert total(cut, (("model", "data"),)) == plain  # model would be the inner axis, not the outer
    assert total(cut, ("model",)) == plain
    assert total(cut, (("data", "model"),), m=12) == plain  # 12 rows on 4 × 2 devices
    assert total(cut, (("data", "model"),), m=16)[0] == Total((("model", 0),), ())
    assert total(cut, (None, "seq")) == plain  # no axis of k


def test_a_total_is_the_sum_of_all_parts():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    x = np.arange(4.0 * 8, dtype=np.float32).reshape(4, 2, 4)

    def run(total: Total, out: P):
        local = jax.shard_map(
            lambda part: total(part[0]), mesh=mesh, in_specs=P(("a", "b")), out_specs=out
        )
        return jax.jit(local)(x)

    np.testing.assert_array_equal(run(Total((), ("a", "b")), P()), x.sum(0))
    np.testing.assert_array_equal(run(Total((("a", 0),), ("b",)), P("a")), x.sum(0))
    np.testing.assert_array_equal(run(Total((("a", 1), ("b", 0)), ()), P("b", "a")), x.sum(0))


# ---- What an array offers ------------------------------------------------------------------------


def devices(*shape: int) -> Mesh:
    names = ("a", "b", "c")[: len(shape)]
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def offered(mesh: Mesh, shape: tuple[int, ...], *spec):
    x = types.SimpleNamespace(shape=shape, sharding=NamedSharding(mesh, P(*spec)))
    return partition._offered(x, mesh)


def test_an_array_offers_its_axes_outer_ones_first():
    mesh = devices(2, 2, 2)
    for spec in ((), ("a",), (None, "b"), ("c", "a"), (("b", "a"), "c"), (None, ("a", "b", "c"))):
        full = (*spec, *[None] * (2 - len(spec)))
        assert offered(mesh, (8, 16), *spec) == P(*full), spec


def test_shards_may_have_one_row():
    assert offered(devices(2, 4), (2, 4), "a", "b") == P("a", "b")


def test_results_have_a_vote_each():
    mesh = devices(2, 2)

    def array(shape: tuple[int, ...], *spec):
        return types.SimpleNamespace(shape=shape, sharding=NamedSharding(mesh, P(*spec)))

    def planned(lhs: tuple, rhs: tuple, out: tuple) -> tuple:
        operands = [array((8, 4), *lhs), array((16, 4), *rhs)]
        found, cut, wanted = partition._plan(PLAIN, mesh, operands, [array((8, 16), *out)])
        assert found is mesh
        return cut, wanted

    assert planned(("a",), (), (None, "a")) == ({"m": ("a",)}, [P(None, "a")])
    assert planned(("a",), ("a",), (None, "a")) == ({"n": ("a",)}, [P(None, "a")])
    assert planned((), (), ("b",)) == ({"m": ("b",)}, [P("b", None)])
    operands = [array((8, 4), None, "b"), array((16, 4))]
    assert partition._plan(PLAIN, mesh, operands, ()) == (mesh, {"k": ("b",)}, [])


def test_where_nothing_is_on_a_mesh_nothing_is_cut():
    device = jax.devices()[3]
    single = jax.sharding.SingleDeviceSharding(device)
    arrays = [types.SimpleNamespace(shape=(8, 4), sharding=single)] * 2
    empty = Mesh(np.empty((), object), ())
    mesh, cut, wanted = partition._plan(PLAIN, empty, arrays, [arrays[0]] * 3)
    assert mesh.axis_names == ("devices",) and mesh.devices.tolist() == [device]
    assert cut == {} and wanted == [P()] * 3


def test_an_axis_of_one_device_cuts_nothing():
    assert offered(devices(1, 4, 2), (8, 16), "a", "b") == P(None, "b")


def test_a_part_of_an_axis_is_no_cut():
    """Four devices along an axis, two shards: Shardy may offer that, JAX has no name for it."""
    mesh = devices(4, 2)
    starts = {d: slice(4 * (i // 4), 4 * (i // 4) + 4) for i, d in enumerate(mesh.devices.flat)}
    halves = types.SimpleNamespace(
        devices_indices_map=lambda shape: {d: (s,) for d, s in starts.items()}
    )
    x = types.SimpleNamespace(shape=(8,), sharding=halves)
    assert partition._offered(x, mesh) == P(None)


def test_shards_of_unequal_size_offer_nothing():
    def unequal(shape):
        raise ValueError("unequal")

    x = types.SimpleNamespace(
        shape=(3,), sharding=types.SimpleNamespace(devices_indices_map=unequal)
    )
    assert partition._offered(x, devices(2)) == P()


# ---- Programs ------------------------------------------------------------------------------------

SUMMED = rule_of("m k, n k, m n -> m n", summed="k", added=2)


def product(*operands, total=None, seen: list | None = None):
    """x · wᵀ + init, as the GEMM's: init is added behind the sum."""
    x, w, init = operands
    if seen is not None:
        own = jax.sharding.get_abstract_mesh().empty  # what is traced is for one device
        seen.append((*(tuple(y.shape) for y in operands), own))
    part = x @ w.T
    return [init + (part if total is None else total(part))]


@pytest.mark.parametrize("shardy", [True, False])
def test_devices_get_the_shards_of_the_plan(shardy):
    mesh, seen = devices(2, 2), []
    x, w, init = (np.arange(48.0, dtype=np.float32).reshape(s) for s in ((4, 12), (4, 12), (12, 4)))
    init = init[:4]
    call = partitioned(functools.partial(product, seen=seen), SUMMED, f"shardy {shardy}")
    specs = (P("a", "b"), P(None, "b"), P())
    placed = [
        jax.device_put(y, NamedSharding(mesh, s)) for y, s in zip((x, w, init), specs, strict=True)
    ]
    jax.config.update("jax_use_shardy_partitioner", shardy)
    try:
        with jax.set_mesh(mesh):
            (out,) = jax.jit(call, out_shardings=[NamedSharding(mesh, P("a", "b"))])(*placed)
            (kept,) = jax.jit(call)(*placed)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    for got in (out, kept):
        np.testing.assert_array_equal(got, x @ w.T + init)
    assert out.sharding.spec == P("a", "b") and kept.sharding.spec in (P("a"), P("a", None))
    # k is cut, and init is where the sum will be: along b where that scatters it
    assert ((2, 6), (4, 6), (2, 2), True) in seen and ((2, 6), (4, 6), (2, 4), True) in seen


def test_without_a_mesh_nothing_is_cut():
    seen: list = []
    call = partitioned(functools.partial(product, seen=seen), SUMMED, "no mesh")
    x = np.ones((4, 12), np.float32)
    (out,) = call(x, x, np.ones((4, 4), np.float32))
    np.testing.assert_array_equal(out, np.full((4, 4), 13))
    assert {shapes[:3] for shapes in seen} == {((4, 12), (4, 12), (4, 4))}


def test_a_program_names_all_that_it_depends_on():
    """JAX's persistent cache does not look into what runs on a device."""

    def name(static, op: str = "a b") -> str:
        rule = Rule(op, *arrays_of_one, ((0, 1),))
        return partitioned(lambda x: [x], rule, static).__name__

    arrays_of_one = (arrays("m"), arrays("m"))
    assert name(1).startswith("a_b_") and len(name(1)) == len("a_b_") + 16
    assert name(1) == name(1) != name(2)
    assert name(f"1 {__version__}") != name(1)
    lowered = jax.jit(partitioned(lambda x: [x], Rule("a b", *arrays_of_one, ()), 1))
    assert name(1) in lowered.lower(np.ones(4, np.float32)).as_text()


# ---- The rules of GEMMs --------------------------------------------------------------------------

COLUMNS = SCALES["1x128_1x128"]
GEMMS = {
    "dense": ("m k, n k, m k/128, n k/128 -> m n", ""),
    "batched": ("g m k, g n k, g m k/128, g n k/128 -> g m n", ""),
    "ragged": ("m k, g n k, m k/128, g n k/128, g -> m n", "gm"),
    "contiguous": ("m k, g n k, m k/128, g n k/128, m -> m n", "gm"),
    "masked": ("g m k, g n k, g m k/128, g n k/128, g -> g m n", "m"),
    "ragged_contracting": ("m k, n k, m k/128, n k/128, g -> g m n", "gk"),
}


@pytest.mark.parametrize("variant", GEMMS)
def test_gemms_are_cut_but_for_groups_and_what_these_cut_up(variant):
    text, whole = GEMMS[variant]
    rule = gemm_op.sharding_rule(VARIANTS[variant], COLUMNS, False)
    assert text_of(rule) == text and rule.whole == set(whole)
    assert rule.summed == rule.blocked == {"k"} and rule.added is None
    assert rule.op == f"gemm {variant}"


@pytest.mark.parametrize("scales", SCALES)
def test_scales_of_gemms_follow_their_tiles(scales):
    rule = gemm_op.sharding_rule(VARIANTS["dense"], SCALES[scales], False)
    assert (
        text_of(rule)
        == {
            "1x128_128x128": "m k, n k, m k/128, n/128 k/128 -> m n",
            "1x128_1x128": "m k, n k, m k/128, n k/128 -> m n",
            "row_row": "m k, n k, m k/all, n k/all -> m n",
            "tensor_tensor": "m k, n k, m/all k/all, n/all k/all -> m n",
        }[scales]
    )
    assert rule.blocked == ({"k", "n"} if scales == "1x128_128x128" else {"k"})


def test_init_follows_the_result_and_every_dim_of_rhs_but_the_first_is_contracted():
    row = VARIANTS["dense"].with_ranks(4, 3)
    rule = gemm_op.sharding_rule(row, SCALES["1x128_128x128"], True)
    assert text_of(rule) == "A m B k, n B k, A m B k/128, n B/128 k/128, A m n -> A m n"
    assert rule.summed == {"B", "k"} and rule.added == 4


CASTING = {
    ("bf16", False): ("m k, g n k, m k/128, g -> m n", "gm"),
    ("bf16", True): ("m k, g n f, g n f, m k/128, g -> m n", "gmkf"),
    ("bf16_transposed", False): ("m k, g k n, m k/128, g -> m n", "gm"),
    ("bf16_transposed", True): ("m k, g k f, g k f, m k/128, g -> m n", "gmnf"),
}


@pytest.mark.parametrize("rhs, pair", CASTING)
def test_a_rhs_that_is_cast_is_cut_as_it_lies(rhs, pair):
    """Two that lie side by side are the halves of a dim, which so stays whole."""
    text, whole = CASTING[rhs, pair]
    rule = gemm_op.sharding_rule(VARIANTS["ragged"], SCALES["1x128_128x128"], False, rhs, pair)
    assert text_of(rule) == text and rule.whole == set(whole)
    assert rule.blocked == {"k", "n"} and rule.summed == {"k"}


def test_both_operands_of_a_gemm_vote_and_rows_win():
    rule = gemm_op.sharding_rule(VARIANTS["dense"], COLUMNS, False)
    assert rule.voters == ((0, 1), (1, 1))
    sizes = {"m": 512, "n": 512, "k": 512}

    def cut(lhs: P, rhs: P, out: P | None = None) -> dict:
        voters = [(rule.operands[i], spec, votes)
                  for (i, votes), spec in zip(rule.voters, (lhs, rhs), strict=True)]  # fmt: skip
        return assign(rule, [*voters, (rule.results[0], out or P(), 1)], sizes, MESH)

    assert cut(P("data"), P("data")) == {"m": ("data",)}
    assert cut(P(None, "data"), P("data")) == {"k": ("data",)}
    assert cut(P("data"), P("data"), P(None, "data")) == {"n": ("data",)}
    assert cut(P(), P("model")) == {"n": ("model",)}


def test_the_rule_of_a_gemm_is_that_of_its_spec():
    spec = GemmSpec(
        variant=VARIANTS["ragged"], scales="1x128_128x128", out="bf16", rhs="bf16_transposed",
        pair=True,
    )  # fmt: skip
    rule = gemm_op._rule(spec, ())
    assert text_of(rule) == CASTING["bf16_transposed", True][0]
    adds = GemmSpec(variant=VARIANTS["dense"], scales="row_row", out="f32", accumulate=True)
    assert gemm_op._rule(adds, ()).added == 4


# ---- The rules of casts --------------------------------------------------------------------------

# Spec, whether tokens are a multiple of 128, dims, whole beside r t g p, blocked beside t.
CASTS = {
    "rows": ({}, True, "A m k -> A m k, A m k/128", "", "k"),
    "both": (
        {"transposed": True}, True,
        "A m k -> A m k, A m k/128, A k m, A k m/128", "", "km",
    ),
    "tail_of_tokens": (
        {"transposed": True}, False,
        "A m k -> A m k, A m k/128, A k t, A k t/128", "", "km",
    ),
    "transposed": (
        {"transposed": True, "rows": False, "source": "fp8"}, True,
        "A m k, A m k/128 -> A k m, A k m/128", "", "km",
    ),
    "shared_columns": (
        {"transposed": True, "rows": False, "shared_columns": True}, True,
        "A m k -> A k m, A k m/128", "", "km",
    ),
    "unshared": ({"transposed": True, "rows": False}, True, "A m k -> A k m, A k m/128", "", "m"),
    "token_dims": (
        {"transposed": True, "token_dims": 2}, True,
        "A m k -> A m k, A m k/128, k A m, k A m/128", "", "km",
    ),
    "blocks": (
        {"transposed": True, "tile": (128, 128)}, False,
        "A m k -> A m k, A m/128 k/128, A k m, A k/128 m/128", "", "km",
    ),
    "row_scales": ({"tile": (1, None)}, True, "A m k -> A m k, A m k/all", "hkf", ""),
    "grouped": (
        {"transposed": True, "grouped": True}, True,
        "A m k, g -> A m k, A m k/128, A k t, A k t/128", "m", "km",
    ),
    "gather": ({"gather": True}, True, "A r k, m -> A m k, A m k/128", "m", "k"),
    "pair": (
        {"pair": True, "transposed": True}, True,
        "A m h, A m h -> A m k, A m k/128, A k m, A k m/128", "hkf", "km",
    ),
    "swiglu": (
        {"source": "swiglu", "transposed": True}, True,
        "A m h, m -> A m k, A m k/128, A k m, A k m/128", "hkf", "km",
    ),
    "swiglu_backward": (
        {"source": "swiglu_backward", "transposed": True}, True,
        "A m h, A m h/128, A m f, m -> A m h, A m h/128, "
        "A f m, A f m/128, A f m, A f m/128, A f m, A f m/128, p m", "hkf", "hm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASTS)
def test_casts_are_cut_but_for_groups_gathered_rows_and_pairs(name):
    fields, whole_tokens, text, whole, blocked = CASTS[name]
    rule = quantize_op.sharding_rule(CastSpec(**fields), 3, whole_tokens)
    assert text_of(rule) == text
    assert rule.whole == set("rtgp" + whole)
    assert rule.blocked - {"t"} == set(blocked)
    assert ("t" in rule.blocked) == ("t/128" in text)
    assert rule.summed == set() and rule.added is None and rule.op == "quantize"


def test_dims_before_the_tokens_count_matrices():
    def text(rank: int, **fields) -> str:
        return text_of(quantize_op.sharding_rule(CastSpec(**fields), rank, True))

    assert text(2) == "m k -> m k, m k/128"
    assert text(4) == "A B m k -> A B m k, A B m k/128"
    assert text(4, rows=False, transposed=True) == "A B m k -> A B k m, A B k m/128"
    two = text(5, rows=False, transposed=True, token_dims=2)
    assert two == "A B C m k -> A B k C m, A B k C m/128"
    assert text(4, rows=False, transposed=True, token_dims=3) == "A B m k -> k A B m, k A B m/128"


def test_the_source_of_a_cast_outvotes_all_its_copies():
    """Copies are smaller: rather they travel. At most nine results have the same dim."""
    spec = CastSpec(source="swiglu_backward", transposed=True)
    rule = quantize_op.sharding_rule(spec, 3, True)
    assert len(rule.results) == 9
    ((operand, votes),) = rule.voters
    assert operand == 0
    sizes = {"A": 512, "m": 512, "h": 512, "f": 256}

    def cut(own: str, other: str) -> dict:
        """Returns the plan where x is cut along one letter, and all results along another."""
        arrays = [(rule.operands[0], own, votes), *((dims, other, 1) for dims in rule.results)]
        offered = [
            (dims, P(*("data" if dim.letter == letter else None for dim in dims)), count)
            for dims, letter, count in arrays
        ]
        return assign(rule, offered, sizes, MESH)

    assert cut("m", "A") == {"m": ("data",)} and cut("A", "m") == {"A": ("data",)}


def test_tokens_of_a_cast_are_its_rows_or_its_index():
    def last(spec: CastSpec, *shapes) -> str:
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return text_of(quantize_op._rule(spec, operands)).split(", ")[-1]

    both = CastSpec(transposed=True)
    assert last(both, (2, 256, 128)) == "A k m/128"
    assert last(both, (2, 255, 128)) == "A k t/128"
    swiglu = CastSpec(source="swiglu", transposed=True)
    assert last(swiglu, (1, 256, 512), (256,)) == "A k m/128"
    gather = CastSpec(transposed=True, gather=True)
    assert last(gather, (100, 128), (256,)) == "k m/128"
    assert last(gather, (256, 128), (100,)) == "k t/128"
