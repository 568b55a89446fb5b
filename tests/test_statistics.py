"""cast_statistics(q, x): what a cast clipped, flushed to zero or lost, by a plain count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import mesh_of, place
from jax.sharding import AxisType

import jax_fp8gemm as fp8
from jax_fp8gemm._core.groups import place_by_groups
from jax_fp8gemm._core.layout import BLOCKS, ROW_BLOCKS, ROWS, TENSOR

TILES = [ROW_BLOCKS, BLOCKS, ROWS, TENSOR]


def wide(key, shape) -> jax.Array:
    """Returns numbers over many powers of two, with tiles of zeros and a NaN."""
    x = jax.random.normal(key, shape) * jnp.exp(6 * jax.random.normal(jax.random.key(1), shape))
    return x.at[..., :150].multiply(0.0).at[..., -1, -1].set(jnp.nan)


def counted(q: fp8.QArray, x: np.ndarray, tile) -> dict[str, int]:
    """Counts tile by tile. q and x are matrices of one shape."""
    values, x = np.asarray(q.qvalue, np.float32), np.asarray(x, np.float64)
    found = dict.fromkeys(("overflows", "underflows", "zero_tiles", "nonfinite_tiles"), 0)
    rows, columns = (n or size for n, size in zip(tile, x.shape, strict=True))
    for (i, j), scale in np.ndenumerate(np.asarray(q.scale, np.float64)):
        own = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        numbers, given = values[own], x[own]
        found["zero_tiles"] += not numbers.any()
        found["nonfinite_tiles"] += not np.isfinite(scale) or np.isnan(numbers).any()
        found["overflows"] += int((np.abs(given / scale) > 464).sum())
        found["underflows"] += int(((given != 0) & (numbers == 0)).sum())
    return found


def part(found: fp8.CastStatistics, names) -> dict[str, int]:
    return {name: int(getattr(found, name)) for name in names}


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_counts_are_those_of_a_loop(key, tile):
    x = wide(key, (130, 300))
    q = fp8.quantize(x, tile)
    larger = fp8.QArray(q.qvalue, q.scale / 4)  # as if the scales were of an earlier step
    for cast in (q, larger):
        found = fp8.cast_statistics(cast, x)
        expected = counted(cast, x, tile)
        assert part(found, expected) == expected
        assert (found.values, found.tiles) == (130 * 300, q.scale.size)
    assert fp8.cast_statistics(q, x).overflows == 0
    assert tile == TENSOR or found.overflows > 0  # TENSOR: one NaN takes it all
    assert tile == TENSOR or found.underflows > 0


def test_what_needs_x_is_unknown_without_it(key):
    x = wide(key, (64, 256))
    q = fp8.quantize(x)
    found, known = fp8.cast_statistics(q), fp8.cast_statistics(q, x)
    assert found.overflows is found.underflows is None
    rest = set(found._fields) - {"overflows", "underflows"}
    assert part(found, rest) == part(known, rest)


@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
def test_own_scales_do_not_overflow(key, scale_rounding):
    x = jax.random.normal(key, (256, 512)) * 3.3
    found = fp8.cast_statistics(fp8.quantize(x, scale_rounding=scale_rounding), x)
    assert found.overflows == 0


def test_what_rounds_to_the_largest_number_does_not_overflow():
    x = jnp.array([[448.0, 464.0, 465.0, -480.0] + [0.0] * 124])
    q = fp8.QArray(jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn), jnp.ones((1, 1)))
    assert fp8.cast_statistics(q, x).overflows == 2


def shared_blocks(x: jax.Array, **how) -> tuple[int, int]:
    _, transposed = fp8.quantize_both(x, shared_columns=True)
    found = fp8.cast_statistics(transposed, x, transposed=True, **how)
    return int(found.shared_blocks), int(found.blocks)


def test_blocks_that_share_are_counted(key):
    x = jax.random.normal(key, (300, 320))  # 3 × 3 blocks, the last of 44 tokens, 64 columns
    assert shared_blocks(x) == (9, 9)
    assert shared_blocks(x.at[:, 5].multiply(2.0**-30)) == (6, 9)
    assert shared_blocks(x.at[:, 5].set(0)) == (9, 9)  # a column of zeros takes part
    assert shared_blocks(x.at[130, 5].set(jnp.nan)) == (8, 9)
    assert shared_blocks(x.at[:, :128].set(0)) == (6, 6)  # blocks of zeros do not count
    own = fp8.cast_statistics(fp8.quantize_transposed(x * jnp.arange(1, 321)), transposed=True)
    assert own.shared_blocks < own.blocks == 9
    assert fp8.cast_statistics(fp8.quantize(x, BLOCKS)).blocks is None


def test_groups_are_placed_as_the_cast_places_them(key):
    x = wide(key, (300, 256))
    sizes = jnp.array([70, 0, 130, 20])  # 80 rows are past the groups
    rows, transposed = fp8.quantize_both(x, group_sizes=sizes, shared_columns=True)
    placed = place_by_groups(x, sizes).T
    columns = fp8.cast_statistics(transposed, x, transposed=True, group_sizes=sizes)
    expected = counted(transposed, placed, ROW_BLOCKS)
    assert part(columns, expected) == expected
    found = fp8.cast_statistics(rows, x, group_sizes=sizes)
    expected = counted(fp8.QArray(rows.qvalue[:220], rows.scale[:220]), x[:220], ROW_BLOCKS)
    expected["zero_tiles"] += 2 * 80
    assert part(found, expected) == expected and found.underflows > 0


def test_the_scales_of_another_batch_may_overflow(key):
    """Scales from outside, as with delayed scaling: what is too large is counted."""
    x = jax.random.normal(key, (4, 128))
    scale = fp8.quantize(x).scale / 8
    q = fp8.QArray(jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn), scale)
    expected = int((np.abs(np.asarray(x / scale)) > 464).sum())
    assert fp8.cast_statistics(q, x).overflows == expected > 0


def test_under_jit_vmap_and_scan(key):
    x = jax.random.normal(key, (3, 64, 256)).at[1, :, :128].set(0)
    of_one = lambda x: fp8.cast_statistics(fp8.quantize(x), x)  # noqa: E731
    found = jax.jit(jax.vmap(of_one))(x)
    assert found.zero_tiles.tolist() == [0, 64, 0]
    _, scanned = jax.lax.scan(lambda carry, x: (carry, of_one(x)), 0, x)
    whole = fp8.cast_statistics(fp8.quantize(x), x)
    for name, mapped, stacked, once in zip(found._fields, found, scanned, whole, strict=True):
        np.testing.assert_array_equal(mapped, stacked, name)
        assert once == mapped.sum(), name
        assert once.dtype == jnp.int32


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_over_devices_it_counts_everything(key, kind):
    x = wide(key, (256, 512))
    q = fp8.quantize(x)
    mesh = mesh_of(kind)
    arrays = place(mesh, (q, x), ("data", "model"), ("data", "model"))
    found = jax.jit(fp8.cast_statistics)(*arrays)
    expected = fp8.cast_statistics(q, x)
    assert part(found, found._fields) == part(expected, found._fields)


X, Q = jnp.ones((130, 256)), fp8.quantize(jnp.ones((130, 256)))


@pytest.mark.parametrize(
    ("error", "call", "says"),
    [
        (TypeError, lambda: fp8.cast_statistics(X), "q is not quantized."),
        (ValueError, lambda: fp8.cast_statistics(Q, X[:4]), "q is not a cast of x."),
        (ValueError, lambda: fp8.cast_statistics(Q, X, transposed=True), "q is not a cast of x."),
        (TypeError, lambda: fp8.cast_statistics(Q, transposed=1), "transposed is not a bool."),
        (
            ValueError,
            lambda: fp8.cast_statistics(fp8.quantize(X, BLOCKS), group_sizes=[1]),
            "group_sizes need rows of tokens.",
        ),
    ],
)
def test_errors_say_what_is_wrong(error, call, says):
    with pytest.raises(error, match="cast_statistics: ") as raised:
        call()
    assert says in str(raised.value)


def test_too_many_numbers_to_count():
    shapes = fp8.QArray(
        jax.ShapeDtypeStruct((2**16, 2**15), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((2**16, 2**8), jnp.float32),
    )
    with pytest.raises(ValueError, match="too many numbers"):
        jax.eval_shape(fp8.cast_statistics, shapes)
