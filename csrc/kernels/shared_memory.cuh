// What lies in shared memory, and the ring of stages that the producer fills and consumers drain.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace fp8gemm {

constexpr int kBlockK = 128;  // k per stage: one scale block, and one promotion to fp32
constexpr int kNotes = 4;     // of blocks; eight stages hold no more, at two steps each

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// 128-row scale blocks that a tile of `rows` rows can touch: it begins at a multiple of `rows`.
constexpr int scale_blocks(int rows) {
  const int power = rows & -rows, common = power < 128 ? power : 128;  // their largest divisor
  return ceil_div(128 - common + rows, 128);
}

// Bytes of scales that one stage receives for a tile of `rows` rows.
constexpr int scale_bytes(ScaleTile tile, int rows) {
  if (is_per_row(tile)) return 4 * rows;
  // A copy has at least 16 bytes: an aligned run of four steps of k.
  return tile == ScaleTile::k128x128 ? 16 * scale_blocks(rows) : 16;
}

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

// A member that takes no room when it has no bytes.
template <int kBytes>
struct Bytes {
  alignas(128) uint8_t data[kBytes];
};
template <>
struct Bytes<0> {};

// Rows of lhs scales that are copied for a tile beyond its own. A copy begins at a multiple of 16
// bytes, so where a block may begin at any row, up to three rows before it come along.
// NOTE: a tensor map takes no other inner coordinates either: an "illegal instruction" at run time.
constexpr int extra_scale_rows(Variant variant) { return variant == Variant::kRagged ? 4 : 0; }

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

constexpr int kCastWarps = 4;  // that make FP8 of rhs, a quarter of a tile each

constexpr int kCastSlots = 2;
enum class Content : int { kTile, kNothing, kEnd };

// Where rhs is bf16: its tiles on their way to become FP8.
template <int kStages, Rhs rhs>
struct CastRing {
  using RhsLayout = CoreMatrices;  // of a tile once it is FP8
  alignas(128) uint16_t tile[kCastSlots][128][128];
  Content content[kCastSlots];   // kNothing: of a block without steps of k
  float largest[2][kCastWarps];  // of what each warp read: of this tile, of the one before
  uint64_t full[kCastSlots];     // completes when a tile has landed
  uint64_t empty[kCastSlots];    // completes when casting warps have it in registers
  uint64_t together[2];          // in turns: completes when the other CTA turns to its next block
  uint64_t ready[kStages];       // completes when a stage has its tile of FP8
};
template <int kStages>
struct CastRing<kStages, Rhs::kFp8> {
  using RhsLayout = SwizzledRows;
};

// Every shared array and barrier of a kernel. Operand tiles come first: the 128-byte swizzle wants
// them at multiples of 1024.
template <GemmSpec spec, int kOutBytes, int kExchangeBytes>
struct alignas(1024) SharedMemory {
  static constexpr int kLhsBytes = spec.block_m * kBlockK;
  using RhsLayout = typename CastRing<spec.stages, spec.rhs>::RhsLayout;
  static constexpr int kRhsBytes = round_up(spec.block_n / 8 * RhsLayout::kStride * 16, 1024);
  static constexpr int kLhsScaleSlot =
      round_up(scale_bytes(spec.lhs_scale, spec.block_m + extra_scale_rows(spec.variant)), 128);
  static constexpr int kRhsScaleSlot = round_up(scale_bytes(spec.rhs_scale, spec.block_n), 128);
  uint8_t lhs[spec.stages][kLhsBytes];
  uint8_t rhs[spec.stages][kRhsBytes];
  [[no_unique_address]] Bytes<kOutBytes> out;            // results on their way to the copy engine
  [[no_unique_address]] Bytes<kExchangeBytes> exchange;  // partial sums between warpgroups and CTAs
  [[no_unique_address]] CastRing<spec.stages, spec.rhs> cast;
  uint8_t lhs_scale[spec.stages][kLhsScaleSlot];
  uint8_t rhs_scale[spec.stages][kRhsScaleSlot];
  Block note[kNotes];           // which blocks the stages' bytes belong to, one after the other
  uint64_t note_read[kNotes];   // completes when all consumers have read a note
  uint64_t full[spec.stages];   // completes when a stage's bytes have landed
  uint64_t empty[spec.stages];  // completes when its readers are done
};

// A position in the ring and the parity that says whose turn its stage is.
// NOTE: advance by comparison, not modulo: the division would sit in the producer's only loop.
template <int kStages>
struct RingPosition {
  int stage;
  uint32_t parity;

  FP8GEMM_DEVICE void advance(int steps = 1) {
    stage += steps;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

}  // namespace fp8gemm
