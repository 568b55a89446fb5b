#include "ffi_buffers.h"

#include <algorithm>

#include "kernels/plan.cuh"

namespace fp8gemm {
namespace {

std::string type_text(ffi::DataType type) {
  switch (type) {
    case ffi::F8E4M3FN:
      return "e4m3";
    case ffi::BF16:
      return "bf16";
    case ffi::F16:
      return "f16";
    case ffi::F32:
      return "f32";
    case ffi::S32:
      return "s32";
    default:
      return "element type " + std::to_string(int(type));
  }
}

std::string shape_text(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (int64_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// Kernels count rows of all matrices, and columns, in ints.
bool fits_ints(ffi::AnyBuffer::Dimensions dims) {
  int64_t rows = 1;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] > kMostCount) return false;
    if (i + 1 < dims.size()) rows *= dims[i];
    if (rows > kMostCount) return false;
  }
  return true;
}

}  // namespace

Shape::Shape(std::initializer_list<int64_t> sizes) : rank_(static_cast<int>(sizes.size())) {
  std::copy(sizes.begin(), sizes.end(), sizes_.begin());
}

std::string Shape::text() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) {
    text += (i ? ", " : "") + (sizes_[i] < 0 ? "any" : std::to_string(sizes_[i]));
  }
  return text + "]";
}

Buffer Buffers::operand(const char* name, ffi::DataType type, const Shape& shape) {
  if (!status_.ok()) return {};
  if (next_operand_ >= operands_.size()) return mismatch(name, "no operand", type, shape);
  auto buffer = operands_.get<ffi::AnyBuffer>(next_operand_++);
  if (!buffer.has_value()) return mismatch(name, "no array", type, shape);
  return check(*buffer, name, type, shape);
}

Buffer Buffers::result(const char* name, ffi::DataType type, const Shape& shape) {
  if (!status_.ok()) return {};
  if (next_result_ >= results_.size()) return mismatch(name, "no result", type, shape);
  auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
  if (!buffer.has_value()) return mismatch(name, "no array", type, shape);
  return check(**buffer, name, type, shape);
}

void Buffers::fail(const std::string& what, const std::string& got, const std::string& expected) {
  if (!status_.ok()) return;
  status_ = Status::error(message(std::string(op_) + ": " + what, got, expected, kTraceAgain));
}

void Buffers::require_end() {
  if (next_operand_ == operands_.size() && next_result_ == results_.size()) return;
  const auto counts = [](size_t operands, size_t results) {
    return std::to_string(operands) + " operands, " + std::to_string(results) + " results";
  };
  fail("there are too many buffers", counts(operands_.size(), results_.size()),
       counts(next_operand_, next_result_));
}

Buffer Buffers::check(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type,
                      const Shape& shape) {
  const auto dims = buffer.dimensions();
  const int rank = shape.rank();
  bool fits =
      buffer.element_type() == type && static_cast<int>(dims.size()) == rank && fits_ints(dims);
  for (int i = 0; fits && i < rank; ++i) fits = shape.size(i) < 0 || shape.size(i) == dims[i];
  if (!fits) {
    return mismatch(name, type_text(buffer.element_type()) + shape_text(dims), type, shape);
  }
  return {name, buffer.untyped_data(), rank > 2 ? dims[0] : 1, rank > 1 ? dims[rank - 2] : 1,
          dims[rank - 1]};
}

Buffer Buffers::mismatch(const char* name, const std::string& got, ffi::DataType type,
                         const Shape& shape) {
  fail(std::string(name) + " does not fit", got,
       type_text(type) + shape.text() + ", with at most 2^31 - 2048 rows and columns");
  return {};
}

ScaleShape scale_shape(ScaleTile tile, int64_t rows, int64_t columns) {
  switch (tile) {
    case ScaleTile::k1x128:
      return {ceil_div(columns, kScaleBlock), round_up(rows, 4)};
    case ScaleTile::k1xK:
      return {1, round_up(rows, 4)};
    case ScaleTile::k128x128:
      return {ceil_div(rows, kScaleBlock), round_up(ceil_div(columns, kScaleBlock), 4)};
    case ScaleTile::kTensor:
      return {1, 4};
  }
  return {};
}

}  // namespace fp8gemm
