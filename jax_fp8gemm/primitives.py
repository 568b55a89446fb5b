"""The inner primitive and its rules: shape, lowering for each platform, batching.

Operands, in order: lhs, rhs (e4m3), lhs scale, rhs scale (f32, in the kernel's layout, see
reference.scale_to_kernel), the group operand (int32) of a grouped variant, and init (f32) when
accumulating. A rhs that the kernel casts is bf16, in one array or in two, side by side by their
last dims: the second takes the place of the rhs scale, or the first again. The stack above it is
custom_vjp (ops.py) > custom_vmap (here) > custom_partitioning (sharding.py) > the primitive.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_fp8gemm import config as configs
from jax_fp8gemm import meshes, reference, sharding
from jax_fp8gemm._native import QUANTIZE_TARGET, TARGET
from jax_fp8gemm.errors import message
from jax_fp8gemm.qarray import BLOCK, BLOCKS, TENSOR, QArray, Tile
from jax_fp8gemm.sharding import Dim, Rule, Total, blocked_letters, scale_dims
from jax_fp8gemm.variants import SCALES, VARIANTS, Variant

# For jax.export.export(..., disabled_checks=EXPORT_CHECKS): XLA promises nothing about the
# stability of foreign custom calls; this library does, by the version in the target's name.
EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in (TARGET, QUANTIZE_TARGET)
)

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
SYMBOLIC_SIZE = 4096  # rows for which a config is chosen where an exported program takes any number


@dataclasses.dataclass(frozen=True)
class Static:
    """What of a product is known when it is traced."""

    variant: str
    scales: str
    out: str
    num_sms: int = 0
    config: configs.GemmConfig | None = None
    expected_rows: int = 0  # of a masked group; 0: as many as there is room for
    rhs: str = "fp8"  # or what the kernel casts: "bf16" [g, n, k], "bf16_transposed" [g, k, n]
    pair: bool = False  # such a rhs lies in two arrays

    @property
    def casts(self) -> bool:
        return self.rhs != "fp8"

    @property
    def groups_at(self) -> int | None:
        """Where among the operands the group operand is."""
        return 4 if VARIANTS[self.variant].group_operand else None

    @property
    def init_at(self) -> int:
        """Where init is, if there is one."""
        return 4 if self.groups_at is None else 5

    def row(self, operands) -> Variant:
        """The row of the table for these operands' ranks."""
        return VARIANTS[self.variant].with_ranks(operands[0].ndim, operands[1].ndim)


def primitive(name: str, *, multiple_results: bool = False) -> Primitive:
    """Returns a primitive that runs under jax.disable_jit() too: it brings its own jit."""
    made = Primitive(name)
    made.multiple_results = multiple_results
    jitted = jax.jit(made.bind, static_argnames="static")

    @made.def_impl
    def run(*operands, static):
        with jax.disable_jit(False):
            return jitted(*operands, static=static)

    return made


gemm_p = primitive("jax_fp8gemm_gemm")


