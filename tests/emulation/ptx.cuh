// Stands in for csrc/kernels/ptx.cuh where a kernel runs on a CPU: what CUDA C++ adds to C++, and
// every instruction that quantising and casting use.
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
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

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
inline bool __all_sync(unsigned, bool bit) { return __ballot_sync(~0u, bit) == ~0u; }
inline bool __any_sync(unsigned, bool bit) { return __ballot_sync(~0u, bit) != 0; }

namespace fp8gemm {

// ---- Memory -------------------------------------------------------------------------------------

struct alignas(8) Float2 {
  float x, y;
};
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

// What was copied is there once it was waited for, and poison until then. Where it does not exist
// it is not read.
struct Copy {
  void* destination;
  const void* source;
  int bytes, group;
};
static std::vector<Copy> copies[emulation::kMaxThreads];
static int groups[emulation::kMaxThreads];  // that each thread has committed

inline void start_copy(void* destination, const void* source, bool exists, int bytes) {
  static const Words4 zeros{};
  std::memset(destination, 0xff, bytes);
  copies[emulation::current].push_back(
      {destination, exists ? source : &zeros, bytes, groups[emulation::current]});
}
inline void cp_async(void* destination, const void* source, bool exists) {
  start_copy(destination, source, exists, 16);
}
inline void cp_async_4(void* destination, const void* source, bool exists) {
  start_copy(destination, source, exists, 4);
}
inline void cp_async_commit_group() { ++groups[emulation::current]; }
template <int kPending>
inline void cp_async_wait_group() {
  const int end = groups[emulation::current] - kPending;
  std::erase_if(copies[emulation::current], [&](const Copy& copy) {
    if (copy.group >= end) return false;
    std::memcpy(copy.destination, copy.source, copy.bytes);
    return true;
  });
}
inline void cp_async_wait_all() {
  cp_async_commit_group();
  cp_async_wait_group<0>();
}

inline void mbarrier_init(void* barrier, uint16_t count) {
  *static_cast<emulation::Barrier*>(barrier) = {count, count, 0};
}
inline void mbarrier_arrive(void* barrier) { static_cast<emulation::Barrier*>(barrier)->arrive(); }
inline void mbarrier_try_wait(void* barrier, uint32_t parity) {
  static_cast<emulation::Barrier*>(barrier)->wait_for(parity);
}
inline bool mbarrier_test_wait(void* barrier, uint32_t parity) {
  return static_cast<emulation::Barrier*>(barrier)->phase != parity;
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
T warp_uniform(T value) {
  return __shfl_sync(~0u, value, 0);
}

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

}  // namespace fp8gemm
