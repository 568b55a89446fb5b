// What quantize.cuh quantises: eight (or two) rows × eight columns of a thread, loaded all at once.
//
// Values<spec>: load() takes the columns of `rows` from `column` on. Rows that do not exist are
// zeros. The rest is that of a PackedTile or FloatTile.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"

namespace fp8gemm {

// Rows of a thread: sixteen threads have as many rows of the tile.
template <QuantizeSpec spec>
constexpr int kThreadRows = tile_rows(spec) / 16;

// The rows of x that become a thread's rows, from `first` on, of which `count` exist. One that
// exists stands in for those that do not, if any of the tile does: behind a branch for each row,
// one row's index would be waited for before the next one's is asked for.
template <QuantizeSpec spec>
struct SourceRows {
  int first, count;
  int index[spec.gather ? kThreadRows<spec> : 1];

  FP8GEMM_DEVICE SourceRows(const QuantizeParams& params, int first_row, int end)
      : first(first_row), count(end - first_row) {
    if constexpr (spec.gather) {
#pragma unroll
      for (int i = 0; i < kThreadRows<spec>; ++i) {
        const int given = params.index[first + min(i, count - 1)];
        index[i] = min(max(given, 0), params.x_rows - 1);
      }
    }
  }

  FP8GEMM_DEVICE bool has(int i) const { return i < count; }
  FP8GEMM_DEVICE int operator[](int i) const {
    return spec.gather ? index[i] : first + min(i, count - 1);
  }
};

// How a number of x lies in memory.
template <Float type>
struct NumberOf {
  using Type = uint16_t;
};
template <>
struct NumberOf<Float::kF32> {
  using Type = float;
};
template <Float type>
using Number = typename NumberOf<type>::Type;

// Floats of 16 bits stay packed: half the registers.
template <Float type>
FP8GEMM_DEVICE float unpack(uint32_t two, bool high) {
  if constexpr (type == Float::kBf16) {
    return bits_to_float(high ? two & 0xffff0000u : two << 16);
  } else {
    return cvt_f32_f16(high ? two >> 16 : two & 0xffffu);
  }
}

template <Float type>
FP8GEMM_DEVICE uint32_t larger_of_two(uint32_t a, uint32_t b) {
  return type == Float::kBf16 ? max_nan_bf16x2(a, b) : max_nan_f16x2(a, b);
}

// Numbers of a thread, and the largest magnitudes in a row or a column of them. Two forms: 16-bit
// floats stay packed, which halves their registers and the instructions that compare them.
template <Float type, int kRows>
struct PackedTile {
  static constexpr int kRowsAtOnce = 8;  // that lanes look at together: see FloatTile
  uint32_t two[kRows][4];

  FP8GEMM_DEVICE float get(int i, int j) const { return unpack<type>(two[i][j / 2], j % 2); }

  FP8GEMM_DEVICE float largest_of_row(int i) const {
    uint32_t largest = magnitudes(two[i][0]);
#pragma unroll
    for (int j = 1; j < 4; ++j) largest = larger_of_two<type>(largest, magnitudes(two[i][j]));
    return max_nan(unpack<type>(largest, false), unpack<type>(largest, true));
  }

  FP8GEMM_DEVICE void largest_of_columns(float (&largest)[8]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t both = magnitudes(two[0][j]);
#pragma unroll
      for (int i = 1; i < kRows; ++i) both = larger_of_two<type>(both, magnitudes(two[i][j]));
      largest[2 * j] = unpack<type>(both, false), largest[2 * j + 1] = unpack<type>(both, true);
    }
  }

  // NOTE: otherwise the 64 floats of one use are kept for the next, in registers that a third CTA
  // needs.
  FP8GEMM_DEVICE void unpack_again(uint32_t zero) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) forget(two[i][j], zero);
    }
  }

 private:
  FP8GEMM_DEVICE static uint32_t magnitudes(uint32_t both) { return both & 0x7fff7fffu; }
};

// Columns' largest magnitudes, number by number.
template <int kRows, class Tile>
FP8GEMM_DEVICE void compare_columns(const Tile& tile, float (&largest)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    largest[j] = magnitude(tile.get(0, j));
#pragma unroll
    for (int i = 1; i < kRows; ++i) largest[j] = max_nan(largest[j], magnitude(tile.get(i, j)));
  }
}

template <int kRows>
struct FloatTile {
  // NOTE: of more rows the stores come all at once: 7 % slower. Where numbers are packed,
  // and another CTA has something else to do, fewer instructions win.
  static constexpr int kRowsAtOnce = 2;
  float one[kRows][8];

