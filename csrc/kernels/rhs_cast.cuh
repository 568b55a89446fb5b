// Makes FP8 of tiles of rhs that lie in shared memory as bf16: four warps between the copy engine
// and the tensor core. What they write, scale included, is what quantize.cuh would have written.
//
// A thread holds two blocks of eight rows × eight columns of a tile, so that it can write eight
// bytes at once whichever way k runs.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"
#include "quantize_scale.cuh"
#include "quantize_source.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

constexpr int kCastBarrier = 4;  // named, of the casting warps

template <class Ring>
FP8GEMM_DEVICE void init_cast_barriers(Ring& ring) {
#pragma unroll
  for (int slot = 0; slot < kCastSlots; ++slot) {
    mbarrier_init(shared_address(&ring.full[slot]), 1);
    mbarrier_init(shared_address(&ring.empty[slot]), kCastWarps);
  }
  for (uint64_t& barrier : ring.together) mbarrier_init(shared_address(&barrier), 1);
  for (uint64_t& barrier : ring.ready) mbarrier_init(shared_address(&barrier), kCastWarps);
}

// A cluster's two CTAs work on neighbouring blocks, often of the same columns: where they begin
// together, and so go on, the second to ask for a tile finds it in L2.
// NOTE: two barriers, since the other CTA may be at its next block before this one has looked.
template <class Ring>
FP8GEMM_DEVICE void tell_other_cta(Ring& ring, int turn) {
  mbarrier_arrive_remote(shared_address(&ring.together[turn]), cluster_ctarank() ^ 1);
}

// One warp: copies the tiles of rhs that the CTA's blocks need, in the same order as the producer
// of everything else, and as far ahead as there are slots.
template <GemmSpec spec, class Shared>
FP8GEMM_DEVICE void produce_bf16(const GemmParams& params, Shared& shared) {
  const bool elected = elect_sync();
  if (elected) {
    prefetch_tensormap(params.rhs);
    prefetch_tensormap(params.rhs_right);
  }
  RingPosition<kCastSlots> at{0, 1};  // parity 1: the slots begin empty
  const auto fill = [&](Content content, auto start_copy) {
    mbarrier_try_wait(shared_address(&shared.cast.empty[at.stage]), at.parity);
    if (elected) {
      shared.cast.content[at.stage] = content;
      start_copy(shared_address(&shared.cast.full[at.stage]));
    }
    at.advance();
  };
  const auto nothing = [&](auto full) { mbarrier_arrive(full); };
  Scheduler<spec> scheduler(params, blockIdx.x, gridDim.x, 0);
  RingPosition<2> turn{0, 0};
  for (; !scheduler.done(); scheduler.next(), turn.advance()) {
    if (elected) tell_other_cta(shared.cast, turn.stage);
    mbarrier_try_wait(shared_address(&shared.cast.together[turn.stage]), turn.parity);
    const Block block = scheduler.block();
    if (block.steps == 0) fill(Content::kNothing, nothing);
    const int steps = block.steps > 0 ? taken_steps(block.steps) : 0;
#pragma unroll 1
    for (int index = 0; index < steps; ++index) {
      fill(Content::kTile, [&](auto full) {
        const int k = index < block.steps ? index * kBlockK : params.k;  // past the end: zeros
        const int y = spec.rhs == Rhs::kBf16 ? block.n : k;
        int x = spec.rhs == Rhs::kBf16 ? k : block.n;
        const bool right = x >= params.left_columns;
        if (right) x -= params.left_columns;
        mbarrier_arrive_expect_tx(full, sizeof(shared.cast.tile[0]));
        cp_async_bulk_tensor_3d(shared_address(shared.cast.tile[at.stage]),
                                right ? params.rhs_right : params.rhs, full, x, y, block.group);
      });
    }
    __syncwarp();
  }
  if (elected) tell_other_cta(shared.cast, turn.stage);  // which may have one block more
  fill(Content::kEnd, nothing);
}

template <GemmSpec spec, class Shared>
struct Caster {
  static constexpr bool kTransposes = spec.rhs == Rhs::kBf16Transposed;

  Shared& shared;
  int warp;         // 0 ... 3
  int row, column;  // of the thread's first block in a tile as it is stored
  int turn = 0;     // which of the two places for largest magnitudes is next
  PackedTile<Float::kBf16, 8> blocks[2];
  uint32_t largest[4];  // magnitudes of them, two each: four chains, so that none waits for itself

  // NOTE: lanes lie so that eight of them read 128 bytes of a row, and sixteen write to sixteen
  // different groups of banks.
  FP8GEMM_DEVICE Caster(Shared& s, int warp_index) : shared(s), warp(warp_index) {
    const int lane = threadIdx.x % 32;
    row = warp * 32 + (kTransposes ? lane / 8 * 8 : lane / 16 * 8);
    column = kTransposes ? lane % 8 * 8 : lane % 16 * 8;
  }

