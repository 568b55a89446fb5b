// Which output block a CTA works on next. Producer and consumers walk the same list, each alone.
#pragma once

#include "params.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

struct Block {
  int group;  // which product of a batch
  int m;      // first row, counted in its group
  int n;      // first column
};

// Visits the blocks of all groups, `group_m` blocks along m before the next column, so that the
// CTAs at work at one time share rows and columns through L2. A cluster takes two neighbours.
template <GemmSpec spec>
struct Scheduler {
  static constexpr int kClusterM = spec.multicast == Multicast::kRhs ? 2 : 1;
  static constexpr int kClusterN = spec.multicast == Multicast::kLhs ? 2 : 1;

  int m_blocks, n_blocks, blocks_per_group, blocks;
  int index, stride;
  uint32_t rank;

  // `worker` of `workers`: a CTA, or a cluster of them.
  FP8GEMM_DEVICE Scheduler(const GemmParams& params, int worker, int workers, uint32_t cta_rank)
      : m_blocks(ceil_div(params.m, spec.block_m * kClusterM)),
        n_blocks(ceil_div(params.n, spec.block_n * kClusterN)),
        blocks_per_group(m_blocks * n_blocks),
        blocks(blocks_per_group * params.groups),
        index(worker),
        stride(workers),
        rank(cta_rank) {}

  FP8GEMM_DEVICE bool done() const { return index >= blocks; }
  FP8GEMM_DEVICE void next() { index += stride; }

  FP8GEMM_DEVICE Block block() const {
    Block block;
    int rest = index;
    block.group = 0;
    if constexpr (spec.variant == Variant::kBatched) {
      block.group = rest / blocks_per_group;
      rest -= block.group * blocks_per_group;
    }
    const int strip = rest / (spec.group_m * n_blocks);
    rest -= strip * spec.group_m * n_blocks;
    const int strip_rows = min(spec.group_m, m_blocks - strip * spec.group_m);
    const int n_block = rest / strip_rows;
    const int m_block = strip * spec.group_m + rest - n_block * strip_rows;
    block.m = (m_block * kClusterM + (kClusterM > 1 ? rank : 0)) * spec.block_m;
    block.n = (n_block * kClusterN + (kClusterN > 1 ? rank : 0)) * spec.block_n;
    return block;
  }
};

}  // namespace fp8gemm
