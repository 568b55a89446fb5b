"""The kernels against the float64 product of the dequantized operands."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import random_operands
from numerics import calc_diff, product64

import jax_fp8gemm as fp8
from jax_fp8gemm._core.variants import SCALES
from jax_fp8gemm._select.problem import GemmConfig, Problem, deepest, why_illegal
from jax_fp8gemm._tools import operands as on_device
from jax_fp8gemm._tools.operands import compiled, executable_of, sample_error
from jax_fp8gemm._tools.shapes import DENSE, ODD, WEIGHT_GRADIENT

BOUND = {"bf16": 1e-5, "f32": 1e-6}  # calc_diff

# One config of each kind: clusters, floating scale borders, direct stores, split k, one stage pair.
CONFIGS = [
    GemmConfig("persistent", 256, 128, 3, "lhs"),
    GemmConfig("persistent", 256, 96, 2, "rhs"),
    GemmConfig("persistent", 128, 192, 3, "rhs"),
    GemmConfig("persistent", 128, 160, 4),
    GemmConfig("persistent", 128, 144, 4, "lhs"),
    GemmConfig("persistent", 128, 64, 2, group_m=1),
    GemmConfig("persistent", 128, 16, 8),
    GemmConfig("few_rows", 64, 56, 4),
    GemmConfig("few_rows", 64, 8, 2, split_k=2),
    GemmConfig("few_rows", 64, 72, 2, split_k=4),
    GemmConfig("few_rows", 128, 40, 6, split_k=2),
    GemmConfig("few_rows", 128, 64, 2),
    GemmConfig("persistent", 192, 128, 3, "rhs"),
]


def poison() -> None:
    """Leaves NaN in the memory that the next outputs are likely to get."""
    for dtype in (jnp.bfloat16, jnp.float32):
        jax.block_until_ready([jnp.full((1 << 22,), jnp.nan, dtype) for _ in range(4)])


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def check(problem: Problem, config: GemmConfig | None = None, seed: int = 0) -> None:
    """Product, elementwise and by calc_diff; twice, to the bit, on poisoned memory."""
    operands = random_operands(problem, seed=seed)
    run = compiled(problem, config, operands)
    poison()
    out = run()
    np.testing.assert_array_equal(bits(out), bits(run()))
    expected = product64(*operands, problem.tiles)
    got = np.asarray(out, np.float64)
    assert calc_diff(got, expected) < BOUND[problem.out], (problem, config)
    # Rounding to the output type, and 13 bits in the tensor core over 128 of k.
    rounding = 2.0**-8 if problem.out == "bf16" else 2.0**-23
    rows = np.linalg.norm(expected, axis=-1, keepdims=True)
    assert np.all(np.abs(got - expected) <= 2 * rounding * np.abs(expected) + 2e-3 * rows)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
def test_every_kind_of_config_on_odd_shapes(shape, config):
    problem = Problem("dense", shape.m, shape.n, shape.k)
    if why_illegal(problem, config) is None:
        check(problem, config)


@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
def test_every_scale_mode_with_the_chosen_config(shape, scales, out):
    check(Problem("dense", shape.m, shape.n, shape.k, 1, scales, out))


@pytest.mark.parametrize("scales", list(SCALES)[1:])
@pytest.mark.parametrize("config", CONFIGS[::3], ids=str)
def test_other_scale_modes_on_every_kernel(scales, config):
    problem = Problem("dense", 200, 312, 400, 1, scales, "f32")
    if why_illegal(problem, config) is None:
        check(problem, config)


@pytest.mark.parametrize("config", CONFIGS[::2], ids=str)
@pytest.mark.parametrize("scales", SCALES)
def test_batched(scales, config):
    for m, n, k in ((130, 136, 272), (3, 200, 112), (257, 65, 128)):
        problem = Problem("batched", m, n, k, 3, scales, "bf16")
        if why_illegal(problem, config) is None:
            check(problem, config)


@pytest.mark.parametrize("shape", [*DENSE, *WEIGHT_GRADIENT], ids=lambda s: s.name)
def test_model_shapes(shape):
    """All 50 shapes of the benchmarks, checked on the GPU in float32."""
    problem = Problem("dense", shape.m, shape.n, shape.k, 1, shape.scales, shape.out)
    operands = on_device.random_operands(problem)
    run = compiled(problem, None, operands)
    poison()
    out = run()
    assert bool((out == run()).all())
    assert sample_error(problem, out, operands) < BOUND[shape.out]


@pytest.mark.parametrize("m", [1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257])
def test_every_tail_of_m(m):
    check(Problem("dense", m, 264, 384))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 63, 65, 120, 127, 128, 129, 255, 577])
def test_every_tail_of_n(n):
    for config in (CONFIGS[0], CONFIGS[2], CONFIGS[7]):
        check(Problem("dense", 70, n, 256), config)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_last_blocks_of_any_size(config):
    """They are copied by maps of their own, shared ones and those computed in vain too."""
    for m, n in ((259, 393), (333, 200), (511, 131), (300, 520)):
        for scales in ("1x128_128x128", "1x128_1x128"):
            problem = Problem("dense", m, n, 272, 1, scales)
            if why_illegal(problem, config) is None:
                check(problem, config)


# Three warpgroups, each with 64 of 192 rows.
THREE_WARPGROUPS = [
    GemmConfig("persistent", 192, n, 8, multicast)
    for n, multicast in ((128, "none"), (112, "rhs"), (96, "lhs"), (80, "none"), (64, "rhs"))
]


@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("m", [1, 64, 65, 129, 192, 193, 200, 384, 385, 700])
def test_every_tail_of_blocks_of_192_rows(m, out):
    for scales in ("1x128_128x128", "1x128_1x128"):
        problem = Problem("dense", m, 396, 400, 1, scales, out)
        for config in deepest(problem, THREE_WARPGROUPS):
            check(problem, config)


@pytest.mark.parametrize("k", [16, 32, 112, 128, 144, 240, 256, 272, 384, 528, 1040])
def test_every_tail_of_k(k):
    for config in (CONFIGS[0], CONFIGS[3], CONFIGS[7], CONFIGS[11]):
        check(Problem("dense", 130, 200, k), config)


# Where scales of columns are common, another loop runs (csrc/kernels/inspector.cuh).
SHARING = [
    Problem("dense", 300, 392, 640, 1, "1x128_1x128", "f32"),
    Problem("dense", 300, 392, 640, 1, "1x128_1x128", "bf16"),
    Problem("dense", 130, 264, 384, 1, "row_row", "bf16"),
    Problem("batched", 200, 264, 384, 3, "1x128_1x128", "f32"),
    Problem("ragged_contracting", 200, 264, 1536, 3, "1x128_1x128", "f32"),
    Problem("contiguous", 256, 264, 384, 2, "row_row", "bf16"),
]
SHAPES_OF_BLOCKS = [
    (256, 128, "none"), (256, 128, "lhs"), (256, 128, "rhs"), (256, 96, "none"),
    (128, 192, "none"), (128, 160, "lhs"), (128, 144, "none"), (128, 112, "none"), (128, 64, "rhs"),
    (192, 128, "rhs"), (192, 96, "none"),
]  # fmt: skip


def sharing_configs(problem: Problem) -> list[GemmConfig]:
    wanted = [GemmConfig("persistent", m, n, 8, multicast) for m, n, multicast in SHAPES_OF_BLOCKS]
    return deepest(problem, wanted)


@pytest.mark.parametrize("problem", SHARING, ids=str)
def test_common_scales_give_the_bits_of_single_ones(problem):
    """One column with another scale takes its block, and no other column's bits, off that loop."""
    lhs, rhs, *groups = random_operands(problem, shared=1.0)
    odd = fp8.QArray(rhs.qvalue, rhs.scale.at[..., 5, :].mul(2))
    mine = np.arange(problem.n) != 5
    for config in sharing_configs(problem):
        run = compiled(problem, config, (lhs, rhs, *groups))
        out = run()
        assert sample_error(problem, out, (lhs, rhs, *groups)) < BOUND[problem.out]
        other = executable_of(problem, config, (lhs, rhs, *groups))(lhs, odd, *groups)
        np.testing.assert_array_equal(np.asarray(out)[..., mine], np.asarray(other)[..., mine])
        some = random_operands(problem, shared=0.5)
        assert sample_error(problem, compiled(problem, config, some)(), some) < BOUND[problem.out]


