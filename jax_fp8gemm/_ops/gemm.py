"""gemm: FP8 arrays in, checked, and the result of their multiplication out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from jax_fp8gemm._bind import gemm_op
from jax_fp8gemm._bind.gemm_op import GemmSpec
from jax_fp8gemm._core.bits import pad_k
from jax_fp8gemm._core.checks import (
    as_int32,
    check_bool,
    check_option,
    check_positive,
    check_quantized,
)
from jax_fp8gemm._core.errors import describe, fail
from jax_fp8gemm._core.layout import (
    BLOCKS,
    K_MULTIPLE,
    SCALE_BLOCK,
    TENSOR,
    round_up,
    scale_shape,
)
from jax_fp8gemm._core.qarray import FP8, QArray
from jax_fp8gemm._core.types import OutName, ScalesName, VariantName
from jax_fp8gemm._core.variants import SCALES, VARIANTS, Variant
from jax_fp8gemm._select.problem import GemmConfig

OUT_NAMES: dict[str, OutName] = {"bfloat16": "bf16", "float32": "f32"}


def gemm(
    lhs: QArray,
    rhs: QArray,
    group_sizes: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    variant: VariantName = "dense",
    out_dtype: DTypeLike = jnp.bfloat16,
    init: jax.Array | None = None,
    num_sms: int | None = None,
    expected_rows: int | None = None,
    config: GemmConfig | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies FP8 operands: out[m, n] = Σ_k lhs[m, k] · rhs[n, k], both with their scales.

    The tensor core sums 128 of k at a time. These sums are added up in float32. Variants:

      dense               [..., m, k] · [n, k] -> [..., m, n]
      batched             [g, m, k] · [g, n, k] -> [g, m, n]
      ragged              [m, k] · [g, n, k] -> [m, n]: groups of rows, end to end, of any sizes.
                          Rows past the groups are zero, whatever lhs holds there.
      contiguous          [m, k] · [g, n, k] -> [m, n]: `groups` has the group of each row, -1 for
                          padding, whose rows are zero. Every 128 rows from a multiple of 128 on
                          share a group.
      masked              [g, m, k] · [g, n, k] -> [g, m, n]: the first rows of each group. The
                          other rows of a result hold anything.
      ragged_contracting  [m, k] · [n, k] -> [g, m, n]: groups along k. Each starts at a multiple of
                          128. The padding after a group is multiplied too: fill it with zeros.

    Args:
      lhs: QArray, as above. Both have k last, a multiple of 16. Scales are 1x128 × 128x128, 1x128 ×
        1x128, per row × per row, or per tensor × per tensor.
      rhs: likewise.
      group_sizes: int [g], of ragged, masked and ragged_contracting. It stays on the device.
        Negative sizes count as zero, and what does not fit into m (or k) is cut off.
      groups: int [m], of contiguous. It stays on the device.
      variant: one of the above.
      out_dtype: bfloat16 or float32.
      init: f32, of the output's shape: what to add the result to. It needs out_dtype float32.
        Donate it to save a copy.
      num_sms: upper bound of the multiprocessors to use, 1 or more; None: JAX_FP8GEMM_NUM_SMS
        of the environment, or all.
      expected_rows: rows that a masked group is expected to have, for the choice of a config; None
        for all that fit.
      config: overrides the choice of a config.
      batch_invariant: whether a row's result has the same bits however many rows stand beside it.
        Few rows then lose the kernel made for them. k is not cut over devices.

    Returns:
      out_dtype, of the shape above. On a Hopper GPU two runs give the same bits.

    Raises:
      ValueError: shapes or scales do not fit, or the variant is unknown.
      TypeError: operands are not quantized, or dtypes do not fit.
      NotImplementedError: a derivative.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3; DeepGEMM for the variants.

    Example:
      out = gemm(quantize(x), quantize(w.T, (128, 128)))
    """
    check_option("gemm", "variant", variant, VariantName)
    row = VARIANTS[variant]
    for name, q in (("lhs", lhs), ("rhs", rhs)):
        check_quantized("gemm", name, q)
    if rhs.ndim == 2:
        row = row.with_ranks(lhs.ndim, rhs.ndim)
    _check_operands(lhs, rhs, row)
    check_positive("gemm", "num_sms", num_sms)
    check_positive("gemm", "expected_rows", expected_rows)
    check_bool("gemm", "batch_invariant", batch_invariant)
    if config is not None and not isinstance(config, GemmConfig):
        got, fix = type(config).__name__, "leave config out"
        fail("gemm", "config is not a GemmConfig.", got, "GemmConfig or None", fix, TypeError)
    spec = GemmSpec(
        variant=row,
        scales=_scales(lhs, rhs, row),
        out=_out_name(out_dtype),
        num_sms=num_sms or 0,
        config=config,
        expected_rows=expected_rows or 0,
        accumulate=init is not None,
        batch_invariant=batch_invariant,
    )
    operands = [lhs.qvalue, rhs.qvalue, lhs.scale, rhs.scale]
    operand = _group_operand(lhs, rhs, row, group_sizes, groups)
    operands += [operand] if operand is not None else []
    if init is not None:
        count = None if operand is None else operand.shape[0]
        _check_init(init, spec.out, row.out_shape(lhs.shape, rhs.shape, count))
        operands += [init]
    return gemm_op.gemm(spec, *operands)


