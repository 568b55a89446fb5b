"""MaxText: dense layers and experts in FP8. Put this file beside MaxText's quantizations.py,
return `Fp8BlockQuantization()` from `configure_quantization`, and call `gmm` in place of mblx.gmm.
"""

import functools
import math
from types import SimpleNamespace as Space

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_fp8gemm as fp8


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **kw):
    """lax.dot_general, in FP8 where lhs's last dims meet rhs's first: [..., k] · [k, n...]."""
    (left, right), (batch, _) = dimension_numbers
    rows, count = lhs.ndim - len(left), len(right)
    fits = not batch and (*left, *right) == (*range(rows, lhs.ndim), *range(count))
    if not fits or kw.get("out_sharding") is not None:
        dtype = preferred_element_type
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, dtype, **kw)
    k = math.prod(rhs.shape[:count])
    x, w = lhs.reshape(*lhs.shape[:rows], k), rhs.reshape(k, -1)
    y = fp8.fp8_matmul(x, w, preferred_element_type=preferred_element_type)
    return y.reshape(*lhs.shape[:rows], *rhs.shape[count:])


class Fp8DotGeneral(nn.Module):
    def __call__(self, *args, **kw):
        return dot_general(*args, **kw)


class PlainDotGeneral(nn.Module):
    def __call__(self, *args, **kw):
        return jax.lax.dot_general(*args, **kw)


# moe.py asks a quantization for the dtypes that its own kernels should quantize to: None here.
SIDE = Space(numerics=Space(get_dtype=lambda: None))


class Fp8BlockQuantization:
    """1x128 and 128x128 scales, found anew in each product: no state, nothing to calibrate."""

    quant_mode = "train"
    needs_apply_rngs = False
    quant_dg = Space(fwd=Space(dg_quantizer=Space(lhs=SIDE, rhs=SIDE)))

    def dot_general_cls(self, mesh_axes=()):
        """Routers stay in their precision: theirs are the kernels with no name for the last dim."""
        router = len(mesh_axes) == 2 and mesh_axes[-1] is None
        return PlainDotGeneral if router else Fp8DotGeneral

    def einsum(self, mesh_axes=(), dtype=None):
        return functools.partial(jnp.einsum, _dot_general=dot_general)


def gmm(lhs, rhs, group_sizes, preferred_element_type=jnp.float32, *, group_offset=None, **kw):
    """megablox's gmm: lhs [m, k] by rhs [g, k, n]. Tiles and dtypes are not looked at."""
    for name in ("existing_out", "partial_sum", "weight_gather_axes"):
        if kw.get(name) is not None and len(kw[name]):  # MaxText passes [] for no axes
            raise NotImplementedError(f"gmm in FP8 takes no {name}: leave it None")
    w = rhs.swapaxes(1, 2) if kw.get("transpose_rhs") else rhs
    dtype = preferred_element_type
    return fp8.fp8_ragged_dot(lhs, w, group_sizes, None, dtype, group_offset)
