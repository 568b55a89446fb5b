"""tune: every GEMM of a program is found, the fastest config is kept, and `gemm` uses it.

No GPU is needed: the device is a fake, and so is the clock.
"""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm import __main__ as command
from jax_fp8gemm._select import choice, saved
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._tools import measure as measure_module
from jax_fp8gemm._tools import tune as tune_module
from jax_fp8gemm._tools.measure import Case, configs_to_try
from jax_fp8gemm._tools.operands import executable_of, sample_error
from jax_fp8gemm._tools.problems import parse_problem, problem_text
from jax_fp8gemm._tools.programs import calls_of, problems_of

CARD = "NVIDIA H200"
X, W = (64, 256), (256, 128)
DENSE = Problem("dense", 64, 128, 256)


def shape(*dims, dtype=jnp.bfloat16, **options):
    return jax.ShapeDtypeStruct(dims, dtype, **options)


def found(function, *args) -> set[str]:
    return {problem_text(problem) for problem in problems_of(calls_of(function, *args), CARD)}


# ---- the GEMMs of a program ---------------------------------------------------------------------

FORWARD = "dense:m=64,n=256,k=256"
GRADIENT = "dense:m=256,n=256,k=128,scales=1x128_1x128"  # 64 tokens, filled up to 128


def loss(w, x):
    """Three layers in a loop, made again in the backward pass."""
    layer = jax.checkpoint(lambda x, w: jnp.tanh(fp8.fp8_matmul(x, w)))
    y, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, w)
    return y.astype(jnp.float32).sum()


def test_gemms_in_loops_remat_and_derivatives_are_found():
    args = shape(3, 256, 256), shape(64, 256)
    assert found(jax.jit(loss), *args) == {FORWARD}
    assert found(jax.jit(jax.grad(loss)), *args) == {FORWARD, GRADIENT}


def test_a_function_that_ran_before_is_looked_through_again():
    run = jax.jit(fp8.fp8_matmul)
    run(jnp.ones(X), jnp.ones(W))
    for _ in range(2):
        assert found(run, shape(*X), shape(*W)) == {"dense:m=64,n=128,k=256"}


def test_shards_have_the_sizes_of_a_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w = P("data"), P(None, "model")
    at = [NamedSharding(mesh, spec) for spec in (x, w)]
    inside = jax.shard_map(fp8.fp8_matmul, mesh=mesh, in_specs=(x, w), out_specs=P("data", "model"))
    args = shape(512, 256), shape(256, 512)
    shards = {"dense:m=128,n=256,k=256"}
    assert found(jax.jit(inside), *args) == shards
    assert found(jax.jit(fp8.fp8_matmul, in_shardings=at), *args) == shards
    given = [shape(*a.shape, sharding=s) for a, s in zip(args, at, strict=True)]
    assert found(jax.jit(fp8.fp8_matmul), *given) == shards


def test_what_decides_about_a_config_is_found():
    sizes = shape(4, dtype=jnp.int32)
    grouped = fp8.fp8_ragged_dot
    args = shape(64, 256), shape(4, 256, 128), sizes
    assert found(grouped, *args) == {"ragged:m=64,n=128,k=256,g=4,rhs=bf16_transposed"}
    whole = lambda *args: grouped(*args, cast_in_gemm=False)  # noqa: E731
    assert found(whole, *args) == {"ragged:m=64,n=128,k=256,g=4"}

    def adds(x, w, init):
        q, r = fp8.quantize(x), fp8.quantize(w, (128, 128))
        return fp8.gemm(q, r, init=init, out_dtype=jnp.float32, num_sms=20)

    args = shape(64, 256), shape(128, 256), shape(64, 128, dtype=jnp.float32)
    assert found(adds, *args) == {"dense:m=64,n=128,k=256,out=f32,accumulate=1,num_sms=20"}


def test_a_config_that_was_given_is_not_tuned():
    config = GemmConfig("persistent", 128, 128, 4)

    def own(x, w):
        return fp8.gemm(fp8.quantize(x), fp8.quantize(w, (128, 128)), config=config)

    assert found(own, shape(64, 256), shape(128, 256)) == set()


def test_a_gemm_as_text():
    for problem in (
        DENSE,
        Problem("ragged", 4096, 512, 1024, 8, rhs="bf16"),
        Problem("dense", 1, 2, 16, out="f32", accumulate=True, num_sms=3),
    ):
        assert parse_problem("tune", problem_text(problem), CARD) == problem


