"""A jitted FP8 function saved with jax.export for CPU and CUDA, loaded, and run: the same bits.

pip install -e ".[cpu,export]"  # cuda12 or cuda13 instead of cpu on a GPU
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8

PLATFORMS = ("cpu", "cuda")


@jax.jit
def network(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return fp8.fp8_matmul(jax.nn.gelu(fp8.fp8_matmul(x, up)), down)


def main(rows: int = 64, width: int = 256, hidden: int = 512) -> bool:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, width), (width, hidden), (hidden, width))
    operands = [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]

    # JAX promises to load a custom call years later for its own targets alone; ours are listed.
    exported = jax.export.export(network, platforms=PLATFORMS, disabled_checks=fp8.EXPORT_CHECKS)(
        *operands
    )
    assert "jax_fp8gemm_gemm_v1" in exported.mlir_module()  # what a GPU will run

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "network.jax"
        path.write_bytes(exported.serialize())
        loaded = jax.export.deserialize(bytearray(path.read_bytes()))

    same = bool(jnp.all(loaded.call(*operands) == network(*operands)))
    print(f"{len(exported.mlir_module_serialized)} bytes for {PLATFORMS}; same bits: {same}")
    return same


if __name__ == "__main__":
    main()
