"""Whole programs on the GPU: gradients, transformations, CUDA graphs, the sanitizer, the cache."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import calc_diff
from sanitizer import sanitize

import jax_fp8gemm as fp8
from jax_fp8gemm._bind import native


def operands(m=512, k=384, n=640, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((m, k), (k, n), (m, n))
    return [
        jax.random.normal(s, shape).astype(dtype) for s, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("m, k, n", [(512, 384, 640), (100, 300, 77), (1, 16, 1), (3, 7, 130)])
@pytest.mark.parametrize("scale_rounding", ["pow2", "none"])
def test_gradients_are_those_of_the_reference(m, k, n, scale_rounding):
    x, w, dy = operands(m, k, n, jnp.float32)

    @jax.jit
    def both(x, w, dy):
        y, pull = jax.vjp(lambda x, w: fp8.fp8_matmul(x, w, scale_rounding=scale_rounding), x, w)
        return (y, *pull(dy))

    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        expected = both(*jax.device_put((x, w, dy), cpu))
    for got, right in zip(both(x, w, dy), expected, strict=True):
        # The same FP8 numbers but for ties of the division: the sums differ by their order alone.
        assert calc_diff(got, right) < 2e-6


def test_gradients_are_near_the_exact_ones_and_repeat():
    x, w, dy = operands(1024, 1024, 1024)
    both = jax.jit(lambda x, w, dy: jax.vjp(fp8.fp8_matmul, x, w)[1](dy))
    dx, dw = both(x, w, dy)
    f32 = [np.asarray(a, np.float32) for a in (x, w, dy)]
    assert calc_diff(dx, f32[2] @ f32[1].T) < 1e-3 and calc_diff(dw, f32[0].T @ f32[2]) < 1e-3
    for a, b in zip((dx, dw), both(x, w, dy), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_vmap_scan_and_remat_match_the_plain_loop():
    x, _, _ = operands(256, 256, 256)
    ws = jax.random.normal(jax.random.key(5), (4, 256, 256), jnp.bfloat16)

    def loss(ws, layer):
        return (jax.lax.scan(layer, x, ws)[0].astype(jnp.float32) ** 2).sum()

    layer = lambda x, w: (jnp.tanh(fp8.fp8_matmul(x, w)), None)  # noqa: E731
    plain = jax.jit(jax.grad(lambda ws: loss(ws, layer)))(ws)
    remat = jax.jit(jax.grad(lambda ws: loss(ws, jax.checkpoint(layer))))(ws)
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(remat))
    many = jax.jit(jax.vmap(fp8.fp8_matmul, (None, 0)))(x, ws)
    for got, w in zip(many, ws, strict=True):
        assert calc_diff(got.astype(jnp.float32), jax.jit(fp8.fp8_matmul)(x, w)) < 1e-5


def test_an_exported_program_takes_any_number_of_rows(key):
    x, w = jax.random.normal(key, (300, 256)), jax.random.normal(key, (256, 200))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 256"), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda w, x: (fp8.fp8_matmul(x, w) ** 2).sum()))
    exported = jax.export.export(step, disabled_checks=fp8.EXPORT_CHECKS)(w, rows)
    again = jax.export.deserialize(exported.serialize())
    for count in (1, 128, 300):
        got, expected = again.call(w, x[:count]), step(w, x[:count])
        assert calc_diff(got[1], expected[1]) < 1e-9


def test_a_chain_in_a_cuda_graph_gives_the_same_bits(tmp_path):
    """Eight GEMMs in a row: captured by default, launched one by one without command buffers."""
    code = """
import jax, jax.numpy as jnp, numpy as np, sys, jax_fp8gemm as fp8
x = jax.random.normal(jax.random.key(0), (256, 256), jnp.bfloat16)
ws = jax.random.normal(jax.random.key(1), (8, 256, 256), jnp.bfloat16) / 16
qs = [fp8.quantize(w.T, (128, 128)) for w in ws]
@jax.jit
def chain(q, qs):
    outs = [fp8.gemm(q, w) for w in qs]
    return outs
q = fp8.quantize(x)
for turn in range(5):
    q = fp8.quantize(x * (turn + 1))  # other buffers, other numbers
    outs = chain(q, qs)
