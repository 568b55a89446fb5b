// The GEMM kernel for few rows, where bytes and latency count: the same sum as gemm.cuh, cut into
// small blocks so that every SM streams its share of the weights at once.
//
//   warpgroup 0, 1   consumers: whole blocks, taking alternate steps of k
//   warp 8, 9        producers, one for each warpgroup: fill all stages before anything else
//                    happens in the CTA
//
// All CTAs go through k in step, so what several of them need is in L2 when the first one has it:
// begun anywhere, some products took a third longer.
//
// With split_k > 1 a cluster shares one block and divides k. The partial sums of all parts
// (2 warpgroups × split_k CTAs) meet in shared memory (exchange.cuh).
#pragma once

#include "epilogue.cuh"
#include "exchange.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "producer.cuh"
#include "promotion.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

enum FewRowsBarrier : int {
  kBarriersReady = 1,  // the producers have initialised the mbarriers
  kExchangeFree,       // consumers: the exchange of the block before has been read
  kExchangeFull,       // consumers: the exchange of this block has been written
};

template <GemmSpec spec>
struct FewRowsTraits {
  static constexpr int kThreads = threads(spec);
  static constexpr int kSubTiles = sub_tiles(spec);
  static constexpr int kRegisters = spec.block_n / 2;
  using Exchange = fp8gemm::Exchange<spec>;
  using Shared = SharedMemory<spec>;

  static_assert(spec.kernel == Kernel::kFewRows && !why_illegal(spec),
                "a spec that parse_gemm_call() should have refused: see why_illegal() in plan.cuh");
  static_assert(sizeof(Shared) == shared_bytes(spec),
                "SharedMemory and shared_bytes() disagree: list every member in plan.cuh");
  static_assert(math_warpgroups(spec) == kMathWarpgroups &&
                    kThreads == (kMathWarps + kMathWarpgroups) * kWarpThreads,
                "the warps here and threads() disagree: one producer for each math warpgroup");
};

// Every second step of one CTA, over all its blocks: those of one warpgroup and its producer.
template <int kStages>
struct Turns {
  RingPosition<kStages> at;
  int index;  // of the next step in its block

  FP8GEMM_DEVICE void advance() {
    index += 2;
    at.advance(2);
  }
  // Goes on into the next block.
  FP8GEMM_DEVICE void end_block(int steps) { index -= steps; }
};

// The steps of k of one CTA.
struct StepRange {
  int begin, end;

  FP8GEMM_DEVICE StepRange(int steps, int part, int parts)
      : begin(steps * part / parts), end(steps * (part + 1) / parts) {}
  FP8GEMM_DEVICE int count() const { return end - begin; }
};

template <GemmSpec spec>
struct FewRowsConsumer {
  using Traits = FewRowsTraits<spec>;
  using Shared = typename Traits::Shared;
  static constexpr int kSubTiles = Traits::kSubTiles, kRegisters = Traits::kRegisters;

  const GemmParams& params;
  Shared& shared;
  int warpgroup, warp, lane;
  typename Traits::Exchange exchange;
  uint32_t lhs_low, rhs_low;
  Turns<spec.stages> turns;
  int scale_shift = 0;  // rows of scales before the block's first, see extra_scale_rows()
  float sums[kSubTiles][kRegisters];

  FP8GEMM_DEVICE FewRowsConsumer(const GemmParams& p, Shared& s, uint32_t rank)
      : params(p),
        shared(s),
        warpgroup(warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        exchange(shared_address(&s.exchange), rank, warpgroup),
        lhs_low(warp_uniform(descriptor_low<SwizzledRows>(shared_address(s.lhs)))),
        rhs_low(warp_uniform(descriptor_low<SwizzledRows>(shared_address(s.rhs)))),
        turns{{warpgroup, 0}, warpgroup} {}

  FP8GEMM_DEVICE void multiply(const Block& block, const StepRange& range) {
#pragma unroll
    for (int m = 0; m < kSubTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) sums[m][i] = 0;
    }
    const int border = kScaleBlock - block.n % kScaleBlock;
    if constexpr (spec.variant == Variant::kRagged) scale_shift = block.m % 4;
    for (; turns.index < range.count(); turns.advance()) {
      mbarrier_try_wait(shared_address(&shared.full[turns.at.stage]), turns.at.parity);
      one_step<0>(range.begin + turns.index, border);
      if constexpr (kSubTiles == 2) one_step<1>(range.begin + turns.index, border);
    }
    turns.end_block(range.count());
  }

  // Sends each part its columns, receives this part's, stores them.
  FP8GEMM_DEVICE void reduce_and_store(const Block& block) {
    if constexpr (spec.split_k == 1) bar_sync(kExchangeFree, kMathThreads);
    exchange.send(sums);
    if constexpr (spec.split_k == 1) {
      bar_sync(kExchangeFull, kMathThreads);
    } else {
      exchange.await_sums();
    }
    exchange.add_and_store(params, OutBlock::of<spec>(block), warp * 16 + lane / 4, sums);
  }

