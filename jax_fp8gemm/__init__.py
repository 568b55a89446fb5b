"""Block-scaled FP8 matrix products for JAX on NVIDIA Hopper."""

from jax_fp8gemm import _native
from jax_fp8gemm.config import GemmConfig as GemmConfig
from jax_fp8gemm.dot_general import fp8_dot_general as fp8_dot_general
from jax_fp8gemm.expert_weights import PreparedExperts as PreparedExperts
from jax_fp8gemm.expert_weights import prepare_experts as prepare_experts
from jax_fp8gemm.experts import expert_ffn as expert_ffn
from jax_fp8gemm.kernel_level import gemm as gemm
from jax_fp8gemm.moe import moe as moe
from jax_fp8gemm.ops import fp8_matmul as fp8_matmul
from jax_fp8gemm.ops import fp8_ragged_dot as fp8_ragged_dot
from jax_fp8gemm.prepared import PreparedWeight as PreparedWeight
from jax_fp8gemm.prepared import prepare_weight as prepare_weight
from jax_fp8gemm.primitives import EXPORT_CHECKS as EXPORT_CHECKS
from jax_fp8gemm.qarray import QArray as QArray
from jax_fp8gemm.quantizing import dequantize as dequantize
from jax_fp8gemm.quantizing import quantize as quantize
from jax_fp8gemm.quantizing import quantize_both as quantize_both
from jax_fp8gemm.quantizing import quantize_rows as quantize_rows
from jax_fp8gemm.quantizing import quantize_transposed as quantize_transposed
from jax_fp8gemm.quantizing import requantize as requantize
from jax_fp8gemm.quantizing import swiglu_backward as swiglu_backward
from jax_fp8gemm.quantizing import swiglu_quantize as swiglu_quantize
from jax_fp8gemm.quantizing import swiglu_quantize_both as swiglu_quantize_both
from jax_fp8gemm.routing import Permutation as Permutation
from jax_fp8gemm.routing import Routing as Routing
from jax_fp8gemm.routing import permute as permute
from jax_fp8gemm.routing import route as route
from jax_fp8gemm.routing import unpermute as unpermute

_native.register()
