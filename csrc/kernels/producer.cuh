// Fills stages: four copies per 128 of k, issued by one thread.
#pragma once

#include "params.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// 128-deep steps of k. At least two, so that a loop may treat the first and the last apart; the
// copy engine reads zeros past the end of k.
FP8GEMM_DEVICE int k_steps(const GemmParams& params) {
  return max(2, ceil_div(params.k, kBlockK));
}

template <GemmSpec spec, class Shared>
struct Producer {
  const GemmParams& params;
  Shared& shared;
  uint32_t rank;  // in the cluster; CTA 0 loads what both share
  int scale_steps, rhs_scale_rows;

  FP8GEMM_DEVICE Producer(const GemmParams& p, Shared& s, uint32_t cta_rank)
      : params(p),
        shared(s),
        rank(cta_rank),
        scale_steps(ceil_div(p.k, kBlockK)),
        rhs_scale_rows(ceil_div(p.n, 128)) {
    prefetch_tensormap(params.lhs);
    prefetch_tensormap(params.rhs);
    prefetch_tensormap(params.lhs_scale);
    prefetch_tensormap(params.rhs_scale);
  }

  // Starts the copies of step `step` of `block` into `stage`, which must be empty.
  FP8GEMM_DEVICE void load(const Block& block, int step, int stage) {
    const uint32_t full = shared_address(&shared.full[stage]);
    mbarrier_arrive_expect_tx(full, Shared::kStageBytes);
    load_tile<spec.multicast == Multicast::kRhs>(shared.rhs[stage], params.rhs, full, step,
                                                 block.group * params.n + block.n);
    load_tile<spec.multicast == Multicast::kLhs>(shared.lhs[stage], params.lhs, full, step,
                                                 block.group * params.m + block.m);
    load_scales<spec.lhs_scale>(shared.lhs_scale[stage], params.lhs_scale, full, block.group, step,
                                block.m, 0);
    load_scales<spec.rhs_scale>(shared.rhs_scale[stage], params.rhs_scale, full, block.group, step,
                                block.n, rhs_scale_rows);
  }

 private:
  template <bool kShared>
  FP8GEMM_DEVICE void load_tile(const uint8_t* to, const TensorMap& map, uint32_t full, int step,
                                int row) {
    if constexpr (!kShared) {
      cp_async_bulk_tensor_2d(shared_address(to), map, full, step * kBlockK, row);
    } else if (rank == 0) {
      cp_async_bulk_tensor_2d_multicast(shared_address(to), map, full, step * kBlockK, row, 0b11);
    }
  }

  // `block_rows`: rows of a group in a 128x128 scale array.
  template <ScaleTile tile>
  FP8GEMM_DEVICE void load_scales(const uint8_t* to, const TensorMap& map, uint32_t full, int group,
                                  int step, int row, int block_rows) {
    int x = 0, y = group;
    if constexpr (tile == ScaleTile::k1x128) {
      x = row;
      // NOTE: the step past a short k must not meet the next group's scales, which may be NaN.
      y = group * scale_steps + min(step, scale_steps - 1);
    } else if constexpr (tile == ScaleTile::k1xK) {
      x = row;
    } else if constexpr (tile == ScaleTile::k128x128) {
      x = step;
      y = group * block_rows + row / 128;
    }
    cp_async_bulk_tensor_2d(shared_address(to), map, full, x, y);
  }
};

}  // namespace fp8gemm
