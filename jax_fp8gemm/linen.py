"""Flax linen layers in FP8, with the parameters of the layers they stand in for."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_fp8gemm.dot_general import fp8_dot_general
from jax_fp8gemm.moe import moe
from jax_fp8gemm.ops import fp8_matmul
from jax_fp8gemm.prepared import prepare_weight
from jax_fp8gemm.qarray import BLOCKS, QArray
from jax_fp8gemm.quantizing import quantize
from jax_fp8gemm.routing import Routing

default_init = nn.initializers.lecun_normal()  # nn.Dense's
expert_init = nn.initializers.lecun_normal(batch_axis=(0,))  # fan-in of one expert


def cast_inputs(inputs, kernel, bias, *, dtype=None):
    """Flax's promote_dtype, but for the kernel: cast once, to FP8, its gradient keeps its dtype."""
    inputs, bias = nn.dtypes.promote_dtype(
        inputs, bias, dtype=dtype or jnp.result_type(inputs, kernel)
    )
    return inputs, kernel, bias


def multiply(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **kwargs):
    """fp8_dot_general with the result in lhs's dtype, which is the layer's."""
    dtype = preferred_element_type or lhs.dtype
    return fp8_dot_general(lhs, rhs, dimension_numbers, precision, dtype, **kwargs)
