// SwiGLU's backward pass: gradients to gate and up and the recomputed product, quantised as rows
// and transposed, in one pass over tiles of 128 rows × 128 columns.
//
// One CTA stays on each multiprocessor and takes every gridDim.x-th tile. While it works on a tile,
// the operands of the next one, and soon of the one after it, are on their way into shared memory.
// All three results of a tile stay in registers until the scales of rows and of columns are known:
//
//   lane % 16: which eight columns    slot = thread / 16: which four rows
//
// Neighbouring column tiles of the same rows follow each other, in neighbouring CTAs.
#pragma once

#include "group_walk.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"
#include "quantize_scale.cuh"
#include "quantize_source.cuh"

namespace fp8gemm {

// The tile of each number, found by one warp, which leaves what it knows about groups in shared
// memory: in registers it would be in everybody's way.
template <QuantizeSpec spec>
struct BackwardTiles {
  using Walk = GroupWalk<Variant::kRagged>;
  alignas(16) uint8_t walks[32 * sizeof(Walk)];  // of each lane

  FP8GEMM_DEVICE Walk& own_walk() { return reinterpret_cast<Walk*>(walks)[threadIdx.x % 32]; }

  FP8GEMM_DEVICE void start() {
    if constexpr (spec.grouped) own_walk() = Walk{};
  }

  // Numbers never go back. Tiles past the last one have no rows.
  FP8GEMM_DEVICE BackwardTile find(const QuantizeParams& params, int number) {
    const int tiles = params.k / kScaleBlock, index = number / tiles,
              columns = number - index * tiles;
    if (index >= row_tiles(spec, params)) return {};
    if constexpr (!spec.grouped) {
      return {columns, index, index * kScaleBlock,
              min(kScaleBlock, params.m - index * kScaleBlock)};
    } else {
      Walk walk = own_walk();
      walk.find(params, index, 1, kScaleBlock);
      own_walk() = walk;
      if (walk.past_end || walk.group == params.groups) return {};
      const int before = (index - walk.first_block) * kScaleBlock;
      return {columns, index, walk.start + before, min(kScaleBlock, walk.extent - before)};
    }
  }
};

// Eight FP8 numbers, not yet scaled, as floats.
FP8GEMM_DEVICE void unpack_fp8(float (&to)[8], Words2 eight) {
#pragma unroll
  for (int j = 0; j < 8; j += 4) {
    const Words2 halves = cvt_f16x4_e4m3x4(j < 4 ? eight.x : eight.y);
    to[j] = cvt_f32_f16(halves.x & 0xffffu), to[j + 1] = cvt_f32_f16(halves.x >> 16);
    to[j + 2] = cvt_f32_f16(halves.y & 0xffffu), to[j + 3] = cvt_f32_f16(halves.y >> 16);
  }
}

template <QuantizeSpec spec>
struct SwigluBackward {
  using ScaleOf = Scale<spec.pow2>;
  enum { kGate, kUp, kActivation };  // gradient to gate, gradient to up, the product

  const QuantizeParams& params;
  BackwardShared& shared;
  int slot, lane;  // this thread's first row / 4 and first column / 8, in the tile
  FloatTile<4> values[3];
  float row_sum[4];      // of this thread's columns
  float row_reciprocal;  // of the scale of row lane % 4, of gate (lane / 4 % 2 = 0) or up

  FP8GEMM_DEVICE SwigluBackward(const QuantizeParams& p, BackwardShared& s)
      : params(p), shared(s), slot(threadIdx.x / 16), lane(threadIdx.x % 16) {}

  FP8GEMM_DEVICE void run() {
    __shared__ BackwardTiles<spec> tiles;
    if (is_finder()) tiles.start();
    if (threadIdx.x == 0) {
      for (uint64_t& barrier : shared.barrier) {
        mbarrier_init(shared_address(&barrier), kBackwardThreads / kWarpThreads);
      }
    }
#pragma unroll 1  // the less code, the sooner it is there
    for (unsigned n = 0; n < 2; ++n) {
      if (is_finder()) find(tiles, n);
      __syncthreads();
      start_copies(n);
    }
    unsigned n = 0;
    for (; shared.tile[n % 4].count > 0; ++n) {
      cp_async_wait_group<1>();
      __syncwarp();
      compute(n);
      finish_rows(n);
      __syncwarp();
      share_largest_of_columns(operands(n));
      arrive(kLargest);
      store_rows(n, kGate);
      wait(kLargest, n);
      if (threadIdx.x < 3 * kScaleBlock) {
        make_column_scale(n, threadIdx.x / kScaleBlock, threadIdx.x % kScaleBlock);
      }
      if (is_finder()) find(tiles, n + 2);  // it has no columns to scale
      arrive(kScales);
      store_rows(n, kUp);
      wait(kScales, n);
      start_copies(n + 2);  // to where this tile's operands, and then the largest of columns, were
      turn();
      arrive(kTurned);
    }
    if (n == 0) return;
    wait(kTurned, n - 1);
    for (int which = 0; which < 3; ++which) store_lines(first_line(n - 1), which);
  }

