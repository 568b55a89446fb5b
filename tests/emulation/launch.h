// Runs the kernel of the program text above, one CTA after the other.
#pragma once

// Returns what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* launch(
    const fp8gemm::QuantizeParams* params, int batch, int reversed) {
  static const fp8gemm::QuantizeParams* arguments;
  arguments = params;
  emulation::failure[0] = 0;
  emulation::body = [] { fp8_quantize(*arguments); };
  const int columns = grid_x(fp8gemm::kSpec, *params), tiles = grid_y(fp8gemm::kSpec, *params);
  for (int z = 0; z < batch; ++z) {
    for (int y = 0; y < tiles; ++y) {
      for (int x = 0; x < columns && !emulation::failure[0]; ++x) {
        emulation::block_index = {unsigned(x), unsigned(y), unsigned(z)};
        emulation::run_block(reversed);
      }
    }
  }
  return emulation::failure;
}
