"""jax.checkpoint: what its policies save by name is neither cast nor multiplied again."""

import re

import jax
import jax.numpy as jnp
import pytest

import jax_fp8gemm as fp8

CALLS = ("jax_fp8gemm_quantize_v1", "jax_fp8gemm_gemm_v1")


def kernels_of(function, *arguments) -> tuple[int, int]:
    """Returns how many casts and GEMMs a program has on a GPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    pattern = r"func\.func (?:public|private) (@\S+?)\((.*?)\n  }"
    bodies = {name: body for name, body in re.findall(pattern, text, re.S)}

    def count(name: str, target: str) -> int:
        body = bodies[name]
        below = [one for one in re.findall(r'call (@[\w."]+)\(', body) if one in bodies]
        return body.count(f"@{target}(") + sum(count(one, target) for one in below)

    casts, gemms = (count("@main", target) for target in CALLS)
    return casts, gemms


def saving(*names):
    return jax.checkpoint_policies.save_only_these_names(*names)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def gradient(function, *argnums):
    return jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), argnums)


@pytest.mark.parametrize("residuals, casts", [("fp8_t", 3), ("fp8", 4), ("input", 4)])
def test_a_matmul_casts_nothing_twice(residuals, casts):
    def layer(x, w):
        return jnp.tanh(fp8.fp8_matmul(jnp.tanh(x), w, residuals=residuals))

    operands = shape(256, 256, dtype=jnp.bfloat16), shape(256, 256)
    policy = saving("fp8_matmul_x", "fp8_matmul_w")
    for run in (layer, jax.checkpoint(layer, policy=policy)):
        assert kernels_of(gradient(run, 0, 1), *operands) == (casts, 3)


def test_a_ragged_dot_casts_nothing_twice():
    def layer(x, w, sizes):
        return jnp.tanh(fp8.fp8_ragged_dot(jnp.tanh(x), w, sizes))

    operands = shape(256, 256), shape(4, 256, 256), shape(4, dtype=jnp.int32)
    policy = saving("fp8_ragged_dot_x", "fp8_ragged_dot_w")
    for run in (layer, jax.checkpoint(layer, policy=policy)):
        assert kernels_of(gradient(run, 0, 1), *operands) == (3, 3)


def test_a_mixture_of_experts_casts_nothing_twice():
    def layer(x, gate, kernels):
        return jnp.tanh(fp8.moe(jnp.tanh(x), gate, kernels, top_k=2)[0])

    wi, wo = shape(4, 256, 128), shape(4, 128, 256)
    operands = shape(256, 256), shape(256, 4), fp8.ExpertKernels(wi_0=wi, wi_1=wi, wo=wo)
    casts, _ = kernels_of(gradient(layer, 0, 2), *operands)
    named = jax.checkpoint(layer, policy=saving("moe_x", "moe_h", "moe_weights"))
    assert kernels_of(gradient(named, 0, 2), *operands)[0] == casts


@pytest.mark.usefixtures("optimised")
def test_values_are_those_without_checkpoint():
    key = jax.random.key(0)
    x, w = jax.random.normal(key, (256, 256)), jax.random.normal(key, (256, 128)) * 100

    def layer(x, w):
        return jnp.tanh(fp8.fp8_matmul(x, w) / 1000)

    policy = saving("fp8_matmul_x", "fp8_matmul_w")
    want = gradient(layer, 0, 1)(x, w)
    for a, b in zip(gradient(jax.checkpoint(layer, policy=policy), 0, 1)(x, w), want, strict=True):
        assert (a == b).all()  # numbers above 240 too, which e4m3 saved as a float would lose
