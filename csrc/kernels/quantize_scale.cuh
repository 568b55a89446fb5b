// Scales, sums over lanes on the way to them, and eight numbers at a time from floats to FP8.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"

namespace fp8gemm {

constexpr float kLargest = 448.0f;            // finite e4m3
constexpr float kSmallestNormal = 0x1p-126f;  // fp32

// What a value is multiplied by to become FP8, and what undoes it.
template <bool kPow2>
struct Scale {
  float value, reciprocal;

  // As reference.scale_of: 1 for zeros, NaN where there is a NaN or an infinity.
  FP8GEMM_DEVICE static Scale of(float largest) {
    const uint32_t kInfinity = 0x7f800000u, bits = float_to_bits(largest);
    Scale scale;
    if constexpr (kPow2) {
      // largest / 448 is 2^-8 · (mantissa / 1.75) · 2^exponent: one binade up where the mantissa is
      // above 1.75, and no rounding of the quotient changes that.
      const int above = static_cast<int>((bits + 0x001fffffu) & kInfinity) - (8 << 23);
      const int smallest = 1 << 23;  // exponent of the smallest normal number
      const uint32_t power = static_cast<uint32_t>(max(above, smallest));
      scale = {bits_to_float(power), bits_to_float((254u << 23) - power)};
    } else {
      const float value = max(largest * (1.0f / kLargest), kSmallestNormal);
      scale = {value, div_rn(1.0f, value)};
    }
    if (largest == 0) scale = {1.0f, 1.0f};
    if (bits >= kInfinity) scale = {bits_to_float(0x7fc00000u), bits_to_float(0x7fc00000u)};
    return scale;
  }
};

// As reference.share_scales: the scale of this thread's column, or the largest of its block where
// all lie close. 128 neighbouring threads have a block's columns, `which` tells two blocks apart.
FP8GEMM_DEVICE Scale<true> share_scale(Scale<true> own, float largest, int which = 0) {
  __shared__ uint32_t ends[2][4][2];  // of each warp's columns: the largest scale, the smallest
  const uint32_t bits = float_to_bits(own.value), warp = threadIdx.x / 32 % 4;
  const uint32_t warp_most = redux_max(largest != 0 ? bits : 0u);
  const uint32_t warp_least = redux_min(largest != 0 ? bits : ~0u);
  if (threadIdx.x % 32 == 0) ends[which][warp][0] = warp_most, ends[which][warp][1] = warp_least;
  bar_sync(1 + which, kScaleBlock);
  uint32_t most = 0, least = ~0u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    most = max(most, ends[which][i][0]), least = min(least, ends[which][i][1]);
  }
  const uint32_t kInfinity = 0x7f800000u;  // NaN is above it
  const bool close = most - least <= static_cast<uint32_t>(kSharedSpread) << 23;
  if (most == 0 || most >= kInfinity || !close) return own;
  return {bits_to_float(most), bits_to_float((254u << 23) - most)};
}

// Adds up, or the like, each of kCount values over kLanes lanes. Lane i gets value i % kCount: a
// step hands half of the values over and keeps the others, so later steps have fewer.
template <int kLanes, int kCount, class Combine>
FP8GEMM_DEVICE float over_lanes(float (&values)[kCount], Combine combine) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i];
      const float given = upper ? values[i] : values[i + half];
      values[i] = combine(kept, __shfl_xor_sync(~0u, given, half));
    }
  }
#pragma unroll
  for (int distance = kCount; distance < kLanes; distance *= 2) {
    values[0] = combine(values[0], __shfl_xor_sync(~0u, values[0], distance));
  }
  return values[0];
}

// Eight values, get(0) ... get(7), times `reciprocal`.
template <class Get>
FP8GEMM_DEVICE Words2 pack8(Get get, float reciprocal) {
  auto scaled = [&](int i) { return get(i) * reciprocal; };
  return {cvt_e4m3x4(scaled(0), scaled(1), scaled(2), scaled(3)),
          cvt_e4m3x4(scaled(4), scaled(5), scaled(6), scaled(7))};
}

// Writes eight bytes, as many as there is room for. Aligned: a multiple of eight.
template <bool kAligned>
FP8GEMM_DEVICE void store8(uint8_t* to, Words2 bytes, int room) {
  if constexpr (kAligned) {
    if (room > 0) *reinterpret_cast<Words2*>(to) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = i < 4 ? bytes.x : bytes.y;
      if (i < room) to[i] = static_cast<uint8_t>(word >> 8 * (i % 4));
    }
  }
}

}  // namespace fp8gemm
