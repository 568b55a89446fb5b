"""The router's logits: float32 products from bf16 parts, at the speed of tensor cores.

A float32 number is the sum of three bf16 numbers, an f16 number of two. So a product of matrices
is a sum of bf16 GEMMs. Those of a bf16 x take x as it is, and have the parts of the other matrix
side by side.
"""

import functools

import jax
import jax.numpy as jnp

from jax_fp8gemm._bind.meshes import enter, is_manual
from jax_fp8gemm._bind.partition import Dim, Rule

PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # 8 bits each, of 8, 11 and 24
# Products of parts i and j count if i + j < ORDER. The others are 2⁻²⁴ or, for bf16 results, 2⁻¹⁶
# of the result.
ORDER = {"bfloat16": 2, "float16": 3, "float32": 3}
# A tensor core cuts its sum off to float32 after every 16 of k, where a float32 loop rounds. In a
# long sum that is a bias. So it is made in pieces (Ootomo & Yokota, arXiv 2203.03341, section 3).
# With pieces of 512 the error is 5.4e-7 of the result's norm for any k, by the model of a tensor
# core in tests/test_gate.py. That of a float32 loop is 7e-7 at k = 1536 and 1.5e-6 at 7168.
LONGEST_SUM = 512

Contracted = tuple[int, int]  # the contracted dim of each operand


# Of exact sums: whole numbers of at most 2⁷. Over 1024 of k products sum up to at most 2²⁴.
# float32 holds all of these, so no order rounds anything.
SLICES, SLICE_BITS, LONGEST_EXACT_SUM = 4, 8, 1024
LEAST_EXPONENT = -100  # of the largest number of a row: smaller ones would leave float32


def gate_logits(x: jax.Array, kernel: jax.Array, batch_invariant: bool = False) -> jax.Array:
    """Returns x · kernel as float32 products would give it, f32 [t, e].

    Its gradients, of any order in reverse mode, are made in the same way.

    Args:
      x: bf16, f16 or f32 [t, h].
      kernel: bf16, f16 or f32 [h, e].
      batch_invariant: the bits of a token's logits do not depend on t; as many products of
        whole numbers as 31 bits of each operand need, ten.
    """
    rule = Rule(
        op="moe",
        operands=((Dim("t"), Dim("h")), (Dim("h"), Dim("e"))),
        results=((Dim("t"), Dim("e")),),
        voters=((0, 1), (1, 1)),
        summed=frozenset("h"),
    )

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if batch_invariant:
            return _exact_product(x, kernel)
        return _product(x, kernel, (1, 0), "float32")

    return enter(rule, lambda manual: product, (x, kernel))


def parts(x: jax.Array) -> list[jax.Array]:
    """Returns bf16 arrays whose sum is x, the largest first.

    What rounds past the largest bf16 number, 3.39e38, is infinite. Bits below 2⁻¹³³ are lost.
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    found, rest = [], x.astype(jnp.float32)
    for _ in range(PARTS[x.dtype.name]):
        # Not a cast there and back: XLA may leave that out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(part), rest - part, 0)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(a: jax.Array, b: jax.Array, contracted: Contracted, dtype: str) -> jax.Array:
    """Returns the product of two matrices: a's other dim, b's other dim."""
    wanted = [
        (i, j)
        for i in range(PARTS[a.dtype.name])
        for j in range(PARTS[b.dtype.name])
        if i + j < ORDER[dtype]
    ]
    m, n = a.shape[1 - contracted[0]], b.shape[1 - contracted[1]]
    short = a.shape[contracted[0]] <= LONGEST_SUM or dtype != "float32"
    of_parts = _one_sum if short and m * n > a.size + b.size else _side_by_side
    return of_parts(parts(a), parts(b), wanted, contracted).astype(dtype)


def _forward(a, b, contracted: Contracted, dtype: str):
    return _product(a, b, contracted, dtype), (a, b)


def _backward(contracted: Contracted, dtype: str, operands, d):
    a, b = operands
    free = 1 - contracted[0], 1 - contracted[1]
    of_a = (d, b, (1, free[1])) if contracted[0] == 1 else (b, d, (free[1], 1))
    of_b = (a, d, (free[0], 0)) if contracted[1] == 0 else (d, a, (0, free[0]))
    return _product(*of_a, a.dtype.name), _product(*of_b, b.dtype.name)


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _exact_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x · kernel, f32 [t, e], of products whose sums have no rounding, and so no order.

    A row of x, and a column of the kernel, are whole numbers times powers of 2⁻⁸ and one power of
    two of its own. What is below 2⁻³² of the largest number of a row is lost.
    """
    left, row_exponent = _slices(x, 1)
    right, column_exponent = _slices(kernel, 0)
    levels: list[list[jax.Array]] = [[] for _ in range(SLICES)]
    for i, part in enumerate(left):
        beside = _sum_of_pieces(part, jnp.concatenate(right[: SLICES - i], 1))
        for j, one in enumerate(jnp.split(beside, SLICES - i, 1)):
            levels[i + j].append(one)
    total = functools.reduce(jax.lax.add, levels.pop())
    while levels:
        total = total * 2.0**-SLICE_BITS + functools.reduce(jax.lax.add, levels.pop())
    exponent = row_exponent + column_exponent - 2 * (SLICE_BITS - 1)
    half = exponent // 2  # two factors, since one may be no float32
    return total * _power_of_two(half) * _power_of_two(exponent - half)