@pytest.mark.parametrize(
    "text, why",
    [
        ("dense:m=1,n=2", "fields ['k'] are missing or unknown"),
        ("dense:m=1,n=2,k=x", "k is 'x'"),
        ("dense:m=1,n=0,k=128", "n is 0"),
        ("dense:m=1,n=2,k=3,j=4", "fields ['j'] are missing or unknown"),
        ("dense:m=1,n=2,k=3,accumulate=2", "accumulate is 2"),
    ],
)
def test_a_text_that_is_no_gemm_is_refused(text, why):
    with pytest.raises(ValueError) as info:
        parse_problem("tune", text, CARD)
    assert f"\n  got       {text}: {why}\n" in str(info.value)


# ---- timing, with a clock that likes one config -------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A fake H200, with its file. Returns the file's path, and a dict of times by config."""
    device = types.SimpleNamespace(platform="gpu", device_kind=CARD, compute_capability="9.0")
    monkeypatch.setattr(tune_module.jax, "local_devices", lambda: [device])
    tmp_path.chmod(0o700)
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(saved.VARIABLE, str(path))
    choice.saved.cache_clear()
    times: dict[GemmConfig, float] = {}

    def clock(runs, reps, kernel):
        """Noise falls on one launch of three."""
        configs = {name: run.func.config for name, run in runs.items()}
        return {name: [times.get(c, 9.0), 99.0, times.get(c, 9.0)] for name, c in configs.items()}

    def executable(problem, config, types):
        made = executable_of(problem, config, types)

        def run(*operands):
            return made(*operands)

        run.config = config
        return run

    monkeypatch.setattr(measure_module, "device_microseconds", clock)
    monkeypatch.setattr(measure_module, "executable_of", executable)
    yield path, times
    choice.saved.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Compiles nothing, and takes every result for right."""

    def executable(problem, config, types):
        run = lambda *operands: None  # noqa: E731
        run.config = config
        return run

    monkeypatch.setattr(measure_module, "executable_of", executable)
    monkeypatch.setattr(measure_module, "sample_error", lambda *_: 0.0)


def chosen(function, *args) -> list[dict]:
    """Returns the configs that a program for a GPU has."""
    lines = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in lines.splitlines() if "@jax_fp8gemm_gemm_v1" in line]


def test_the_fastest_config_is_kept_and_used(gpu, capfd):
    path, times = gpu
    before = select(DENSE)
    best = configs_to_try(DENSE, 3)[2]
    times |= {before: 4.0, best: 2.0}
    tuning = fp8.tune(jax.jit(fp8.fp8_matmul), shape(*X), shape(*W), configs=3)
    (row,) = tuning.rows
    assert (row.config, row.us, row.before, row.before_us) == (best, 2.0, before, 4.0)
    assert (tuning.device, tuning.path, row.gain) == (CARD, str(path), 2.0)
    printed = capfd.readouterr()
    assert printed.out == f"{tuning}\n"
    assert printed.out.splitlines()[1].split() == ["dense:m=64,n=128,k=256", "4.00", "2.00", "2.00"]
    assert "compiling  [####" in printed.err and "timing     [####" in printed.err
    assert select(DENSE) == best
    (call,) = chosen(lambda x, w: fp8.fp8_matmul(x, w), shape(*X), shape(*W))
    assert f"block_n = {best.block_n} " in call and f'kernel = "{best.kernel}"' in call


@pytest.mark.usefixtures("gpu", "quick")
def test_todays_config_is_timed_and_kept_where_none_is_faster():
    before = select(DENSE)
    assert configs_to_try(DENSE, 1)[0] == before
    tune_module.tune_problems([DENSE], 2)
    assert select(DENSE) == before
    assert saved.read(CARD) == {DENSE: before}


def test_a_config_with_a_wrong_result_is_not_kept(gpu, monkeypatch, capfd):
    _, times = gpu
    before, wrong = configs_to_try(DENSE, 2)[:2]
    times |= {wrong: 1.0, before: 2.0}
    right = measure_module.executable_of

    def executable(problem, config, types):
        made = right(problem, config, types)
        if config != wrong:
            return made

        def run(*operands):
            return made(*operands) + 1

        run.config = config
        return run

    monkeypatch.setattr(measure_module, "executable_of", executable)
    tune_module.tune_problems([DENSE], 2)
    assert select(DENSE) == before
    assert f"WRONG {DENSE} {wrong}" in capfd.readouterr().err


@pytest.mark.usefixtures("gpu", "quick")
def test_operands_are_in_memory_in_batches(monkeypatch):
    problems = [dataclasses.replace(DENSE, m=m) for m in (1, 2, 3)]
    one = Case(problems[-1]).nbytes
    timed: list[int] = []
    clock = measure_module.device_microseconds

    def counted(runs, *rest):
        timed.append(len({case for case, _ in runs}))
        return clock(runs, *rest)

    monkeypatch.setattr(measure_module, "device_microseconds", counted)
    monkeypatch.setattr(measure_module, "MOST_BYTES", 2 * one)
    tune_module.tune_problems(problems, 1)
    assert timed == [2, 1] and set(saved.read(CARD)) == set(problems)


@pytest.mark.parametrize(
    "problem",
    [
        Problem("ragged", 40, 128, 256, 3, rhs="bf16_transposed"),
        Problem("masked", 8, 128, 256, 3, rhs="bf16"),
        Problem("ragged", 40, 128, 256, 3),
        Problem("ragged_contracting", 40, 24, 512, 2, "1x128_1x128", "f32", accumulate=True),
    ],
    ids=problem_text,
)
def test_operands_of_every_kind_of_gemm(problem):
    case = Case(problem)
    operands = case.operands()
    for x, expected in zip(jax.tree.leaves(operands), jax.tree.leaves(case.types), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
    out = executable_of(problem, select(problem), case.types)(*operands)
    assert sample_error(problem, out, operands) < 1e-5
    assert sample_error(problem, out * 1.1, operands) > 1e-4


# ---- what is refused ----------------------------------------------------------------------------


def test_a_machine_without_a_hopper_gpu_is_told_so(monkeypatch):
    with pytest.raises(RuntimeError) as info:
        fp8.tune(fp8.fp8_matmul, shape(*X), shape(*W))
    assert str(info.value) == (
        "tune: there is no Hopper GPU to time configs on.\n"
        "  got       'cpu' of platform 'cpu'\n"
        "  expected  an H100 or H200, compute capability 9.0\n"
        "  fix       run it on such a GPU with jax[cuda12] or jax[cuda13], and copy the file from"
        " there"
    )
    ampere = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100")
    ampere.compute_capability = "8.0"
    monkeypatch.setattr(tune_module.jax, "local_devices", lambda: [ampere])
    with pytest.raises(RuntimeError, match="'NVIDIA A100' of platform 'gpu', compute capability 8"):
        fp8.tune(fp8.fp8_matmul, shape(*X), shape(*W))


def test_what_cannot_be_tuned_is_refused_before_anything_is_timed(gpu, monkeypatch):
    with pytest.raises(ValueError, match=r"tune: the program has nothing to tune.\n  got"):
        fp8.tune(jnp.sin, shape(3))
    for configs in (0, 1.5, True):
        with pytest.raises(ValueError, match="configs is not a positive integer"):
            fp8.tune(fp8.fp8_matmul, shape(*X), shape(*W), configs=configs)
    monkeypatch.setenv(saved.VARIABLE, "")
    with pytest.raises(ValueError, match="there is no place for tuned configs"):
        fp8.tune(fp8.fp8_matmul, shape(*X), shape(*W))


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "steps_to_tune.py").write_text(
        "import jax, jax.numpy as jnp, jax_fp8gemm as fp8\n"
        "def program():\n"
        f"    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ({X}, {W}))\n"
        "    return jax.jit(fp8.fp8_matmul), x, w\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "steps_to_tune:program"
    sys.modules.pop("steps_to_tune", None)


@pytest.mark.usefixtures("gpu", "quick")
def test_the_command_tunes_programs_and_shapes(module, capsys):
    other = "dense:m=5,n=128,k=256"
    assert command.main(["tune", module, other, problem_text(DENSE), "--configs", "1"]) == 0
    assert set(saved.read(CARD)) == {DENSE, parse_problem("tune", other, CARD)}
    assert capsys.readouterr().out.count("dense:") == 2
    assert command.main(["tune", "dense:m=5"]) == 1
    assert capsys.readouterr().err.startswith("tune: this is no GEMM.\n  got       dense:m=5: ")


def test_the_command_says_that_a_gpu_is_needed(module, capsys):
    assert command.main(["tune", module]) == 1
    assert capsys.readouterr().err.startswith("tune: there is no Hopper GPU")


@pytest.mark.usefixtures("quick")
def test_tables_of_this_package_are_made_in_the_same_way(gpu, tmp_path):
    _, times = gpu
    shapes, out, log = (tmp_path / name for name in ("shapes.json", "out.json", "log"))
    given = {"variant": "dense", "m": 64, "n": 128, "k": 256}
    shapes.write_text(json.dumps([given]))
    out.write_text(json.dumps([{**given, "g": 1, "scales": "row_row", "out": "bf16", "us": 1}]))
    best = configs_to_try(DENSE, 2)[1]
    times[best] = 1.25
    tune_module.tune_file(shapes, out, str(log), 2, 3)
    old, new = sorted(json.loads(out.read_text()), key=lambda row: row["us"])
    assert old["scales"] == "row_row" and (new["us"], new["scales"]) == (1.25, DENSE.scales)
    assert GemmConfig(**{f.name: new[f.name] for f in dataclasses.fields(GemmConfig)}) == best
    assert np.all(np.diff([json.loads(line)["us"] for line in log.read_text().splitlines()]) >= 0)
