"""batch_invariant on the GPU: a row has the same bits among 1 and among 4096 rows."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from xla_options import AS_USERS

import jax_fp8gemm as fp8
from jax_fp8gemm._moe.gate import gate_logits

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 500, 1000, 1024]
ROWS += [1025, 2000, 2048, 3000, 4095, 4096]


def draws(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def check_rows(function, x, rows=ROWS) -> None:
    """XLA's own products are those that users get. numpy cuts rows off, without a program."""
    run, x = jax.jit(function, compiler_options=AS_USERS), np.asarray(x)
    whole = jax.device_get(run(x))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda m: jax.device_get(run(x[:m])), rows))
    for m, part in zip(rows, parts, strict=True):
        for got, right in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(got, right[:m], err_msg=str(m))


@pytest.mark.parametrize("n, k", [(2112, 7168), (7168, 2048), (576, 7168), (200, 400)])
def test_rows_of_a_matmul(n, k):
    x, w = draws((4096, k), (k, n))
    check_rows(lambda x: fp8.fp8_matmul(x, w, batch_invariant=True), x)


@pytest.mark.parametrize("cast", [True, False])
def test_rows_of_a_ragged_dot(cast):
    x, w = draws((4096, 1024), (3, 1024, 512))

    def run(x):
        sizes = jnp.array([0, x.shape[0], 0])
        return fp8.fp8_ragged_dot(x, w, sizes, cast_in_gemm=cast, batch_invariant=True)

    check_rows(run, x)


@pytest.mark.parametrize("h, e", [(1536, 128), (7168, 256), (300, 24)])
def test_logits(h, e):
    x, kernel = draws((4096, h), (h, e))
    check_rows(lambda x: gate_logits(x, kernel.astype(jnp.float32), True), x)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_tokens_of_a_layer(score_function):
    h, f, e = 1024, 512, 16
    x, gate, wi_0, wi_1, wo = draws((4096, h), (h, e), (e, h, f), (e, h, f), (e, f, h))
    kernels = fp8.ExpertKernels(wi_0=wi_0 * h**-0.5, wi_1=wi_1 * h**-0.5, wo=wo * f**-0.5)

    def run(x):
        options = {"top_k": 4, "score_function": score_function, "batch_invariant": True}
        y, routing = fp8.moe(x, gate, kernels, **options)
        return y, routing.expert_index, routing.gate_weights

    check_rows(run, x, [1, 2, 3, 7, 16, 33, 64, 100, 257, 1000, 2048, 4096])
