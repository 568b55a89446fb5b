// Fills stages: two to five copies per 128 of k, issued by one thread.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// NOTE: with small blocks the time of one load() limits the kernel: 150 clocks of one warp fill
// 13 KB at the rate of memory. So whatever a block's steps have in common is computed in begin(),
// and all lanes run the loop around load(), which keeps its values in uniform registers.
template <GemmSpec spec, class Shared>
struct Producer {
  const GemmParams& params;
  Shared& shared;
  uint32_t base;             // of shared memory; asked for once, since the answer takes its time
  uint32_t rank;             // in the cluster; CTA 0 loads what both share
  int end_step;              // past the end of k
  int scale_bytes_of_stage;  // but where a block begins at any row
  int stage_bytes;  // what a full barrier expects: all that lands in this CTA, a multicast included

  // The block at work.
  const TensorMap* lhs_map;
  const TensorMap* rhs_map;
  int lhs_row, rhs_row;    // in the operands' maps
  int lhs_line, rhs_line;  // in the maps of row scales
  int lhs_scale_row, rhs_scale_row;
  const float* lhs_scales;  // of tensors, and where a block begins at any row
  const float* rhs_scales;  // of tensors and blocks
  int lhs_scale_bytes;      // where a block begins at any row
  int next_block;           // floats from one scale block of the columns to the next

  static constexpr bool kCasts = is_cast(spec.rhs);  // then rhs is the casting warps' matter
  static constexpr bool kAnyRow = spec.variant == Variant::kRagged && is_per_row(spec.lhs_scale);

  FP8GEMM_DEVICE Producer(const GemmParams& p, Shared& s, uint32_t cta_rank)
      : params(p),
        shared(s),
        base(warp_uniform(shared_address(&s))),
        rank(cta_rank),
        end_step(ceil_div(p.k, kBlockK)) {
    const int lhs_rows = copied_rows(spec.block_m, p.m), rhs_rows = copied_rows(spec.block_n, p.n);
    const int scaled_rows = is_per_row(spec.rhs_scale) ? rhs_rows : spec.block_n;
    scale_bytes_of_stage = (kAnyRow ? 0 : scale_bytes(spec.lhs_scale, lhs_rows)) +
                           (kCasts ? 0 : scale_bytes(spec.rhs_scale, scaled_rows));
    stage_bytes = (lhs_rows + (kCasts ? 0 : rhs_rows)) * kBlockK + scale_bytes_of_stage;
    lhs_map = &params.lhs;
    rhs_map = &params.rhs;
    prefetch_tensormap(params.lhs);
    prefetch_tensormap(params.rhs);
    if constexpr (is_per_row(spec.lhs_scale) && !kAnyRow) prefetch_tensormap(params.lhs_scale);
    if constexpr (is_per_row(spec.rhs_scale)) prefetch_tensormap(params.rhs_scale);
  }

  // Turns to another block.
  FP8GEMM_DEVICE void begin(const Block& block) {
    const int lhs_group = lhs_has_groups(spec.variant) ? block.group : 0;
    const int rhs_group = rhs_has_groups(spec.variant) ? block.group : 0;
    lhs_row = lhs_group * params.m + block.m;
    rhs_row = rhs_group * params.n + block.n;
    lhs_scale_row = block.m;
    rhs_scale_row = block.n;
    lhs_line = lhs_group * (spec.lhs_scale == ScaleTile::k1x128 ? end_step : 1);
    rhs_line = rhs_group * (spec.rhs_scale == ScaleTile::k1x128 ? end_step : 1);
    if constexpr (has_tails(spec)) begin_tails(block);
    if constexpr (kAnyRow) begin_any_row(block.m);
    if constexpr (spec.lhs_scale == ScaleTile::kTensor) {
      lhs_scales = params.lhs_scale_data + 4 * lhs_group;
    }
    if constexpr (spec.rhs_scale == ScaleTile::kTensor) {
      rhs_scales = params.rhs_scale_data + 4 * rhs_group;
    }
    if constexpr (spec.rhs_scale == ScaleTile::k128x128 && !kCasts) {
      const int rows = ceil_div(params.n, kScaleBlock), columns = round_up(end_step, 4);
      const int row = min(block.n / kScaleBlock, rows - 1);
      rhs_scales = params.rhs_scale_data + (int64_t{rhs_group} * rows + row) * columns;
      next_block = row + 1 < rows ? columns : 0;
    }
  }

