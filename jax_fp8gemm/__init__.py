"""Block-scaled FP8 matrix multiplication for JAX on NVIDIA Hopper."""

from jax_fp8gemm._bind import native as _native
from jax_fp8gemm._bind.gemm_op import EXPORT_CHECKS
from jax_fp8gemm._core.qarray import QArray
from jax_fp8gemm._core.version import __version__
from jax_fp8gemm._moe.activations import ClampedSwiglu
from jax_fp8gemm._moe.balance import sequence_loss, update_bias
from jax_fp8gemm._moe.ffn import expert_ffn
from jax_fp8gemm._moe.kernels import ExpertKernels
from jax_fp8gemm._moe.layer import moe
from jax_fp8gemm._moe.order import Permutation, permute, unpermute
from jax_fp8gemm._moe.routing import Routing, route
from jax_fp8gemm._moe.weights import prepare_experts
from jax_fp8gemm._ops.casts import BothCopies, SwigluGradients
from jax_fp8gemm._ops.dot_general import fp8_dot_general
from jax_fp8gemm._ops.gemm import gemm
from jax_fp8gemm._ops.matmul import fp8_matmul
from jax_fp8gemm._ops.quantize import (
    dequantize,
    quantize,
    quantize_both,
    quantize_rows,
    quantize_transposed,
    requantize,
)
from jax_fp8gemm._ops.ragged_dot import fp8_ragged_dot
from jax_fp8gemm._ops.statistics import CastStatistics, cast_statistics
from jax_fp8gemm._ops.swiglu import swiglu_backward, swiglu_quantize, swiglu_quantize_both
from jax_fp8gemm._ops.weights import PreparedWeight, prepare_weight
from jax_fp8gemm._select.problem import GemmConfig
from jax_fp8gemm._tools.profile import KernelRow, Profile, profile
from jax_fp8gemm._tools.tune import TunedGemm, Tuning, tune

__all__ = [
    "EXPORT_CHECKS",
    "BothCopies",
    "CastStatistics",
    "ClampedSwiglu",
    "ExpertKernels",
    "GemmConfig",
    "KernelRow",
    "Permutation",
    "PreparedWeight",
    "Profile",
    "QArray",
    "Routing",
    "SwigluGradients",
    "TunedGemm",
    "Tuning",
    "__version__",
    "cast_statistics",
    "dequantize",
    "expert_ffn",
    "fp8_dot_general",
    "fp8_matmul",
    "fp8_ragged_dot",
    "gemm",
    "moe",
    "permute",
    "prepare_experts",
    "prepare_weight",
    "profile",
    "quantize",
    "quantize_both",
    "quantize_rows",
    "quantize_transposed",
    "requantize",
    "route",
    "sequence_loss",
    "swiglu_backward",
    "swiglu_quantize",
    "swiglu_quantize_both",
    "tune",
    "unpermute",
    "update_bias",
]

_native.register()