np.save(sys.argv[1], np.asarray(jnp.stack(outs).astype(jnp.float32)))
"""
    results = []
    for name, flags in (("on", ""), ("off", "--xla_gpu_enable_command_buffer=")):
        path = str(tmp_path / f"{name}.npy")
        environment = {**os.environ, "XLA_FLAGS": flags}
        subprocess.run([sys.executable, "-c", code, path], env=environment, check=True, timeout=120)
        results.append(np.load(path))
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)


SANITIZED = {"dense": """
import jax, jax.numpy as jnp, jax_fp8gemm as fp8
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._tools.operands import compiled, random_operands
for shape in ((130, 136, 272), (5, 7, 384)):
    for config in (GemmConfig("persistent", 256, 128, 3, "lhs"),
                   GemmConfig("persistent", 128, 192, 3, "rhs"),
                   GemmConfig("persistent", 128, 144, 3),
                   GemmConfig("few_rows", 64, 56, 4), GemmConfig("few_rows", 64, 32, 2, split_k=2)):
        problem = Problem("dense", *shape)
        operands = random_operands(problem)
        compiled(problem, config, operands)().block_until_ready()
problem = Problem("dense", 130, 131, 272, 1, "1x128_1x128", "f32")
operands = random_operands(problem)
compiled(problem, GemmConfig("persistent", 128, 128, 3), operands)().block_until_ready()
print("finished")
""", "grouped": """
import jax, jax.numpy as jnp, jax_fp8gemm as fp8
from jax_fp8gemm._select.problem import GemmConfig, Problem
from jax_fp8gemm._tools.operands import compiled, random_operands
wide = GemmConfig("persistent", 256, 128, 3, "lhs")
for variant, configs in {
    "ragged": (wide, GemmConfig("few_rows", 64, 56, 4)),
    "contiguous": (GemmConfig("persistent", 128, 96, 3, "lhs"),),
    "masked": (wide, GemmConfig("persistent", 128, 96, 3, "rhs")),
    "ragged_contracting": (wide,),
}.items():
    along_k = variant == "ragged_contracting"
    scales = ("1x128_1x128", "f32") if along_k else ("1x128_128x128", "bf16")
    problem = Problem(variant, 300, 136, 640 if along_k else 272, 4, *scales)
    sizes = jnp.array([0, 256, 384, 0] if along_k else [131, 0, 40, 70], jnp.int32)
    operands = random_operands(problem, sizes)
    for config in configs:
        compiled(problem, config, operands)().block_until_ready()
print("finished")
"""}  # fmt: skip


@pytest.mark.parametrize("kernels", SANITIZED)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool, kernels):
    sanitize(tool, SANITIZED[kernels], "fp8_gemm")


def test_persistent_compilation_cache_is_hit(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp, jax_fp8gemm as fp8
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
x = jnp.ones((256, 256), jnp.bfloat16)
print(float(jax.jit(lambda x: fp8.fp8_matmul(x, x).sum())(x)))
print(sum(name.endswith("cache_hits") for name in hits))
"""
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout.split())
    assert outputs[0][0] == outputs[1][0] and int(outputs[1][1]) > int(outputs[0][1])


def test_second_process_compiles_no_kernel(tmp_path):
    code = """
import jax.numpy as jnp, jax_fp8gemm as fp8
from jax_fp8gemm._bind import native
fp8.fp8_matmul(jnp.ones((256, 256)), jnp.ones((256, 256))).block_until_ready()
print(native.cache_facts()["compiled"], native.cache_facts()["from_disk"])
"""
    environment = {**os.environ, "JAX_FP8GEMM_CACHE_DIR": str(tmp_path)}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout.split())
    assert outputs == [["3", "0"], ["0", "3"]]  # two casts and a GEMM


def test_check_command_says_that_the_kernels_run():
    done = subprocess.run(
        [sys.executable, "-m", "jax_fp8gemm"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "kernels run on this GPU" in done.stdout
    assert native.device_facts()["devices"][0]["name"] in done.stdout


def test_a_profile_names_our_kernels_and_their_limit(capsys):
    def step(x, w):
        y = fp8.fp8_matmul(x, w)
        return y, jnp.dot(x, w), jnp.take(y, jnp.arange(0, 4096, 2), axis=0)

    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, 4096), (4096, 2048)))
    found = fp8.profile(step, x, w, reps=3)
    assert str(found) in capsys.readouterr().out
    (ours,) = (row for row in found.rows if row.label == "fp8_gemm_dense_m4096_n2048_k4096")
    assert ours.kind == "GEMM" and ours.flops == 2 * 4096 * 2048 * 4096
    assert 0.3 < ours.of_limit < 1.2  # L2 is warm
    casts = [row for row in found.rows if row.kind == "cast"]
    assert len(casts) == 2 and all(row.launches == 1 for row in casts)
    bf16 = [row for row in found.by_kind()["GEMM"] if row is not ours]
    assert bf16 and all(row.flops == ours.flops for row in bf16)