  // Starts the copies of the `index`-th step of `block` into `stage`, which must be empty.
  FP8GEMM_DEVICE void load(const Block& block, int index, int stage) {
    // Past the block's last step: zeros from past the end of k, times scales that are its own.
    const int scale_step = block.first_step + min(index, block.steps - 1);
    const int step = index < block.steps ? scale_step : end_step;
    const uint32_t full = address(&shared.full[stage]);
    mbarrier_arrive_expect_tx(full, stage_bytes + (kAnyRow ? lhs_scale_bytes : 0));
    if constexpr (!kCasts) {
      load_tile<spec.multicast == Multicast::kRhs>(shared.rhs[stage], *rhs_map, full, step,
                                                   rhs_row);
    }
    load_tile<spec.multicast == Multicast::kLhs>(shared.lhs[stage], *lhs_map, full, step, lhs_row);
    const uint32_t lhs_slot = address(shared.lhs_scale[stage]);
    const uint32_t rhs_slot = address(shared.rhs_scale[stage]);
    if constexpr (kAnyRow) {
      load_any_row_scales(lhs_slot, full, scale_step);
    } else if constexpr (is_per_row(spec.lhs_scale)) {
      const int line = lhs_line + (spec.lhs_scale == ScaleTile::k1x128 ? scale_step : 0);
      cp_async_bulk_tensor_2d(lhs_slot, params.lhs_scale, full, lhs_scale_row, line);
    } else {
      static_assert(spec.lhs_scale == ScaleTile::kTensor, "lhs scales: per row, or per tensor");
      cp_async_bulk(lhs_slot, lhs_scales, 16, full);
    }
    if constexpr (kCasts) return;
    if constexpr (is_per_row(spec.rhs_scale)) {
      const int line = rhs_line + (spec.rhs_scale == ScaleTile::k1x128 ? scale_step : 0);
      cp_async_bulk_tensor_2d(rhs_slot, params.rhs_scale, full, rhs_scale_row, line);
    } else if constexpr (spec.rhs_scale == ScaleTile::k128x128) {
      load_block_scales(rhs_slot, full, scale_step);
    } else {
      cp_async_bulk(rhs_slot, rhs_scales, 16, full);
    }
  }

  // Of something in shared memory.
  FP8GEMM_DEVICE uint32_t address(const void* member) const {
    return base + static_cast<uint32_t>(static_cast<const uint8_t*>(member) -
                                        reinterpret_cast<const uint8_t*>(&shared));
  }

 private:
  template <bool kShared>
  FP8GEMM_DEVICE void load_tile(const uint8_t* to, const TensorMap& map, uint32_t full, int step,
                                int row) {
    if constexpr (!kShared) {
      cp_async_bulk_tensor_2d(address(to), map, full, step * kBlockK, row);
    } else if (rank == 0) {
      cp_async_bulk_tensor_2d_multicast(address(to), map, full, step * kBlockK, row, 0b11);
    }
  }

  // Last blocks copy the rows that exist. A cluster's block that is computed in vain has none, and
  // is filled with zeros.
  FP8GEMM_DEVICE void begin_tails(const Block& block) {
    const int lhs_rows = copied_rows(spec.block_m, params.m), lhs_left = params.m - block.m;
    const int rhs_rows = copied_rows(spec.block_n, params.n), rhs_left = params.n - block.n;
    const bool lhs_ends = block.m > 0 && lhs_left > 0 && lhs_left < lhs_rows;
    const bool rhs_ends = block.n > 0 && rhs_left > 0 && rhs_left < rhs_rows;
    lhs_map = lhs_ends ? &params.lhs_tail : &params.lhs;
    rhs_map = rhs_ends ? &params.rhs_tail : &params.rhs;
    stage_bytes = ((lhs_ends ? lhs_left : lhs_rows) + (rhs_ends ? rhs_left : rhs_rows)) * kBlockK +
                  scale_bytes_of_stage;
  }

  // The scales of a block that begins at row m: from the multiple of four before it on, as many as
  // there are. The second block of a cluster may begin past the last row.
  FP8GEMM_DEVICE void begin_any_row(int m) {
    const int first = min(m, params.m - 1) / 4 * 4;
    const int rows =
        min(spec.block_m + extra_scale_rows(spec.variant), round_up(params.m, 4) - first);
    lhs_scales = params.lhs_scale_data + first;
    lhs_scale_bytes = 4 * rows;
  }

  FP8GEMM_DEVICE void load_any_row_scales(uint32_t to, uint32_t full, int step) {
    const int line = spec.lhs_scale == ScaleTile::k1x128 ? step : 0;
    cp_async_bulk(to, lhs_scales + int64_t{line} * round_up(params.m, 4), lhs_scale_bytes, full);
  }

  // The aligned run of four steps that `step` is in, for each scale block of the columns.
  FP8GEMM_DEVICE void load_block_scales(uint32_t to, uint32_t full, int step) {
    static_assert(scale_blocks(spec.block_n) <= 2);
    const float* from = rhs_scales + (step & ~3);
    cp_async_bulk(to, from, 16, full);
    if constexpr (scale_blocks(spec.block_n) == 2) {
      cp_async_bulk(to + 16, from + next_block, 16, full);
    }
  }
};

}  // namespace fp8gemm
