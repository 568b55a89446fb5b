"""gemm: FP8 arrays in, checked, and their product out."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jax_fp8gemm.config import GemmConfig
from jax_fp8gemm.errors import describe, fail
from jax_fp8gemm.primitives import Static, product
from jax_fp8gemm.qarray import (
    BLOCK,
    BLOCKS,
    FP8,
    TENSOR,
    QArray,
    round_up,
    scale_shape,
)
from jax_fp8gemm.variants import SCALES, VARIANTS

K_MULTIPLE = 16  # bytes: what the copy engine wants of a row of FP8 numbers


def gemm(
    lhs: QArray,
    rhs: QArray,
    group_sizes: jax.Array | None = None,
    *,
    variant: str = "dense",
    out_dtype: jnp.dtype = jnp.bfloat16,
    init: jax.Array | None = None,
    num_sms: int | None = None,
    expected_rows: int | None = None,
    config: GemmConfig | None = None,
) -> jax.Array:
    """Multiplies FP8 operands: out[m, n] = Σ_k lhs[m, k] · rhs[n, k], both with their scales.

    Sums of 128 of k are made by the tensor core and added up in float32. Variants:

      dense               [..., m, k] · [n, k] -> [..., m, n]
      batched             [g, m, k] · [g, n, k] -> [g, m, n]
      ragged              [m, k] · [g, n, k] -> [m, n]: groups of rows, end to end, any sizes;
                          rows past the groups are zero, whatever lhs holds there
      contiguous          likewise; group_sizes is the group of each row [m], -1 for padding, whose
                          rows are zero; every 128 rows from a multiple of 128 on share a group
      masked              [g, m, k] · [g, n, k] -> [g, m, n]: the first rows of each group; the
                          other rows of a result hold anything
      ragged_contracting  [m, k] · [n, k] -> [g, m, n]: groups along k, each from a multiple of 128
                          on, zeros between its size and the next multiple

    Args:
      lhs, rhs: QArray, as above; both have k last, a multiple of 16. Scales are 1x128 × 128x128,
        1x128 × 1x128, per row × per row, or per tensor × per tensor.
      group_sizes: int [g] of a grouped variant, on the device. Never read back: negative sizes
        count as zero, and what does not fit into m (or k) is cut off.
      variant: one of the above.
      out_dtype: bfloat16 or float32.
      init: f32, of the output's shape: what to add the product to; needs out_dtype float32.
        Donate it to save a copy.
      num_sms: upper bound of the multiprocessors to use; None for all.
      expected_rows: of a masked group, for the choice of a config; None for all that fit.
      config: overrides jax_fp8gemm.config.select.

    Returns:
      out_dtype, shape as above. On a Hopper GPU two runs give the same bits.

    Raises:
      ValueError: shapes or scales that do not fit, an unknown variant. TypeError: dtypes.
      NotImplementedError: a derivative; jax.vmap of a grouped variant other than masked.

    Example:
      out = gemm(quantize(x), quantize(w.T, (128, 128)))
    """
    if variant not in VARIANTS:
        fail("gemm", "unknown variant.", repr(variant), f"one of {list(VARIANTS)}", "choose one")
    _check_operands(lhs, rhs, variant)
    check_positive("gemm", "num_sms", num_sms)
    check_positive("gemm", "expected_rows", expected_rows)
    groups = _group_operand(lhs, rhs, group_sizes, variant)
    count = None if groups is None else groups.shape[0]
    row = VARIANTS[variant].with_ranks(lhs.ndim, rhs.ndim)
    shape = row.out_shape(lhs.shape, rhs.shape, count)
    scales = _scales(lhs, rhs, variant)
    out = _out_name(out_dtype, init, shape)
    static = Static(variant, scales, out, num_sms or 0, config, expected_rows or 0)
    return product(lhs, rhs, static, groups, init)


def gemm_casting(
    lhs: QArray,
    weights: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    transposed: bool,
    variant: str = "ragged",
) -> jax.Array:
    """Multiplies by weights that the kernel casts on their way to the tensor core.

    The result is that of gemm with the weights quantised by 128x128, powers of two, before; but
    their FP8 copy is never in memory. Every 256 rows of a group read and cast the weights anew.

    Args:
      lhs: QArray as gemm takes it, scaled 1x128.
      weights: bf16 [g, n, k], or, transposed, [g, k, n]: one array, or two that lie side by side,
        as if concatenated along their last dim, which is then a multiple of 128. n is one of 8.
      group_sizes, variant: as gemm takes them; "ragged" or "masked".

    Returns:
      bf16, as gemm.
    """
    static = Static(
        variant,
        "1x128_128x128",
        "bf16",
        rhs="bf16_transposed" if transposed else "bf16",
        pair=len(weights) == 2,
    )
    groups = as_int32("gemm_casting", "group_sizes", group_sizes)
    return product(lhs, (weights[0], weights[-1]), static, groups)


def contract_tokens(
    lhs: QArray,
    rhs: QArray,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Multiplies transposed copies: out[m, n] = Σ_t lhs[m, t] · rhs[n, t], t any number of dims.

    Args:
      lhs: QArray [m, *tokens], rhs: QArray [n, *tokens], both scaled 1x128; the last dim of tokens
        is a multiple of 128.
      dtype: of the result; other than bf16 by way of f32.
      out_sharding: of the result, where mesh axes are Explicit.

    Returns:
      dtype [m, n].
    """
    static = Static("dense", "1x128_1x128", "bf16" if dtype == jnp.bfloat16 else "f32")
    return product(lhs, rhs, static, out_sharding=out_sharding).astype(dtype)


