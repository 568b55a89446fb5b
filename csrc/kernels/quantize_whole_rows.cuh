// Quantising with one scale for each row: a CTA goes over its row twice. The second time the row
// comes from a cache.
#pragma once

#include "params.cuh"
#include "plan.cuh"
#include "ptx.cuh"
#include "ptx_arithmetic.cuh"
#include "quantize_scale.cuh"
#include "quantize_source.cuh"

namespace fp8gemm {

// Where a tile's first row goes.
template <Float type, int kRows>
FP8GEMM_DEVICE auto first_row(PackedTile<type, kRows>& tile) -> uint32_t (&)[4] {
  return tile.two[0];
}
template <int kRows>
FP8GEMM_DEVICE auto first_row(FloatTile<kRows>& tile) -> float (&)[8] {
  return tile.one[0];
}

// Calls use(column, values) for this thread's columns of a row, eight at a time.
template <QuantizeSpec spec, class Use>
FP8GEMM_DEVICE void each_eight(const QuantizeParams& params, int64_t row, Use use) {
  using T = Number<spec.type>;
  const T* x = static_cast<const T*>(params.x) + row * params.k;
#pragma unroll 4
  for (int column = threadIdx.x * 8; column < params.k; column += kQuantizeThreads * 8) {
    Values<spec> values;
    load8<spec.aligned>(first_row(values), x + column, params.k - column);
    use(column, values);
  }
}

FP8GEMM_DEVICE float largest_of_block(float largest) {
  __shared__ float of_warps[kQuantizeThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = max_nan(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) {
    largest = max_nan(largest, of_warps[warp]);
  }
  return largest;
}

template <QuantizeSpec spec>
FP8GEMM_DEVICE void quantize_whole_row(const QuantizeParams& params) {
  const int64_t batch = int64_t{blockIdx.z} * params.grid_y + blockIdx.y;
  if (batch >= params.batch) return;
  const int64_t row = batch * params.m + blockIdx.x;
  float largest = 0;
  each_eight<spec>(params, row, [&](int, const Values<spec>& values) {
    largest = max_nan(largest, values.largest_of_row(0));
  });
  const auto scale = Scale<spec.pow2>::of(largest_of_block(largest));
  if (threadIdx.x == 0) {
    params.rows_scale[batch * round_up4(params.m) + blockIdx.x] = scale.value;
  }
  uint8_t* to = params.rows + row * params.k;
  each_eight<spec>(params, row, [&](int column, const Values<spec>& values) {
    const Words2 bytes = pack8([&](int j) { return values.get(0, j); }, scale.reciprocal);
    store8<spec.aligned>(to + column, bytes, params.k - column);
  });
}

}  // namespace fp8gemm
