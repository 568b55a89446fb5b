"""The custom call of the GEMM kernels: its operands, its rules, and the choice of a config.

Operands, in order (`GemmSpec.names`): lhs and rhs, e4m3; their scales, f32; the group operand,
int32, of a grouped variant; init, f32, when accumulating. A rhs that the kernel casts is bf16,
without scales: one array, or two that lie side by side by their last dims.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jax_fp8gemm._bind import meshes
from jax_fp8gemm._bind.merge import Stacked, merge
from jax_fp8gemm._bind.native import QUANTIZE_TARGET, TARGET
from jax_fp8gemm._bind.op import (
    Arrays,
    Op,
    Results,
    Shape,
    bind,
    bind_primitive,
    loop,
    rebind,
    run_batch,
    spread,
    typical,
)
from jax_fp8gemm._bind.partition import Batch, Dim, Rule, Total, blocked_letters, scale_dims
from jax_fp8gemm._core import reference
from jax_fp8gemm._core.errors import fail
from jax_fp8gemm._core.layout import (
    BLOCKS,
    ROW_BLOCKS,
    SCALE_BLOCK,
    TENSOR,
    Tile,
    scale_to_kernel,
)
from jax_fp8gemm._core.types import OutName, RhsName, ScalesName
from jax_fp8gemm._core.variants import SCALES, VARIANTS, Variant
from jax_fp8gemm._select.choice import choose, select
from jax_fp8gemm._select.cost import predicted_microseconds
from jax_fp8gemm._select.problem import (
    DEFAULT_DEVICE,
    GemmConfig,
    Problem,
    attributes,
    most_sms,
    why_illegal,
)

# For jax.export.export(..., disabled_checks=EXPORT_CHECKS): XLA promises nothing about the
# stability of foreign custom calls. This library does, by the version in the target's name.
EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in (TARGET, QUANTIZE_TARGET)
)

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """Static description of one GEMM call.

    Attributes:
      variant: the row of the table, with a letter for each dim of the operands.
      num_sms: upper bound of the multiprocessors to use; 0: that of the environment, or all.
      config: 0 or the user's; None: select's.
      expected_rows: of a masked group, or of all groups of `ragged` and `ragged_contracting`
        together; 0: as many as there is room for.
      rhs: "fp8", or what the kernel casts: "bf16" [g, n, k], "bf16_transposed" [g, k, n].
      pair: such a rhs lies in two arrays.
      accumulate: there is an init, which the result is added to.
      batch_invariant: one order of sums over k for every m, so no device has a part of k.
      leave_rest: rows past the groups of `ragged` hold anything: the caller never reads them. They
        are zeros otherwise.
    """

    variant: Variant
    scales: ScalesName
    out: OutName
    num_sms: int = 0
    config: GemmConfig | None = None
    expected_rows: int = 0
    rhs: RhsName = "fp8"
    pair: bool = False
    accumulate: bool = False
    batch_invariant: bool = False
    leave_rest: bool = False

    @functools.cached_property
    def casts(self) -> bool:
        return self.rhs != "fp8"

    @functools.cached_property
    def tiles(self) -> tuple[Tile, Tile]:
        return SCALES[self.scales]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the operands."""
        present = {
            "lhs": True,
            "rhs": True,
            "rhs_right": self.pair,
            "lhs_scale": True,
            "rhs_scale": not self.casts,
            "groups": self.variant.group_operand is not None,
            "init": self.accumulate,
        }
        return tuple(name for name, there in present.items() if there)

    def named(self, operands: Sequence) -> dict:
        return dict(zip(self.names, operands, strict=True))

    def with_ranks(self, lhs: int, rhs: int) -> "GemmSpec":
        """Returns the spec for operands of these ranks; only `dense` has others than its own."""
        return dataclasses.replace(self, variant=self.variant.with_ranks(lhs, rhs))

    def sizes(self, operands: Sequence) -> dict[str, int]:
        """Returns the size of every letter of the table's row."""
        named = self.named(operands)
        count = named["groups"].shape[0] if "groups" in named else None
        rhs = named["rhs"].shape
        if self.casts:
            rhs = (*rhs[:-1], rhs[-1] * (2 if self.pair else 1))
            rhs = (rhs[0], rhs[2], rhs[1]) if self.rhs == "bf16_transposed" else rhs
        return self.variant.sizes(named["lhs"].shape, rhs, count)

    def out_shape(self, operands: Sequence) -> Shape:
        sizes = self.sizes(operands)
        return tuple(sizes[letter] for letter in self.variant.out)