  FP8GEMM_DEVICE float get(int i, int j) const { return one[i][j]; }

  FP8GEMM_DEVICE float largest_of_row(int i) const {
    float largest = magnitude(one[i][0]);
#pragma unroll
    for (int j = 1; j < 8; ++j) largest = max_nan(largest, magnitude(one[i][j]));
    return largest;
  }

  FP8GEMM_DEVICE void largest_of_columns(float (&largest)[8]) const {
    compare_columns<kRows>(*this, largest);
  }

  FP8GEMM_DEVICE void unpack_again(uint32_t) {}
};

// Eight 16-bit floats from `from` on, of which `count` exist. Aligned: a multiple of eight.
template <bool kAligned>
FP8GEMM_DEVICE void load8(uint32_t (&to)[4], const uint16_t* from, int count) {
  if constexpr (kAligned) {
    const Words4 v = count > 0 ? ld_global_stream_v4(from) : Words4{};
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = 2 * j < count ? from[2 * j] : 0;
      const uint32_t high = 2 * j + 1 < count ? from[2 * j + 1] : 0;
      to[j] = low | high << 16;
    }
  }
}

template <bool kAligned>
FP8GEMM_DEVICE void load8(float (&to)[8], const float* from, int count) {
  if constexpr (kAligned) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const Words4 v = count > 0 ? ld_global_stream_v4(from + j) : Words4{};
      to[j] = bits_to_float(v.x), to[j + 1] = bits_to_float(v.y);
      to[j + 2] = bits_to_float(v.z), to[j + 3] = bits_to_float(v.w);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = j < count ? from[j] : 0.0f;
  }
}

template <bool kAligned>
FP8GEMM_DEVICE void load8(uint32_t (&to)[2], const uint8_t* from, int count) {
  to[0] = to[1] = 0;
  if constexpr (kAligned) {
    const Words2 v = count > 0 ? ld_global_stream_v2(from) : Words2{};
    to[0] = v.x, to[1] = v.y;
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < count) to[j / 4] |= uint32_t{from[j]} << 8 * (j % 4);
    }
  }
}

// The numbers of one array that a thread's columns lie in.
template <class T>
struct Columns {
  const T* first;  // of row 0
  int pitch;       // from one row to the next
  int count;       // columns from `first` to the end of a row
};

template <QuantizeSpec spec, class T>
FP8GEMM_DEVICE Columns<T> columns_of(const QuantizeParams& params, int column) {
  const T* x = static_cast<const T*>(params.x);
  if constexpr (spec.pair) {  // both halves are whole tiles
    const int half = params.k / 2;
    if (column >= half) x = static_cast<const T*>(params.beside), column -= half;
    return {x + column, half, half - column};
  }
  return {x + column, params.k, params.k - column};
}

template <QuantizeSpec spec>
struct Values;

// to: a tile's rows, as PackedTile or FloatTile hold them.
template <QuantizeSpec spec, class To>
FP8GEMM_DEVICE void load_floats(To& to, const QuantizeParams& params, int batch,
                                const SourceRows<spec>& rows, int column) {
  const auto x = columns_of<spec, Number<spec.type>>(params, column);
  const auto* from = x.first + int64_t{batch} * params.x_rows * x.pitch;
  if constexpr (!spec.gather) from += int64_t{rows.first} * x.pitch;
#pragma unroll
  for (int i = 0; i < kThreadRows<spec>; ++i) {
    // Nothing is read of a row that does not exist, whatever the address.
    const int count = rows.has(i) ? x.count : 0;
    if constexpr (!spec.gather) {
      load8<spec.aligned>(to[i], from + int64_t{i} * x.pitch, count);
    } else if constexpr (spec.type == Float::kF32) {
      load8<spec.aligned>(to[i], from + int64_t{rows[i]} * x.pitch, count);
    } else {
      load8<spec.aligned>(to[i], row_of(from, rows[i], x.pitch), count);
    }
  }
}

template <QuantizeSpec spec>
  requires(spec.source == Source::kFloat && spec.type != Float::kF32)
struct Values<spec> : PackedTile<spec.type, kThreadRows<spec>> {
  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, const SourceRows<spec>& rows,
                           int column) {
    load_floats<spec>(this->two, params, batch, rows, column);
  }
};

template <QuantizeSpec spec>
  requires(spec.source == Source::kFloat && spec.type == Float::kF32)
struct Values<spec> : FloatTile<kThreadRows<spec>> {
  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, const SourceRows<spec>& rows,
                           int column) {
    load_floats<spec>(this->one, params, batch, rows, column);
  }
};

