// What quantize.cuh quantises: eight rows × eight columns of a thread, loaded all at once.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace fp8gemm {

// The row of x that becomes `row`, over all batches.
template <QuantizeSpec spec>
FP8GEMM_DEVICE int64_t source_row(const QuantizeParams& params, int batch, int row) {
  if constexpr (spec.gather) row = min(max(params.index[row], 0), params.x_rows - 1);
  return int64_t{batch} * params.x_rows + row;
}

// Floats of 16 bits stay packed: half the registers.
template <Float type>
FP8GEMM_DEVICE float unpack(uint32_t two, bool high) {
  if constexpr (type == Float::kBf16) {
    return bits_to_float(high ? two & 0xffff0000u : two << 16);
  } else {
    return cvt_f32_f16(high ? two >> 16 : two & 0xffffu);
  }
}

// Eight 16-bit floats from `from` on, of which `count` exist.
FP8GEMM_DEVICE void load8(uint32_t (&to)[4], const uint16_t* from, int count, bool aligned) {
  if (aligned && count > 0) {
    const Words4 v = ld_global_stream_v4(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = 2 * j < count ? from[2 * j] : 0;
    const uint32_t high = 2 * j + 1 < count ? from[2 * j + 1] : 0;
    to[j] = low | high << 16;
  }
}

FP8GEMM_DEVICE void load8(float (&to)[8], const float* from, int count, bool aligned) {
  if (aligned && count > 0) {
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const Words4 v = ld_global_stream_v4(from + j);
      to[j] = bits_to_float(v.x), to[j + 1] = bits_to_float(v.y);
      to[j + 2] = bits_to_float(v.z), to[j + 3] = bits_to_float(v.w);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) to[j] = j < count ? from[j] : 0.0f;
}

FP8GEMM_DEVICE void load8(uint32_t (&to)[2], const uint8_t* from, int count, bool aligned) {
  if (aligned && count > 0) {
    const Words2 v = ld_global_stream_v2(from);
    to[0] = v.x, to[1] = v.y;
    return;
  }
  to[0] = to[1] = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < count) to[j / 4] |= uint32_t{from[j]} << 8 * (j % 4);
  }
}

// Values<spec>: load() them from `row` and `column` on, rows from `end` on being zeros; get(i, j).
template <QuantizeSpec spec>
struct Values;

template <QuantizeSpec spec>
  requires(spec.source == Source::kFloat && spec.type != Float::kF32)
struct Values<spec> {
  uint32_t two[8][4];

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, int row, int end, int column) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = row + i < end;
      const int64_t at = exists ? source_row<spec>(params, batch, row + i) * params.k : 0;
      load8(two[i], static_cast<const uint16_t*>(params.x) + at + column,
            exists ? params.k - column : 0, params.k % 8 == 0);
    }
  }
  FP8GEMM_DEVICE float get(int i, int j) const { return unpack<spec.type>(two[i][j / 2], j % 2); }
};

template <QuantizeSpec spec>
  requires(spec.source == Source::kFloat && spec.type == Float::kF32)
struct Values<spec> {
  float one[8][8];

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, int row, int end, int column) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = row + i < end;
      const int64_t at = exists ? source_row<spec>(params, batch, row + i) * params.k : 0;
      load8(one[i], static_cast<const float*>(params.x) + at + column,
            exists ? params.k - column : 0, params.k % 8 == 0);
    }
  }
  FP8GEMM_DEVICE float get(int i, int j) const { return one[i][j]; }
};

// FP8 rows with one scale for each 128 columns.
template <QuantizeSpec spec>
  requires(spec.source == Source::kFp8)
struct Values<spec> {
  float one[8][8];

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, int row, int end, int column) {
    const int steps = (params.k + 127) / 128, scale_rows = (params.x_rows + 3) / 4 * 4;
    const float* scales =
        params.x_scale + (int64_t{batch} * steps + min(column / 128, steps - 1)) * scale_rows;
    uint32_t four[8][2];
    float scale[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = row + i < end && column < params.k;
      const int64_t at = exists ? source_row<spec>(params, batch, row + i) : 0;
      scale[i] = exists ? scales[at - int64_t{batch} * params.x_rows] : 0.0f;
      load8(four[i], static_cast<const uint8_t*>(params.x) + at * params.k + column,
            exists ? params.k - column : 0, params.k % 8 == 0);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const uint32_t halves = cvt_f16x2_e4m3x2(four[i][j / 4] >> 8 * (j % 4));
        one[i][j] = cvt_f32_f16(halves & 0xffffu) * scale[i];
        one[i][j + 1] = cvt_f32_f16(halves >> 16) * scale[i];
      }
    }
  }
  FP8GEMM_DEVICE float get(int i, int j) const { return one[i][j]; }
};

// silu(gate) · up · row weight, in fp32. x: [rows, 2k], gate beside up.
template <QuantizeSpec spec>
  requires(spec.source == Source::kSwiglu)
struct Values<spec> {
  static_assert(spec.type != Float::kF32, "SwiGLU takes 16-bit floats");
  float one[8][8];

  FP8GEMM_DEVICE void load(const QuantizeParams& params, int batch, int row, int end, int column) {
    uint32_t gate[8][4], up[8][4];
    float weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool exists = row + i < end;
      const int64_t at = exists ? source_row<spec>(params, batch, row + i) * 2 * params.k : 0;
      const uint16_t* x = static_cast<const uint16_t*>(params.x) + at + column;
      const int count = exists ? params.k - column : 0;
      load8(gate[i], x, count, params.k % 8 == 0);
      load8(up[i], x + params.k, count, params.k % 8 == 0);
      weight[i] = exists ? params.row_weight[row + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float g = unpack<spec.type>(gate[i][j / 2], j % 2);
        one[i][j] = g * sigmoid(g) * unpack<spec.type>(up[i][j / 2], j % 2) * weight[i];
      }
    }
  }
  FP8GEMM_DEVICE float get(int i, int j) const { return one[i][j]; }

 private:
  FP8GEMM_DEVICE static float sigmoid(float x) {
    const float kLog2E = 1.4426950408889634f;
    return div_rn(1.0f, 1.0f + exp2_approx(-x * kLog2E));
  }
};

}  // namespace fp8gemm
