// Stands in for csrc/kernels/ptx.cuh where a kernel runs on a CPU: what CUDA C++ adds to C++, and
// every instruction that quantising and casting use, bit for bit.
// NOTE: ex2.approx and rcp.approx are not: they may be off by a unit or two in the last place.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "fibers.h"
#include "params.cuh"

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define FP8GEMM_DEVICE inline
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid

template <class T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T>
constexpr T max(T a, T b) { return a < b ? b : a; }

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __syncthreads() { emulation::wait(emulation::Wait::kBlock); }
inline void __syncwarp() { emulation::wait(emulation::Wait::kWarp); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return emulation::exchange(value, threadIdx.x % 32 / width * width + lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulation::exchange(value, threadIdx.x % 32 ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return emulation::exchange(value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool bit) {
  unsigned bits = unsigned{bit} << threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    bits |= __shfl_xor_sync(~0u, bits, distance);
  }
  return bits;
}

namespace fp8gemm {

// ---- Memory -------------------------------------------------------------------------------------

struct alignas(16) Float4 {
  float x, y, z, w;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

struct alignas(8) Words2 {
  uint32_t x, y;
};

inline uint8_t* dynamic_shared() {
  alignas(1024) static uint8_t bytes[227 << 10];
  return bytes;
}
inline void* shared_address(void* pointer) { return pointer; }

// What was copied is there once it was waited for, and poison until then. Where it does not exist it
// is not read.
struct Copy {
  void* destination;
  const void* source;
  int bytes;
};
static std::vector<Copy> copies[emulation::kMaxThreads];

inline void start_copy(void* destination, const void* source, bool exists, int bytes) {
  static const Words4 zeros{};
  std::memset(destination, 0xff, bytes);
  copies[emulation::current].push_back({destination, exists ? source : &zeros, bytes});
}
inline void cp_async(void* destination, const void* source, bool exists) {
  start_copy(destination, source, exists, 16);
}
inline void cp_async_4(void* destination, const void* source, bool exists) {
  start_copy(destination, source, exists, 4);
}
inline void cp_async_wait_all() {
  for (const Copy& copy : copies[emulation::current]) {
    std::memcpy(copy.destination, copy.source, copy.bytes);
  }
  copies[emulation::current].clear();
}

inline void mbarrier_init(void* barrier, uint16_t count) {
  *static_cast<emulation::Barrier*>(barrier) = {count, count, 0};
}
inline void mbarrier_arrive(void* barrier) { static_cast<emulation::Barrier*>(barrier)->arrive(); }
inline void mbarrier_try_wait(void* barrier, uint32_t parity) {
  static_cast<emulation::Barrier*>(barrier)->wait_for(parity);
}

// A cluster is one CTA, which tells itself what others would.
inline uint32_t cluster_ctarank() { return 0; }
inline void mbarrier_arrive_remote(void* barrier, uint32_t) { mbarrier_arrive(barrier); }
// Copies are there at once.
inline void mbarrier_arrive_expect_tx(void* barrier, uint32_t) { mbarrier_arrive(barrier); }
inline void fence_proxy_async() {}

// A tensor map of bf16 [z, y, x], and boxes of 128 × 128; zeros past the end.
struct Matrices {
  const uint16_t* data;
  int64_t x, y, z;
};
inline void prefetch_tensormap(const TensorMap&) {}
inline void cp_async_bulk_tensor_3d(void* to, const TensorMap& map, void*, int x, int y, int z) {
  const Matrices& from = reinterpret_cast<const Matrices&>(map);
  for (int i = 0; i < 128 * 128; ++i) {
    const int row = y + i / 128, column = x + i % 128;
    const bool exists = row < from.y && column < from.x;
    static_cast<uint16_t*>(to)[i] = exists ? from.data[(z * from.y + row) * from.x + column] : 0;
  }
}

inline bool elect_sync() { return threadIdx.x % 32 == 0; }
template <class T>
T warp_uniform(T value) { return __shfl_sync(~0u, value, 0); }

inline void bar_sync(int number, int threads) {
  static emulation::Barrier barriers[16];
  emulation::Barrier& barrier = barriers[number];
  if (barrier.expected == 0) barrier = {uint16_t(threads), uint16_t(threads), 0};
  const uint32_t phase = barrier.phase;
  barrier.arrive();
  barrier.wait_for(phase);
}

inline Words2 ld_global_stream_v2(const void* address) {
  return *static_cast<const Words2*>(address);
}
inline Words4 ld_global_stream_v4(const void* address) {
  return *static_cast<const Words4*>(address);
}

// ---- Arithmetic ---------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }

inline float max_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return bits_to_float(0x7fffffffu);
  return a < b ? b : a;
}
inline float rcp_approx(float x) { return 1 / x; }
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
