// Where several parts sum a block over steps of k of their own, their sums meet here: each part
// owns every kParts-th group of eight columns, receives the others' sums for it, and adds them in a
// fixed order, so results repeat to the bit.
#pragma once

#include "epilogue.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

constexpr int kMathWarpgroups = 2;  // of the few-rows kernel
constexpr int kMathThreads = kMathWarpgroups * kWarpgroupThreads;
constexpr int kMathWarps = kMathThreads / kWarpThreads;

// A part is one of two warpgroups of one of split_k CTAs; its sums are
// float[kSubTiles][kRegisters].
template <GemmSpec spec>
struct Exchange {
  static constexpr ExchangePlan kPlan = exchange_plan(spec);
  static constexpr int kCtas = spec.split_k, kParts = kPlan.parts, kSumBytes = kPlan.sum_bytes;
  static constexpr int kSubTiles = sub_tiles(spec), kRegisters = spec.block_n / 2;
  using Sums = float[kSubTiles][kRegisters];

  uint32_t memory;  // address of [warpgroup that receives][slot of the sender][group], a barrier
  int warpgroup, part;

  FP8GEMM_DEVICE Exchange(uint32_t address, uint32_t rank, int warpgroup_of_cta)
      : memory(address),
        warpgroup(warpgroup_of_cta),
        part(kMathWarpgroups * rank + warpgroup_of_cta) {}

  // In a cluster, before anything else and for the whole CTA: once all have been here, and
  // await_others() returns, they may send. It gets one block, so the barrier is passed once.
  FP8GEMM_DEVICE static void begin(uint32_t address, uint32_t rank) {
    if (threadIdx.x == 0) {
      int groups = 0;
      for (int i = 0; i < kMathWarpgroups; ++i) groups += owned_by(kMathWarpgroups * rank + i);
      mbarrier_init(address + kSumBytes, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(address + kSumBytes, (kParts - 1) * groups * kExchangeGroupBytes);
    }
    __syncwarp();
    cluster_arrive_relaxed();
  }

  FP8GEMM_DEVICE static void await_others() { cluster_wait(); }

  // Gives each other part its columns.
  FP8GEMM_DEVICE void send(const Sums& sums) const {
    for_each_group([&](int m, int i, int owner, int owned) {
      if (owner == part) return;
      const uint32_t to = address(owner % kMathWarpgroups, part < owner ? part : part - 1, owned);
      const Float4 v{sums[m][i], sums[m][i + 1], sums[m][i + 2], sums[m][i + 3]};
      if constexpr (kCtas > 1) {
        st_async_v4(to, memory + kSumBytes, owner / kMathWarpgroups, v);
      } else {
        st_shared_v4(to, v);
      }
    });
  }

  // Until all that others send to this CTA has arrived.
  FP8GEMM_DEVICE void await_sums() const { mbarrier_try_wait(memory + kSumBytes, 0); }

  // Adds to this part's columns what the others sent, and stores them. row: of this thread's first
  // value.
  FP8GEMM_DEVICE void add_and_store(const GemmParams& params, const OutBlock& block, int row,
                                    const Sums& sums) const {
    const int column = 2 * (threadIdx.x % 4);
    for_each_group([&](int m, int i, int owner, int owned) {
      if (owner != part) return;
      const OutputRow<spec> top(params, block, row + m * kSubTileRows, column);
      const OutputRow<spec> bottom(params, block, row + m * kSubTileRows + 8, column);
      Float4 v{sums[m][i], sums[m][i + 1], sums[m][i + 2], sums[m][i + 3]};
#pragma unroll
      for (int slot = 0; slot < kParts - 1; ++slot) {
        const Float4 other = ld_shared_v4(address(warpgroup, slot, owned));
        v = {v.x + other.x, v.y + other.y, v.z + other.z, v.w + other.w};
      }
      top.store(2 * i, v.x, v.y);
      bottom.store(2 * i, v.z, v.w);
    });
  }

 private:
  FP8GEMM_DEVICE static int owned_by(int part) {
    return (kPlan.groups + kParts - 1 - part) / kParts;
  }

  // Calls body(sub-tile, first register, owner, index among the owner's) for each group of columns.
  template <class Body>
  FP8GEMM_DEVICE static void for_each_group(Body body) {
#pragma unroll
    for (int m = 0; m < kSubTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kRegisters; i += 4) {
        const int group = m * (kRegisters / 4) + i / 4;
        body(m, i, group % kParts, group / kParts);
      }
    }
  }

  // Where this thread's values of a group lie.
  FP8GEMM_DEVICE uint32_t address(int receiver, int slot, int owned) const {
    const int index = (receiver * (kParts - 1) + slot) * kPlan.most_owned + owned;
    return memory + index * kExchangeGroupBytes + threadIdx.x % kWarpgroupThreads * 16;
  }
};

}  // namespace fp8gemm
