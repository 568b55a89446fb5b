// Runs the kernel of the program text above, one CTA after the other.
#pragma once

// Returns what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* launch(
    const fp8gemm::QuantizeParams* params, int reversed) {
  static const fp8gemm::QuantizeParams* arguments;
  arguments = params;
  emulation::failure[0] = 0;
  emulation::body = [] { fp8_quantize(*arguments); };
  const int columns = grid_x(fp8gemm::kSpec, *params);
  const int tiles = params->batch * row_tiles(fp8gemm::kSpec, *params);
  for (int z = 0; z * params->grid_y < tiles; ++z) {
    for (int y = 0; y < params->grid_y; ++y) {
      for (int x = 0; x < columns && !emulation::failure[0]; ++x) {
        emulation::block_index = {unsigned(x), unsigned(y), unsigned(z)};
        emulation::run_block(reversed);
      }
    }
  }
  return emulation::failure;
}
