// Which output block a CTA, or a cluster, works on next. Each visits every `workers`-th block.
#pragma once

#include "group_walk.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// Steps of k that a block takes: at least two, so that a loop may treat the first and the last
// apart. Past the end of k, and past the end of a group along k, a step reads zeros.
FP8GEMM_DEVICE int taken_steps(int steps) { return max(2, steps); }

// Visits the blocks of one group after the other, and in a group `group_m` blocks along m before
// the next column, so that the CTAs at work at one time share rows and columns through L2. A
// cluster takes two neighbours, which always belong to one group.
//
// Construction and next() are for whole warps where the variant is grouped.
template <GemmSpec spec>
struct Scheduler {
  static constexpr int kClusterM = spec.multicast == Multicast::kRhs ? 2 : 1;
  static constexpr int kClusterN = spec.multicast == Multicast::kLhs ? 2 : 1;
  static constexpr bool kWalks = is_grouped(spec.variant) && spec.variant != Variant::kContiguous;
  static constexpr bool kRest = spec.variant == Variant::kRagged && !spec.leave_rest;

  const GemmParams& params;
  int m_blocks, n_blocks;  // of one group, where all have the same number
  int index, stride;
  uint32_t rank;
  GroupWalk<spec.variant, kRest> walk;

  // `worker` of `workers`: a CTA, or a cluster of them.
  FP8GEMM_DEVICE Scheduler(const GemmParams& p, int worker, int workers, uint32_t cta_rank)
      : params(p),
        m_blocks(ceil_div(p.m, spec.block_m * kClusterM)),
        n_blocks(ceil_div(p.n, spec.block_n * kClusterN)),
        index(worker),
        stride(workers),
        rank(cta_rank),
        walk{} {
    if constexpr (kWalks) walk.find(params, index, n_blocks, spec.block_m * kClusterM);
  }

  FP8GEMM_DEVICE bool done() const {
    if constexpr (kWalks) return walk.past_end;
    return index >= m_blocks * n_blocks * (spec.variant == Variant::kBatched ? params.groups : 1);
  }

  FP8GEMM_DEVICE void next() {
    index += stride;
    if constexpr (kWalks) walk.find(params, index, n_blocks, spec.block_m * kClusterM);
  }

  FP8GEMM_DEVICE Block block() const {
    if constexpr (kWalks) return walked_block();
    const int group = spec.variant == Variant::kBatched ? index / (m_blocks * n_blocks) : 0;
    Block block = place(index - group * m_blocks * n_blocks, m_blocks);
    block.group = group;
    block.m_end = params.m;
    block.first_step = 0;
    block.steps = ceil_div(params.k, kBlockK);
    if constexpr (spec.variant == Variant::kContiguous) {
      block.group = min(params.group_data[block.m], params.groups - 1);
      if (block.group < 0) block.steps = 0;  // padding
    }
    return block;
  }

 private:
  FP8GEMM_DEVICE Block walked_block() const {
    const bool along_k = spec.variant == Variant::kRaggedContracting;
    const int extent = walk.extent;  // rows, or steps of k
    const int rows = along_k ? params.m : extent;
    Block block = place(index - walk.first_block, ceil_div(rows, spec.block_m * kClusterM));
    block.group = walk.group;
    block.first_step = along_k ? walk.start : 0;
    block.steps = along_k ? extent : ceil_div(params.k, kBlockK);
    block.m_end = rows;
    if constexpr (spec.variant == Variant::kRagged) {
      block.m += walk.start;
      block.m_end += walk.start;
      if (kRest && block.group == params.groups) block.steps = 0;  // rows past the groups
    }
    return block;
  }

  // The `index`-th block of a group with `m_blocks` blocks along m.
  FP8GEMM_DEVICE Block place(int index, int m_blocks) const {
    const int strip = index / (spec.group_m * n_blocks);
    index -= strip * spec.group_m * n_blocks;
    const int strip_rows = min(spec.group_m, m_blocks - strip * spec.group_m);
    const int n_block = index / strip_rows;
    const int m_block = strip * spec.group_m + index - n_block * strip_rows;
    Block block;
    block.m = (m_block * kClusterM + (kClusterM > 1 ? rank : 0)) * spec.block_m;
    block.n = (n_block * kClusterN + (kClusterN > 1 ? rank : 0)) * spec.block_n;
    return block;
  }
};

}  // namespace fp8gemm