HOSTILE = {
    "zero": lambda s: s.at[5].set(0),
    "negative": lambda s: -s,
    "one_negative": lambda s: s.at[200, 1].mul(-1),
    "nan": lambda s: s.at[130, 2].set(jnp.nan),
    "inf": lambda s: s.at[131, 2].set(jnp.inf),
    "a_block_of_nan": lambda s: s.at[128:256, 1].set(jnp.nan),
    "a_block_of_zeros": lambda s: s.at[128:256].set(0),
    "the_last_column": lambda s: s.at[-1].mul(2),
    "no_powers_of_two": lambda s: s * 0.7,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_scales_of_users_are_multiplied_as_they_are(name):
    problem = Problem("dense", 256, 389, 512, 1, "1x128_1x128", "f32")
    lhs, rhs = random_operands(problem, shared=1.0)
    rhs = fp8.QArray(rhs.qvalue, HOSTILE[name](rhs.scale))
    with np.errstate(invalid="ignore"):  # sums of both infinities
        expected = product64(lhs, rhs, problem.tiles)
    finite = np.isfinite(expected)
    for config in sharing_configs(problem)[:5]:
        out = np.asarray(compiled(problem, config, (lhs, rhs))())
        np.testing.assert_array_equal(np.isfinite(out), finite)
        assert calc_diff(out[finite], expected[finite]) < BOUND["f32"]


def test_slices_of_shared_operands_keep_their_values():
    """From column 40 on, blocks of the slice hold columns of two blocks of scales."""
    problem = Problem("dense", 256, 640, 512, 1, "1x128_1x128", "f32")
    lhs, rhs = random_operands(problem, shared=1.0)
    some = fp8.QArray(rhs.qvalue[40:], rhs.scale[40:])
    for config in sharing_configs(problem)[:5]:
        whole, part = (
            fp8.gemm(lhs, own, out_dtype=jnp.float32, config=config) for own in (rhs, some)
        )
        np.testing.assert_array_equal(part, whole[:, 40:])


def test_init_is_added():
    problem = Problem("dense", 200, 131, 256, 1, "1x128_1x128", "f32")
    lhs, rhs = random_operands(problem)
    init = jax.random.normal(jax.random.key(3), (200, 131))
    run = jax.jit(lambda lhs, rhs, init: fp8.gemm(lhs, rhs, init=init, out_dtype=jnp.float32))
    expected = product64(lhs, rhs, problem.tiles) + np.asarray(init, np.float64)
    assert calc_diff(run(lhs, rhs, init), expected) < 1e-6
    np.testing.assert_array_equal(init, jax.random.normal(jax.random.key(3), (200, 131)))


def test_all_positive_operands_keep_their_sum():
    """Without promotion the tensor core's 13 bits would lose 21 % here."""
    lhs = fp8.quantize(jax.random.uniform(jax.random.key(0), (128, 16384), minval=0.5))
    rhs = fp8.quantize(jax.random.uniform(jax.random.key(1), (256, 16384), minval=0.5), (128, 128))
    expected = product64(lhs, rhs)
    for config in (None, CONFIGS[0], CONFIGS[7]):
        out = np.asarray(fp8.gemm(lhs, rhs, out_dtype=jnp.float32, config=config), np.float64)
        assert np.max(np.abs(out - expected) / expected) < 1e-3


def test_one_hot_and_powers_of_two_are_exact():
    eye = fp8.quantize(jnp.eye(256, 512))
    values = jnp.exp2(jnp.arange(300 * 512) % 7.0).reshape(300, 512)
    rhs = fp8.quantize(values, (128, 128))
    for config in (None, *CONFIGS[:4], CONFIGS[9]):
        out = fp8.gemm(eye, rhs, out_dtype=jnp.float32, config=config)
        np.testing.assert_array_equal(out, values[:, :256].T)


def test_nan_stays_in_its_row_and_its_column():
    lhs, rhs = random_operands(Problem("dense", 200, 300, 512))
    lhs = fp8.QArray(lhs.qvalue, lhs.scale.at[70, 1].set(jnp.nan))
    rhs = fp8.QArray(rhs.qvalue.at[11, 200].set(jnp.nan), rhs.scale)
    for config in (None, CONFIGS[0], CONFIGS[2], CONFIGS[9]):
        out = np.isnan(np.asarray(fp8.gemm(lhs, rhs, config=config), np.float32))
        expected = np.zeros_like(out)
        expected[70], expected[:, 11] = True, True
        np.testing.assert_array_equal(out, expected)


def test_nan_in_one_group_of_a_batch_stays_there():
    for k in (64, 128, 272):
        lhs, rhs = random_operands(Problem("batched", 70, 72, k, 3, "1x128_1x128"))
        lhs = fp8.QArray(lhs.qvalue, lhs.scale.at[1].set(jnp.nan))
        rhs = fp8.QArray(rhs.qvalue, rhs.scale.at[1].set(jnp.nan))
        out = np.isnan(np.asarray(fp8.gemm(lhs, rhs, variant="batched"), np.float32))
        assert out[1].all() and not out[0].any() and not out[2].any()


@pytest.mark.parametrize("num_sms", [1, 2, 7, 132])
def test_num_sms(num_sms):
    check(Problem("dense", 520, 600, 384, num_sms=num_sms))
    check(Problem("dense", 520, 600, 384, num_sms=num_sms), CONFIGS[0])


def test_offsets_past_two_to_the_31():
    """65792 × 40960 outputs, 2.7·10⁹: the last rows and columns are right."""
    problem = Problem("dense", 65792, 40960, 256)
    lhs, rhs = random_operands(problem)
    out = compiled(problem, None, (lhs, rhs))()
    rows = np.r_[0:3, 40000:40003, 65789:65792]
    part = fp8.QArray(lhs.qvalue[rows], lhs.scale[rows])
    assert calc_diff(out[rows].astype(jnp.float32), product64(part, rhs, problem.tiles)) < 1e-5
    direct = GemmConfig("persistent", 128, 144, 4)
    out = compiled(problem, direct, (lhs, rhs))()
    assert calc_diff(out[rows].astype(jnp.float32), product64(part, rhs, problem.tiles)) < 1e-5


def test_two_threads_at_once():
    problems = [Problem("dense", 300 + 64 * i, 520, 640) for i in range(4)]
    operands = [random_operands(problem) for problem in problems]
    runs = [compiled(*a) for a in zip(problems, [None] * 4, operands, strict=True)]
    expected = [bits(run()) for run in runs]

    def many(index):
        return all(np.array_equal(bits(runs[index]()), expected[index]) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
