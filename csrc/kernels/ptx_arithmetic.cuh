// Instructions on registers: the second half of ptx.cuh.
#pragma once

#include "ptx.cuh"

namespace fp8gemm {

// ---- Arithmetic (max, abs, fma, div) ------------------------------------------------------------

// NaN wins over every number.
FP8GEMM_DEVICE float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// Of either half. NaN wins here too.
FP8GEMM_DEVICE uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

FP8GEMM_DEVICE uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Of either half, the larger magnitude; NaN wins, and the sign is of no use.
FP8GEMM_DEVICE uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// The largest of a warp.
FP8GEMM_DEVICE uint32_t redux_max(uint32_t value) {
  uint32_t largest;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(value));
  return largest;
}

// The smallest of a warp.
FP8GEMM_DEVICE uint32_t redux_min(uint32_t value) {
  uint32_t smallest;
  asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(smallest) : "r"(value));
  return smallest;
}

FP8GEMM_DEVICE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

FP8GEMM_DEVICE float magnitude(float x) {
  float result;
  asm("abs.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

FP8GEMM_DEVICE float fma_rn(float a, float b, float c) {
  float sum;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
  return sum;
}

FP8GEMM_DEVICE float div_rn(float a, float b) {
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}

// Floating point: ex2.approx, 2 units in the last place.
FP8GEMM_DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Floating point: rcp.approx, 1 unit in the last place.
FP8GEMM_DEVICE float rcp_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

FP8GEMM_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  asm("mov.b32 %0, %1;" : "=f"(value) : "r"(bits));
  return value;
}

FP8GEMM_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ---- Conversion (cvt) ---------------------------------------------------------------------------

// Four fp32 to four e4m3, the first in the lowest byte; saturates at ±448, keeps NaN.
FP8GEMM_DEVICE uint32_t cvt_e4m3x4(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// Four e4m3 to four f16, the lower two of them first.
FP8GEMM_DEVICE Words2 cvt_f16x4_e4m3x4(uint32_t four) {
  Words2 halves;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(four));
  return halves;
}

FP8GEMM_DEVICE float cvt_f32_f16(uint32_t low_half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(low_half)));
  return value;
}

// Two fp32 to two bf16 in one word, `low` in the low half.
FP8GEMM_DEVICE uint32_t cvt_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace fp8gemm
