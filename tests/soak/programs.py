"""Runs checks: many seeds in one program, or single calls into poisoned memory between canaries."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

ALIGNMENT = 256  # bytes to which JAX's allocator on a GPU rounds
POISON = 1 << 22  # numbers


@jax.jit
def _poison() -> list[jax.Array]:
    return [jnp.full(POISON, jnp.nan, dtype) for dtype in (jnp.float32, jnp.bfloat16)]


def poison() -> None:
    """Leaves NaN in memory that is then free: where the next results and temporaries lie."""
    jax.block_until_ready(_poison())


def key_of(seed, index) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), index)


def count(check, operands, outs) -> jax.Array:
    """Returns how many values of all results are wrong."""
    return sum(jnp.sum(marks, dtype=jnp.int32) for marks in check.marks(operands, outs))


def step(checks: Sequence, key: jax.Array) -> jax.Array:
    """Makes all operands, runs the checks one after the other, and counts what is wrong, [checks].

    The products stand together, so that XLA captures them into one CUDA graph.
    """
    keys = jax.random.split(key, len(checks))
    made = [check.make(own) for check, own in zip(checks, keys, strict=True)]
    made, results = list(jax.lax.optimization_barrier(made)), []
    for i, check in enumerate(checks):
        if results:  # in this order, whatever the compiler likes better
            made[i], results[-1] = jax.lax.optimization_barrier((made[i], results[-1]))
        results.append(check.run(made[i]))
    made, results = jax.lax.optimization_barrier((made, results))
    return jnp.stack([count(*one) for one in zip(checks, made, results, strict=True)])


def loop(checks: Sequence, repeats: int):
    """Returns a compiled function: (seed, index) -> wrong values of `repeats` seeds from index on.

    int32 [repeats, checks].
    """

    def run(seed, index):
        indices = index + jnp.arange(repeats)
        return jax.lax.map(lambda i: step(checks, key_of(seed, i)), indices)

    return jax.jit(run).lower(0, 0).compile()


@dataclasses.dataclass
class Calls:
    """Single calls of one check. Each result takes the memory of a donated array.

    That array is full of NaN (or is `init`), and lies between two others that nobody may write to.

    Attributes:
      adjacent: calls in which both others did touch it.
    """

    check: object
    adjacent: int = 0

    def __post_init__(self):
        check = self.check
        self._make = jax.jit(lambda seed, index: check.make(key_of(seed, index)))
        self._memory = jax.jit(self._allocate)
        self._run = jax.jit(self._call, donate_argnums=0, keep_unused=True)
        self._judge = jax.jit(self._count)

    def _allocate(self, operands) -> list[tuple[jax.Array, ...]]:
        arrays = []
        for shape, dtype in self.check.results:
            before, own, after = (jnp.full(shape, jnp.nan, dtype) for _ in range(3))
            arrays.append((before, operands.get("init", own) + 0, after))
        return arrays

    def _call(self, donated: list[jax.Array], operands) -> list[jax.Array]:
        given = {"init": donated[0]} if "init" in operands else {}
        return self.check.run({**operands, **given})

    def _count(self, operands, outs, canaries) -> tuple[jax.Array, jax.Array]:
        changed = sum(
            jnp.sum(_bits(x) != _bits(jnp.full(x.shape, jnp.nan, x.dtype)), dtype=jnp.int32)
            for x in canaries
        )
        return count(self.check, operands, outs), changed

    def __call__(self, seed: int, index: int) -> tuple[int, int]:
        """Returns how many values are wrong, and how many next to the results have changed."""
        operands = self._make(seed, index)
        memory = self._memory(operands)
        addresses = [tuple(x.unsafe_buffer_pointer() for x in three) for three in memory]
        nbytes = [three[1].nbytes for three in memory]
        outs = self._run([own for _, own, _ in memory], operands)
        canaries = [x for before, _, after in memory for x in (before, after)]
        wrong, changed = self._judge(operands, outs, canaries)
        self.adjacent += _adjacent(addresses[0], nbytes[0], outs[0].unsafe_buffer_pointer())
        return int(wrong), int(changed)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)


def _adjacent(addresses: tuple[int, ...], nbytes: int, out: int) -> bool:
    before, own, after = addresses
    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    return own == out and {abs(before - own), abs(after - own)} == {size} and before != after