# ---- as the library's own code calls it: arguments have been checked ----------------------------


def multiply(
    lhs: QArray,
    rhs: QArray,
    dtype: DTypeLike = jnp.bfloat16,
    group_sizes: jax.Array | None = None,
    *,
    variant: VariantName = "dense",
    scales: ScalesName = "1x128_128x128",
    out_sharding: NamedSharding | None = None,
    expected_rows: int = 0,
    batch_invariant: bool = False,
    leave_rest: bool = False,
) -> jax.Array:
    """Returns gemm's result as any float dtype; other than bf16 by way of f32.

    Args:
      lhs: with k last, of any size: it is filled with zeros to a multiple of 16. rhs has two dims,
        or any more that are contracted and that lhs has last.
      rhs: likewise.
      group_sizes: int32 [g] of a grouped variant.
      out_sharding: of the result, where mesh axes are Explicit.
      expected_rows: of a masked group, or of all groups of another variant together; 0: as many as
        there is room for.
      leave_rest: rows past the groups of `ragged` hold anything, and the caller never reads them.
    """
    lhs, rhs = pad_k(lhs), pad_k(rhs)
    out = OUT_NAMES.get(jnp.dtype(dtype).name, "f32")
    row = VARIANTS[variant].with_ranks(lhs.ndim, rhs.ndim)
    same, expected = batch_invariant, expected_rows
    spec = GemmSpec(
        variant=row,
        scales=scales,
        out=out,
        expected_rows=expected,
        batch_invariant=same,
        leave_rest=leave_rest and may_leave_rest(),
    )
    rest = () if group_sizes is None else (group_sizes,)
    operands = lhs.qvalue, rhs.qvalue, lhs.scale, rhs.scale, *rest
    return gemm_op.gemm(spec, *operands, out_sharding=out_sharding).astype(dtype)


def may_leave_rest() -> bool:
    """Whether rows that nobody reads may hold anything: not where JAX looks at every number."""
    return not (jax.debug_nans.value or jax.debug_infs.value)


def multiply_casting(
    lhs: QArray,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    transposed: bool,
    variant: VariantName = "ragged",
    expected_rows: int = 0,
    batch_invariant: bool = False,
    leave_rest: bool = False,
) -> jax.Array:
    """Multiplies by weights that the kernel casts on their way to the tensor core.

    The result is that of `multiply` with weights that were quantized by 128x128 with powers of two
    before. But their FP8 copy is never in memory. Every 256 rows of a group read and cast the
    weights anew.

    Args:
      lhs: QArray as gemm takes it, scaled 1x128.
      weights: bf16 [g, n, k], or, transposed, [g, k, n]: one array, or two that lie side by side,
        as if concatenated along their last dim, which is then a multiple of 128. n is one of 8.
      group_sizes: int32 [g]. variant: "ragged" or "masked".
      expected_rows: see `multiply`.
      leave_rest: see `multiply`.

    Returns:
      bf16, as gemm.
    """
    spec = GemmSpec(
        variant=VARIANTS[variant],
        scales="1x128_128x128",
        out="bf16",
        rhs="bf16_transposed" if transposed else "bf16",
        pair=len(weights) == 2,
        expected_rows=expected_rows,
        batch_invariant=batch_invariant,
        leave_rest=leave_rest and may_leave_rest(),
    )
    return gemm_op.gemm(spec, lhs.qvalue, *weights, lhs.scale, group_sizes)


# ---- checks -------------------------------------------------------------------------------------


def _check_operands(lhs: QArray, rhs: QArray, row: Variant) -> None:
    for name, q, letters in (("lhs", lhs, row.lhs), ("rhs", rhs, row.rhs)):
        text = f"{name} [{', '.join(letters)}]"
        got = f"{describe(name, q.qvalue)}, {describe('scale', q.scale)}"
        if q.ndim != len(letters) or q.scale.ndim != len(letters):
            fail("gemm", f"{name} has the wrong rank.", got, text, f"reshape {name} to {text}")
        if q.qvalue.dtype != FP8 or q.scale.dtype != jnp.float32:
            what, fix = f"{name} has the wrong dtype.", f"quantize({name})"
            fail("gemm", what, got, "e4m3 and f32 scales", fix, TypeError)
    both = f"{describe('lhs', lhs.qvalue)}, {describe('rhs', rhs.qvalue)}"
    k = lhs.shape[-1]
    if k != rhs.shape[-1]:
        fix = "both operands have k last; if rhs is stored [k, n], quantize its transpose"
        fail("gemm", "dim k differs between lhs and rhs.", both, f"rhs [..., n, {k}]", fix)
    if lhs.ndim == rhs.ndim and lhs.shape[:-2] != rhs.shape[:-2]:
        fail("gemm", "dim g differs between lhs and rhs.", both, "equal g", "broadcast one of them")
    if k % K_MULTIPLE:
        fix = f"pad k to {round_up(k, K_MULTIPLE)} with zeros, as fp8_matmul does"
        what = f"dim k is not a multiple of {K_MULTIPLE}."
        fail("gemm", what, both, f"k % {K_MULTIPLE} == 0", fix)