// The scales [rows↑4] of FP8 rows' step of 128 that `column` lies in.
FP8GEMM_DEVICE const float* scales_of(const QuantizeParams& params, int batch, int k, int column) {
  const int steps = ceil_div(k, kScaleBlock), rows = round_up4(params.x_rows);
  return params.x_scale + (int64_t{batch} * steps + min(column / kScaleBlock, steps - 1)) * rows;
}

// FP8 rows with one scale for each 128 columns. They stay packed, as f16, which holds every FP8
// number.
template <QuantizeSpec spec>
  requires(spec.source == Source::kFp8)
struct Values<spec> : PackedTile<Float::kF16, kThreadRows<spec>> {
  using Packed = PackedTile<Float::kF16, kThreadRows<spec>>;
  float scale[8];

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, const SourceRows<spec>& rows,
                           int column) {
    const float* scales = scales_of(params, batch, params.k, column);
    const uint8_t* x = static_cast<const uint8_t*>(params.x) + column;
    x += int64_t{batch} * params.x_rows * params.k;
    uint32_t four[8][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = rows[i];
      scale[i] = scales[uint32_t(row)];
      if (!rows.has(i)) scale[i] = 0;
      load8<spec.aligned>(four[i], row_of(x, row, params.k), rows.has(i) ? params.k - column : 0);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Words2 low = cvt_f16x4_e4m3x4(four[i][0]), high = cvt_f16x4_e4m3x4(four[i][1]);
      this->two[i][0] = low.x, this->two[i][1] = low.y;
      this->two[i][2] = high.x, this->two[i][3] = high.y;
    }
  }

  FP8GEMM_DEVICE float get(int i, int j) const { return Packed::get(i, j) * scale[i]; }

  FP8GEMM_DEVICE void largest_of_columns(float (&largest)[8]) const {
    compare_columns<kThreadRows<spec>>(*this, largest);
  }
};

constexpr float kLog2E = 1.4426950408889634f;

// sigmoid(x) = 1 / (1 + 2^power), power = −x · log₂ e; 0 where it is below 2⁻¹²⁶.
FP8GEMM_DEVICE float sigmoid_of_power(float power) { return rcp_approx(1.0f + exp2_approx(power)); }

// silu(gate) · up · row weight, in fp32. x: [rows, 2k], gate beside up.
//
// NOTE: x goes through shared memory, so that all of it is on its way at once. In registers the
// assembler moves the loads of a row down to where it is used, whatever the source says (it has not
// enough of them for all), and a thread waits for memory eight times over.
template <QuantizeSpec spec>
  requires(spec.source == Source::kSwiglu)
struct Values<spec> : FloatTile<kThreadRows<spec>> {
  static_assert(sizeof(SwigluOperands) == shared_bytes(spec));

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, const SourceRows<spec>& rows,
                           int column) {
    auto& tile = *reinterpret_cast<SwigluOperands*>(dynamic_shared());
    const int first = threadIdx.x / 16 * 8, at = threadIdx.x % 16 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = int64_t{batch} * params.x_rows + rows.first + i;
      const int64_t from = row * 2 * params.k;
      const uint16_t* x = static_cast<const uint16_t*>(params.x) + from + column;
      const int count = rows.has(i) ? params.k - column : 0;
      copy8(tile.gate[first + i] + at, x, count);
      copy8(tile.up[first + i] + at, x + params.k, count);
    }
    cp_async_wait_all();  // every thread reads what it copied itself
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float weight = rows.has(i) ? params.row_weight[rows.first + i] : 0.0f;
      const Words4 gate = *reinterpret_cast<const Words4*>(tile.gate[first + i] + at);
      const Words4 up = *reinterpret_cast<const Words4*>(tile.up[first + i] + at);
      const uint32_t gates[4] = {gate.x, gate.y, gate.z, gate.w};
      const uint32_t ups[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float g = unpack<spec.type>(gates[j / 2], j % 2);
        this->one[i][j] =
            g * sigmoid_of_power(g * -kLog2E) * unpack<spec.type>(ups[j / 2], j % 2) * weight;
      }
    }
  }

 private:
  FP8GEMM_DEVICE static void copy8(uint16_t* to, const uint16_t* from, int count) {
    if constexpr (spec.aligned) {
      cp_async(shared_address(to), from, count > 0);
    } else {
      uint32_t two[4];
      load8<false>(two, from, count);
      *reinterpret_cast<Words4*>(to) = {two[0], two[1], two[2], two[3]};
    }
  }
};

}  // namespace fp8gemm