def gemm(spec: GemmSpec, *operands: jax.Array, out_sharding: NamedSharding | None = None):
    """Returns the result of one GEMM, under every transformation. Arguments have been checked.

    A dense GEMM may have more than two dims: every dim of rhs but the first is contracted, and lhs
    has any number of others before these. They stay apart until each device has its shard, since a
    merged dim can be sharded by its first part alone.
    """
    return bind(GEMM, spec, operands, out_sharding)[0]


# ---- the kernel's meaning and specification -----------------------------------------------------


def _results(spec: GemmSpec, operands: Arrays) -> Results:
    return [(spec.out_shape(operands), DTYPES[spec.out])]


def _reference(spec: GemmSpec, operands: Arrays) -> Arrays:
    named = spec.named(operands)
    if spec.casts:
        named["rhs"], named["rhs_scale"] = _cast(spec, named["rhs"], named.get("rhs_right"))
    rest = [named[name] for name in ("groups", "init") if name in named]
    four = (named[name] for name in ("lhs", "rhs", "lhs_scale", "rhs_scale"))
    name, dtype = spec.variant.name, DTYPES[spec.out]
    same = spec.batch_invariant
    out = reference.gemm(
        *four, *rest, variant=name, tiles=spec.tiles, dtype=dtype, batch_invariant=same
    )
    if spec.leave_rest:  # so that tests notice who reads these rows
        out = reference.spoil_rest(out, named["groups"])
    return [out]


