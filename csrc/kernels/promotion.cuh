// One step of k: four tensor-core instructions into a partial sum, then partial times scales into
// fp32 registers. The tensor core keeps 13 bits of its sums, so nothing deeper than 128 stays
// there.
//
// Register layout of a 64-row accumulator (PTX ISA, "Register fragments for wgmma.m64nNk32"):
// thread `lane` of warp w holds, for each 8 columns j, the four values
//   [4j], [4j+1]: row 16w + lane/4,     columns 8j + 2(lane%4), +1
//   [4j+2], [4j+3]: row 16w + lane/4 + 8, the same columns
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

// Starts partial[64, block_n] = lhs[64, 128] · rhs[block_n, 128]ᵀ.
template <class RhsLayout, int kRegisters>
FP8GEMM_DEVICE void start_partial(float (&partial)[kRegisters], uint32_t lhs_low,
                                  uint32_t rhs_low) {
  fence_registers(partial);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kBlockK / 32; ++i) {  // 32 of k per instruction
    wgmma_m64k32(partial, descriptor<SwizzledRows>(lhs_low + SwizzledRows::kStep * i),
                 descriptor<RhsLayout>(rhs_low + RhsLayout::kStep * i), i > 0);
  }
  wgmma_commit_group();
  fence_registers(partial);
}

template <int kRegisters>
FP8GEMM_DEVICE void finish_partial(float (&partial)[kRegisters]) {
  wgmma_wait_group<0>();
  fence_registers(partial);
}

// The lhs scales of a thread's two rows.
template <ScaleTile tile>
FP8GEMM_DEVICE Float2 load_lhs_scales(uint32_t slot, int row) {
  if constexpr (is_per_row(tile)) {
    return {ld_shared(slot + 4 * row), ld_shared(slot + 4 * (row + 8))};
  } else {
    static_assert(tile == ScaleTile::kTensor, "lhs scales: one per row, or one per tensor");
    const float scale = ld_shared(slot);
    return {scale, scale};
  }
}

// Scales of a thread's values where rhs has one per 128 columns (or per tensor): lhs scale · rhs
// scale, for each of two rows and each block of columns. Where it has one per column, those of a
// block must be equal, and the first one of them is read.
//
// NOTE: make them before start_partial(). After it the assembler puts loads and products where it
// likes between the tensor core's instructions, and the last of those may wait for them: up to 15 %
// longer.
template <GemmSpec spec>
struct BlockScales {
  static constexpr int kBlocks =
      spec.rhs_scale == ScaleTile::kTensor ? 1 : scale_blocks(spec.block_n);
  // Whether the border between two scale blocks can fall anywhere inside the columns.
  static constexpr bool kFloating = kBlocks > 1 && spec.block_n % kScaleBlock != 0;
  // Columns between which no border can fall: the largest power of two in block_n.
  static constexpr int kRun = spec.block_n & -spec.block_n;

  float value[2 * kBlocks];  // [2i], [2i+1]: upper and lower row, block i

  // slot: of the rhs scales: the aligned run of four steps that `step` is in, or its scale alone,
  // or those of all columns. border: see promote().
  FP8GEMM_DEVICE BlockScales(Float2 lhs, uint32_t slot, int step, int border) {
    constexpr bool kFour = spec.rhs_scale == ScaleTile::k128x128 && !is_cast(spec.rhs);
    const uint32_t first = kFour ? slot + 4 * (step % 4) : slot;
    const int next = is_per_row(spec.rhs_scale) ? 4 * min(border, spec.block_n - 1) : 16;  // bytes
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const float rhs = ld_shared(first + next * i);
      value[2 * i] = lhs.x * rhs;
      value[2 * i + 1] = lhs.y * rhs;
    }
    fence_registers(value);  // here, and no later
  }

  FP8GEMM_DEVICE Float2 of_block(int i) const { return {value[2 * i], value[2 * i + 1]}; }
};

// sums (+)= partial · scale, with rhs scales by blocks of columns.
// border: columns of this block that belong to its first scale block.
// kBefore: registers of `sums` before those of `partial`.
template <GemmSpec spec, bool kFirst, int kBefore = 0, int kSums, int kRegisters>
FP8GEMM_DEVICE void promote(float (&sums)[kSums], const float (&partial)[kRegisters],
                            const BlockScales<spec>& scales, int border) {
  using Scales = BlockScales<spec>;
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const int column = 2 * (kBefore + i);
    float* const sum = sums + kBefore + i;
    Float2 s = scales.of_block(Scales::kBlocks == 1 ? 0 : column / kScaleBlock);
    if constexpr (Scales::kFloating) {
      s = column / Scales::kRun * Scales::kRun < border ? scales.of_block(0) : scales.of_block(1);
    }
    sum[0] = kFirst ? s.x * partial[i + 0] : sum[0] + s.x * partial[i + 0];
    sum[1] = kFirst ? s.x * partial[i + 1] : sum[1] + s.x * partial[i + 1];
    sum[2] = kFirst ? s.y * partial[i + 2] : sum[2] + s.y * partial[i + 2];
    sum[3] = kFirst ? s.y * partial[i + 3] : sum[3] + s.y * partial[i + 3];
  }
}

// rhs scales of single columns, two for each eight columns. There are too many of them to hold: the
// first ones are read while the tensor core works, the others as they are needed.
template <int kRegisters>
struct ColumnScales {
  static constexpr int kAhead = kRegisters / 4 < 3 ? kRegisters / 4 : 3;
  uint32_t first;  // address
  Float2 ahead[kAhead];

  FP8GEMM_DEVICE ColumnScales(uint32_t slot, int lane) : first(slot + 8 * (lane % 4)) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) ahead[j] = ld_shared_v2(first + 32 * j);
  }
  FP8GEMM_DEVICE Float2 get(int j) const {
    return j < kAhead ? ahead[j] : ld_shared_v2(first + 32 * j);
  }
};

// The same with one rhs scale per column.
template <bool kFirst, int kRegisters>
FP8GEMM_DEVICE void promote_per_column(float (&sums)[kRegisters],
                                       const float (&partial)[kRegisters], Float2 lhs,
                                       const ColumnScales<kRegisters>& scales) {
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {
    const Float2 rhs = scales.get(i / 4);
    const float a = lhs.x * rhs.x, b = lhs.x * rhs.y, c = lhs.y * rhs.x, d = lhs.y * rhs.y;
    sums[i + 0] = kFirst ? a * partial[i + 0] : sums[i + 0] + a * partial[i + 0];
    sums[i + 1] = kFirst ? b * partial[i + 1] : sums[i + 1] + b * partial[i + 1];
    sums[i + 2] = kFirst ? c * partial[i + 2] : sums[i + 2] + c * partial[i + 2];
    sums[i + 3] = kFirst ? d * partial[i + 3] : sums[i + 3] + d * partial[i + 3];
  }
}

}  // namespace fp8gemm
