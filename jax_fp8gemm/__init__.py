"""Block-scaled FP8 matrix products for JAX on NVIDIA Hopper."""

from jax_fp8gemm import _native
from jax_fp8gemm.config import GemmConfig as GemmConfig
from jax_fp8gemm.kernel_level import dequantize as dequantize
from jax_fp8gemm.kernel_level import gemm as gemm
from jax_fp8gemm.kernel_level import quantize as quantize
from jax_fp8gemm.ops import fp8_matmul as fp8_matmul
from jax_fp8gemm.ops import fp8_ragged_dot as fp8_ragged_dot
from jax_fp8gemm.primitives import EXPORT_CHECKS as EXPORT_CHECKS
from jax_fp8gemm.qarray import QArray as QArray

_native.register()
