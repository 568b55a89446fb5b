// The GEMM kernel: out[m, n] = Σ over 128-deep steps of k of (lhs · rhsᵀ) · lhs scale · rhs scale.
//
//   warpgroup 0, 1   consumers: tensor core, promotion, epilogue; every second 64 rows each
//   warpgroup 2      producer: one thread starts the copies
//
// A block of 192 rows has three warpgroups of consumers, with 64 rows each.
// Where rhs is bf16, one more warpgroup makes FP8 of it, and its copies are another warp's
// (rhs_cast.cuh). Where rhs has a scale per column, other warps of the producer's warpgroup look
// for equal ones (inspector.cuh).
//
// Persistent: a CTA takes output blocks until none is left. The producer chooses them, and leaves
// a note of each before its first bytes. The epilogue of a finished sub-tile runs under the next
// sub-tile's tensor-core work, across blocks too.
#pragma once

#include "epilogue.cuh"
#include "inspector.cuh"
#include "params.cuh"
#include "plan.cuh"
#include "producer.cuh"
#include "promotion.cuh"
#include "ptx.cuh"
#include "rhs_cast.cuh"
#include "scheduler.cuh"
#include "shared_memory.cuh"

namespace fp8gemm {

enum NamedBarrier : int {  // 0 is __syncthreads, kCastBarrier the casting warps'
  kReadyBarrier = 1,       // the mbarriers are initialised
  kStoreBarrier,           // + warpgroup: its 128 threads around the use of its output boxes
};

template <GemmSpec spec>
struct GemmTraits {
  static constexpr int kMathWarpgroups = math_warpgroups(spec);
  static constexpr int kMathThreads = math_threads(spec), kMathWarps = math_warps(spec);
  static constexpr int kProducer = kMathWarps, kCastProducer = kProducer + 1;  // warps
  static constexpr int kFirstInspector = kProducer + 1;  // where casts do not need the others
  static constexpr int kFirstCaster = kProducer + kWarpgroupThreads / kWarpThreads;
  static constexpr int kSubTiles = sub_tiles(spec);    // per warpgroup
  static constexpr int kRegisters = spec.block_n / 2;  // of one 64-row accumulator, per thread
  // Of those, what one instruction fills.
  static constexpr int kPartRegisters = instruction_columns(spec) / 2;
  static constexpr int kCtas = spec.multicast == Multicast::kNone ? 1 : 2;
  static constexpr bool kPerColumn = is_per_row(spec.rhs_scale);
  static constexpr bool kInspected = is_inspected(spec);
  static constexpr bool kCasts = is_cast(spec.rhs);
  static constexpr bool kCluster = cluster_size(spec) > 1;
  // Whether a block may end early, where the rows of its group end.
  static constexpr bool kCutShort =
      spec.variant == Variant::kRagged || spec.variant == Variant::kMasked;
  static constexpr int kOutTiles = out_tiles(spec), kOutTileBytes = out_tile_bytes(spec);
  static constexpr bool kStoresTma = store(spec) == Store::kTma;
  using Shared = SharedMemory<spec>;
  using Ring = RingPosition<spec.stages>;
  using RhsLayout = typename Shared::RhsLayout;

  static_assert(spec.kernel == Kernel::kPersistent && !why_illegal(spec),
                "a spec that parse_gemm_call() should have refused: see why_illegal() in plan.cuh");
  static_assert(sizeof(Shared) == shared_bytes(spec),
                "SharedMemory and shared_bytes() disagree: list every member in plan.cuh");
  static_assert(threads(spec) == (kCasts ? kFirstCaster + kCastWarps : kFirstCaster) * kWarpThreads,
                "the warps here and threads() disagree: count every warp in plan.cuh");
  static_assert(has_registers(spec), "register_shares(): give away no more than there are");
  static_assert(!kCasts || kStoreBarrier + kMathWarpgroups <= kCastBarrier,
                "two uses of one named barrier: move kCastBarrier");
};

template <GemmSpec spec>
struct Consumer {
  using Traits = GemmTraits<spec>;
  using Shared = typename Traits::Shared;
  static constexpr int kSubTiles = Traits::kSubTiles;
  static constexpr int kRegisters = Traits::kRegisters;
  static constexpr int kPartRegisters = Traits::kPartRegisters;
  static constexpr int kMathWarpgroups = Traits::kMathWarpgroups;