def check_quantised(op: str, name: str, q: QArray) -> None:
    if not isinstance(q, QArray):
        got, mend = type(q).__name__, f"quantize({name})"
        fail(op, f"{name} is not quantised.", got, "QArray", mend, TypeError)


def _check_operands(lhs: QArray, rhs: QArray, variant: str) -> None:
    row = VARIANTS[variant]
    if isinstance(lhs, QArray) and isinstance(rhs, QArray) and rhs.ndim == 2:
        row = row.with_ranks(lhs.ndim, rhs.ndim)
    for name, q, letters in (("lhs", lhs, row.lhs), ("rhs", rhs, row.rhs)):
        check_quantised("gemm", name, q)
        text = f"{name} [{', '.join(letters)}]"
        if q.ndim != len(letters) or q.scale.ndim != len(letters):
            got = describe(name, q.qvalue) + ", " + describe("scale", q.scale)
            fail("gemm", f"{name} has the wrong rank.", got, text, f"reshape {name} to {text}")
        if q.qvalue.dtype != FP8 or q.scale.dtype != jnp.float32:
            got = describe(name, q.qvalue) + ", " + describe("scale", q.scale)
            fail(
                "gemm",
                f"{name} has the wrong dtype.",
                got,
                "e4m3 and f32 scales",
                f"quantize({name})",
                TypeError,
            )
    both = describe("lhs", lhs.qvalue) + ", " + describe("rhs", rhs.qvalue)
    k = lhs.shape[-1]
    if k != rhs.shape[-1]:
        mend = "both operands have k last; if rhs is stored [k, n], quantise its transpose"
        fail("gemm", "dim k differs between lhs and rhs.", both, f"rhs [..., n, {k}]", mend)
    if lhs.ndim == rhs.ndim and lhs.shape[:-2] != rhs.shape[:-2]:
        fail("gemm", "dim g differs between lhs and rhs.", both, "equal g", "broadcast one of them")
    if k % K_MULTIPLE:
        mend = f"pad k to {round_up(k, K_MULTIPLE)} with zeros, as fp8_matmul does"
        fail("gemm", f"dim k is not a multiple of {K_MULTIPLE}.", both, "k % 16 == 0", mend)


def check_positive(op: str, name: str, count: int | None) -> None:
    if count is not None and count < 1:
        mend = "leave it out, or pass None, for all"
        fail(op, f"{name} is below 1.", f"{name} {count}", "1 or more", mend)


