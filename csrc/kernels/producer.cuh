// Fills stages: four or five copies per 128 of k, issued by one thread.
#pragma once

#include "params.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

template <GemmSpec spec, class Shared>
struct Producer {
  const GemmParams& params;
  Shared& shared;
  uint32_t rank;  // in the cluster; CTA 0 loads what both share
  int scale_steps;
  int stage_bytes;  // what a full barrier expects: all that lands in this CTA, a multicast included

  static constexpr bool kAnyRow = spec.variant == Variant::kRagged && is_per_row(spec.lhs_scale);

  FP8GEMM_DEVICE Producer(const GemmParams& p, Shared& s, uint32_t cta_rank)
      : params(p), shared(s), rank(cta_rank), scale_steps(ceil_div(p.k, kBlockK)) {
    const int lhs_rows = copied_rows(spec.block_m, p.m), rhs_rows = copied_rows(spec.block_n, p.n);
    stage_bytes = (lhs_rows + rhs_rows) * kBlockK +
                  (kAnyRow ? 0 : scale_bytes(spec.lhs_scale, lhs_rows)) +
                  scale_bytes(spec.rhs_scale, is_per_row(spec.rhs_scale) ? rhs_rows : spec.block_n);
    prefetch_tensormap(params.lhs);
    prefetch_tensormap(params.rhs);
    if constexpr (is_per_row(spec.lhs_scale) && !kAnyRow) prefetch_tensormap(params.lhs_scale);
    if constexpr (is_per_row(spec.rhs_scale)) prefetch_tensormap(params.rhs_scale);
  }

  // Starts the copies of the `index`-th step of `block` into `stage`, which must be empty.
  FP8GEMM_DEVICE void load(const Block& block, int index, int stage) {
    const uint32_t full = shared_address(&shared.full[stage]);
    mbarrier_arrive_expect_tx(full, stage_bytes + (kAnyRow ? 4 * any_row_count(block.m) : 0));
    const int lhs_group = lhs_has_groups(spec.variant) ? block.group : 0;
    const int rhs_group = rhs_has_groups(spec.variant) ? block.group : 0;
    // Past the block's last step: zeros from past the end of k, times scales that are its own.
    const int step = index < block.steps ? block.first_step + index : scale_steps;
    const int scale_step = block.first_step + min(index, block.steps - 1);
    load_tile<spec.multicast == Multicast::kRhs>(shared.rhs[stage], params.rhs, full, step,
                                                 rhs_group * params.n + block.n);
    load_tile<spec.multicast == Multicast::kLhs>(shared.lhs[stage], params.lhs, full, step,
                                                 lhs_group * params.m + block.m);
    if constexpr (kAnyRow) {
      load_any_row_scales(shared.lhs_scale[stage], full, scale_step, block.m);
    } else if constexpr (is_per_row(spec.lhs_scale)) {
      load_row_scales<spec.lhs_scale>(shared.lhs_scale[stage], params.lhs_scale, full, lhs_group,
                                      scale_step, block.m);
    } else {
      static_assert(spec.lhs_scale == ScaleTile::kTensor, "lhs scales: per row, or per tensor");
      load_tensor_scale(shared.lhs_scale[stage], params.lhs_scale_data, full, lhs_group);
    }
    if constexpr (is_per_row(spec.rhs_scale)) {
      load_row_scales<spec.rhs_scale>(shared.rhs_scale[stage], params.rhs_scale, full, rhs_group,
                                      scale_step, block.n);
    } else if constexpr (spec.rhs_scale == ScaleTile::k128x128) {
      load_block_scales(shared.rhs_scale[stage], full, rhs_group, block.n, scale_step);
    } else {
      load_tensor_scale(shared.rhs_scale[stage], params.rhs_scale_data, full, rhs_group);
    }
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

  template <ScaleTile tile>
  FP8GEMM_DEVICE void load_row_scales(const uint8_t* to, const TensorMap& map, uint32_t full,
                                      int group, int step, int row) {
    const int line = tile == ScaleTile::k1x128 ? group * scale_steps + step : group;
    cp_async_bulk_tensor_2d(shared_address(to), map, full, row, line);
  }

  // Scales that are copied for a block that begins at row m: from the multiple of four before it
  // on, as many as there are. The second block of a cluster may begin past the last row.
  FP8GEMM_DEVICE int any_row_first(int m) const { return min(m, params.m - 1) / 4 * 4; }
  FP8GEMM_DEVICE int any_row_count(int m) const {
    return min(spec.block_m + extra_scale_rows(spec.variant),
               round_up(params.m, 4) - any_row_first(m));
  }

  FP8GEMM_DEVICE void load_any_row_scales(const uint8_t* to, uint32_t full, int step, int m) {
    const int line = spec.lhs_scale == ScaleTile::k1x128 ? step : 0;
    const float* from =
        params.lhs_scale_data + int64_t{line} * round_up(params.m, 4) + any_row_first(m);
    cp_async_bulk(shared_address(to), from, 4 * any_row_count(m), full);
  }

  // The aligned run of four steps that `step` is in, for each scale block of the columns.
  FP8GEMM_DEVICE void load_block_scales(const uint8_t* to, uint32_t full, int group, int n,
                                        int step) {
    const int rows = ceil_div(params.n, 128), columns = round_up(scale_steps, 4);
    const float* from = params.rhs_scale_data + int64_t{group} * rows * columns + step / 4 * 4;
#pragma unroll
    for (int i = 0; i < scale_blocks(spec.block_n); ++i) {
      const int row = min(n / 128 + i, rows - 1);
      cp_async_bulk(shared_address(to) + 16 * i, from + row * columns, 16, full);
    }
  }

  FP8GEMM_DEVICE void load_tensor_scale(const uint8_t* to, const float* scales, uint32_t full,
                                        int group) {
    cp_async_bulk(shared_address(to), scales + 4 * group, 16, full);
  }
};

}  // namespace fp8gemm