  const GemmParams& params;
  Shared& shared;
  int warpgroup, warp, lane;
  uint32_t lhs_low, rhs_low;  // descriptors of stage 0
  typename Traits::Ring at{0, 0};
  RingPosition<kNotes> note{0, 0};
  bool landed = false;  // the stage at `at` was seen full
  int border = 0;       // see promote()
  int scale_shift = 0;  // rows of scales before the block's first, see extra_scale_rows()
  OutBlock finished{};  // the block whose results are in `sums`
  int pending = 0;      // its sub-tiles, if the last of them was not stored yet
  bool common = false;  // whether the block at work has common scales, see inspector.cuh
  float sums[kSubTiles][kRegisters];

  FP8GEMM_DEVICE Consumer(const GemmParams& p, Shared& s)
      : params(p),
        shared(s),
        warpgroup(warp_uniform(threadIdx.x / kWarpgroupThreads)),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        lhs_low(warp_uniform(descriptor_low<SwizzledRows>(shared_address(s.lhs) +
                                                          warpgroup * kSubTileRows * kBlockK))),
        rhs_low(warp_uniform(descriptor_low<typename Traits::RhsLayout>(shared_address(s.rhs)))) {}

  // Works through the blocks that the producer announces.
  FP8GEMM_DEVICE void run() {
    while (true) {
      await_stage();
      landed = true;
      const Block block = read_note();
      const int steps = warp_uniform(block.steps);
      if (steps < 0) break;
      if (steps > 0) {
        multiply_sub_tiles(block, taken_steps(steps));
      } else {
        store_zeros<spec>(params, OutBlock::of<spec>(block), threadIdx.x, Traits::kMathThreads);
        release();
      }
    }
    store_pending();
    // Shared memory must outlive the copies out of it.
    if (Traits::kStoresTma && threadIdx.x % kWarpgroupThreads == 0) {
      cp_async_bulk_wait_group_read<0>();
    }
  }

 private:
  // The next block; its first stage is full.
  FP8GEMM_DEVICE Block read_note() {
    const Block block = shared.note[note.stage];
    if constexpr (Traits::kInspected) {
      const int steps = warp_uniform(block.steps);
      if (steps > 0) read_inspection();
    }
    mbarrier_arrive(shared_address(&shared.note_read[note.stage]));
    note.advance();
    return block;
  }

  FP8GEMM_DEVICE void read_inspection() {
    mbarrier_try_wait(shared_address(&shared.inspection.done[note.stage]), note.parity);
    common = true;
#pragma unroll
    for (bool own : shared.inspection.common[note.stage]) common = common & own;
    common = warp_uniform(common);
  }

  // The sub-tiles of this warpgroup that have rows of the block's group; the others cost nothing
  // but their copies.
  FP8GEMM_DEVICE void multiply_sub_tiles(const Block& block, int steps) {
    if constexpr (Traits::kCutShort) {
      const int rows = warp_uniform(block.m_end - block.m) - warpgroup * kSubTileRows;
      if (rows <= 0) return skip(steps);
      if constexpr (kSubTiles == 2) {
        if (rows <= kMathWarpgroups * kSubTileRows) return multiply<1>(block, steps);
      }
    }
    multiply<kSubTiles>(block, steps);
  }

  template <int kActive>
  FP8GEMM_DEVICE void multiply(const Block& block, int steps) {
    if constexpr (Traits::kInspected) {
      if (common) return multiply_steps<kActive, false>(block, steps);
    }
    multiply_steps<kActive, Traits::kPerColumn>(block, steps);
  }

  FP8GEMM_DEVICE void skip(int steps) {
    for (int step = 0; step < steps; ++step) {
      await_stage();
      release();
    }
  }

