"""tokamax: an implementation of its ragged_dot.

    y = tokamax.ragged_dot(x, w, sizes, implementation=[fp8_implementation, "xla"])

What FP8 does not take raises NotImplementedError, at which tokamax goes on to the next one.
"""

import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8

ROWS = (((1,), (1,)), ((), ()))  # lhs [m, k] · rhs [g, k, n]
ROWS_TRANSPOSED = (((1,), (2,)), ((), ()))  # lhs [m, k] · rhs [g, n, k]


def fp8_implementation(
    lhs,
    rhs,
    *,
    group_sizes,
    ragged_dot_dimension_numbers,
    precision=None,
    preferred_element_type=None,
    activation=None,
    group_offset=None,
    zero_initialize=False,
    **others,
):
    """Takes float arrays. An activation sees float32. Rows past the groups are always zero."""
    del zero_initialize
    dims = ragged_dot_dimension_numbers
    contracting, batch = dims.dot_dimension_numbers
    numbers = tuple(map(tuple, contracting)), tuple(map(tuple, batch))
    ragged, group = tuple(dims.lhs_ragged_dimensions), tuple(dims.rhs_group_dimensions)
    if numbers not in (ROWS, ROWS_TRANSPOSED) or (ragged, group) != ((0,), (0,)):
        raise NotImplementedError(f"fp8_ragged_dot has groups of rows alone, not {dims}")
    if not all(isinstance(x, jax.Array) for x in (lhs, rhs)):
        raise NotImplementedError("fp8_ragged_dot quantizes floats itself: pass them")
    if given := [name for name, value in others.items() if value is not None]:
        raise NotImplementedError(f"fp8_ragged_dot has no {', '.join(given)}: leave it out")
    w = rhs if numbers == ROWS else rhs.swapaxes(1, 2)
    sizes = jnp.asarray(getattr(group_sizes, "value", group_sizes))  # tokamax.GroupSizes has one
    dtype = preferred_element_type or jnp.result_type(lhs.dtype, rhs.dtype)
    if activation is None:
        return fp8.fp8_ragged_dot(lhs, w, sizes, precision, dtype, group_offset)
    y = fp8.fp8_ragged_dot(lhs, w, sizes, precision, jnp.float32, group_offset)
    return activation(y).astype(dtype)
