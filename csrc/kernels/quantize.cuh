// Quantising: every CTA reads a tile of 128 rows × 128 columns once, and writes it as it lies, or
// transposed, or both. Where nothing needs 128 rows, a tile has 32 (tile_rows).
//
// 256 threads; 16 of them share a row. A thread holds eight neighbouring columns of eight (or two)
// neighbouring rows, so that it can write eight bytes of either copy at once:
//
//   lane % 16: which eight columns    slot = thread / 16: which rows
//
// Largest magnitudes of rows meet by shuffles, those of columns in shared memory.
#pragma once

#include "group_walk.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"
#include "quantize_scale.cuh"
#include "quantize_source.cuh"
#include "quantize_whole_rows.cuh"
#include "swiglu_backward.cuh"

namespace fp8gemm {

// The rows of one tile.
struct TokenTile {
  int batch;     // matrix
  int first;     // row
  int count;     // rows that exist; the others are zeros, and only in the transposed copy
  int position;  // of the first row in the transposed copy
};

template <QuantizeSpec spec>
FP8GEMM_DEVICE bool find_tile(const QuantizeParams& params, TokenTile& tile) {
  constexpr int kRows = tile_rows(spec);
  const uint32_t tiles = row_tiles(spec, params);
  const uint32_t number = blockIdx.z * params.grid_y + blockIdx.y;
  const int batch = number / tiles, index = number % tiles;
  if (batch >= params.batch) return false;
  if constexpr (!spec.grouped) {
    tile = {batch, index * kRows, min(kRows, params.m - index * kRows), index * kRows};
    return true;
  } else {
    GroupWalk<Variant::kRagged> walk{};
    walk.find(params, index, 1, kRows);
    if (walk.past_end || walk.group == params.groups) return false;
    const int before = (index - walk.first_block) * kRows;
    tile = {batch, walk.start + before, min(kRows, walk.extent - before), index * kRows};
    return true;
  }
}

template <QuantizeSpec spec>
struct QuantizeShared {
  alignas(16) float largest[8][kScaleBlock];   // of a column, in each warp's rows
  Scale<spec.pow2> column[kScaleBlock];        // of the transposed copy
  alignas(128) Words2 tile[kScaleBlock * 16];  // the transposed copy: 128 bytes for each column
};

template <QuantizeSpec spec>
struct Quantizer {
  using Shared = QuantizeShared<spec>;
  using ScaleOf = Scale<spec.pow2>;
  static constexpr bool kBlocks = spec.tile == ScaleTile::k128x128;
  static constexpr int kRows = kThreadRows<spec>;
  static_assert(quantize_threads(spec) * kRows * 8 == tile_rows(spec) * kScaleBlock,
                "the threads of plan.cuh do not cover a tile");

  const QuantizeParams& params;
  Shared& shared;
  TokenTile tokens;
  int first_column;  // of the tile
  int slot, column;  // this thread's rows, and its first column in the tile
  Values<spec> values;

  FP8GEMM_DEVICE Quantizer(const QuantizeParams& p, Shared& s, const TokenTile& t)
      : params(p),
        shared(s),
        tokens(t),
        first_column(blockIdx.x * kScaleBlock),
        slot(threadIdx.x / 16),
        column(threadIdx.x % 16 * 8) {}

  FP8GEMM_DEVICE void run() {
    const SourceRows<spec> rows(params, row(0), tokens.first + tokens.count);
    if constexpr (!takes_many_columns(spec)) {
      quantize(rows);
    } else {
      // Shared memory is used again without another barrier: what a tile writes there was last read
      // before the barrier that precedes the writing.
      for (; first_column < params.k; first_column += gridDim.x * kScaleBlock) quantize(rows);
    }
  }