_exact_product.defvjp(
    lambda x, kernel: (_exact_product(x, kernel), (x, kernel)),
    functools.partial(_backward, (1, 0), "float32"),
)


def _slices(x: jax.Array, dim: int) -> tuple[list[jax.Array], jax.Array]:
    """Returns whole numbers of at most 2⁷ in bf16, the largest slice first, and exponents: x is
    2^(exponent − 7) · Σ_i slice_i · 2^(−8i)."""
    x = x.astype(jnp.float32)
    largest = jax.lax.bitcast_convert_type(jnp.abs(x).max(dim, keepdims=True), jnp.int32)
    exponent = jnp.clip((largest >> 23) - 126, LEAST_EXPONENT, 128)  # |x| < 2^exponent
    rest = x * _power_of_two(SLICE_BITS - 1 - exponent)
    slices = []
    for _ in range(SLICES):
        whole = jnp.round(rest)
        slices.append(whole.astype(jnp.bfloat16))
        rest = (rest - whole) * 2.0**SLICE_BITS
    return slices, exponent


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _sum_of_pieces(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a · b, each piece of k exact, pieces added in their order."""
    count = max(1, -(-a.shape[1] // LONGEST_EXACT_SUM))
    pieces = _dot(_cut(a, 1, count), _cut(b, 0, count), (((2,), (1,)), ((1,), (0,))))
    return functools.reduce(jax.lax.add, (pieces[i] for i in range(count)))


def _one_sum(a, b, wanted, contracted: Contracted) -> jax.Array:
    """All products as one GEMM, one behind the other along the contracted dim, small ones first.

    For results that are larger than the operands.
    """
    ordered = sorted(wanted, key=sum, reverse=True)
    left = jnp.stack([a[i] for i, _ in ordered], contracted[0])
    right = jnp.stack([b[j] for _, j in ordered], contracted[1])
    dims = tuple((dim, dim + 1) for dim in contracted)
    return _dot(left, right, (dims, ((), ())))


def _side_by_side(a, b, wanted, contracted: Contracted) -> jax.Array:
    """A GEMM for each part of a, with parts of b side by side; the largest product by itself."""
    out = _long_dot(a[0], b[0], contracted)
    dims, small = (contracted[:1], contracted[1:]), []
    for i, part in enumerate(a):
        others = [b[j] for other, j in wanted if other == i and i + j > 0]
        if others:
            beside = _dot(part, jnp.concatenate(others, 1 - contracted[1]), (dims, ((), ())))
            small.append(beside.reshape(out.shape[0], len(others), out.shape[1]).sum(1))
    # NOTE: no zeros to begin with: under jax.vmap with spmd_axis_name they would not vary.
    return out + functools.reduce(jax.lax.add, small) if small else out


def _long_dot(a: jax.Array, b: jax.Array, contracted: Contracted) -> jax.Array:
    """One product, summed in float32 over pieces of at most LONGEST_SUM."""
    dims = contracted[:1], contracted[1:]
    k = a.shape[contracted[0]]
    least = max(1, -(-k // LONGEST_SUM))
    count = next((c for c in range(least, 2 * least) if k % c == 0), least)
    if count == 1:
        return _dot(a, b, (dims, ((), ())))
    inner = tuple((dim + 1,) for dim in contracted)
    left, right = _cut(a, contracted[0], count), _cut(b, contracted[1], count)
    return _dot(left, right, (inner, dims)).sum(0)


def _cut(x: jax.Array, dim: int, count: int) -> jax.Array:
    """Splits a dim in two, [count, rest], with zeros behind it if need be."""
    missing = [(0, 0), (0, 0)]
    missing[dim] = (0, -x.shape[dim] % count)
    shape = [*x.shape[:dim], count, -1, *x.shape[dim + 1 :]]
    return jnp.pad(x, missing).reshape(shape)


def _dot(a: jax.Array, b: jax.Array, dims) -> jax.Array:
    """bf16 operands and float32 sums, whatever jax_default_matmul_precision says.

    On a CPU in float32, with the same products: of bf16 arrays XLA (of jaxlib 0.10.2) takes some
    batched ones for what a library of its own can do, which then refuses them at run time.
    """
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=dims,
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )

    def in_float32(a: jax.Array, b: jax.Array) -> jax.Array:
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    return _typed_like(jax.lax.platform_dependent(a, b, cpu=in_float32, default=dot), a, b)


def _typed_like(out: jax.Array, *operands: jax.Array) -> jax.Array:
    """Types a result as varying over every axis of a shard_map that an operand varies over.

    Under jax.vmap with spmd_axis_name a choice by platform loses that axis in its type (JAX
    0.10.2). A select has the axes of all its operands. XLA drops these.
    """
    if not is_manual() or not out.size:
        return out
    for x in operands:
        out = jnp.where(False, x[(0,) * x.ndim].astype(out.dtype), out)
    return out