 private:
  template <int kSubTile>
  FP8GEMM_DEVICE void one_step(int step, int border) {
    constexpr bool kPerColumn = is_per_row(spec.rhs_scale);
    const int stage = turns.at.stage;
    const uint32_t rhs_slot = shared_address(shared.rhs_scale[stage]);
    float partial[kRegisters];
    const auto start = [&] {
      start_partial<SwizzledRows>(
          partial,
          lhs_low + stage * (Shared::kLhsBytes / 16) + kSubTile * (kSubTileRows * kBlockK / 16),
          rhs_low + stage * (Shared::kRhsBytes / 16));
    };
    const auto lhs_scales = [&] {
      return load_lhs_scales<spec.lhs_scale>(
          shared_address(shared.lhs_scale[stage]),
          kSubTile * kSubTileRows + warp * 16 + lane / 4 + scale_shift);
    };
    if constexpr (kPerColumn) {
      start();
      const Float2 lhs_scale = lhs_scales();
      const ColumnScales<kRegisters> rhs_scale(rhs_slot, lane);
      finish_partial(partial);
      promote_per_column<false>(sums[kSubTile], partial, lhs_scale, rhs_scale);
      if constexpr (kSubTile == kSubTiles - 1) release(stage);
    } else {
      const BlockScales<spec> scales(lhs_scales(), rhs_slot, step, border);
      start();
      finish_partial(partial);
      if constexpr (kSubTile == kSubTiles - 1) release(stage);
      promote<spec, false>(sums[kSubTile], partial, scales, border);
    }
  }

  FP8GEMM_DEVICE void release(int stage) {
    if (lane == 0) mbarrier_arrive(shared_address(&shared.empty[stage]));
  }
};

// Initialises the barriers of one warpgroup's stages and fills them: copies land in this CTA alone,
// so they need not wait for the other warps.
template <GemmSpec spec, class Shared>
FP8GEMM_DEVICE void few_rows_producer(const GemmParams& params, Shared& shared, int warpgroup,
                                      Scheduler<spec> scheduler, const StepRange& range) {
  const bool elected = elect_sync();
  if (elected) {
#pragma unroll
    for (int i = 0; i < spec.stages; i += 2) {
      mbarrier_init(shared_address(&shared.full[warpgroup + i]), 1);
      mbarrier_init(shared_address(&shared.empty[warpgroup + i]), 4);  // warps of the warpgroup
    }
    fence_mbarrier_init();
    fence_proxy_async();
  }
  __syncwarp();
  Producer<spec, Shared> producer(params, shared, 0);
  auto tell_ready = [] {
    __syncwarp();  // bar.arrive is for whole warps
    bar_arrive(kBarriersReady, FewRowsTraits<spec>::kThreads);
  };
  int empty_stages = spec.stages / 2;
  Turns<spec.stages> turns{{warpgroup, 1}, warpgroup};
  for (; !scheduler.done(); scheduler.next()) {
    const Block block = scheduler.block();
    if (block.steps == 0) continue;
    producer.begin(block);
#pragma unroll 1  // straight-line code of many steps would not be in the instruction cache
    for (; turns.index < range.count(); turns.advance()) {
      if (--empty_stages < 0) {
        if (empty_stages == -1) tell_ready();
        mbarrier_try_wait(producer.address(&shared.empty[turns.at.stage]), turns.at.parity);
      }
      if (elected) producer.load(block, range.begin + turns.index, turns.at.stage);
    }
    turns.end_block(range.count());
  }
  if (empty_stages >= 0) tell_ready();
}

template <GemmSpec spec>
FP8GEMM_DEVICE void few_rows_kernel(const GemmParams& params) {
  using Traits = FewRowsTraits<spec>;
  using Shared = typename Traits::Shared;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());

  constexpr bool kCluster = cluster_size(spec) > 1;
  const uint32_t rank = kCluster ? warp_uniform(cluster_ctarank()) : 0;
  if constexpr (kCluster) Traits::Exchange::begin(shared_address(&shared.exchange), rank);
  const StepRange range(taken_steps(ceil_div(params.k, kBlockK)), rank, spec.split_k);
  Scheduler<spec> scheduler(params, blockIdx.x / spec.split_k, gridDim.x / spec.split_k, 0);

  const int warp = warp_uniform(threadIdx.x / 32);
  if (warp >= kMathWarps) {
    few_rows_producer<spec>(params, shared, warp % 2, scheduler, range);
    if constexpr (kCluster) Traits::Exchange::await_others();
  } else {
    bar_sync(kBarriersReady, Traits::kThreads);
    FewRowsConsumer<spec> consumer(params, shared, rank);
    // NOTE: a cluster gets exactly one block.
    for (; !scheduler.done(); scheduler.next()) {
      const Block block = scheduler.block();
      if (block.steps == 0) {
        store_zeros<spec>(params, OutBlock::of<spec>(block), threadIdx.x, kMathThreads);
        continue;
      }
      consumer.multiply(block, range);
      if constexpr (kCluster) Traits::Exchange::await_others();
      consumer.reduce_and_store(block);
    }
  }
}

}  // namespace fp8gemm