 private:
  FP8GEMM_DEVICE void quantize(const SourceRows<spec>& rows) {
    values.load(params, tokens.batch, rows, first_column + column);
    if constexpr (kBlocks) {
      const ScaleOf scale = ScaleOf::of(largest_of_tile());
      if (threadIdx.x == 0) store_block_scale(scale.value);
      if constexpr (spec.rows) store_rows(scale);
      if constexpr (spec.transposed) store_transposed([&](int) { return scale; });
    } else {
      if constexpr (spec.transposed) share_largest_of_columns();
      if constexpr (spec.rows) quantize_rows();
      if constexpr (spec.transposed) {
        values.unpack_again(params.pitch %
                            kScaleBlock);  // 0: in this copy tokens come in whole tiles
        __syncthreads();
        if (threadIdx.x < kScaleBlock) make_column_scale(threadIdx.x);
        __syncthreads();
        const ScaleOf* own = shared.column + column;
        store_transposed([&](int j) { return own[j]; });
      }
    }
  }

  FP8GEMM_DEVICE int row(int i) const { return tokens.first + slot * kRows + i; }
  FP8GEMM_DEVICE bool has_row(int i) const { return slot * kRows + i < tokens.count; }

  // ---- Scales ----

  FP8GEMM_DEVICE float largest_of_tile() {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) largest = max_nan(largest, values.largest_of_row(i));
    return largest_of_block(largest);
  }

