// What lies in shared memory, and the ring of stages that the producer fills and consumers drain.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"

namespace fp8gemm {

// A member that takes no room when it has no bytes.
template <int kBytes>
struct Bytes {
  alignas(kArrayAlignment) uint8_t data[kBytes];
};
template <>
struct Bytes<0> {};

// Where rhs is bf16: its tiles on their way to become FP8.
template <int kStages, Rhs rhs>
struct CastRing {
  using RhsLayout = CoreMatrices;  // of a tile once it is FP8
  alignas(kArrayAlignment) uint16_t tile[kCastSlots][kScaleBlock][kBlockK];
  Content content[kCastSlots];   // see Content
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

// What the inspectors found out about the blocks that the notes are of.
template <bool kInspected>
struct alignas(kArrayAlignment) Inspection {
  uint64_t done[kNotes];             // completes when all inspectors have looked
  bool common[kNotes][kInspectors];  // of the steps that each looked at
};
template <>
struct Inspection<false> {};

// Every shared array and barrier of a kernel, of which plan.cuh knows the sizes. Operand tiles come
// first: the 128-byte swizzle wants them at multiples of 1024.
template <GemmSpec spec>
struct alignas(kTileAlignment) SharedMemory {
  using RhsLayout = typename CastRing<spec.stages, spec.rhs>::RhsLayout;
  static constexpr int kLhsBytes = lhs_tile_bytes(spec), kRhsBytes = rhs_tile_bytes(spec);
  uint8_t lhs[spec.stages][kLhsBytes];
  uint8_t rhs[spec.stages][kRhsBytes];
  [[no_unique_address]] Bytes<out_bytes(spec)> out;  // results on their way to the copy engine
  [[no_unique_address]] Bytes<exchange_plan(spec).bytes> exchange;  // sums between parts
  [[no_unique_address]] CastRing<spec.stages, spec.rhs> cast;
  [[no_unique_address]] Inspection<is_inspected(spec)> inspection;
  uint8_t lhs_scale[spec.stages][lhs_scale_slot(spec)];
  uint8_t rhs_scale[spec.stages][rhs_scale_slot(spec)];
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