def _group_operand(lhs: QArray, rhs: QArray, row: Variant, group_sizes, groups):
    """Returns the group operand as int32, or None without one."""
    operands = {"g": ("group_sizes", group_sizes, "int [g]"), "m": ("groups", groups, "int [m]")}
    wanted = operands.pop(row.group_operand) if row.group_operand else None
    for name, given, _ in operands.values():
        if given is not None:
            fix = f"leave {name} out, or name another variant"
            got = f"variant={row.name!r} and {name}"
            fail("gemm", f"{row.name} takes no {name}.", got, f"no {name}", fix)
    if wanted is None:
        return None
    name, given, expected = wanted
    if given is None:
        fail("gemm", f"{row.name} needs {name}.", f"no {name}", expected, f"pass {name}=")
    operand = as_int32("gemm", name, given)
    size = row.sizes(lhs.shape, rhs.shape, None).get(row.group_operand)
    if operand.ndim != 1 or (size is not None and operand.shape[0] != size):
        got = f"{describe(name, operand)}, {describe('rhs', rhs.qvalue)}"
        expected += "" if size is None else f", here [{size}]"
        fix = f"pass one {'group for each row' if name == 'groups' else 'size for each group'}"
        fail("gemm", f"{name} does not fit the operands.", got, expected, fix)
    if name == "groups" and isinstance(given, np.ndarray):
        _check_contiguous(given)
    return operand


def _check_contiguous(rows: np.ndarray) -> None:
    """Raises where a block of 128 rows belongs to two groups."""
    for start in range(0, len(rows), SCALE_BLOCK):
        block = rows[start : start + SCALE_BLOCK]
        found = np.unique(block[block >= 0])
        if len(found) > 1 or (len(found) == 1 and block[0] < 0):
            got = f"rows {start} to {start + len(block) - 1} of groups {found.tolist()}"
            fix = 'pad each group to a multiple of 128 rows, or use variant="ragged"'
            what = "contiguous: a block of 128 rows has more than one group, or padding first."
            fail("gemm", what, got, "one group for each 128 rows, padding at its end", fix)


def _scales(lhs: QArray, rhs: QArray, row: Variant) -> ScalesName:
    """Returns the name of the first pair of tiles that fits; small arrays fit several, alike."""
    for name, (lhs_tile, rhs_tile) in SCALES.items():
        if row.name == "dense" and lhs.ndim > 2 and lhs_tile == TENSOR:
            continue  # a scale for each matrix
        if row.name == "ragged_contracting" and rhs_tile == BLOCKS:
            continue  # a block of scales would belong to several groups
        if lhs.has_tile(lhs_tile) and rhs.has_tile(rhs_tile):
            return name
    got = f"lhs {list(lhs.shape)} with scale {list(lhs.scale.shape)}, "
    got += f"rhs {list(rhs.shape)} with scale {list(rhs.scale.shape)}"
    pairs = [
        f"{list(scale_shape(lhs.shape, a))} and {list(scale_shape(rhs.shape, b))}"
        for a, b in SCALES.values()
    ]
    fix = "quantize(lhs) with tile (1, 128), quantize(rhs, (128, 128))"
    fail("gemm", "the scales have shapes that no kernel takes.", got, " or ".join(pairs), fix)


def _out_name(out_dtype: Any) -> OutName:
    try:
        name = jnp.dtype(out_dtype).name
    except TypeError:
        name = repr(out_dtype)
    if name not in OUT_NAMES:
        expected, fix = "bfloat16 or float32", "pass one of these, and cast the result"
        fail("gemm", "out_dtype is unknown.", f"out_dtype={name}", expected, fix, TypeError)
    return OUT_NAMES[name]


def _check_init(init: Any, out: OutName, shape: tuple[int, ...]) -> None:
    got = describe("init", init)
    if out != "f32" or getattr(init, "dtype", None) != jnp.float32:
        fix = "pass out_dtype=jnp.float32, and init as f32"
        got += f", out_dtype {out}"
        fail("gemm", "init needs float32.", got, "f32 init and out_dtype", fix, TypeError)
    if init.shape != shape:
        fail("gemm", "init has the wrong shape.", got, f"f32{list(shape)}", "reshape it")
