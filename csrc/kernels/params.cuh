// What the host tells a kernel: the compile-time GemmSpec or QuantizeSpec, and the run-time
// GemmParams or QuantizeParams.
// Host and device both read it, so it includes nothing on the device. What follows from a spec is
// in plan.cuh.
#pragma once

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <cstdint>
#endif

namespace fp8gemm {

// gemm.cuh or gemm_few_rows.cuh.
enum class Kernel : int { kPersistent, kFewRows };

// A row of the table in variants.py.
enum class Variant : int { kDense, kBatched, kRagged, kContiguous, kMasked, kRaggedContracting };

// Which arrays of a variant have a leading dim of groups, and which variants read group sizes.
constexpr bool lhs_has_groups(Variant v) { return v == Variant::kBatched || v == Variant::kMasked; }
constexpr bool rhs_has_groups(Variant v) {
  return v != Variant::kDense && v != Variant::kRaggedContracting;
}
constexpr bool out_has_groups(Variant v) {
  return lhs_has_groups(v) || v == Variant::kRaggedContracting;
}
constexpr bool is_grouped(Variant v) { return v != Variant::kDense && v != Variant::kBatched; }

// Which elements of an operand share one scale. Named rows × columns of the operand; k is its
// columns.
enum class ScaleTile : int {
  k1x128,    // scales [k/128, rows↑4], rows contiguous
  k128x128,  // scales [rows/128, (k/128)↑4], k contiguous
  k1xK,      // scales [1, rows↑4]
  kTensor,   // scales [1, 4], the first of which counts; one for each group of a batch
};

constexpr bool is_per_row(ScaleTile tile) {
  return tile == ScaleTile::k1x128 || tile == ScaleTile::k1xK;
}

// ↑4: a line of scales is whole 16 bytes.
constexpr int round_up4(int x) { return (x + 3) / 4 * 4; }

// How rhs lies in memory. As bf16 it becomes FP8 on its way to the tensor core, by 128×128.
enum class Rhs : int {
  kFp8,             // [n, k], with scales beside it
  kBf16,            // [n, k]
  kBf16Transposed,  // [k, n]
};

constexpr bool is_cast(Rhs rhs) { return rhs != Rhs::kFp8; }

enum class Out : int { kBf16, kF32 };

// Which operand tile the two CTAs of a cluster share; kNone means no cluster.
enum class Multicast : int { kNone, kLhs, kRhs };

// How results leave: staged through shared memory and the copy engine, or straight from registers.
enum class Store : int { kTma, kDirect };

// Everything the compiler specialises on. m, n, k and the number of groups stay free at run time.
struct GemmSpec {
  Kernel kernel;
  Variant variant;
  ScaleTile lhs_scale;
  ScaleTile rhs_scale;
  Rhs rhs;
  Out out;
  bool accumulate;  // out += product instead of out = product (fp32 only)
  int block_m;      // rows of lhs per output block
  int block_n;      // rows of rhs per output block
  int stages;       // slots of the shared-memory ring, each one 128-deep step of k
  Multicast multicast;
  int split_k;      // CTAs of a cluster that divide k (few-rows kernel only)
  int group_m;      // blocks along m that are visited before the next column of blocks
  bool aligned;     // rows of the output are multiples of 16 bytes
  bool leave_rest;  // kRagged: rows past the groups are not written, else they become zeros
};

// The driver's CUtensorMap: 128 opaque bytes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

struct GemmParams {
  TensorMap lhs;        // fp8 [groups * m, k], or [m, k] where lhs has no groups
  TensorMap rhs;        // likewise fp8 [groups * n, k]; where it is cast, bf16 as it lies
  TensorMap lhs_scale;  // fp32, where GemmSpec::lhs_scale is per row
  TensorMap rhs_scale;  // likewise
  TensorMap out;        // GemmSpec::out [groups, m, n], likewise, where store() is Store::kTma
  const float* lhs_scale_data;  // layout by GemmSpec::lhs_scale; rows are multiples of 16 bytes
  const float* rhs_scale_data;
  void* out_data;             // [groups, m, n] of GemmSpec::out, or [m, n]
  const int32_t* group_data;  // sizes [groups], or kContiguous: the group of each row [m]
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t groups;
  // Where rhs is bf16: it may lie in two arrays side by side, by their last dims.
  int32_t left_columns;  // of the first, which `rhs` is the map of
  TensorMap rhs_right;
  // Where has_tails(): `lhs` and `rhs` with tiles of as many rows as the last block has, where it
  // has fewer than the others.
  TensorMap lhs_tail;
  TensorMap rhs_tail;
};

// ---- Quantising ---------------------------------------------------------------------------------

// What is quantised.
enum class Source : int {
  kFloat,   // x [batch, m, k]
  kFp8,     // the same in FP8, with scales 1x128
  kSwiglu,  // x [m, 2k], gate beside up: silu(gate) · up · row weight
  // x [m, 2k] in FP8 as above: what follows from the gradient [m, k] to the same product.
  kSwigluBackward,
};

enum class Float : int { kBf16, kF16, kF32 };

struct QuantizeSpec {
  Source source;
  Float type;       // of x, where that is not FP8
  ScaleTile tile;   // k1x128 along what the copy contracts over; k128x128; or k1xK
  bool pow2;        // scales are powers of two
  bool rows;        // write [m, k]
  bool transposed;  // write [k, m]; where tiles are 1x128, with m rounded up to 128, zeros between
  bool grouped;     // rows lie in groups; in the transposed copy each begins at a multiple of 128
  bool gather;      // row i is row index[i] of x
  bool pair;        // kFloat: the right half of the columns lies in a second array
  // In the transposed copy 128 columns of x get one scale where their own lie close; of
  // kSwigluBackward those of the gradients.
  bool shared_columns;
  bool aligned;  // k is a multiple of 8; and m of 16 where a transposed copy's tiles are k128x128
};

// ↑: rounded up to a multiple. Scales as ScaleTile says.
struct QuantizeParams {
  const void* x;
  const void* beside;         // QuantizeSpec::pair: columns k/2 to k
  const float* x_scale;       // Source::kFp8: [k/128, m↑4]; kSwigluBackward: [2k/128, m↑4]
  const uint16_t* gradient;   // kSwigluBackward: bf16 [m, k]
  const float* row_weight;    // Source::kSwiglu: [m]
  const int32_t* group_data;  // sizes [groups]
  const int32_t* index;       // [m]
  uint8_t* rows;
  float* rows_scale;
  uint8_t* transposed;
  float* transposed_scale;
  uint8_t* up_transposed;  // kSwigluBackward: [k, m], like `transposed`, which is gate's there
  float* up_transposed_scale;
  uint8_t* activation;  // kSwigluBackward: [k, m], likewise
  float* activation_scale;
  float* row_weight_gradient;  // kSwigluBackward: [k/128, m], in parts to be added up
  int32_t m;
  int32_t k;
  int32_t x_rows;  // of x: m, but where rows are gathered
  int32_t pitch;   // columns of the transposed copy
  int32_t groups;
  int32_t batch;
  int32_t grid_y;  // CTAs along y; see row_tiles() in plan.cuh
};

}  // namespace fp8gemm