  // All steps of k of one block. On entry `sums` may still hold the last sub-tile of the block
  // before; on exit it holds this block's last one, and the others have been stored.
  template <int kActive, bool kOwnScales>
  FP8GEMM_DEVICE void multiply_steps(const Block& block, int steps) {
    const OutBlock next = OutBlock::of<spec>(block);
    if constexpr (BlockScales<spec>::kFloating) border = kScaleBlock - next.n % kScaleBlock;
    if constexpr (spec.variant == Variant::kRagged) scale_shift = next.m % 4;
    sub_step<kActive, kOwnScales, 0, true, false>(0);
    finished = next;
    pending = kActive;
    if constexpr (kActive == 2) sub_step<kActive, kOwnScales, 1, true, false>(0);
    // NOTE: one scale per column, or a cast beside, leave no registers for more steps at a time.
#pragma unroll(kOwnScales || Traits::kCasts ? 1 : 4)
    for (int step = 1; step < steps - 1; ++step) {
      sub_step<kActive, kOwnScales, 0, false, false>(step);
      if constexpr (kActive == 2) sub_step<kActive, kOwnScales, 1, false, false>(step);
    }
    sub_step<kActive, kOwnScales, 0, false, false>(steps - 1);
    if constexpr (kActive == 2) sub_step<kActive, kOwnScales, 1, false, true>(steps - 1);
  }

  // One sub-tile of one step. While its tensor-core work runs, a sub-tile that finished before is
  // stored: the last of the previous block (kFirst), or this block's first (kLast).
  // kOwnScales: each column of rhs has its own scale.
  template <int kActive, bool kOwnScales, int kSubTile, bool kFirst, bool kLast>
  FP8GEMM_DEVICE void sub_step(int step) {
    const int stage = at.stage;
    if constexpr (kSubTile == 0) await_stage();
    float partial[kPartRegisters];
    const auto start = [&](int part = 0) {
      using RhsLayout = typename Traits::RhsLayout;
      start_partial<RhsLayout>(partial,
                               lhs_low + stage * (Shared::kLhsBytes / 16) +
                                   kSubTile * (kMathWarpgroups * kSubTileRows * kBlockK / 16),
                               rhs_low + stage * (Shared::kRhsBytes / 16) +
                                   part * (kPartRegisters / 4 * RhsLayout::kStride));
    };
    const uint32_t rhs_slot = shared_address(shared.rhs_scale[stage]);
    const auto lhs_scales = [&] {
      return load_lhs_scales<spec.lhs_scale>(shared_address(shared.lhs_scale[stage]),
                                             row_in_block(kSubTile) + scale_shift);
    };
    if constexpr (kOwnScales) {
      start();
      const Float2 lhs_scale = lhs_scales();
      store_finished<kSubTile, kFirst, kLast>();
      const ColumnScales<kRegisters> rhs_scale(rhs_slot, lane);
      finish_partial(partial);
      promote_per_column<kFirst>(sums[kSubTile], partial, lhs_scale, rhs_scale);
      if constexpr (kSubTile == kActive - 1) release();
    } else {
      const BlockScales<spec> scales(lhs_scales(), rhs_slot, step, border);
      start();
      store_finished<kSubTile, kFirst, kLast>();
      finish_partial(partial);
      if constexpr (kPartRegisters < kRegisters) {  // the other half
        promote<spec, kFirst>(sums[kSubTile], partial, scales, border);
        start(1);
        finish_partial(partial);
      }
      if constexpr (kSubTile == kActive - 1) release();
      promote<spec, kFirst, kRegisters - kPartRegisters>(sums[kSubTile], partial, scales, border);
    }
  }

  template <int kSubTile, bool kFirst, bool kLast>
  FP8GEMM_DEVICE void store_finished() {
    if constexpr (kSubTile == 0 && kFirst) store_pending();
    if constexpr (kSubTile == 1 && kLast) store<0>();
  }

  FP8GEMM_DEVICE void store_pending() {
    if (Traits::kCutShort && kSubTiles == 2 && pending == 1) {
      store<0>();
    } else if (pending) {
      store<kSubTiles - 1>();
    }
    pending = 0;
  }

  FP8GEMM_DEVICE void await_stage() {
    if (!landed) mbarrier_try_wait(shared_address(&shared.full[at.stage]), at.parity);
    if constexpr (Traits::kCasts) {
      mbarrier_try_wait(shared_address(&shared.cast.ready[at.stage]), at.parity);
    }
  }