  FP8GEMM_DEVICE void share_largest_of_columns() {
    float largest[8];
    values.largest_of_columns(largest);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest[j] = max_nan(largest[j], __shfl_xor_sync(~0u, largest[j], 16));
    }
    Float4* to = reinterpret_cast<Float4*>(&shared.largest[threadIdx.x / 32][column]);
    if (threadIdx.x % 32 >= 16) return;
    to[0] = {largest[0], largest[1], largest[2], largest[3]};
    to[1] = {largest[4], largest[5], largest[6], largest[7]};
  }

  FP8GEMM_DEVICE void make_column_scale(int at) {
    float largest = shared.largest[0][at];
#pragma unroll
    for (int warp = 1; warp < 8; ++warp) largest = max_nan(largest, shared.largest[warp][at]);
    ScaleOf scale = ScaleOf::of(largest);
    if constexpr (spec.shared_columns) scale = share_scale(scale, largest);
    shared.column[at] = scale;
    const int steps = params.pitch / kScaleBlock, all = round_up4(params.k);
    const int64_t line = int64_t{tokens.batch} * steps + tokens.position / kScaleBlock;
    if (first_column + at < params.k) {
      params.transposed_scale[line * all + first_column + at] = scale.value;
    }
  }

  FP8GEMM_DEVICE void store_block_scale(float scale) {
    const int row_tile = tokens.first / kScaleBlock, column_tile = blockIdx.x;
    const int row_tiles = ceil_div(params.m, kScaleBlock);
    const int column_tiles = ceil_div(params.k, kScaleBlock);
    if constexpr (spec.rows) {
      const int64_t line = int64_t{tokens.batch} * row_tiles + row_tile;
      params.rows_scale[line * round_up4(column_tiles) + column_tile] = scale;
    }
    if constexpr (spec.transposed) {
      const int64_t line = int64_t{tokens.batch} * column_tiles + column_tile;
      params.transposed_scale[line * round_up4(row_tiles) + row_tile] = scale;
    }
  }

  // ---- The copy as it lies ----

  FP8GEMM_DEVICE void quantize_rows() {
    const int64_t line =
        int64_t{tokens.batch} * ceil_div(params.k, kScaleBlock) + first_column / kScaleBlock;
    const int own = threadIdx.x % 16;  // of kAtOnce rows: which one this lane has the scale of
    float* scales = params.rows_scale + line * round_up4(params.m) + row(own);
    uint8_t* to = first_row();
    constexpr int kAtOnce = kRows < Values<spec>::kRowsAtOnce ? kRows : Values<spec>::kRowsAtOnce;
#pragma unroll
    for (int first = 0; first < kRows; first += kAtOnce) {
      float largest[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) largest[i] = values.largest_of_row(first + i);
      const ScaleOf scale = ScaleOf::of(over_lanes<16>(largest, max_nan));
      if (own < kAtOnce && has_row(first + own)) scales[first] = scale.value;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, to += params.k) {
        store_row(to, first + i, __shfl_sync(~0u, scale.reciprocal, i, 16));
      }
    }
  }

  FP8GEMM_DEVICE void store_rows(ScaleOf scale) {
    uint8_t* to = first_row();
#pragma unroll
    for (int i = 0; i < kRows; ++i, to += params.k) store_row(to, i, scale.reciprocal);
  }

  FP8GEMM_DEVICE uint8_t* first_row() const {
    return params.rows + (int64_t{tokens.batch} * params.m + row(0)) * params.k + first_column +
           column;
  }

  FP8GEMM_DEVICE void store_row(uint8_t* to, int i, float reciprocal) {
    const Words2 bytes = pack8([&](int j) { return values.get(i, j); }, reciprocal);
    if (has_row(i)) store8<spec.aligned>(to, bytes, params.k - first_column - column);
  }

  // ---- The transposed copy ----

  // Bytes go to shared memory so that a warp can write whole lines of 128. Where 16 bytes lie is
  // moved by an exclusive or with the column, and their halves swapped in half of the columns, so
  // that neither side meets itself in a bank.
  template <class ScaleOfColumn>
  FP8GEMM_DEVICE void store_transposed(ScaleOfColumn scale) {
    Words2* to_column = shared.tile + place(column, slot / 2, slot % 2);  // one of eight
#pragma unroll
    for (int j = 0; j < 8; ++j, to_column += 16) {
      *to_column = pack8([&](int i) { return values.get(i, j); }, scale(j).reciprocal);
    }
    __syncthreads();
    const int room = params.pitch - tokens.position;  // columns of the transposed copy, here on
    uint8_t* out =
        params.transposed + int64_t{tokens.batch} * params.k * params.pitch + tokens.position;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = threadIdx.x / 8 + 32 * i, chunk = threadIdx.x % 8;
      const int line = first_column + at;
      if (line >= params.k) continue;
      const Words2 low = shared.tile[place(at, chunk, 0)], high = shared.tile[place(at, chunk, 1)];
      uint8_t* to = out + int64_t{line} * params.pitch + chunk * 16;
      if constexpr (spec.aligned || !kBlocks) {
        if (chunk * 16 < room) *reinterpret_cast<Words4*>(to) = {low.x, low.y, high.x, high.y};
      } else {
        store8<spec.aligned>(to, low, room - chunk * 16);
        store8<spec.aligned>(to + 8, high, room - chunk * 16 - 8);
      }
    }
  }

  FP8GEMM_DEVICE static int place(int column, int chunk, int half) {
    return column * 16 + (chunk ^ (column / 8 % 8)) * 2 + (half ^ (column / 64));
  }
};

template <QuantizeSpec spec>
FP8GEMM_DEVICE void quantize_tile(const QuantizeParams& params) {
  __shared__ QuantizeShared<spec> shared;
  TokenTile tile;
  if (!find_tile<spec>(params, tile)) return;
  Quantizer<spec>(params, shared, tile).run();
}

template <QuantizeSpec spec>
FP8GEMM_DEVICE void quantize_kernel(const QuantizeParams& params) {
  static_assert(!why_illegal(spec),
                "a spec that parse_quantize_spec() should have refused: see plan.cuh");
  if constexpr (spec.source == Source::kSwigluBackward) {
    swiglu_backward<spec>(params);
  } else if constexpr (spec.tile == ScaleTile::k1xK) {
    quantize_whole_row<spec>(params);
  } else {
    quantize_tile<spec>(params);
  }
}

}  // namespace fp8gemm
