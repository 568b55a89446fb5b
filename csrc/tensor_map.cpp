#include "tensor_map.h"

#include <string>

namespace fp8gemm {
namespace {

int element_bytes(int type) {
  return type == kTensorMapUint8 ? 1 : type == kTensorMapBfloat16 ? 2 : 4;
}

int swizzle(const TensorMapShape& shape) {
  if (!shape.swizzled) return kTensorMapSwizzleNone;
  const uint32_t bytes = shape.box[0] * element_bytes(shape.type);
  return bytes == 32   ? kTensorMapSwizzle32
         : bytes == 64 ? kTensorMapSwizzle64
                       : kTensorMapSwizzle128;
}

}  // namespace

Status encode(const Driver& driver, TensorMap& map, const TensorMapShape& shape, void* address,
              const char* name) {
  uint64_t strides[2];
  uint64_t stride = element_bytes(shape.type);
  for (int i = 0; i + 1 < shape.rank; ++i) strides[i] = stride *= shape.dims[i];
  const uint32_t element_strides[3] = {1, 1, 1};
  const CUresult result = driver.encode_tiled(
      &map, shape.type, shape.rank, address, shape.dims, strides, shape.box, element_strides,
      /*interleave=*/0, swizzle(shape), kTensorMapPromotion256, /*out_of_bounds_fill: zeros=*/0);
  if (result == 0) return {};
  std::string dims;
  for (int i = shape.rank; i-- > 0;) {
    dims += (dims.empty() ? "" : ", ") + std::to_string(shape.dims[i]);
  }
  return check(driver, result, std::string("tensor map of ") + name + " [" + dims + "]");
}

}  // namespace fp8gemm