  // NOTE: what casting takes is its waits, one after the other, in a single warp of each scheduler.
  // So the next tile is read while this one is written, if it is there by then. measure() has no
  // condition, which would keep it apart from what it should run beside. A slot is given back once
  // its largest is known, and so all of it in registers: right after the loads, a copy overtook
  // them.
  FP8GEMM_DEVICE void run() {
    RingPosition<kCastSlots> from{0, 0};
    RingPosition<spec.stages> to{0, 1};  // parity 1: the stages begin empty
    Content content = read_tile(from);
    while (true) {
      const bool tile = content == Content::kTile, last = content == Content::kEnd;
      measure<1>();
      Scale<true> scale{};
      if (tile) share_largest();
      arrive(shared.cast.empty[from.stage]);
      from.advance();
      if (tile) scale = Scale<true>::of(largest_of_tile());
      const bool landed = !last && has_landed(from);
      if (landed) content = content_of(from.stage);
      const bool next = landed && content == Content::kTile;
      mbarrier_try_wait(shared_address(&shared.empty[to.stage]), to.parity);
      if (tile) write<0>(to.stage, scale);
      if (next) load<0>(from.stage);
      if (tile) write<1>(to.stage, scale);
      measure<0>();
      fence_proxy_async();
      arrive(shared.cast.ready[to.stage]);
      to.advance();
      if (next) load<1>(from.stage);
      if (last) break;
      if (!landed) content = read_tile(from);
    }
  }

 private:
  // Of the second block beside the first.
  static constexpr int kNextRow = kTransposes ? 0 : 16, kNextColumn = kTransposes ? 64 : 0;

  // NOTE: read by the lane that arrives for its warp: the sanitizer follows no others.
  FP8GEMM_DEVICE Content content_of(int slot) const {
    int content = 0;
    if (threadIdx.x % 32 == 0) content = static_cast<int>(shared.cast.content[slot]);
    return static_cast<Content>(warp_uniform(content));
  }

  FP8GEMM_DEVICE bool has_landed(RingPosition<kCastSlots> at) const {
    return __all_sync(~0u,
                      mbarrier_test_wait(shared_address(&shared.cast.full[at.stage]), at.parity));
  }

  FP8GEMM_DEVICE Content read_tile(RingPosition<kCastSlots> from) {
    mbarrier_try_wait(shared_address(&shared.cast.full[from.stage]), from.parity);
    const Content content = content_of(from.stage);
    if (content == Content::kTile) load<0>(from.stage), load<1>(from.stage);
    measure<0>();
    return content;
  }

  // Block b of the tile in a slot, 0 or 1.
  template <int b>
  FP8GEMM_DEVICE void load(int slot) {
    const uint16_t* from = &shared.cast.tile[slot][row + b * kNextRow][column + b * kNextColumn];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Words4 v = *reinterpret_cast<const Words4*>(from + kBlockK * i);
      uint32_t (&two)[4] = blocks[b].two[i];
      two[0] = v.x, two[1] = v.y, two[2] = v.z, two[3] = v.w;
    }
  }

  FP8GEMM_DEVICE uint32_t& word(int i) { return blocks[i / 32].two[i / 4 % 8][i % 4]; }

  // Looks at block b; block 0 first.
  template <int b>
  FP8GEMM_DEVICE void measure() {
#pragma unroll
    for (int i = 32 * b; i < 32 * b + 32; ++i) {
      largest[i % 4] = max_magnitude_bf16x2(i < 4 ? 0 : largest[i % 4], word(i));
    }
  }

  FP8GEMM_DEVICE void share_largest() {
    const uint32_t both = max_magnitude_bf16x2(max_magnitude_bf16x2(largest[0], largest[1]),
                                               max_magnitude_bf16x2(largest[2], largest[3]));
    // Magnitudes are ordered as their bits are, NaN last.
    const uint32_t bits = max(both & 0x7fff, both >> 16 & 0x7fff);
    const float result = bits_to_float(redux_max(bits) << 16);
    if (threadIdx.x % 32 == 0) shared.cast.largest[turn][warp] = result;
  }

  FP8GEMM_DEVICE float largest_of_tile() {
    float result = 0;
    const float* of_warps = shared.cast.largest[turn];
    turn ^= 1;
    bar_sync(kCastBarrier, kCastWarps * kWarpThreads);
#pragma unroll
    for (int i = 0; i < kCastWarps; ++i) result = max_nan(result, of_warps[i]);
    return result;
  }

  // NOTE: two at a time. A power of two changes no digit of a bf16, but of those so small that they
  // become zeros in FP8.
  template <int b>
  FP8GEMM_DEVICE void multiply_by(float power_of_two) {
    const uint32_t half = float_to_bits(power_of_two) >> 16;
#pragma unroll
    for (int i = 32 * b; i < 32 * b + 32; ++i) word(i) = mul_bf16x2(word(i), half << 16 | half);
  }

  template <int b>
  FP8GEMM_DEVICE void write(int stage, Scale<true> scale) {
    multiply_by<b>(scale.reciprocal);
    const int first = row + b * kNextRow, second = column + b * kNextColumn;
    const int n = kTransposes ? second : first, k = kTransposes ? first : second;
    uint8_t* to = shared.rhs[stage] + n / 8 * (CoreMatrices::kStride * 16) +
                  k / 16 * (CoreMatrices::kLeading * 16) + k % 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto get = [&](int j) {
        return kTransposes ? blocks[b].get(j, i) : blocks[b].get(i, j);
      };
      *reinterpret_cast<Words2*>(to + 16 * i) = pack8(get, 1.0f);
    }
    if (b == 0 && warp == 0 && threadIdx.x % 32 == 0) {
      *reinterpret_cast<float*>(shared.rhs_scale[stage]) = scale.value;
    }
  }

  FP8GEMM_DEVICE void arrive(uint64_t& barrier) {  // once for each warp
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&barrier));
  }
};

}  // namespace fp8gemm