 private:
  // ---- Barriers, one phase for each tile ----
  //
  // A warp says that it has come as far, and between that and waiting for the others does what
  // needs none of them.

  // What lies in shared memory: columns' largest; their scales, with these the tile after the next
  // one; and their copies.
  enum { kLargest, kScales, kTurned };

  FP8GEMM_DEVICE void arrive(int which) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared.barrier[which]));
  }

  FP8GEMM_DEVICE void wait(int which, unsigned n) const {
    mbarrier_try_wait(shared_address(&shared.barrier[which]), n % 2);
  }

  FP8GEMM_DEVICE static bool is_finder() { return threadIdx.x >= kBackwardThreads - 32; }

  FP8GEMM_DEVICE void find(BackwardTiles<spec>& tiles, unsigned n) {
    shared.tile[n % 4] = tiles.find(params, blockIdx.x + n * gridDim.x);
  }

  // ---- Operands: every warp copies its own ----

  FP8GEMM_DEVICE BackwardOperands& operands(unsigned n) const {
    return shared.operands[n % 2][threadIdx.x / 32];
  }

  // Starts copying the operands of the n-th tile; rows that it does not have become zeros.
  FP8GEMM_DEVICE void start_copies(unsigned n) const {
    const BackwardTile tile = shared.tile[n % 4];
    if (tile.count > 0) copy(tile, operands(n).rows);
    cp_async_commit_group();
  }

  // NOTE: of rows that do not exist nothing is read, whatever the address.
  FP8GEMM_DEVICE void copy(const BackwardTile& tile, BackwardOperands::Rows& to) const {
    const int warp_lane = threadIdx.x % 32, first = threadIdx.x / 32 * 8;  // row
    const int64_t k = params.k;
    const int row = warp_lane / 8, byte = warp_lane % 8 * 16;
    const uint8_t* x = static_cast<const uint8_t*>(params.x) + (tile.first + first + row) * 2 * k +
                       (tile.columns * kScaleBlock + byte);
#pragma unroll
    for (int i = 0; i < 8; i += 4, x += 4 * 2 * k) {
      const bool exists = first + row + i < tile.count;
      cp_async(shared_address(&to.gate[row + i][byte]), x, exists);
      cp_async(shared_address(&to.up[row + i][byte]), x + k, exists);
    }
    const int half = warp_lane / 16;
    const uint16_t* gradient =
        params.gradient + (tile.first + first + half) * k + (tile.columns * kScaleBlock + lane * 8);
#pragma unroll
    for (int i = 0; i < 8; i += 2, gradient += 2 * k) {
      const bool exists = first + half + i < tile.count;
      cp_async(shared_address(&to.gradient[half + i][lane * 8]), gradient, exists);
    }
    if (warp_lane < 24) copy_row_factor(tile, to, warp_lane / 8, warp_lane % 8);
  }

  FP8GEMM_DEVICE void copy_row_factor(const BackwardTile& tile, BackwardOperands::Rows& to,
                                      int which, int at) const {
    const int row = threadIdx.x / 32 * 8 + at;
    const float* from = which < 2 ? params.x_scale + scale_line(tile, which) : params.row_weight;
    cp_async_4(shared_address(&to.row_factor[which][at]), from + (tile.first + row),
               row < tile.count);
  }

  // Where the tile's line of gate (0) or up (1) begins in scales of rows [2k/128, m↑4].
  FP8GEMM_DEVICE int64_t scale_line(const BackwardTile& tile, int side) const {
    const uint32_t line = tile.columns + side * (params.k / kScaleBlock), rows = params.m;
    return uint64_t{line} * ((rows + 3) / 4 * 4);
  }

  // ---- Values ----

  // With s = sigmoid(gate):
  //   gradient to gate  dy · row weight · up · (s + gate · s · (1 − s))
  //   gradient to up    dy · row weight · gate · s
  //   the product       row weight · gate · s · up
  // and for each row dy · gate · s · up, summed over the tile's columns.
  //
  // NOTE: between the rows the last tile's transposed copies are written. Elsewhere warps would
  // wait for each other's stores; here they have enough to do. All operands are read before, since
  // no read moves up past the wait.
  FP8GEMM_DEVICE void compute(unsigned n) {
    const auto& from = operands(n).rows;
    const int64_t line = n > 0 ? first_line(n - 1) : 0;
    const int row = slot % 2 * 4;
    float gate_scale[4], up_scale[4], weight[4];
    load4(gate_scale, &from.row_factor[0][row]);
    load4(up_scale, &from.row_factor[1][row]);
    load4(weight, &from.row_factor[2][row]);
    Words2 gate[4], up[4];
    Words4 gradient[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      gate[i] = *reinterpret_cast<const Words2*>(&from.gate[row + i][lane * 8]);
      up[i] = *reinterpret_cast<const Words2*>(&from.up[row + i][lane * 8]);
      gradient[i] = *reinterpret_cast<const Words4*>(&from.gradient[row + i][lane * 8]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      compute_row(i, gate[i], up[i], gradient[i], gate_scale[i], up_scale[i], weight[i]);
      if (i == 0 && n > 0) wait(kTurned, n - 1);
      if (i < 3 && n > 0) store_lines(line, i);
    }
  }

  FP8GEMM_DEVICE void compute_row(int i, Words2 gates, Words2 ups, Words4 dy, float gate_scale,
                                  float up_scale, float weight) {
    float gate[8], up[8];
    unpack_fp8(gate, gates);
    unpack_fp8(up, ups);
    const uint32_t two[4] = {dy.x, dy.y, dy.z, dy.w};
    const float weighted_scale = up_scale * weight;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = unpack<Float::kBf16>(two[j / 2], j % 2);
      const float g = gate[j] * gate_scale, s = sigmoid_of_power(g * -kLog2E);
      const float silu = g * s, d_silu = d * silu, weighted_up = up[j] * weighted_scale;
      const float d_s = d * s * weighted_up;
      values[kGate].one[i][j] = fma_rn(d_s, g - silu, d_s);
      values[kUp].one[i][j] = d_silu * weight;
      values[kActivation].one[i][j] = silu * weighted_up;
      sum = fma_rn(d_silu, up[j], sum);
    }
    row_sum[i] = sum * up_scale;
  }

  FP8GEMM_DEVICE static void load4(float (&to)[4], const float* from) {
    const Float4 v = *reinterpret_cast<const Float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }

  // ---- Rows ----

  // Scales of rows, and the part of the gradient to row weights that these 128 columns give.
  FP8GEMM_DEVICE void finish_rows(unsigned n) {
    const BackwardTile tile = shared.tile[n % 4];
    const int row = tile.first + slot * 4 + lane % 4;
    const bool exists = slot * 4 + lane % 4 < tile.count;
    const float sum = over_lanes<16>(row_sum, [](float a, float b) { return a + b; });
    if (exists && lane < 4) {
      params.row_weight_gradient[int64_t{tile.columns} * params.m + row] = sum;
    }
    float largest[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) largest[i] = values[i / 4].largest_of_row(i % 4);
    const ScaleOf scale = ScaleOf::of(over_lanes<16>(largest, max_nan));
    row_reciprocal = scale.reciprocal;
    if (exists && lane < 8) {
      params.rows_scale[scale_line(tile, lane / 4) + row] = scale.value;
    }
  }

  // side: kGate or kUp.
  FP8GEMM_DEVICE void store_rows(unsigned n, int side) const {
    const BackwardTile tile = shared.tile[n % 4];
    const int64_t pitch = 2 * int64_t{params.k};
    uint8_t* to = params.rows + (tile.first + slot * 4) * pitch +
                  (side * params.k + tile.columns * kScaleBlock + lane * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i, to += pitch) {
      const float reciprocal = __shfl_sync(~0u, row_reciprocal, side * 4 + i, 16);
      const Words2 bytes = pack8([&](int j) { return values[side].get(i, j); }, reciprocal);
      if (slot * 4 + i < tile.count) *reinterpret_cast<Words2*>(to) = bytes;
    }
  }

  // ---- Columns ----

  // Columns' numbers in shared memory lie so that four of every thread's eight come first: sixteen
  // lanes then read and write runs of 16 bytes without a gap.
  FP8GEMM_DEVICE void share_largest_of_columns(BackwardOperands& to) const {
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      float largest[8];
      values[which].largest_of_columns(largest);
      Float4* run = reinterpret_cast<Float4*>(to.largest[slot % 2][which]) + lane;
      run[0] = {largest[0], largest[1], largest[2], largest[3]};
      run[16] = {largest[4], largest[5], largest[6], largest[7]};
    }
  }

  // `at`: where the column lies. Four lanes look at four columns, at a quarter of the rows each: a
  // quarter of the reads, while all other warps wait.
  FP8GEMM_DEVICE void make_column_scale(unsigned n, int which, int at) {
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const BackwardOperands& from = shared.operands[n % 2][i / 2 * 4 + at % 4];
      float four[4];
      load4(four, &from.largest[i % 2][which][at / 4 * 4]);
#pragma unroll
      for (int j = 0; j < 4; ++j) largest[j] = max_nan(largest[j], four[j]);
    }
    const float own = over_lanes<4>(largest, max_nan);
    ScaleOf scale = ScaleOf::of(own);
    if constexpr (spec.shared_columns) {
      if (which != kActivation) scale = share_scale(scale, own, which);
    }
    shared.reciprocal[which][at] = scale.reciprocal;
    const BackwardTile tile = shared.tile[n % 4];
    const int column = at % 64 / 4 * 8 + at / 64 * 4 + at % 4;
    float* to = which == kGate ? params.transposed_scale
                : which == kUp ? params.up_transposed_scale
                               : params.activation_scale;
    to[int64_t{tile.tokens} * params.k + (tile.columns * kScaleBlock + column)] = scale.value;
  }

  // Writes the transposed tiles to shared memory. A word, four rows of a column, is moved by an
  // exclusive or with the column, so that lanes do not meet in a bank.
  FP8GEMM_DEVICE void turn() {
#pragma unroll
    for (int which = 0; which < 3; ++which) {
      float reciprocal[8];
      const float* own = shared.reciprocal[which] + 4 * lane;
      load4(reinterpret_cast<float (&)[4]>(reciprocal[0]), own);
      load4(reinterpret_cast<float (&)[4]>(reciprocal[4]), own + 64);
      uint32_t* to = shared.transposed[which][lane * 8] + (slot ^ (2 * lane));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        auto scaled = [&](int i) { return values[which].get(i, j) * reciprocal[j]; };
        to[32 * j] = cvt_e4m3x4(scaled(0), scaled(1), scaled(2), scaled(3));
      }
    }
  }

  // Eight threads write a line of 128 bytes. Those beside them take a line whose bytes lie in the
  // other half of the banks: eight columns away.
  FP8GEMM_DEVICE static int first_column() {
    const int line = threadIdx.x / 8;
    return line / 16 * 16 + line % 2 * 8 + line / 2 % 8;
  }

  // Where this thread's first line of the n-th tile begins in the transposed copies.
  FP8GEMM_DEVICE int64_t first_line(unsigned n) const {
    const BackwardTile tile = shared.tile[n % 4];
    return (tile.columns * kScaleBlock + first_column()) * int64_t{params.pitch} +
           tile.tokens * kScaleBlock;
  }

  FP8GEMM_DEVICE void store_lines(int64_t line, int which) const {
    const int chunk = threadIdx.x % 8;
    uint8_t* to = which == kGate ? params.transposed
                  : which == kUp ? params.up_transposed
                                 : params.activation;
    to += line + chunk * 16;
#pragma unroll
    for (int i = 0; i < kScaleBlock; i += 64, to += 64 * int64_t{params.pitch}) {
      const int column = first_column() + i, moved = 2 * (column / 8);
      const uint32_t* from = shared.transposed[which][column];
      const Words2 low = *reinterpret_cast<const Words2*>(from + ((chunk * 4) ^ moved));
      const Words2 high = *reinterpret_cast<const Words2*>(from + ((chunk * 4 + 2) ^ moved));
      *reinterpret_cast<Words4*>(to) = {low.x, low.y, high.x, high.y};
    }
  }
};

template <QuantizeSpec spec>
FP8GEMM_DEVICE void swiglu_backward(const QuantizeParams& params) {
  static_assert(sizeof(BackwardShared) == shared_bytes(spec));
  static_assert(quantize_threads(spec) * 4 * 8 == tile_rows(spec) * kScaleBlock,
                "the threads of plan.cuh do not cover a tile");
  SwigluBackward<spec>(params, *reinterpret_cast<BackwardShared*>(dynamic_shared())).run();
}

}  // namespace fp8gemm