def _cast(spec: GemmSpec, left: jax.Array, right: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns what the kernel makes of a bf16 rhs: [g, n, k] in FP8, and scales in its layout."""
    w = left if right is None else jnp.concatenate((left, right), -1)
    w = jnp.swapaxes(w, -1, -2) if spec.rhs == "bf16_transposed" else w
    values, scale = reference.quantize(w, BLOCKS, "pow2")
    return values, scale_to_kernel(scale, BLOCKS)


def _attributes(spec: GemmSpec, operands: Arrays) -> dict:
    return attributes_for(device_kind(), spec, operands)


def _seconds(spec: GemmSpec, operands: Arrays) -> float:
    problem = problem_of(spec, operands, device_kind())
    config = spec.config or choose(problem)[0]
    return 1e-6 * float(predicted_microseconds(problem, [config])[0])


def attributes_for(device: str, spec: GemmSpec, operands: Sequence) -> dict:
    """Returns the attributes of the custom call for a card of this name."""
    problem = problem_of(spec, operands, device)
    config = spec.config or select(problem)
    reason = why_illegal(problem, config)
    if reason:
        fail(
            "gemm",
            "the config cannot run this GEMM.",
            f"{config}: {reason}",
            f"a legal config for {problem}",
            "leave config out",
        )
    found = attributes(problem, config, pair=spec.pair, leave_rest=spec.leave_rest)
    if jax.export.is_symbolic_dim(spec.sizes(operands)["n"]):
        found["aligned"] = np.int64(0)  # whatever n will be
    return found


def problem_of(spec: GemmSpec, operands: Sequence, device: str) -> Problem:
    """Returns what the choice of a config may depend on."""
    sizes = {letter: typical(size) for letter, size in spec.sizes(operands).items()}
    if spec.expected_rows:
        sizes[spec.variant.groups or "m"] = spec.expected_rows
    return Problem(
        variant=spec.variant.name,
        m=sizes["m"],
        n=sizes["n"],
        k=sizes["k"],
        g=sizes.get("g", 1),
        scales=spec.scales,
        out=spec.out,
        accumulate=spec.accumulate,
        num_sms=most_sms(spec.num_sms),
        device=device,
        rhs=spec.rhs,
        batch_invariant=spec.batch_invariant,
    )


def device_kind() -> str:
    """Returns the kind of the GPU in use, or the default when programs are made without one."""
    device = jax.devices()[0]
    return device.device_kind if device.platform in ("gpu", "cuda") else DEFAULT_DEVICE


def _aliases(spec: GemmSpec) -> dict[int, int]:
    return {spec.names.index("init"): 0} if spec.accumulate else {}


# ---- one device ---------------------------------------------------------------------------------


def _empty(spec: GemmSpec, operands: Arrays) -> Arrays | None:
    named, shape = spec.named(operands), spec.out_shape(operands)
    if 0 not in (*shape, *named["lhs"].shape, *named["rhs"].shape):
        return None
    if spec.accumulate:
        return [named["init"]]
    like = meshes.vary_alike(*operands)[0]
    return [jnp.zeros_like(like, DTYPES[spec.out], shape=shape)]


def _local(spec: GemmSpec, operands: Arrays, batch: Batch, total: Total | None) -> Arrays:
    """One device's share. Where k is cut, float32 parts are summed by `total`."""
    if total is None:
        return _run(spec, operands, batch)
    named = spec.named(operands)
    init = [named.pop("init")] if spec.accumulate else []
    part_spec = dataclasses.replace(spec, out="f32", accumulate=False)
    (part,) = _run(part_spec, tuple(named.values()), batch)
    return [sum(init, total(part)).astype(DTYPES[spec.out])]


def _run(spec: GemmSpec, operands: Arrays, batch: Batch) -> Arrays:
    one = lambda operands: [_on_one_device(*operands, spec=spec)]  # noqa: E731
    return run_batch(one, functools.partial(_many, spec), batch, operands)


def _many(spec: GemmSpec, size: int, batched: Sequence[bool], operands: Arrays) -> Arrays:
    """A batch of GEMMs in one kernel; a loop where an operand has one scale for all of k."""
    if spec.variant.groups == "k" and spec.tiles[0] != ROW_BLOCKS:
        return loop(lambda one: [_on_one_device(*one, spec=spec)], batched, operands)
    named = spec.named(operands)
    if spec.scales == "tensor_tensor":  # of each element: one scale for all rows no more
        spec = dataclasses.replace(spec, scales="row_row")
        for name in ("lhs", "rhs"):
            scale, rows = named[f"{name}_scale"], named[name].shape[-2]
            named[f"{name}_scale"] = jnp.broadcast_to(scale, (*scale.shape[:-2], rows, 1))
    merged = merge(spec.variant.name, Stacked(size, spec.named(batched), named))
    expected = spec.expected_rows  # of a masked group, or of all of them
    if merged.variant != "masked":
        expected *= size * (named["groups"].shape[-1] if spec.variant.name == "masked" else 1)
    spec = dataclasses.replace(spec, variant=VARIANTS[merged.variant], expected_rows=expected)
    return [merged.unmerge(_on_one_device(*merged.named.values(), spec=spec))]


@functools.partial(jax.jit, static_argnames="spec")
def _on_one_device(*operands: jax.Array, spec: GemmSpec) -> jax.Array:
    """Lays scales out as the kernel wants them, and makes two dims of many."""
    named, shape = spec.named(operands), spec.out_shape(operands)
    if spec.variant.name == "dense":
        spec = dataclasses.replace(spec, variant=VARIANTS["dense"])
        m, n = math.prod(shape[:-1]), shape[-1]
        rows = {"lhs": m, "lhs_scale": m, "init": m, "rhs": n, "rhs_scale": n}
        for name, count in rows.items():
            if name in named and named[name].ndim > 2:
                named[name] = named[name].reshape(count, -1)
    for name, tile in zip(("lhs_scale", "rhs_scale"), spec.tiles, strict=True):
        if name in named:
            named[name] = scale_to_kernel(named[name], tile)
    with jax.named_scope(_label(spec, tuple(named.values()))):
        (out,) = bind_primitive(GEMM, spec, tuple(named.values()))
    return out.reshape(shape)


def _label(spec: GemmSpec, operands: Arrays) -> str:
    """Returns what profilers show beside the kernel, such as fp8_gemm_ragged_g8_m4096_n512_k256."""
    sizes = spec.sizes(operands)
    dims = "_".join(f"{letter}{sizes[letter]}" for letter in "gmnk" if letter in sizes)
    return f"fp8_gemm_{spec.variant.name}_{dims}"


# ---- many devices, many GEMMs -------------------------------------------------------------------


def _rule(spec: GemmSpec, operands: Arrays) -> Rule:
    rule = sharding_rule(spec.variant, spec.tiles, spec.accumulate, spec.rhs, spec.pair)
    if spec.batch_invariant:  # a sum over devices has an order of its own for each size
        rule = dataclasses.replace(rule, whole=rule.whole | {"k"})
    return rule


@functools.cache
def sharding_rule(
    row: Variant, tiles: tuple[Tile, Tile], accumulate: bool, rhs_type: RhsName = "fp8", pair=False
) -> Rule:
    """Returns how a GEMM is cut up. Groups, and what they cut up, stay whole; blocks do."""
    letters = {"lhs": row.lhs, "rhs": row.rhs, "init": row.out, "groups": row.group_operand}
    whole = {row.groups} if row.groups else set()
    blocked = {"k"}  # the kernel steps by 128 of k
    if rhs_type != "fp8":
        blocked |= {"n"}  # and casts blocks
        stored = "gkn" if rhs_type == "bf16_transposed" else row.rhs
        if pair:  # halves of the last dim, which so stays whole
            whole |= {stored[-1], "f"}
            stored = stored[:-1] + "f"
        letters |= {"rhs": stored, "rhs_right": stored}
    if row.group_operand:
        whole |= set() if "g" in row.lhs else {"g"}  # masked: every group has its own rows
    spec = GemmSpec(
        variant=row, scales="row_row", out="f32", rhs=rhs_type, pair=pair, accumulate=accumulate
    )
    dims = {name: tuple(map(Dim, letters.get(name) or "")) for name in spec.names}
    for name, side, tile in (("lhs_scale", row.lhs, tiles[0]), ("rhs_scale", row.rhs, tiles[1])):
        if name in dims:
            dims[name] = scale_dims(side, tile)
    operands = tuple(dims.values())
    return Rule(
        op=f"gemm {row.name}",
        operands=operands,
        results=(tuple(map(Dim, row.out)),),
        voters=((0, 1), (1, 1)),  # lhs and rhs
        summed=frozenset(set(row.lhs) & set(row.rhs) - set(row.out)),
        whole=frozenset(whole),
        blocked=blocked_letters(*operands) | blocked,
        added=spec.names.index("init") if accumulate else None,
        names=spec.names,
    )


def _vmap(spec: GemmSpec, size: int, batched: Sequence[bool], operands: Arrays) -> Arrays | None:
    """More rows or columns of a dense GEMM. The groups of others are those of one element."""
    if spec.variant.name == "dense":
        return [_vmap_dense(spec, size, spec.named(batched), spec.named(operands))]
    if not spec.accumulate:
        return None
    plain = dataclasses.replace(spec, accumulate=False)

    def add(*operands):  # once for each element, though all may share one GEMM
        return rebind(GEMM, plain, operands[:-1])[0] + operands[-1]

    axes = [0 if own else None for own in batched]
    return [jax.vmap(add, axes, axis_size=size)(*operands)]


def _vmap_dense(spec: GemmSpec, size: int, batched: dict, named: dict) -> jax.Array:
    """vmap of a dense GEMM: more rows, more columns, or the batched variant."""
    lhs_tile, rhs_tile = spec.tiles
    lhs_batched = batched["lhs"] or batched["lhs_scale"]
    rhs_batched = batched["rhs"] or batched["rhs_scale"]
    n = named["rhs"].shape[batched["rhs"]]
    own = dict(zip(named, spread(size, list(batched.values()), list(named.values())), strict=True))
    if not rhs_batched and lhs_tile != TENSOR:  # one more leading dim
        merged = {**own, "rhs": named["rhs"], "rhs_scale": named["rhs_scale"]}
        return _rebind_dense(spec, merged)
    whole_blocks = rhs_tile != BLOCKS or n % SCALE_BLOCK == 0
    if not lhs_batched and rhs_tile != TENSOR and whole_blocks and not spec.accumulate:
        columns = {x: own[x].reshape(-1, *own[x].shape[2:]) for x in ("rhs", "rhs_scale")}
        out = _rebind_dense(spec, {**named, **columns})
        return jnp.moveaxis(out.reshape(*out.shape[:-1], size, n), -2, 0)
    lhs, rhs = own["lhs"], own["rhs"]
    lead = lhs.shape[1 : lhs.ndim - rhs.ndim + 2]
    if lhs.ndim > 3:
        own |= {x: own[x].reshape(size, math.prod(lead), -1) for x in ("lhs", "lhs_scale")}
        if spec.accumulate:
            own["init"] = own["init"].reshape(size, math.prod(lead), n)
    own |= {x: own[x].reshape(*own[x].shape[:2], -1) for x in ("rhs", "rhs_scale")}
    partner = dataclasses.replace(spec, variant=VARIANTS["batched"])
    (out,) = rebind(GEMM, partner, tuple(own.values()))
    return out.reshape(size, *lead, n)


def _rebind_dense(spec: GemmSpec, named: dict) -> jax.Array:
    spec = dataclasses.replace(spec, variant=VARIANTS["dense"])
    spec = spec.with_ranks(named["lhs"].ndim, named["rhs"].ndim)
    return rebind(GEMM, spec, tuple(named.values()))[0]


GEMM = Op(
    name="gemm",
    target=TARGET,
    results=_results,
    reference=_reference,
    attributes=_attributes,
    seconds=_seconds,
    aliases=_aliases,
    empty=_empty,
    rule=_rule,
    local=_local,
    vmap=_vmap,
)
