// How a finished 64-row sub-tile leaves the registers.
#pragma once

#include "params.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

template <GemmSpec spec>
struct Element;
template <GemmSpec spec>
  requires(spec.out == Out::kF32)
struct Element<spec> {
  using Type = float;
};
template <GemmSpec spec>
  requires(spec.out == Out::kBf16)
struct Element<spec> {
  using Type = uint16_t;  // the bits of a bf16
};

// Where a block's results go.
struct OutBlock {
  int group;  // 0 where the output has none
  int m, m_end, n;

  template <GemmSpec spec>
  FP8GEMM_DEVICE static OutBlock of(const Block& block) {
    return {out_has_groups(spec.variant) ? block.group : 0, block.m, block.m_end, block.n};
  }
};

// One row of the output from some column on. Pairs of columns are written (or added) whole where
// every row of the matrix is aligned to a pair, else one by one.
template <GemmSpec spec>
struct OutputRow {
  using Type = typename Element<spec>::Type;
  Type* data;
  int columns;  // that this row has from here on; 0 where the row does not exist
  bool paired;

  // row, column: counted in the block.
  FP8GEMM_DEVICE OutputRow(const GemmParams& params, const OutBlock& block, int row, int column)
      : data(static_cast<Type*>(params.out_data) +
             (int64_t{block.group} * params.m + block.m + row) * params.n + block.n + column),
        columns(block.m + row < block.m_end ? params.n - block.n - column : 0),
        paired(params.n % 2 == 0) {}

  FP8GEMM_DEVICE void store(int column, float x, float y) const {
    if (column >= columns) return;
    Type* at = data + column;
    if constexpr (spec.out == Out::kBf16) {
      static_assert(!spec.accumulate, "init needs an fp32 output");
      const uint32_t pair = cvt_bf16x2(x, y);
      if (paired) {
        *reinterpret_cast<uint32_t*>(at) = pair;
      } else {
        at[0] = static_cast<uint16_t>(pair);
        if (column + 1 < columns) at[1] = static_cast<uint16_t>(pair >> 16);
      }
    } else if (paired) {
      Float2* both = reinterpret_cast<Float2*>(at);
      *both = spec.accumulate ? Float2{both->x + x, both->y + y} : Float2{x, y};
    } else {
      at[0] = spec.accumulate ? at[0] + x : x;
      if (column + 1 < columns) at[1] = spec.accumulate ? at[1] + y : y;
    }
  }
};

// Straight from registers. row, column: of this thread's first value, counted in the block.
// NOTE: one row after the other: pointers to both would not fit beside the sums.
template <GemmSpec spec, int kRegisters>
FP8GEMM_DEVICE void store_direct(const GemmParams& params, const float (&sums)[kRegisters],
                                 const OutBlock& block, int row, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const OutputRow<spec> out(params, block, row + 8 * half, column);
#pragma unroll
    for (int i = 2 * half; i < kRegisters; i += 4) out.store(2 * (i / 4 * 4), sums[i], sums[i + 1]);
  }
}

// Writes a block of zeros, or adds nothing. thread: of `threads` that share the block.
template <GemmSpec spec>
FP8GEMM_DEVICE void store_zeros(const GemmParams& params, const OutBlock& block, int thread,
                                int threads) {
  if constexpr (spec.accumulate || spec.leave_rest) return;
  const int rows = min(spec.block_m, block.m_end - block.m);
  // NOTE: other variants never come here, and keep the code that they have.
  if constexpr (spec.variant == Variant::kRagged || spec.variant == Variant::kContiguous ||
                spec.variant == Variant::kRaggedContracting) {
    using Type = typename Element<spec>::Type;
    constexpr int kColumns = sizeof(Words4) / sizeof(Type), kWords = spec.block_n / kColumns;
    if (params.n % kColumns == 0) {  // rows are aligned: 16 bytes a thread, a row after the other
      // NOTE: not unrolled, since sums of the block before may still be in registers.
#pragma unroll 1
      for (int i = thread; i < rows * kWords; i += threads) {
        const OutputRow<spec> to(params, block, i / kWords, i % kWords * kColumns);
        if (to.columns > 0) *reinterpret_cast<Words4*>(to.data) = Words4{};
      }
      return;
    }
  }
  for (int row = thread / 32; row < rows; row += threads / 32) {
    for (int column = thread % 32 * 2; column < spec.block_n; column += 64) {
      OutputRow<spec>(params, block, row, column).store(0, 0.0f, 0.0f);
    }
  }
}

// Makes rows without a group zero. row: of this thread's first value.
template <int kRegisters>
FP8GEMM_DEVICE void clear_padding(const GemmParams& params, float (&sums)[kRegisters], int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half;
    const bool padding = at < params.m && params.group_data[at] < 0;
    if (__any_sync(~0u, padding)) {
#pragma unroll
      for (int i = 2 * half; i < kRegisters; i += 4) {
        sums[i] = padding ? 0.0f : sums[i];
        sums[i + 1] = padding ? 0.0f : sums[i + 1];
      }
    }
  }
}

// Packs 64 rows into boxes of kColumns bf16 columns, swizzled as the tensor map wants: the 16-byte
// chunk of a row moves by an exclusive or with the number of its 128-byte line.
template <int kColumns, int kRegisters>
FP8GEMM_DEVICE void stage_out(uint32_t boxes, const float (&sums)[kRegisters], int warp, int lane) {
  constexpr int kRowBytes = 2 * kColumns, kBoxBytes = 64 * kRowBytes, kChunks = kColumns / 8;
  const int row = lane % 16, swizzle = row * kRowBytes / 128 % kChunks;
  const uint32_t first = boxes + (warp * 16 + row) * kRowBytes;
#pragma unroll
  for (int i = 0; i < kRegisters; i += 8) {  // 16 columns
    const int box = 2 * i / kColumns, chunk = 2 * i % kColumns / 8 + lane / 16;
    stmatrix_x4(first + box * kBoxBytes + (chunk ^ swizzle) * 16,
                cvt_bf16x2(sums[i + 0], sums[i + 1]), cvt_bf16x2(sums[i + 2], sums[i + 3]),
                cvt_bf16x2(sums[i + 4], sums[i + 5]), cvt_bf16x2(sums[i + 6], sums[i + 7]));
  }
}

// The same for boxes of fp32 columns.
template <int kColumns, int kRegisters>
FP8GEMM_DEVICE void stage_out_f32(uint32_t boxes, const float (&sums)[kRegisters], int warp,
                                  int lane) {
  constexpr int kRowBytes = 4 * kColumns, kBoxBytes = 64 * kRowBytes, kChunks = kColumns / 4;
  const int row = lane / 4, swizzle = row * kRowBytes / 128 % kChunks;  // eight rows on: the same
  const uint32_t first = boxes + (warp * 16 + row) * kRowBytes + lane % 2 * 8;
#pragma unroll
  for (int i = 0; i < kRegisters; i += 4) {  // 8 columns
    const int box = 2 * i / kColumns, chunk = 2 * i % kColumns / 4 + lane % 4 / 2;
    const uint32_t to = first + box * kBoxBytes + (chunk ^ swizzle) * 16;
    st_shared_v2(to, {sums[i], sums[i + 1]});
    st_shared_v2(to + 8 * kRowBytes, {sums[i + 2], sums[i + 3]});
  }
}

}  // namespace fp8gemm
