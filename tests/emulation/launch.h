// Runs the kernel of the program text above, one CTA after the other.
#pragma once

// The grid of ffi_quantize.cpp on a GPU of three multiprocessors, and with few CTAs along y.
inline emulation::Index grid_of(const fp8gemm::QuantizeParams& params) {
  const unsigned columns = grid_x(fp8gemm::kSpec, params), rows = params.grid_y;
  const unsigned tiles = params.batch * row_tiles(fp8gemm::kSpec, params);
  if (is_persistent(fp8gemm::kSpec)) return {min(columns * tiles, 3u), 1, 1};
  const unsigned x = ctas_in_x(fp8gemm::kSpec, columns, 3 * 9 * tiles, 3);  // as of many rows
  return {x, rows, (tiles + rows - 1) / rows};
}

// Returns what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* launch(
    const fp8gemm::QuantizeParams* params, int reversed) {
  static const fp8gemm::QuantizeParams* arguments;
  arguments = params;
  emulation::failure[0] = 0;
  emulation::body = [] { fp8_quantize(*arguments); };
  emulation::threads = quantize_threads(fp8gemm::kSpec);
  const emulation::Index grid = emulation::grid = grid_of(*params);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && !emulation::failure[0]; ++x) {
        emulation::block_index = {x, y, z};
        emulation::run_block(reversed);
      }
    }
  }
  return emulation::failure;
}
