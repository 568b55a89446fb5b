// Where rhs has a scale for each column: which output blocks have common ones.
//
// A scale of its own for each column costs a product for each value of the accumulator. Casts of
// gradients therefore give 128 columns one scale where they can (QuantizeSpec::shared_columns), but
// nothing in the operands says so. The three warps beside the producer look: they read the scales
// of a block's columns along all of k, some blocks ahead of the consumers, and compare. Where those
// of each 128 columns are equal at every step, the consumers take the loop of a 128x128 rhs.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// One warp of them: it looks at every kInspectors-th step.
template <GemmSpec spec>
struct Inspector {
  static constexpr int kRun = 4 * kWarpThreads;  // columns, four for each lane
  static constexpr int kRuns = ceil_div(spec.block_n, kRun);
  static constexpr int kAtOnce = 4 / kRuns;  // steps whose scales are on their way together

  const GemmParams& params;
  SharedMemory<spec>& shared;
  int number, lane;
  int own[kRuns];   // this lane's columns of the block
  int like[kRuns];  // the first one of their scale block
  RingPosition<kNotes> note{0, 1};

  FP8GEMM_DEVICE Inspector(const GemmParams& p, SharedMemory<spec>& s, int own_number)
      : params(p), shared(s), number(own_number), lane(threadIdx.x % 32) {}

  FP8GEMM_DEVICE void run(Scheduler<spec> scheduler) {
    for (; !scheduler.done(); scheduler.next()) {
      const Block block = scheduler.block();
      // A block that is computed in vain, or of zeros, perhaps of no group, has no scales.
      const bool common = block.steps == 0 || block.n >= params.n || are_common(block);
      mbarrier_try_wait(shared_address(&shared.note_read[note.stage]), note.parity);
      if (lane == 0) {
        shared.inspection.common[note.stage][number] = common;
        mbarrier_arrive(shared_address(&shared.inspection.done[note.stage]));
      }
      note.advance();
    }
  }

 private:
  FP8GEMM_DEVICE bool are_common(const Block& block) {
    place_columns(block.n);
    const bool along_k = spec.rhs_scale == ScaleTile::k1x128;  // else one line for all of k
    const int64_t pitch = round_up4(params.n);
    const int group = rhs_has_groups(spec.variant) ? block.group : 0;
    const int lines = along_k ? ceil_div(params.k, kBlockK) : 1;
    const int first = along_k ? block.first_step : 0;
    const int end = along_k ? block.first_step + block.steps : 1;
    const float* scales = params.rhs_scale_data + int64_t{group} * lines * pitch + block.n;
    for (int line = first + number; line < end; line += kInspectors * kAtOnce) {
      if (!all_lanes(are_equal(scales, pitch, line, end - 1))) return false;
    }
    return true;
  }

  // Lanes whose columns rhs does not have look at the first ones.
  FP8GEMM_DEVICE void place_columns(int n) {
    const int columns = min(spec.block_n, params.n - n), border = kScaleBlock - n % kScaleBlock;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int column = kRun * run + 4 * lane;
      own[run] = column < columns ? column : 0;
      like[run] = own[run] >= border ? border : 0;
    }
  }

  // Whether at some lines, up to `last`, this lane's columns have the scale of `like`. All are read
  // before one is compared.
  FP8GEMM_DEVICE bool are_equal(const float* scales, int64_t pitch, int line, int last) const {
    Float4 four[kAtOnce][kRuns];
    float want[kAtOnce][kRuns];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* from = scales + min(line + i * kInspectors, last) * pitch;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        four[i][run] = *reinterpret_cast<const Float4*>(from + own[run]);
        want[i][run] = from[like[run]];
      }
    }
    bool equal = true;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const Float4 v = four[i][run];
        const float w = want[i][run];
        equal = equal & v.x == w & v.y == w & v.z == w & v.w == w;
      }
    }
    return equal;
  }
};

}  // namespace fp8gemm