  // Gives the stage back, and peeks at the next one so that the wait is over before it is needed.
  FP8GEMM_DEVICE void release() {
    const uint32_t empty = shared_address(&shared.empty[at.stage]);
    if constexpr (Traits::kCtas == 1) {
      if (lane == 0) mbarrier_arrive(empty);
    } else {
      if (lane < Traits::kCtas) mbarrier_arrive_remote(empty, lane);
    }
    at.advance();
    landed = mbarrier_test_wait(shared_address(&shared.full[at.stage]), at.parity);
  }

  FP8GEMM_DEVICE int row_in_block(int sub_tile) const {
    return (kMathWarpgroups * sub_tile + warpgroup) * kSubTileRows + warp * 16 + lane / 4;
  }

  template <int kSubTile>
  FP8GEMM_DEVICE void store() {
    if constexpr (spec.variant == Variant::kContiguous) {
      clear_padding(params, sums[kSubTile], finished.m + row_in_block(kSubTile));
    }
    if constexpr (Traits::kStoresTma) {
      store_tma<kSubTile>();
    } else {
      store_direct<spec>(params, sums[kSubTile], finished, row_in_block(kSubTile), 2 * (lane % 4));
    }
  }

  FP8GEMM_DEVICE bool fits_box(int row) const {
    return spec.variant != Variant::kRagged || warp_uniform(row + kSubTileRows <= finished.m_end);
  }

  template <int kSubTile>
  FP8GEMM_DEVICE void store_tma() {
    constexpr int kColumns = store_columns(spec.block_n, spec.out);
    constexpr int kBoxes = spec.block_n / kColumns, kBoxBytes = Traits::kOutTileBytes / kBoxes;
    const int tile = kMathWarpgroups * kSubTile + warpgroup;
    const int slot = Traits::kOutTiles == 1 ? warpgroup : tile;
    const uint32_t boxes = shared_address(&shared.out) + slot * Traits::kOutTileBytes;
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    if (!fits_box(finished.m + tile * kSubTileRows)) {
      store_direct<spec>(params, sums[kSubTile], finished, row_in_block(kSubTile), 2 * (lane % 4));
      return;
    }
    // The boxes are free again once the last store from them has read: the last of all, or with two
    // slots the one before; where sub-tiles may leave by another way, once all have.
    constexpr int kPending = Traits::kCutShort ? 0 : Traits::kOutTiles - 1;
    if (leader) cp_async_bulk_wait_group_read<kPending>();
    bar_sync(kStoreBarrier + warpgroup, kWarpgroupThreads);
    if constexpr (spec.out == Out::kF32) {
      stage_out_f32<kColumns>(boxes, sums[kSubTile], warp, lane);
    } else {
      stage_out<kColumns>(boxes, sums[kSubTile], warp, lane);
    }
    fence_proxy_async();
    bar_sync(kStoreBarrier + warpgroup, kWarpgroupThreads);
    if (leader) {
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        cp_async_bulk_tensor_3d_store(params.out, boxes + i * kBoxBytes, finished.n + i * kColumns,
                                      finished.m + tile * kSubTileRows, finished.group);
      }
      cp_async_bulk_commit_group();
    }
  }
};

// For the producer warp. Whoever may touch a barrier before await_barriers() is the same thread.
template <GemmSpec spec, class Shared>
FP8GEMM_DEVICE void init_barriers(Shared& shared) {
  constexpr int kCtas = GemmTraits<spec>::kCtas;
  constexpr bool kCasts = GemmTraits<spec>::kCasts;
  if (elect_sync()) {
#pragma unroll
    for (int stage = 0; stage < spec.stages; ++stage) {
      mbarrier_init(shared_address(&shared.full[stage]), 1);
      // One arrival per math warp of every CTA that a copy into this stage may come from.
      mbarrier_init(shared_address(&shared.empty[stage]), kCtas * math_warps(spec));
    }
#pragma unroll
    for (int i = 0; i < kNotes; ++i) {
      mbarrier_init(shared_address(&shared.note_read[i]), math_threads(spec));
    }
    if constexpr (kCasts) init_cast_barriers(shared.cast);
    if constexpr (GemmTraits<spec>::kInspected) {
#pragma unroll
      for (uint64_t& done : shared.inspection.done) {
        mbarrier_init(shared_address(&done), kInspectors);
      }
    }
    fence_mbarrier_init();
    fence_proxy_async();
  }
  __syncwarp();
}

