"""What XLA's scheduler is told: how long each custom call takes, by the cost model."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_fp8gemm as fp8
from jax_fp8gemm._bind.gemm_op import EXPORT_CHECKS, device_kind
from jax_fp8gemm._select.choice import select
from jax_fp8gemm._select.cost import predicted_microseconds, streaming_microseconds
from jax_fp8gemm._select.problem import Problem

BF16 = jnp.bfloat16


def lowered(function, *arrays, platforms=("cuda",)) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=platforms).as_text()


def latencies(text: str, target: str) -> list[int]:
    """Returns the nanoseconds of every custom call of a program; each must have them."""
    calls = [line for line in text.splitlines() if f"@jax_fp8gemm_{target}_v1(" in line]
    found = [re.findall(r'latency_metadata = "(\d+)"', line) for line in calls]
    assert all(len(one) == 1 for one in found)
    return [int(ns) for (ns,) in found]


def test_a_gemm_takes_what_the_model_says():
    m, n, k = 1000, 384, 512
    operands = fp8.quantize(jnp.ones((m, k))), fp8.quantize(jnp.ones((n, k)), (128, 128))
    problem = Problem("dense", m, n, k, device=device_kind())
    expected = round(1e3 * predicted_microseconds(problem, [select(problem)])[0])
    assert latencies(lowered(fp8.gemm, *operands), "gemm") == [expected]
    chosen = fp8.GemmConfig("persistent", 128, 64, 4)
    text = lowered(functools.partial(fp8.gemm, config=chosen), *operands)
    assert latencies(text, "gemm") == [round(1e3 * predicted_microseconds(problem, [chosen])[0])]


def test_a_cast_takes_the_time_of_its_bytes():
    m, k = 4096, 2048
    (ns,) = latencies(lowered(fp8.quantize, jnp.ones((m, k), BF16)), "quantize")
    moved = m * k * (2 + 1 + 4 / 128)  # bf16 in; FP8 and a scale for 128 out
    assert ns == round(1e3 * streaming_microseconds(moved))


def step(x, w, experts, sizes):
    def loss(w, experts):
        y = fp8.fp8_matmul(x, w)
        return fp8.fp8_ragged_dot(y, experts, sizes).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1))(w, experts)


ARRAYS = (
    jnp.ones((256, 256), BF16),
    jnp.ones((256, 128), BF16),
    jnp.ones((2, 128, 128), BF16),
    jnp.array([100, 150]),
)


def test_every_call_of_a_training_step_has_a_latency_and_no_other_platform_sees_it():
    text = lowered(step, *ARRAYS)
    calls = latencies(text, "gemm") + latencies(text, "quantize")
    assert len(calls) >= 8 and text.count("latency_metadata") == len(calls)
    assert all(2000 < ns < 20000 for ns in calls)
    assert "latency_metadata" not in lowered(step, *ARRAYS, platforms=("cpu",))
    both = lowered(step, *ARRAYS, platforms=("cpu", "cuda"))
    assert both.count("latency_metadata") == len(calls)


def test_vmap_scan_and_shard_map():
    x, w, *_ = ARRAYS
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (fp8.fp8_matmul(x, w), None), x, ws)[0]

    square = jnp.ones((3, 256, 256), BF16)
    for run, arrays in (
        (jax.vmap(fp8.fp8_matmul), (x[None].repeat(2, 0), w[None].repeat(2, 0))),
        (jax.grad(lambda w, x: layers(x, w).astype(jnp.float32).sum()), (square, x)),
        (
            jax.shard_map(fp8.fp8_matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x")),
            (x.repeat(8, 0), w),
        ),
    ):
        text = lowered(run, *arrays)
        assert latencies(text, "gemm") and latencies(text, "quantize")


def test_exported_programs_of_any_size():
    shapes = jax.export.symbolic_args_specs((ARRAYS[0], ARRAYS[1]), ("m, 256", "256, 128"))
    export = jax.export.export(
        jax.jit(fp8.fp8_matmul), platforms=("cpu", "cuda"), disabled_checks=EXPORT_CHECKS
    )
    made = jax.export.deserialize(export(*shapes).serialize())
    assert latencies(made.mlir_module(), "gemm")
    np.testing.assert_array_equal(made.call(*ARRAYS[:2]), fp8.fp8_matmul(*ARRAYS[:2]))
