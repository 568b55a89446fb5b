// Shapes in elements to the copy engine's tensor maps.
#pragma once

#include "driver.h"
#include "kernels/params.cuh"
#include "status.h"

namespace fp8gemm {

// A row-major matrix of tiles to load or store. Dimensions in elements, innermost first.
struct TensorMapShape {
  int type;  // kTensorMap...
  int rank;
  uint64_t dims[3];
  uint32_t box[3];
  bool swizzled;  // by the box's inner bytes: 32, 64 or 128
};

// `name` is the operand's, for the error.
Status encode(const Driver& driver, TensorMap& map, const TensorMapShape& shape, void* address,
              const char* name);

}  // namespace fp8gemm