// The barriers are ready, and visible to both CTAs of a cluster, when this returns. A producer
// whose copies stay in its own CTA goes on at once.
template <GemmSpec spec>
FP8GEMM_DEVICE void await_barriers(uint32_t warp) {
  constexpr bool kInspected = GemmTraits<spec>::kInspected;
  constexpr int kMathWarps = math_warps(spec), kProducer = GemmTraits<spec>::kProducer;
  constexpr int kThreads = (kMathWarps + 1 + (kInspected ? kInspectors : 0)) * kWarpThreads;
  if constexpr (GemmTraits<spec>::kCluster) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else if (warp == kProducer) {
    bar_arrive(kReadyBarrier, kThreads);
  } else if (warp < kMathWarps || kInspected) {
    bar_sync(kReadyBarrier, kThreads);
  }
}

// One warp: all of it looks for the next block, one thread starts its copies.
template <GemmSpec spec, class Shared>
FP8GEMM_DEVICE void produce(const GemmParams& params, Shared& shared, uint32_t rank) {
  constexpr int kCtas = GemmTraits<spec>::kCtas;
  const bool elected = elect_sync();
  Producer<spec, Shared> producer(params, shared, rank);
  RingPosition<spec.stages> at{0, 1};  // parity 1: the stages begin empty
  RingPosition<kNotes> note{0, 1};
  auto wait = [&] { mbarrier_try_wait(producer.address(&shared.empty[at.stage]), at.parity); };
  auto leave_note = [&](const Block& block) {
    mbarrier_try_wait(producer.address(&shared.note_read[note.stage]), note.parity);
    if (elected) shared.note[note.stage] = block;
    note.advance();
  };
  Scheduler<spec> scheduler(params, blockIdx.x / kCtas, gridDim.x / kCtas, rank);
  for (; !scheduler.done(); scheduler.next()) {
    const Block block = scheduler.block();
    producer.begin(block);
    leave_note(block);
    if (block.steps == 0) {
      wait();
      if (elected) mbarrier_arrive(shared_address(&shared.full[at.stage]));
      at.advance();
    }
    const int steps = block.steps > 0 ? taken_steps(block.steps) : 0;
#pragma unroll 1  // 40 registers hold one step's addresses
    for (int index = 0; index < steps; ++index, at.advance()) {
      wait();
      if (elected) producer.load(block, index, at.stage);
    }
    __syncwarp();
  }
  leave_note({.steps = -1});
  wait();
  if (elected) mbarrier_arrive(shared_address(&shared.full[at.stage]));
}

template <GemmSpec spec>
FP8GEMM_DEVICE void gemm_kernel(const GemmParams& params) {
  using Traits = GemmTraits<spec>;
  using Shared = typename Traits::Shared;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());

  const uint32_t rank = Traits::kCtas > 1 ? warp_uniform(cluster_ctarank()) : 0;
  const uint32_t warp = warp_uniform(threadIdx.x / 32);
  constexpr RegisterShares kOwn = register_shares(spec);
  if (warp == Traits::kProducer) init_barriers<spec>(shared);
  await_barriers<spec>(warp);
  if (Traits::kCasts && warp >= Traits::kFirstCaster) {
    if constexpr (Traits::kCasts) {
      setmaxnreg_dec<kOwn.caster>();
      Caster<spec, Shared>(shared, warp - Traits::kFirstCaster).run();
    }
  } else if (warp >= Traits::kMathWarps) {
    setmaxnreg_dec<kOwn.producer>();
    if (warp == Traits::kProducer) produce<spec>(params, shared, rank);
    if constexpr (Traits::kInspected) {
      if (warp >= Traits::kFirstInspector) {
        Inspector<spec>(params, shared, warp - Traits::kFirstInspector)
            .run({params, int(blockIdx.x / Traits::kCtas), int(gridDim.x / Traits::kCtas), rank});
      }
    }
    if constexpr (Traits::kCasts) {
      if (warp == Traits::kCastProducer) produce_bf16<spec>(params, shared);
    }
  } else {
    setmaxnreg_inc<kOwn.consumer>();
    Consumer<spec>(params, shared).run();
  }
  __syncwarp();
  if constexpr (Traits::kCluster) {  // the other CTA may still arrive at this one's barriers
    cluster_arrive_relaxed();
    cluster_wait();
  }
}

}  // namespace fp8gemm
