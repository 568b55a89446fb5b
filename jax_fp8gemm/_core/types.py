"""The words that options may be."""

from typing import Literal

# Scales rounded up to powers of two, or max / 448 as it is.
ScaleRounding = Literal["pow2", "none"]
# How a router turns logits into scores.
ScoreFunction = Literal["softmax", "sigmoid"]
# What multiplies: our kernels in FP8, or XLA in bf16 for comparison and for other GPUs.
Precision = Literal["fp8", "bf16"]
# What a GEMM keeps of its input for the backward pass.
Residuals = Literal["fp8_t", "fp8", "input"]
# How tokens reach the devices of their experts, and in which type.
ExchangeKind = Literal["all_gather", "all_to_all"]
Wire = Literal["fp8", "bf16"]

# A row of the table in variants.py, and the scale tiles of its two operands.
VariantName = Literal["dense", "batched", "ragged", "contiguous", "masked", "ragged_contracting"]
ScalesName = Literal["1x128_128x128", "1x128_1x128", "row_row", "tensor_tensor"]
# Type of a GEMM's result, and of its rhs: FP8, or bf16 [n, k] or [k, n] that the kernel casts.
OutName = Literal["bf16", "f32"]
RhsName = Literal["fp8", "bf16", "bf16_transposed"]
# Fields of a GemmConfig.
KernelName = Literal["persistent", "few_rows"]
MulticastName = Literal["none", "lhs", "rhs"]
# What a cast reads.
SourceName = Literal["float", "fp8", "swiglu", "swiglu_backward"]
