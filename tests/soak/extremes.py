"""NaN, infinities, 3e38 and denormals in some rows of lhs and columns of rhs: they stay there."""

import jax
import jax.numpy as jnp
from soak import exact

import jax_fp8gemm as fp8

# What a row may have. The first of rhs's columns are as the first of lhs's rows.
CLEAN, NAN, NAN_SCALE, INF_SCALE, HUGE_SCALE, TINY_SCALE = range(6)
HUGE, TINY = 3e38, 2.0**-140
TINY_RESULT = 1e-30  # more than 2048 · 128 steps · TINY · any other scale


def draw(key: jax.Array, gemm) -> dict[str, jax.Array]:
    """Returns for rows of lhs what they have, and where along k; for columns of rhs likewise.

    Scales that are not one for each row stay as they are.
    """
    keys = jax.random.split(key, 6)
    lhs, rhs = gemm.shape(0), gemm.shape(1)
    per_row = exact.TILES[exact.SCALES[gemm.scales][0]][0] == 1
    kinds = jax.random.randint(keys[0], lhs[:-1], 1, TINY_SCALE + 1 if per_row else NAN + 1)
    share = min(0.3, 3 / lhs[-2])
    some = jax.random.bernoulli(keys[1], share, lhs[:-1])
    columns = jax.random.bernoulli(keys[2], min(0.3, 1 / rhs[-2]), rhs[:-1])
    return {
        "row_kind": jnp.where(some, kinds, CLEAN),
        "row_at": jax.random.randint(keys[3], lhs[:-1], 0, gemm.k),
        "column_kind": jnp.where(columns & (gemm.rhs == "fp8"), NAN, CLEAN),
        "column_at": jax.random.randint(keys[4], rhs[:-1], 0, gemm.k),
    }


def dirty(gemm, operands, name: str) -> fp8.QArray:
    """Returns lhs or rhs with what was drawn."""
    prefix = "row" if name == "lhs" else "column"
    kind, at = operands[f"{prefix}_kind"][..., None], operands[f"{prefix}_at"][..., None]
    q = operands[name].astype(jnp.float8_e4m3fn)
    here = (kind == NAN) & (jnp.arange(gemm.k) == at)
    q = jnp.where(here, jnp.float8_e4m3fn(jnp.nan), q)
    scale = operands[f"{name}_scale"]
    if name == "lhs" and scale.shape[:-1] == kind.shape[:-1]:
        steps = scale.shape[-1]  # 1 where a row has one scale
        here = jnp.arange(steps) == (at // 128 if steps > 1 else 0)
        scale = jnp.where(here & (kind == NAN_SCALE), jnp.nan, scale)
        scale = jnp.where(here & (kind == INF_SCALE), jnp.inf, scale)
        scale = jnp.where(kind == HUGE_SCALE, HUGE, scale)
        scale = jnp.where(kind == TINY_SCALE, TINY, scale)
    return fp8.QArray(q, scale)


def right(gemm, operands, out: jax.Array, equal: jax.Array) -> jax.Array:
    """Returns which values are right. `equal`: are those of the clean operands.

    Where NaN is, the result is NaN. An infinite scale gives no finite value, a denormal one
    nearly zero, and 3e38 gives anything.
    """
    kind, nan = _of_results(gemm, operands)
    start = operands["init"] if gemm.init else 0
    tiny = jnp.abs(out - start) <= TINY_RESULT
    found = jnp.where(kind == TINY_SCALE, tiny, equal)
    found = jnp.where(kind == HUGE_SCALE, True, found)
    found = jnp.where(kind == INF_SCALE, ~jnp.isfinite(out), found)
    return jnp.where(nan, jnp.isnan(out), found)


def _of_results(gemm, operands) -> tuple[jax.Array, jax.Array]:
    """Returns what each value of the result has of its row, and whether NaN reaches it."""
    rows, columns = operands["row_kind"], operands["column_kind"]
    own = gemm.own(operands)
    if gemm.variant in ("ragged", "contiguous"):  # each row has the columns of its group
        rows = jnp.where(own.any(0), rows, CLEAN)
        columns = jnp.max(jnp.where(own[:, :, None], columns[:, None, :], CLEAN), 0)
        rows = rows[:, None]
    elif gemm.variant == "ragged_contracting":  # each group sees its own part of k
        rows = _of_groups(rows, operands["row_at"], own, gemm)[:, :, None]
        columns = _of_groups(columns, operands["column_at"], own, gemm)[:, None, :]
    else:
        rows, columns = rows[..., :, None], columns[..., None, :]
    kind = jnp.broadcast_to(rows, gemm.shape(2))
    return kind, (kind == NAN) | (kind == NAN_SCALE) | (columns == NAN)


def _of_groups(kind: jax.Array, at: jax.Array, own: jax.Array, gemm) -> jax.Array:
    """Returns what rows have in each group, [g, rows]: what is at one place, or in all of k.

    A group without any k is clean.
    """
    per_row = exact.SCALES[gemm.scales][0] == "row"
    whole = (kind == HUGE_SCALE) | (kind == TINY_SCALE)
    whole |= per_row & ((kind == NAN_SCALE) | (kind == INF_SCALE))
    step = own[:, (at // 128 * 128)]
    here = jnp.where(whole[None], own.any(1)[:, None], step)
    return jnp.where(here, kind[None], CLEAN)
