"""Programs for a GPU made on a machine without one, export, and the persistent cache."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8gemm as fp8
from jax_fp8gemm._core import reference
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.problem import GemmConfig, Problem, attributes, most_sms


def test_cuda_lowering_has_the_custom_call_with_its_whole_specification():
    x, w = jnp.ones((4096, 7168), jnp.bfloat16), jnp.ones((7168, 4096))
    traced = jax.jit(jax.grad(lambda w, x: fp8.fp8_matmul(x, w).sum())).trace(w, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@jax_fp8gemm_gemm_v1" in line]
    assert any('rhs_scale = "1x128"' in call and 'out = "f32"' in call for call in calls)
    problem = Problem("dense", 4096, 7168, 4096, 1, "1x128_1x128", "f32")
    for name in attributes(problem, select(problem)):
        assert all(f"{name} = " in call for call in calls), name


def test_init_is_aliased_to_the_output():
    lhs, rhs = fp8.quantize(jnp.ones((8, 128))), fp8.quantize(jnp.ones((8, 128)), (128, 128))
    init = jnp.ones((8, 8))
    run = jax.jit(lambda lhs, rhs, init: fp8.gemm(lhs, rhs, init=init, out_dtype=jnp.float32))
    text = run.trace(lhs, rhs, init).lower(lowering_platforms=("cuda",)).as_text()
    assert "output_operand_alias" in text and "accumulate = 1" in text


def test_cpu_lowering_has_no_custom_call():
    text = jax.jit(fp8.fp8_matmul).lower(jnp.ones((8, 128)), jnp.ones((128, 8))).as_text()
    assert "jax_fp8gemm_gemm_v1" not in text


def test_num_sms_and_config_reach_the_program():
    config = GemmConfig("persistent", 128, 64, 4)
    lhs, rhs = fp8.quantize(jnp.ones((8, 128))), fp8.quantize(jnp.ones((8, 128)), (128, 128))
    run = jax.jit(lambda lhs, rhs: fp8.gemm(lhs, rhs, num_sms=20, config=config))
    text = run.trace(lhs, rhs).lower(lowering_platforms=("cuda",)).as_text()
    assert "num_sms = 20" in text and "block_n = 64" in text


def test_a_limit_of_multiprocessors_for_all_gemms_of_a_program(monkeypatch):
    x, w = jnp.ones((256, 256), jnp.bfloat16), jnp.ones((256, 384), jnp.bfloat16)

    def limits() -> list[str]:
        step = jax.grad(lambda w, x: fp8.fp8_matmul(x, w).astype(jnp.float32).sum())
        text = jax.jit(step).trace(w, x).lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "@jax_fp8gemm_gemm_v1" in line]
        return [(re.findall(r"num_sms = (\d+)", line) or [""])[0] for line in calls]

    assert set(limits()) == {""}
    monkeypatch.setenv("JAX_FP8GEMM_NUM_SMS", "116")
    assert set(limits()) == {"116"}
    lhs, rhs = fp8.quantize(jnp.ones((8, 128))), fp8.quantize(jnp.ones((8, 128)), (128, 128))
    run = jax.jit(lambda lhs, rhs: fp8.gemm(lhs, rhs, num_sms=20))
    text = run.trace(lhs, rhs).lower(lowering_platforms=("cuda",)).as_text()
    assert "num_sms = 20" in text and "116" not in text  # that of the call counts more


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5", "²", str(2**31)])
def test_a_limit_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv("JAX_FP8GEMM_NUM_SMS", value)
    with pytest.raises(ValueError) as info:
        most_sms(0)
    for part in ("JAX_FP8GEMM_NUM_SMS", "\n  got       ", "\n  expected  ", "\n  fix       "):
        assert part in str(info.value)
    assert most_sms(7) == 7


def test_export_round_trip(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    exported = jax.export.export(
        jax.jit(fp8.fp8_matmul), platforms=("cpu", "cuda"), disabled_checks=fp8.EXPORT_CHECKS
    )(x, w)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, w), jax.jit(fp8.fp8_matmul)(x, w))


def test_fp8_weights_are_arguments_of_an_exported_program(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    prepared, q = fp8.prepare_weight(w), fp8.quantize(x)
    run = jax.jit(lambda x, w, q: (fp8.fp8_matmul(x, w), q))
    exported = jax.export.export(run, disabled_checks=fp8.EXPORT_CHECKS)(x, prepared, q)
    y, again = jax.export.deserialize(exported.serialize()).call(x, prepared, q)
    np.testing.assert_array_equal(y, jax.jit(fp8.fp8_matmul)(x, w))
    assert isinstance(again, fp8.QArray) and again.tile == q.tile


def test_export_for_any_number_of_rows(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 64"), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda w, x: (fp8.fp8_matmul(x, w) ** 2).sum()))
    exported = jax.export.export(
        step, platforms=("cpu", "cuda"), disabled_checks=fp8.EXPORT_CHECKS
    )(w, rows)
    again = jax.export.deserialize(exported.serialize())
    for count in (1, 32):
        got, expected = again.call(w, x[:count]), step(w, x[:count])
        np.testing.assert_array_equal(got[1], expected[1])


def test_without_jit_everything_still_runs(key):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48))
    gradient = jax.grad(lambda x, w: (fp8.fp8_matmul(x, w) ** 2).sum(), (0, 1))
    expected = gradient(x, w)
    with jax.disable_jit():
        got = gradient(x, w)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_reference_is_traced_once_for_all_programs(monkeypatch):
    """Once more for settings of JAX that change what its tracing finds, and after clear_caches."""
    traced, gemm = [], reference.gemm
    monkeypatch.setattr(reference, "gemm", lambda *a, **how: traced.append(1) or gemm(*a, **how))
    x, w = jnp.ones((24, 136)), jnp.ones((136, 40))  # as in no other test
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ("x", ""))
    placed = jax.device_put(x, split), jax.device_put(w, whole)

    def programs() -> None:
        for scale in range(1, 4):
            jax.jit(lambda x, w, scale=scale: scale * fp8.fp8_matmul(x, w)).lower(x, w)

    programs()
    assert len(traced) == 1
    jax.jit(lambda x, w: [fp8.fp8_matmul(scale * x, w) for scale in range(4)])(*placed)
    assert len(traced) == 2  # for a shard of three rows
    with jax.enable_x64(True):
        programs()
    assert len(traced) == 3
    jax.clear_caches()
    programs()
    assert len(traced) == 4


def test_config_is_the_same_for_equal_problems():
    first = Problem("dense", 777, 4096, 7168)
    assert select(first) == select(Problem("dense", 777, 4096, 7168))


def test_a_second_process_finds_the_program_in_the_persistent_cache(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp, jax_fp8gemm as fp8
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
x = jnp.ones((32, 128), jnp.bfloat16)
print(float(jax.jit(lambda x: fp8.fp8_matmul(x, x.T).sum())(x)))
print(sum(name.endswith("cache_hits") for name in found))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout.split())
    assert outputs[0][0] == outputs[1][0] and int(outputs[1][1]) > int(outputs[0][1])