def _rhs_shape(static: Static, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that rhs has as the table means it."""
    if not static.casts:
        return stored
    g, rows, columns = stored
    columns *= 2 if static.pair else 1
    return (g, columns, rows) if static.rhs == "bf16_transposed" else (g, rows, columns)


def _sizes(static: Static, operands) -> dict[str, int]:
    """Returns the size of every letter of the table's row."""
    count = None if static.groups_at is None else operands[static.groups_at].shape[0]
    rhs = _rhs_shape(static, operands[1].shape)
    return static.row(operands).sizes(operands[0].shape, rhs, count)


def _out_shape(static: Static, operands) -> tuple[int, ...]:
    sizes = _sizes(static, operands)
    return tuple(sizes[letter] for letter in static.row(operands).out)


def _abstract(*operands, static: Static):
    lhs, shape = operands[0], _out_shape(static, operands)
    # The update carries the manual axes of a shard_map along; the mesh too, unsharded.
    sharding = NamedSharding(lhs.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return lhs.update(shape=shape, dtype=DTYPES[static.out], weak_type=False, sharding=sharding)


gemm_p.def_abstract_eval(_abstract)


def _reference(*operands, static: Static):
    if static.casts:
        lhs, left, lhs_scale, right, *rest = operands
        values, scale = _cast(left, right, static)
        operands = (lhs, values, lhs_scale, scale, *rest)
    return reference.gemm(
        *operands,
        variant=static.variant,
        tiles=SCALES[static.scales],
        dtype=DTYPES[static.out],
    )


def _cast(left: jax.Array, right: jax.Array, static: Static) -> tuple[jax.Array, jax.Array]:
    """Returns what the kernel makes of a bf16 rhs: [g, n, k] in FP8, and scales in its layout."""
    w = jnp.concatenate((left, right), -1) if static.pair else left
    w = jnp.swapaxes(w, -1, -2) if static.rhs == "bf16_transposed" else w
    values, scale = reference.quantize(w, BLOCKS, "pow2")
    return values, reference.scale_to_kernel(scale, BLOCKS)


mlir.register_lowering(gemm_p, mlir.lower_fun(_reference, multiple_results=False))


def _device_kind() -> str:
    """Returns the kind of the GPU in use, or the default when programs are made without one."""
    device = jax.devices()[0]
    return device.device_kind if device.platform in ("gpu", "cuda") else configs.DEFAULT_DEVICE


def _problem(static: Static, operands, accumulate: bool) -> configs.Problem:
    sizes = {letter: _typical(size) for letter, size in _sizes(static, operands).items()}
    m = static.expected_rows or sizes["m"]
    return configs.Problem(
        static.variant, m, sizes["n"], sizes["k"], sizes.get("g", 1), static.scales, static.out,
        accumulate, static.num_sms, _device_kind(), static.rhs,
    )  # fmt: skip


def _typical(size) -> int:
    """A size to choose a config for; that of an exported program may not be known yet."""
    return SYMBOLIC_SIZE if jax.export.is_symbolic_dim(size) else size


def _lower_cuda(ctx, *operands, static: Static):
    accumulate = len(operands) > static.init_at
    problem = _problem(static, ctx.avals_in, accumulate)
    config = static.config or configs.select(problem)
    reason = configs.legal(problem, config)
    if reason:
        raise ValueError(
            message(
                "gemm",
                "the config cannot run this product.",
                got=f"{config}: {reason}",
                expected=f"a legal config for {problem}",
                mend="leave config out, or take one of jax_fp8gemm.config.candidates(problem)",
            )
        )
    aliases = {static.init_at: 0} if accumulate else None
    rule = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=aliases)
    attributes = configs.attributes(problem, config)
    if static.casts:  # rhs in one array or two, and no scales of it
        lhs, left, lhs_scale, right, *rest = zip(operands, ctx.avals_in, strict=True)
        given = [lhs, left, *[right] * static.pair, lhs_scale, *rest]
        operands, avals = zip(*given, strict=True)
        ctx = ctx.replace(avals_in=avals)
        attributes["pair"] = np.int64(static.pair)
    return rule(ctx, *operands, **attributes)


mlir.register_lowering(gemm_p, _lower_cuda, platform="cuda")


@functools.partial(jax.jit, static_argnames="static")
def _bind(lhs, rhs, lhs_scale, rhs_scale, *rest, static: Static):
    """One product on one device. Scales in their logical layout; many dims become two."""
    shape = _out_shape(static, (lhs, rhs, lhs_scale, rhs_scale, *rest))
    if static.variant == "dense":
        m, n = math.prod(shape[:-1]), shape[-1]
        lhs, lhs_scale, *rest = (_matrix(x, m) for x in (lhs, lhs_scale, *rest))
        rhs, rhs_scale = (_matrix(x, n) for x in (rhs, rhs_scale))
    lhs_tile, rhs_tile = SCALES[static.scales]
    out = gemm_p.bind(
        lhs,
        rhs,
        reference.scale_to_kernel(lhs_scale, lhs_tile),
        rhs_scale if static.casts else reference.scale_to_kernel(rhs_scale, rhs_tile),
        *rest,
        static=static,
    )
    return out.reshape(shape)


def _matrix(x: jax.Array, rows: int) -> jax.Array:
    return x.reshape(rows, -1) if x.ndim > 2 else x


def _shard(*operands, static: Static, total: Total | None = None):
    """One device's share of a product; where k is cut, float32 parts are summed by `total`."""
    if total is None:
        return _bind(*operands, static=static)
    init = operands[static.init_at :]
    part = _bind(*operands[: static.init_at], static=dataclasses.replace(static, out="f32"))
    return sum(init, total(part)).astype(DTYPES[static.out])


@functools.cache
def sharding_rule(
    row: Variant, tiles: tuple[Tile, Tile], accumulate: bool, rhs_type: str = "fp8", pair=False
) -> Rule:
    """Returns how a product is cut up. Groups and what they cut up stay whole; blocks do."""
    lhs, rhs, out = (tuple(map(Dim, letters)) for letters in (row.lhs, row.rhs, row.out))
    operands = [lhs, rhs, scale_dims(row.lhs, tiles[0]), scale_dims(row.rhs, tiles[1])]
    whole = {row.groups} - {None}
    if rhs_type != "fp8":
        stored = "gkn" if rhs_type == "bf16_transposed" else row.rhs
        if pair:  # halves of the last dim, which so stays whole
            whole |= {stored[-1], "f"}
            stored = stored[:-1] + "f"
        operands[1] = operands[3] = tuple(map(Dim, stored))
    if row.group_operand:
        operands.append((Dim(row.group_operand),))
        whole |= set() if "g" in row.lhs else {"g"}  # masked: every group has its own rows
    summed = set(row.lhs) & set(row.rhs) - set(row.out)
    return Rule(
        f"gemm {row.name}",
        (*operands, *[out] * accumulate),
        (out,),
        deciding=(0, 1),
        summed=frozenset(summed),
        whole=frozenset(whole),
        # The kernel steps by 128 of k, and casts blocks.
        blocked=blocked_letters(*operands) | ({"k"} if rhs_type == "fp8" else {"k", "n"}),
        added=len(operands) if accumulate else None,
    )


def no_derivative(op: str):
    """Returns the rule for derivatives of a primitive on FP8 numbers: a clear error."""

    def rule(primals, tangents):
        raise NotImplementedError(
            message(
                op,
                "FP8 numbers have no derivative.",
                got=f"jax.grad (or a second derivative) through {op}",
                expected="first derivatives, through fp8_matmul or fp8_ragged_dot",
                mend="differentiate these once; for second derivatives use jnp.dot, for a "
                "metric jax.lax.stop_gradient",
            )
        )

    return rule


def product(
    lhs: QArray,
    rhs: QArray | tuple[jax.Array, jax.Array],
    static: Static,
    groups: jax.Array | None = None,
    init: jax.Array | None = None,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Binds one product, under every transformation. Shapes have been checked.

    A dense product may have more than two dims: every dim of rhs but the first is contracted, and
    lhs has any number of others before these. They stay apart until each device has its shard,
    since a merged dim can be sharded by its first part alone.
    """
    rest = [x for x in (groups, init) if x is not None]
    values, beside = (rhs.qvalue, rhs.scale) if isinstance(rhs, QArray) else rhs
    operands = (lhs.qvalue, values, lhs.scale, beside, *rest)
    shape = _out_shape(static, operands)
    if 0 in (*shape, *lhs.shape, *values.shape):
        like = meshes.vary_alike(*operands)[0]
        return jnp.zeros_like(like, DTYPES[static.out], shape=shape) if init is None else init
    rule = _rule(static, operands)
    call = meshes.explicit(rule, _batchable(static), operands, out_sharding)
    return call(*meshes.vary_alike(*operands))


def _rule(static: Static, operands) -> Rule:
    row, accumulate = static.row(operands), len(operands) > static.init_at
    return sharding_rule(row, SCALES[static.scales], accumulate, static.rhs, static.pair)


@functools.cache
def _placed(static: Static, rule: Rule):
    """Returns the product with its rule for partitioning."""
    return sharding.partitioned(functools.partial(_shard, static=static), rule, static)


@functools.cache
def _batchable(static: Static):
    """Returns the product for `static` with its rule for vmap."""

    @jax.custom_jvp
    def on_devices(*operands):
        if meshes.is_manual():
            return _bind(*operands, static=static)
        return _placed(static, _rule(static, operands))(*operands)

    on_devices.defjvp(no_derivative("gemm"))

    @custom_vmap
    def call(*operands):
        return on_devices(*operands)

    @call.def_vmap
    def rule(size, batched, *operands):
        def spread(*which):
            return [
                x if batched[i] else jnp.broadcast_to(x, (size, *x.shape))
                for i, x in enumerate(operands)
                if i in which
            ]

        if size == 0:
            return empty_batch(call, batched, operands), True
        if static.variant in ("batched", "masked"):  # more groups
            merged = [x.reshape(-1, *x.shape[2:]) for x in spread(0, 1, 2, 3, 4, 5)]
            out = _batchable(static)(*merged)
            return out.reshape(size, -1, *out.shape[1:]), True
        if static.variant == "dense":
            return _vmap_dense(static, size, batched, operands, spread), True
        raise NotImplementedError(
            message(
                "gemm",
                f"variant {static.variant} has no vmap.",
                got=f"a vmap of size {size}",
                expected="vmap of dense, batched or masked products",
                mend="loop with jax.lax.map, or make the batch part of the groups",
            )
        )

    return call


def empty_batch(call, batched, operands):
    """Returns what a vmap of size 0 gives, of as many dims as any other."""
    one = [
        jax.ShapeDtypeStruct(x.shape[own:], x.dtype)
        for x, own in zip(operands, batched, strict=True)
    ]
    return jax.tree.map(lambda y: jnp.zeros((0, *y.shape), y.dtype), jax.eval_shape(call, *one))


def _vmap_dense(static: Static, size: int, batched, operands, spread):
    """vmap of a dense product: more rows, more columns, or the batched variant."""
    lhs_tile, rhs_tile = SCALES[static.scales]
    lhs_batched, rhs_batched = batched[0] or batched[2], batched[1] or batched[3]
    if not rhs_batched and lhs_tile != TENSOR:  # one more leading dim
        lhs, lhs_scale, *init = spread(0, 2, 4)
        return _batchable(static)(lhs, operands[1], lhs_scale, operands[3], *init)
    n = operands[1].shape[batched[1]]
    whole_blocks = rhs_tile != BLOCKS or n % BLOCK == 0
    if not lhs_batched and rhs_tile != TENSOR and whole_blocks and len(batched) == 4:
        rhs, rhs_scale = (x.reshape(-1, *x.shape[2:]) for x in spread(1, 3))
        out = _batchable(static)(operands[0], rhs, operands[2], rhs_scale)
        return jnp.moveaxis(out.reshape(*out.shape[:-1], size, n), -2, 0)
    lhs, rhs, lhs_scale, rhs_scale, *init = spread(0, 1, 2, 3, 4)
    lead = lhs.shape[1 : lhs.ndim - rhs.ndim + 2]
    if lhs.ndim > 3:
        lhs, lhs_scale = (x.reshape(size, math.prod(lead), -1) for x in (lhs, lhs_scale))
        init = [x.reshape(size, -1, n) for x in init]
    rhs, rhs_scale = (x.reshape(*x.shape[:2], -1) for x in (rhs, rhs_scale))
    partner = dataclasses.replace(static, variant=VARIANTS[static.variant].vmap)
    out = _batchable(partner)(lhs, rhs, lhs_scale, rhs_scale, *init)
    return out.reshape(size, *lead, n)
