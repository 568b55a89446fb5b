// How a finished 64-row sub-tile leaves the registers.
#pragma once

#include "params.cuh"
#include "ptx.cuh"
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

// One row of the output from some column on. Pairs of columns are written (or added) whole where
// every row of the matrix is aligned to a pair, else one by one.
template <GemmSpec spec>
struct OutputRow {
  using Type = typename Element<spec>::Type;
  Type* data;
  int columns;  // that this row has from here on; 0 where the row does not exist
  bool paired;

  FP8GEMM_DEVICE OutputRow(const GemmParams& params, int group, int row, int column)
      : data(static_cast<Type*>(params.out_data) +
             (int64_t{group} * params.m + row) * params.n + column),
        columns(row < params.m ? params.n - column : 0),
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

// Straight from registers. row, column: of this thread's first value, counted in the group.
// NOTE: one row after the other: pointers to both would not fit beside the sums.
template <GemmSpec spec, int kRegisters>
FP8GEMM_DEVICE void store_direct(const GemmParams& params, const float (&sums)[kRegisters],
                                 int group, int row, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const OutputRow<spec> out(params, group, row + 8 * half, column);
#pragma unroll
    for (int i = 2 * half; i < kRegisters; i += 4) out.store(2 * (i / 4 * 4), sums[i], sums[i + 1]);
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

}  // namespace fp8gemm
