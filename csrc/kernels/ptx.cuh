// One function per PTX instruction, named as in the PTX ISA manual, with the manual's section.
// Here: memory, synchronisation, tensor core; ptx_arithmetic.cuh: the others. Every line of asm of
// this library is in these two, but for the wgmma wrapper that gemm_spec.cpp writes for the one
// block_n that a kernel uses.
#pragma once

#include "params.cuh"

namespace fp8gemm {

#define FP8GEMM_DEVICE __device__ __forceinline__

// ---- Addresses, indices -----------------------------------------------------------------------

FP8GEMM_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What the launch gives a CTA beyond its static shared memory.
FP8GEMM_DEVICE uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

// Special registers: %cluster_ctarank
FP8GEMM_DEVICE uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Data movement: elect.sync. True in one lane of the warp.
FP8GEMM_DEVICE bool elect_sync() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected;
}

// The same value in every lane, in a way the compiler can see: keeps it in a uniform register.
FP8GEMM_DEVICE uint32_t warp_uniform(uint32_t value) { return __shfl_sync(~0u, value, 0); }

// ---- mbarrier (Parallel synchronization: mbarrier) --------------------------------------------

FP8GEMM_DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

FP8GEMM_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FP8GEMM_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of CTA `rank` of the cluster.
// NOTE: without `.release.cluster`, which compiles to a GPU-wide MEMBAR in every warp and k-block.
FP8GEMM_DEVICE void mbarrier_arrive_remote(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

FP8GEMM_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase with this parity has completed; may suspend the thread.
FP8GEMM_DEVICE void mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Asks once and never suspends.
FP8GEMM_DEVICE bool mbarrier_test_wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete;
}

// ---- Barriers (Parallel synchronization: bar, barrier.cluster) --------------------------------

// Whether it is true in all lanes of a warp.
FP8GEMM_DEVICE bool all_lanes(bool value) { return __all_sync(~0u, value); }

FP8GEMM_DEVICE void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Warp-aligned: never call it in a branch that one elected lane takes.
FP8GEMM_DEVICE void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

FP8GEMM_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

FP8GEMM_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Makes this thread's shared-memory writes visible to the copy engine.
FP8GEMM_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Copy engine (Data movement: cp.async.bulk.tensor) -----------------------------------------

FP8GEMM_DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Plain bytes: addresses and size are multiples of 16.
FP8GEMM_DEVICE void cp_async_bulk(uint32_t destination, const void* source, uint32_t bytes,
                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

FP8GEMM_DEVICE void cp_async_bulk_tensor_2d(uint32_t destination, const TensorMap& map,
                                            uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

FP8GEMM_DEVICE void cp_async_bulk_tensor_3d(uint32_t destination, const TensorMap& map,
                                            uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// To the same shared-memory offset, and the same barrier, of every CTA in `mask`.
FP8GEMM_DEVICE void cp_async_bulk_tensor_2d_multicast(uint32_t destination, const TensorMap& map,
                                                      uint32_t barrier, int x, int y,
                                                      uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
      : "memory");
}

FP8GEMM_DEVICE void cp_async_bulk_tensor_3d_store(const TensorMap& map, uint32_t source, int x,
                                                  int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(source), "r"(x), "r"(y), "r"(z)
      : "memory");
}

FP8GEMM_DEVICE void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the latest `kPending` groups of stores have read their shared memory.
template <int kPending>
FP8GEMM_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor core (Asynchronous warpgroup level matrix instructions) -----------------------------

FP8GEMM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FP8GEMM_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
FP8GEMM_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulator registers across this point.
template <int kCount>
FP8GEMM_DEVICE void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// base + row · pitch, in one instruction: the compiler takes the sum apart, and makes more of it.
// pitch: in numbers; in bytes it is less than 2^32.
template <class T>
FP8GEMM_DEVICE const T* row_of(const T* base, int row, int pitch) {
  const T* to;
  const uint32_t bytes = uint32_t(pitch) * sizeof(T);
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(row), "r"(bytes), "l"(base));
  return to;
}

// Leaves a value as it is, but unknown to the compiler. zero: 0, in a way the compiler cannot see.
FP8GEMM_DEVICE void forget(uint32_t& value, uint32_t zero) {
  asm volatile("xor.b32 %0, %0, %1;" : "+r"(value) : "r"(zero));
}

// Matrix descriptor (section "Matrix descriptor format") of a tile with k contiguous, laid out as
// SwizzledRows or CoreMatrices say (shared_memory.cuh).
// low: address >> 4 in bits 0-13, leading offset at bit 16.
template <class Layout>
FP8GEMM_DEVICE uint32_t descriptor_low(uint32_t address) {
  return ((address & 0x3FFFF) >> 4) | Layout::kLeading << 16;
}

// high: constant: stride of eight rows, and swizzle mode.
template <class Layout>
FP8GEMM_DEVICE uint64_t descriptor(uint32_t low) {
  uint64_t both;
  asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low), "r"(Layout::kMode << 30 | Layout::kStride));
  return both;
}

// ---- Registers (Miscellaneous: setmaxnreg) ------------------------------------------------------

template <int kCount>
FP8GEMM_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
FP8GEMM_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Shared memory (Data movement: ld, st, stmatrix) --------------------------------------------

FP8GEMM_DEVICE float ld_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
}

struct alignas(8) Float2 {
  float x, y;
};

struct alignas(16) Float4 {
  float x, y, z, w;
};

FP8GEMM_DEVICE Float2 ld_shared_v2(uint32_t address) {
  Float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}

FP8GEMM_DEVICE Float4 ld_shared_v4(uint32_t address) {
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

FP8GEMM_DEVICE void st_shared_v2(uint32_t address, Float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

FP8GEMM_DEVICE void st_shared_v4(uint32_t address, Float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

// Writes to the same offset of CTA `rank` of the cluster, whose barrier counts the bytes.
FP8GEMM_DEVICE void st_async_v4(uint32_t address, uint32_t barrier, uint32_t rank, Float4 v) {
  asm volatile(
      "{\n.reg .b32 remote, counts;\nmapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counts, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [remote], {%3, %4, %5, %6}, "
      "[counts];\n}" ::"r"(address),
      "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

FP8GEMM_DEVICE void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- Global memory (Data movement: ld, st) ------------------------------------------------------

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

struct alignas(8) Words2 {
  uint32_t x, y;
};

// Read once, by nobody else.
FP8GEMM_DEVICE Words2 ld_global_stream_v2(const void* address) {
  Words2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address));
  return v;
}

FP8GEMM_DEVICE Words4 ld_global_stream_v4(const void* address) {
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Data movement: cp.async. 16 bytes to shared memory, zeros where they do not exist; the neighbours
// of what is read, up to 256 bytes, are on their way into L2 then.
FP8GEMM_DEVICE void cp_async(uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

// The same with 4 bytes.
FP8GEMM_DEVICE void cp_async_4(uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source),
               "r"(exists ? 4 : 0)
               : "memory");
}

FP8GEMM_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the latest `kPending` groups of copies have landed.
template <int kPending>
FP8GEMM_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

FP8GEMM_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fp8gemm
