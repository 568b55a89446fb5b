// Instructions on registers: the second half of ptx.cuh. Bit for bit, but for ex2.approx and
// rcp.approx, which may be off by a unit or two in the last place.
#pragma once

#include "ptx.cuh"

namespace fp8gemm {

// ---- Arithmetic ---------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }

inline float max_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return bits_to_float(0x7fffffffu);
  return a < b ? b : a;
}
inline float rcp_approx(float x) { return 1 / x; }
template <class T>
const T* row_of(const T* base, int row, int pitch) {
  return base + int64_t{row} * pitch;
}
inline void forget(uint32_t& value, uint32_t zero) { value ^= zero; }
inline float magnitude(float x) { return std::fabs(x); }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float exp2_approx(float x) { return std::exp2(x); }

// ---- Conversion ---------------------------------------------------------------------------------

// To the nearest e4m3, ties to even, at most ±448; NaN becomes 0x7f.
inline uint32_t cvt_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fabs(x);
  if (size >= 448) return sign | 0x7e;
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const float units = std::nearbyint(std::ldexp(size, 3 - exponent));  // of the last place
  return sign | (8 * (exponent + 6) + uint32_t(units));
}
inline uint32_t cvt_e4m3x4(float a, float b, float c, float d) {
  return cvt_e4m3(a) | cvt_e4m3(b) << 8 | cvt_e4m3(c) << 16 | cvt_e4m3(d) << 24;
}

inline uint32_t cvt_f16_e4m3(uint32_t byte) {
  const uint32_t sign = (byte & 0x80) << 8;
  if ((byte & 0x7f) == 0x7f) return 0x7fff;
  if ((byte & 0x7f) == 0) return sign;
  int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if (exponent == 0) {
    for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
    mantissa -= 8;
  }
  return sign | (exponent + 8) << 10 | mantissa << 7;
}
inline uint32_t cvt_f16x2_e4m3x2(uint32_t two) {
  return cvt_f16_e4m3(two & 0xff) | cvt_f16_e4m3(two >> 8 & 0xff) << 16;
}
inline Words2 cvt_f16x4_e4m3x4(uint32_t four) {
  return {cvt_f16x2_e4m3x2(four), cvt_f16x2_e4m3x2(four >> 16)};
}

inline float cvt_f32_f16(uint32_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                     : std::ldexp(float(1024 + mantissa), exponent - 25);
  return half >> 15 & 1 ? -size : size;
}

// Two 16-bit floats in one word; to_float reads the low one.
template <class ToFloat>
uint32_t larger_of_halves(uint32_t a, uint32_t b, ToFloat to_float) {
  uint32_t both = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t x = a >> shift & 0xffff, y = b >> shift & 0xffff;
    const bool nan = std::isnan(to_float(x)) || std::isnan(to_float(y));
    both |= (nan ? 0x7fffu : to_float(x) < to_float(y) ? y : x) << shift;
  }
  return both;
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  return larger_of_halves(a, b, [](uint32_t half) { return bits_to_float(half << 16); });
}
// Only the magnitude counts.
inline uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
  return max_nan_bf16x2(a & 0x7fff7fff, b & 0x7fff7fff);
}
inline uint32_t redux_min(uint32_t value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    value = min(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

inline uint32_t redux_max(uint32_t value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}
inline uint32_t cvt_bf16x2(float low, float high) {
  uint32_t both = 0;
  for (float x : {high, low}) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    both = both << 16 | rounded;
  }
  return both;
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t both = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = bits_to_float(a >> shift << 16), y = bits_to_float(b >> shift << 16);
    const uint32_t bits = float_to_bits(x * y);
    const uint32_t rounded = std::isnan(x * y) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    both |= rounded << shift;
  }
  return both;
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  return larger_of_halves(a, b, cvt_f32_f16);
}

}  // namespace fp8gemm
