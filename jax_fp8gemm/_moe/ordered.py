"""Sums in an order of their own.

The order of a reduction is XLA's to choose, and it may choose by the number of rows. Additions that
are written out are made as they stand.
"""

import functools

import jax
import jax.numpy as jnp


def sum_of_few(x: jax.Array, in_order: bool) -> jax.Array:
    """Returns x [t, few, ...] summed over its second dim; in_order: one after the other."""
    if not in_order:
        return x.sum(1)
    return functools.reduce(jax.lax.add, (x[:, i] for i in range(x.shape[1])))


def sum_by_halves(x: jax.Array) -> jax.Array:
    """Returns x [t, n] summed to [t, 1]: the first half and the second, and so on."""
    while x.shape[1] > 1:
        x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)])
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def softmax_by_halves(x: jax.Array) -> jax.Array:
    """Returns jax.nn.softmax of x [t, n], whose denominators are summed by halves."""
    powers = jnp.exp(x - jax.lax.stop_gradient(x.max(1, keepdims=True)))
    return powers / sum_by_halves(powers)
