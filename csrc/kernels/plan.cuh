// The plan of every kernel: its threads and registers, what lies in its shared memory, how results
// leave, and which specs there can be. Kernels assert that they agree, the host launches by it, and
// Python asks for it through bindings.cpp. No number of it stands anywhere else.
//
// Everything here is constexpr and plain C++, since the host reads it too.
#pragma once

#include "params.cuh"

namespace fp8gemm {

// Any two integer types; the result has the wider one.
template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
constexpr auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

// Rows, columns or steps along k that share a scale: the side of a 128x128 block, the length of a
// 1x128 run. A tile of a cast has as many columns, and a casting GEMM's blocks too.
constexpr int kScaleBlock = 128;
constexpr int kBlockK = kScaleBlock;  // k per stage: one scale block, and one promotion to fp32
constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;  // four warps, which give the tensor core one instruction
constexpr int kSubTileRows = 64;        // of lhs, in one of its instructions

// Rows of all matrices of an array, and columns: kernels count them in ints, and a block that
// begins at the last one ends past it.
constexpr int kMostCount = 0x7fffffff - 2047;

// Of one CTA on compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications").
constexpr int kMostSharedBytes = 232448;  // 227 KiB
constexpr int kRegisterFile = 65536;

// ---- GEMM: threads and registers ----------------------------------------------------------------

constexpr int kCastWarps = 4;   // that make FP8 of rhs, a quarter of a tile each
constexpr int kInspectors = 3;  // warps that look for common scales, beside the producer

// Warpgroups that multiply. Two of them cannot share the three sub-tiles of 192 rows evenly.
constexpr int math_warpgroups(const GemmSpec& spec) { return spec.block_m == 192 ? 3 : 2; }
constexpr int math_threads(const GemmSpec& spec) {
  return math_warpgroups(spec) * kWarpgroupThreads;
}
constexpr int math_warps(const GemmSpec& spec) { return math_threads(spec) / kWarpThreads; }

constexpr int threads(const GemmSpec& spec) {
  // Each math warpgroup of the few-rows kernel has a warp that produces for it.
  const int producers = math_warpgroups(spec) * kWarpThreads;
  if (spec.kernel == Kernel::kFewRows) return math_threads(spec) + producers;
  const int casters = is_cast(spec.rhs) ? kCastWarps * kWarpThreads : 0;
  return math_threads(spec) + kWarpgroupThreads + casters;
}

// CTAs of a cluster: those that divide k, or two that share a tile. Two CTAs whose rhs is cast keep
// in step, so that one of them finds in L2 what the other has read.
constexpr int cluster_size(const GemmSpec& spec) {
  if (spec.kernel == Kernel::kFewRows) return spec.split_k;
  return spec.multicast != Multicast::kNone || is_cast(spec.rhs) ? 2 : 1;
}

// Sub-tiles of a block that one warpgroup sums. In the few-rows kernel each sums all of them, over
// every second step of k.
constexpr int sub_tiles(const GemmSpec& spec) {
  const int all = spec.block_m / kSubTileRows;
  return spec.kernel == Kernel::kFewRows ? all : all / math_warpgroups(spec);
}

// fp32 registers of a math thread: the sums of its sub-tiles, and one partial sum.
constexpr int registers(const GemmSpec& spec) { return (sub_tiles(spec) + 1) * (spec.block_n / 2); }

// With more the compiler spills: found by compiling.
constexpr int most_registers(const GemmSpec& spec) {
  if (spec.kernel == Kernel::kFewRows) return 152;
  return math_warpgroups(spec) == 3 ? 128 : 192;
}

// What setmaxnreg gives to each thread of a warpgroup, of the persistent kernel. All begin with an
// equal share of the register file, in units of eight, and hand registers over.
struct RegisterShares {
  int consumer, producer, caster;
};
constexpr RegisterShares register_shares(const GemmSpec& spec) {
  if (math_warpgroups(spec) == 3) return {160, 32, 0};
  return is_cast(spec.rhs) ? RegisterShares{192, 32, 96} : RegisterShares{232, 40, 0};
}
// Whether there are as many; setmaxnreg would wait forever for more.
constexpr bool has_registers(const GemmSpec& spec) {
  const RegisterShares own = register_shares(spec);
  const int warpgroups = threads(spec) / kWarpgroupThreads;
  const int all = kRegisterFile / threads(spec) / 8 * 8 * warpgroups;
  return math_warpgroups(spec) * own.consumer + own.producer + own.caster <= all;
}

// Columns of one tensor-core instruction. Where rhs is cast, half a block: half of the registers of
// a partial sum are the casting warps'.
constexpr int instruction_columns(const GemmSpec& spec) {
  return is_cast(spec.rhs) ? spec.block_n / 2 : spec.block_n;
}

// ---- GEMM: tiles --------------------------------------------------------------------------------

// How results leave. fp32 goes straight from registers in two more cases: groups of any rows leave
// both ways, for which there are not enough registers, and wide blocks would pay with stages.
constexpr Store store(const GemmSpec& spec) {
  if (spec.kernel == Kernel::kFewRows || spec.accumulate) return Store::kDirect;
  const bool f32 = spec.out == Out::kF32;
  if (f32 && (spec.variant == Variant::kRagged || spec.block_n > 128)) return Store::kDirect;
  return spec.aligned ? Store::kTma : Store::kDirect;
}

// Rows of a tile that are copied: whole groups of eight, the unit of the 128-byte swizzle, and no
// more than the operand has. The rest of a tile then holds anything, in rows nobody stores.
// NOTE: rows past the end would be filled with zeros, at a cost: one row of lhs took 40 % longer
// than 64.
constexpr int copied_rows(int block_rows, int rows) {
  return rows < block_rows ? round_up(rows, 8) : block_rows;
}

// Whether last blocks with fewer rows than the others are copied by tensor maps of their own, for
// the same reason: 192 rows in blocks of 128 take 20.8 µs so, and took 25.7. Where groups follow
// each other in one operand there are none: what lies past a block is the next group.
constexpr bool has_tails(const GemmSpec& spec) { return spec.variant == Variant::kDense; }

// Columns of a box of results on its way out: as many as the swizzle takes, which is 128 bytes, and
// the block divides by.
constexpr int store_columns(int block_n, Out out) {
  const int divisor = block_n & -block_n, most = out == Out::kF32 ? 32 : 64;
  return divisor < most ? divisor : most;
}

// Scale blocks that a tile of `rows` rows can touch: it begins at a multiple of `rows`.
constexpr int scale_blocks(int rows) {
  const int power = rows & -rows;
  const int common = power < kScaleBlock ? power : kScaleBlock;  // their largest divisor
  return ceil_div(kScaleBlock - common + rows, kScaleBlock);
}

// Bytes of scales that one stage receives for a tile of `rows` rows.
constexpr int scale_bytes(ScaleTile tile, int rows) {
  if (is_per_row(tile)) return 4 * rows;
  // A copy has at least 16 bytes: an aligned run of four steps of k.
  return tile == ScaleTile::k128x128 ? 16 * scale_blocks(rows) : 16;
}

// Rows of lhs scales that are copied for a tile beyond its own. A copy begins at a multiple of 16
// bytes, so where a block may begin at any row, up to three rows before it come along.
// NOTE: a tensor map takes no other inner coordinates either: an "illegal instruction" at run time.
constexpr int extra_scale_rows(Variant variant) { return variant == Variant::kRagged ? 4 : 0; }

// ---- GEMM: shared memory ------------------------------------------------------------------------

constexpr int kTileAlignment = 1024;  // of operand tiles: the 128-byte swizzle repeats as often
constexpr int kArrayAlignment = 128;  // of everything else that is copied
constexpr int kBarrierBytes = sizeof(uint64_t);
constexpr int kNotes = 4;  // of blocks; eight stages hold no more, at two steps each
constexpr int kCastSlots = 2;

// One output block, and the part of k that is summed for it.
struct alignas(16) Block {
  int group;       // of the operands that have groups
  int m;           // first row
  int m_end;       // rows from here on belong to somebody else
  int n;           // first column
  int first_step;  // of k, in steps of 128
  int steps;       // 0: an output of zeros; negative: there is no block
  int unused[2];
};

// What a slot of CastRing holds. kNothing: of a block without steps of k.
enum class Content : int { kTile, kNothing, kEnd };

// Layouts of a tile with k contiguous, in units of 16 bytes, as the tensor core is told of them.
// kLeading: to the next 16 bytes of k; kStride: to the next eight rows; kMode: of the swizzle;
// kStep: from 32 of k to the next.
struct SwizzledRows {  // rows of 128 bytes, as the copy engine writes them
  static constexpr uint32_t kLeading = 1, kStride = 1024 / 16, kMode = 1, kStep = 2;
};
// Eight rows × 16 bytes without a gap. Neighbours along k and along rows are 16 bytes further apart
// than they need be, so that warps write down either of them without bank conflicts.
struct CoreMatrices {
  static constexpr uint32_t kLeading = 9, kStride = 8 * kLeading + 1, kMode = 0,
                            kStep = 2 * kLeading;
};

constexpr int lhs_tile_bytes(const GemmSpec& spec) { return spec.block_m * kBlockK; }

constexpr int rhs_tile_bytes(const GemmSpec& spec) {
  const int stride = is_cast(spec.rhs) ? CoreMatrices::kStride : SwizzledRows::kStride;
  return round_up(spec.block_n / 8 * stride * 16, kTileAlignment);
}

constexpr int lhs_scale_slot(const GemmSpec& spec) {
  const int rows = spec.block_m + extra_scale_rows(spec.variant);
  return round_up(scale_bytes(spec.lhs_scale, rows), kArrayAlignment);
}

constexpr int rhs_scale_slot(const GemmSpec& spec) {
  return round_up(scale_bytes(spec.rhs_scale, spec.block_n), kArrayAlignment);
}

// Sub-tiles of a warpgroup that shared memory holds on their way out: fp32, and a rhs to cast,
// leave room for one.
constexpr int out_tiles(const GemmSpec& spec) {
  return spec.out == Out::kF32 || is_cast(spec.rhs) ? 1 : sub_tiles(spec);
}

constexpr int out_tile_bytes(const GemmSpec& spec) {
  return kSubTileRows * spec.block_n * (spec.out == Out::kF32 ? 4 : 2);
}

constexpr int out_bytes(const GemmSpec& spec) {
  if (store(spec) == Store::kDirect) return 0;
  return math_warpgroups(spec) * out_tiles(spec) * out_tile_bytes(spec);
}

// Where parts of a block's sum meet (exchange.cuh): sums are dealt out in groups of 64 rows × 8
// columns, and each part receives its own groups from all others.
constexpr int kExchangeGroupBytes = kSubTileRows * 8 * 4;
struct ExchangePlan {
  int parts;  // warpgroups of all CTAs of a cluster
  int groups;
  int most_owned;  // groups of one part
  int sum_bytes;   // that a CTA receives
  int bytes;       // and, between CTAs, a barrier
};
constexpr ExchangePlan exchange_plan(const GemmSpec& spec) {
  if (spec.kernel != Kernel::kFewRows) return {};
  const int warpgroups = math_warpgroups(spec), parts = warpgroups * spec.split_k;
  const int groups = sub_tiles(spec) * (spec.block_n / 8);
  const int most_owned = ceil_div(groups, parts);
  const int sum_bytes = warpgroups * (parts - 1) * most_owned * kExchangeGroupBytes;
  const int barrier = spec.split_k > 1 ? round_up(kBarrierBytes, kArrayAlignment) : 0;
  return {parts, groups, most_owned, sum_bytes, sum_bytes + barrier};
}

// Of CastRing, member by member.
constexpr int cast_ring_bytes(const GemmSpec& spec) {
  if (!is_cast(spec.rhs)) return 0;
  const int tile = kCastSlots * kScaleBlock * kBlockK * 2;
  const int content = kCastSlots * sizeof(Content);
  const int largest = 2 * kCastWarps * 4;
  const int full = kCastSlots * kBarrierBytes, empty = kCastSlots * kBarrierBytes;
  const int together = 2 * kBarrierBytes, ready = spec.stages * kBarrierBytes;
  return round_up(tile + content + largest + full + empty + together + ready, kArrayAlignment);
}

// Whether warps look for common scales of columns (inspector.cuh). A second loop of kRagged, which
// stores in two ways, would spill; it is no weight gradient.
constexpr bool is_inspected(const GemmSpec& spec) {
  return spec.kernel == Kernel::kPersistent && is_per_row(spec.rhs_scale) &&
         spec.variant != Variant::kRagged;
}

constexpr int inspection_bytes(const GemmSpec& spec) {
  if (!is_inspected(spec)) return 0;
  return round_up(kNotes * (kBarrierBytes + kInspectors), kArrayAlignment);
}

// Of SharedMemory, member by member.
constexpr int shared_bytes(const GemmSpec& spec) {
  const int lhs = spec.stages * lhs_tile_bytes(spec);
  const int rhs = spec.stages * rhs_tile_bytes(spec);
  const int out = out_bytes(spec);
  const int exchange = exchange_plan(spec).bytes;
  const int cast = cast_ring_bytes(spec);
  const int inspection = inspection_bytes(spec);
  const int lhs_scale = spec.stages * lhs_scale_slot(spec);
  const int rhs_scale = spec.stages * rhs_scale_slot(spec);
  const int note = kNotes * sizeof(Block), note_read = kNotes * kBarrierBytes;
  const int full = spec.stages * kBarrierBytes, empty = spec.stages * kBarrierBytes;
  return round_up(lhs + rhs + out + exchange + cast + inspection + lhs_scale + rhs_scale + note +
                      note_read + full + empty,
                  kTileAlignment);
}

// ---- GEMM: which specs there can be -------------------------------------------------------------

constexpr int kMostStages = 64;     // more than fit, whatever the block
constexpr int kMostGroupM = 65536;  // group_m · blocks along n stays an int: see launch()
constexpr int kAnySteps = 0x7fffffff;

// Why a number is out of range, or null. Where it is null, nothing here overflows.
constexpr const char* out_of_range(const GemmSpec& spec) {
  if (spec.block_m != 64 && spec.block_m != 128 && spec.block_m != 192 && spec.block_m != 256) {
    return "block_m must be 64, 128, 192 or 256";
  }
  if (spec.block_n < 8 || spec.block_n > 256 || spec.block_n % 8) {
    return "block_n must be a multiple of 8, from 8 to 256";
  }
  if (spec.stages < 2 || spec.stages > kMostStages) return "stages must be from 2 to 64";
  if (spec.split_k != 1 && spec.split_k != 2 && spec.split_k != 4) {
    return "split_k must be 1, 2 or 4";
  }
  if (spec.group_m < 1 || spec.group_m > kMostGroupM) return "group_m must be from 1 to 65536";
  return nullptr;
}

// Of what a spec computes, whatever the config.
constexpr const char* why_illegal_problem(const GemmSpec& spec) {
  if (spec.lhs_scale == ScaleTile::k128x128) return "lhs takes scales per row or per tensor";
  if (spec.accumulate && spec.out != Out::kF32) return "only an f32 output can accumulate";
  if (!is_cast(spec.rhs)) return nullptr;
  if (!rhs_has_groups(spec.variant)) return "a bf16 rhs must have groups";
  if (spec.rhs_scale != ScaleTile::k128x128) return "a bf16 rhs is cast with scales of 128x128";
  return nullptr;
}

constexpr const char* why_illegal_persistent(const GemmSpec& spec) {
  if (spec.block_m < 128) return "block_m of the persistent kernel must be 128, 192 or 256";
  if (spec.block_n % 16) return "block_n of the persistent kernel must be a multiple of 16";
  if (spec.split_k != 1) return "only the few_rows kernel takes split_k";
  if (is_cast(spec.rhs) && spec.block_n != kScaleBlock) return "a bf16 rhs needs block_n 128";
  if (is_cast(spec.rhs) && math_warpgroups(spec) > 2) return "a bf16 rhs needs block_m 128 or 256";
  if (is_cast(spec.rhs) && spec.multicast != Multicast::kNone) {
    return "a bf16 rhs takes no multicast";
  }
  if (spec.rhs_scale == ScaleTile::k128x128 && scale_blocks(spec.block_n) > 2) {
    return "such a block_n may touch three blocks of scales; two is the most";
  }
  if (spec.variant != Variant::kContiguous) return nullptr;
  if (spec.block_m != 128) return "the contiguous variant needs block_m 128";
  if (spec.multicast == Multicast::kRhs) return "the contiguous variant cannot multicast rhs";
  return nullptr;
}

constexpr const char* why_illegal_few_rows(const GemmSpec& spec, int steps) {
  if (is_cast(spec.rhs)) return "a bf16 rhs needs the persistent kernel";
  if (spec.variant == Variant::kContiguous || spec.variant == Variant::kRaggedContracting) {
    return "the few_rows kernel does not take this variant";
  }
  if (spec.block_m > 128) return "block_m of the few_rows kernel must be 64 or 128";
  if (spec.block_n > 128) return "block_n of the few_rows kernel must be at most 128";
  if (spec.multicast != Multicast::kNone) return "the few_rows kernel takes no multicast";
  if (spec.stages % 2) return "the few_rows kernel needs an even number of stages";
  if (spec.split_k > 1 && is_grouped(spec.variant)) {
    return "split_k needs a variant whose number of blocks is known; group sizes are not";
  }
  if (spec.split_k > 2 && spec.split_k > steps) return "split_k is more than the steps of k";
  return nullptr;
}

// Why no kernel can be made for a spec, or null. steps: of 128 along k.
constexpr const char* why_illegal(const GemmSpec& spec, int steps = kAnySteps) {
  const char* reason = out_of_range(spec);
  if (!reason) reason = why_illegal_problem(spec);
  if (!reason) {
    reason = spec.kernel == Kernel::kFewRows ? why_illegal_few_rows(spec, steps)
                                             : why_illegal_persistent(spec);
  }
  if (reason) return reason;
  if (shared_bytes(spec) > kMostSharedBytes)
    return "such a config needs more than 227 KiB of shared memory";
  if (registers(spec) > most_registers(spec)) return "such a config needs too many registers";
  return nullptr;
}

// The most stages, up to those of `spec`, with which it is legal; 0 where there are none.
constexpr int deepest_stages(GemmSpec spec, int steps = kAnySteps) {
  const int step = spec.kernel == Kernel::kFewRows ? 2 : 1;
  spec.stages = (spec.stages < kMostStages ? spec.stages : kMostStages) / step * step;
  for (; spec.stages >= 2; spec.stages -= step) {
    if (!why_illegal(spec, steps)) return spec.stages;
  }
  return 0;
}

// ---- Casts --------------------------------------------------------------------------------------

// QuantizeSpec::shared_columns: the largest scale of a block is at most 2 to this times the
// smallest. As SHARED_SPREAD of reference.py.
constexpr int kSharedSpread = 10;

constexpr int kQuantizeThreads = 256;
constexpr int kBackwardThreads = 512;  // of kSwigluBackward

constexpr int quantize_threads(const QuantizeSpec& spec) {
  return spec.source == Source::kSwigluBackward ? kBackwardThreads : kQuantizeThreads;
}

// Of kSwigluBackward one CTA stays on each multiprocessor and goes from tile to tile, whatever the
// grid below.
constexpr bool is_persistent(const QuantizeSpec& spec) {
  return spec.source == Source::kSwigluBackward;
}

// Whether a CTA takes more than one tile of its rows. What it found out about the rows, such as the
// group that they are in, then counts for all of these tiles. Floats gain nothing from it.
constexpr bool takes_many_columns(const QuantizeSpec& spec) {
  return spec.source == Source::kFp8 && (spec.grouped || spec.gather);
}

// A kernel's work in x. Whole rows: one each. Else tiles of 128 columns.
constexpr int grid_x(const QuantizeSpec& spec, const QuantizeParams& params) {
  return spec.tile == ScaleTile::k1xK ? params.m : ceil_div(params.k, kScaleBlock);
}

// Rows of a tile. Where nothing needs 128 of them, smaller tiles let more CTAs take turns at
// memory.
constexpr int tile_rows(const QuantizeSpec& spec) {
  const bool plain_rows = spec.source == Source::kFloat && spec.tile == ScaleTile::k1x128 &&
                          !spec.transposed && !spec.grouped;
  return plain_rows ? 32 : kScaleBlock;
}

// Tiles of rows of one matrix: every group begins one, so any sizes of groups must fit. Those of
// all matrices are numbered along y, and on along z, since y ends at 65535.
constexpr int row_tiles(const QuantizeSpec& spec, const QuantizeParams& params) {
  if (spec.tile == ScaleTile::k1xK) return 1;
  const int parts = !spec.grouped ? 1 : params.groups < params.m ? params.groups : params.m;
  return static_cast<int>((params.m + int64_t{tile_rows(spec) - 1} * parts) / tile_rows(spec));
}

// CTAs that share a multiprocessor: as many as registers and shared memory allow without spills.
// Numbers of 8 and 16 bits stay packed, and leave room for a third or a fourth.
constexpr int residents(const QuantizeSpec& spec) {
  if (!spec.aligned || is_persistent(spec)) return 1;
  if (tile_rows(spec) < kScaleBlock) return spec.type == Float::kF32 ? 6 : 8;
  const bool packed =
      spec.source == Source::kFloat && spec.type != Float::kF32 && spec.tile == ScaleTile::k1x128;
  const bool swiglu_rows = spec.source == Source::kSwiglu && !spec.transposed && spec.pow2;
  if (spec.source == Source::kFp8) return takes_many_columns(spec) ? 3 : 4;
  return packed || swiglu_rows ? 3 : 2;
}

// CTAs in x for `columns` tiles: fewer where takes_many_columns(), if enough are left for the
// multiprocessors to take turns. `tiles`: of rows.
constexpr int64_t ctas_in_x(const QuantizeSpec& spec, int64_t columns, int64_t tiles,
                            int multiprocessors) {
  if (!takes_many_columns(spec)) return columns;
  constexpr int kMostColumns = 4, kTurns = 3;
  const int64_t turns = columns * tiles / (int64_t{multiprocessors} * residents(spec) * kTurns);
  return ceil_div(columns, turns < 1 ? 1 : turns > kMostColumns ? kMostColumns : turns);
}

// Dynamic shared memory of a CTA of kSwiglu: its tile of x.
struct SwigluOperands {
  uint16_t gate[kScaleBlock][kScaleBlock];
  uint16_t up[kScaleBlock][kScaleBlock];
};

// A tile of kSwigluBackward.
struct alignas(16) BackwardTile {
  int32_t columns;  // number of its 128 columns
  int32_t tokens;   // number of its 128 tokens in the transposed copies
  int32_t first;    // row
  int32_t count;    // rows that exist; the others are zeros, and only in the transposed copies
};

// Of a tile what one warp copies and reads: eight rows.
union BackwardOperands {
  struct alignas(16) Rows {
    uint8_t gate[8][kScaleBlock];
    uint8_t up[8][kScaleBlock];
    uint16_t gradient[8][kScaleBlock];
    float row_factor[3][8];  // scale of gate, scale of up, row weight
  } rows;
  float largest[2][3][kScaleBlock];  // afterwards: of columns, in rows 0 to 3 and 4 to 7
};

// Dynamic shared memory of a CTA of kSwigluBackward. 3: the gradient to gate, to up, the product.
struct alignas(kArrayAlignment) BackwardShared {
  BackwardOperands operands[2][kBackwardThreads / kWarpThreads];  // of this tile and the next one
  uint32_t transposed[3][kScaleBlock][kScaleBlock / 4];           // 128 bytes for each column
  float reciprocal[3][kScaleBlock];                               // of columns' scales
  BackwardTile tile[4];  // by its number % 4: the last one, this one, the next two
  uint64_t barrier[3];   // of all warps, a phase for each tile
};

// Dynamic; the other casts' shared memory is static.
constexpr int shared_bytes(const QuantizeSpec& spec) {
  if (spec.source == Source::kSwiglu) return sizeof(SwigluOperands);
  return spec.source == Source::kSwigluBackward ? sizeof(BackwardShared) : 0;
}

// Why no kernel can be made for a spec, or null.
constexpr const char* why_illegal(const QuantizeSpec& spec) {
  const bool moves = spec.gather || spec.pair;
  if (!spec.rows && !spec.transposed) return "a cast must write rows, or the transposed copy";
  if (spec.tile == ScaleTile::kTensor) return "tiles must be 1x128, 128x128 or 1xk";
  if (spec.pair && spec.source != Source::kFloat) return "only floats can lie in two arrays";
  if (spec.source == Source::kSwiglu && spec.type == Float::kF32) {
    return "swiglu takes floats of 16 bits";
  }
  if (spec.shared_columns && (!spec.transposed || !spec.pow2 || spec.tile != ScaleTile::k1x128)) {
    return "only columns of 1x128 with scales of powers of two can share them, in a transposed "
           "copy";
  }
  if (spec.tile == ScaleTile::k1xK &&
      (spec.source != Source::kFloat || spec.transposed || spec.grouped || moves)) {
    return "tiles of 1xk are only of floats, as they lie";
  }
  if (spec.source == Source::kSwigluBackward &&
      (!spec.rows || !spec.transposed || spec.tile != ScaleTile::k1x128 || !spec.aligned ||
       moves)) {
    return "swiglu_backward writes all copies, of whole tiles of columns";
  }
  return nullptr;
}

}  // namespace fp8gemm
