"""One FP8 matrix multiplication in a jitted function, and what it costs in accuracy.

pip install -e ".[cpu]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8


def main(m: int = 512, n: int = 1024, k: int = 2048) -> float:
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)

    # Floats in, floats out: quantized inside, differentiable.
    y = jax.jit(fp8.fp8_matmul)(x, w)

    # The same at kernel level: quantize a weight once, use it often. Both operands have k last.
    weight = jax.jit(lambda w: fp8.quantize(w.T, (128, 128)))(w)
    again = jax.jit(lambda x, weight: fp8.gemm(fp8.quantize(x), weight))(x, weight)

    exact = jnp.dot(x, w, preferred_element_type=jnp.float32)
    error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    print(f"[{m}, {k}] x [{k}, {n}] on {jax.devices()[0].device_kind}")
    print(f"relative error of FP8: {error:.3f}; both ways agree: {bool(jnp.all(y == again))}")
    return error


if __name__ == "__main__":
    main()
