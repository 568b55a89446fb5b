// Finds the group that a block belongs to, from group sizes that only the device knows.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// Walks along the groups, 32 at a time: each lane of a warp holds one of them, and sums over the
// lanes before it give where its rows (or steps of k) and its blocks begin.
//
// Sizes are clamped: negative ones to zero, and to what is left of the operand, so that no value
// leads out of bounds.
//
// kRest: whether rows past the groups are one more group.
template <Variant variant, bool kRest = variant == Variant::kRagged>
struct GroupWalk {
  static constexpr bool kAlongK = variant == Variant::kRaggedContracting;

  // The group that was found.
  int group, start, extent, first_block;
  bool past_end;

 private:
  // Group of lane 0.
  int window_ = -32;
  // Of this lane's group.
  int start_ = 0, extent_ = 0, first_block_ = 0, end_block_ = 0;

 public:
  // Moves on to the group of block `index`; indices never go back.
  template <class Params>
  FP8GEMM_DEVICE void find(const Params& params, int index, int n_blocks, int rows_per_block) {
    const int entries = params.groups + (kRest ? 1 : 0);
    while (index >= __shfl_sync(~0u, end_block_, 31)) {
      if (window_ + 32 >= entries) {
        past_end = true;
        return;
      }
      advance(params, n_blocks, rows_per_block);
    }
    const int owner = __ffs(__ballot_sync(~0u, index < end_block_)) - 1;
    past_end = false;
    group = window_ + owner;
    start = __shfl_sync(~0u, start_, owner);
    extent = __shfl_sync(~0u, extent_, owner);
    first_block = __shfl_sync(~0u, first_block_, owner);
  }

 private:
  template <class Params>
  FP8GEMM_DEVICE void advance(const Params& params, int n_blocks, int rows_per_block) {
    const int start = __shfl_sync(~0u, start_ + extent_, 31);
    const int blocks = __shfl_sync(~0u, end_block_, 31);
    window_ += 32;
    const int lane = threadIdx.x % 32, group = window_ + lane;
    const int limit = kAlongK ? ceil_div(params.k, kBlockK) : params.m;
    int size = group < params.groups ? max(params.group_data[group], 0) : 0;
    if (kAlongK) size = ceil_div(min(size, params.k), kBlockK);
    if (kRest && group == params.groups) size = limit;
    size = min(size, limit);
    if constexpr (variant == Variant::kMasked) {  // every group begins at row 0 of its own
      extent_ = size;
    } else {
      const int end = min(start + sum_of_lanes(size, lane, limit), limit);
      const int before = __shfl_up_sync(~0u, end, 1);
      start_ = lane == 0 ? start : before;
      extent_ = end - start_;
    }
    const int rows = kAlongK ? (group < params.groups ? params.m : 0) : extent_;
    const int own = ceil_div(rows, rows_per_block) * n_blocks;
    end_block_ = blocks + sum_of_lanes(own, lane, 0x7fffffff - blocks);
    first_block_ = end_block_ - own;
  }

  // The sum over this lane and all before it, at most `most`.
  FP8GEMM_DEVICE static int sum_of_lanes(int value, int lane, int most) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value = static_cast<int>(min(uint32_t(value) + before, uint32_t(most)));
    }
    return value;
  }
};

}  // namespace fp8gemm