def _group_operand(lhs: QArray, rhs: QArray, groups, variant: str) -> jax.Array | None:
    """Returns the checked group operand as int32."""
    row = VARIANTS[variant]
    if row.group_operand is None:
        if groups is not None:
            mend = "leave group_sizes out, or name a grouped variant"
            fail("gemm", f"{variant} takes no group_sizes.", "group_sizes", "none", mend)
        return None
    want = "the group of each row, int [m]" if row.group_operand == "m" else "int [g]"
    if groups is None:
        fail("gemm", f"{variant} needs group_sizes.", "none", want, "pass group_sizes")
    concrete = isinstance(groups, np.ndarray)
    given, groups = groups, as_int32("gemm", "group_sizes", groups)
    size = row.sizes(lhs.shape, rhs.shape, None).get(row.group_operand)
    if groups.ndim != 1 or groups.shape[0] != (groups.shape[0] if size is None else size):
        got = describe("group_sizes", groups) + ", " + describe("rhs", rhs.qvalue)
        expected = want if size is None else f"{want}, here [{size}]"
        fail("gemm", "group_sizes do not fit the operands.", got, expected, "pass one per group")
    if variant == "contiguous" and concrete:
        _check_contiguous(given)
    return groups


def as_int32(op: str, name: str, integers: jax.Array) -> jax.Array:
    """Returns the nearest int32 of each."""
    integers = jnp.asarray(integers)
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        got, mend = describe(name, integers), f"cast {name} to int32"
        fail(op, f"{name} must be integers.", got, "integers", mend, TypeError)
    own, most = jnp.iinfo(integers.dtype), jnp.iinfo(jnp.int32)
    if own.max > most.max:
        integers = jnp.clip(integers, max(own.min, most.min), most.max)
    return integers.astype(jnp.int32)


def _check_contiguous(rows: np.ndarray) -> None:
    """Raises where a block of 128 rows belongs to two groups."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        groups = np.unique(block[block >= 0])
        if len(groups) > 1 or (len(groups) == 1 and block[0] < 0):
            got = f"rows {start} to {start + len(block) - 1} of groups {groups.tolist()}"
            mend = 'pad each group to a multiple of 128 rows, or use variant="ragged"'
            what = "contiguous: a block of 128 rows has more than one group, or padding first."
            fail("gemm", what, got, "one group for each 128 rows, padding at its end", mend)


def _scales(lhs: QArray, rhs: QArray, variant: str) -> str:
    """Returns the name of the first pair of tiles that fits; small arrays fit several, alike."""
    for name, (lhs_tile, rhs_tile) in SCALES.items():
        if variant == "dense" and lhs.ndim > 2 and lhs_tile == TENSOR:
            continue  # a scale for each matrix
        if variant == "ragged_contracting" and rhs_tile == BLOCKS:
            continue  # a block of scales would belong to several groups
        if lhs.has_tile(lhs_tile) and rhs.has_tile(rhs_tile):
            return name
    got = f"lhs {list(lhs.shape)} with scale {list(lhs.scale.shape)}, "
    got += f"rhs {list(rhs.shape)} with scale {list(rhs.scale.shape)}"
    pairs = [
        f"{list(scale_shape(lhs.shape, a))} and {list(scale_shape(rhs.shape, b))}"
        for a, b in SCALES.values()
    ]
    mend = "quantize(lhs) with tile (1, 128), quantize(rhs, (128, 128))"
    fail("gemm", "the scales have shapes that no kernel takes.", got, " or ".join(pairs), mend)


def _out_name(out_dtype, init: jax.Array | None, shape: tuple[int, ...]) -> str:
    name = {"bfloat16": "bf16", "float32": "f32"}.get(jnp.dtype(out_dtype).name)
    if name is None:
        fail(
            "gemm",
            "unknown out_dtype.",
            str(out_dtype),
            "bfloat16 or float32",
            "choose one",
            TypeError,
        )
    if init is None:
        return name
    if name != "f32" or init.dtype != jnp.float32:
        got = f"{describe('init', init)}, out_dtype {jnp.dtype(out_dtype).name}"
        fail(
            "gemm",
            "init needs float32.",
            got,
            "f32 init and out_dtype",
            "pass out_dtype=jnp.float32, and init as f32",
            TypeError,
        )
    if init.shape != shape:
        fail(
            "gemm",
            "init has the wrong shape.",
            describe("init", init),
            f"f32{list(shape)}",
            "reshape it",
        )
    return name
