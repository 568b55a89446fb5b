// Reads the operands and results of a custom call, one after the other, and checks each.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels/params.cuh"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace fp8gemm {

namespace ffi = xla::ffi;

constexpr int64_t kAnySize = -1;

// What a buffer must look like: up to three dims, of which kAnySize fits any.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes);

  int rank() const { return rank_; }
  int64_t size(int dim) const { return sizes_[dim]; }
  std::string text() const;

 private:
  int rank_ = 0;
  std::array<int64_t, 3> sizes_{};
};

// A buffer as a stack of matrices [groups, rows, columns], of which it may lack the first dims.
// Where a check failed: null, and no groups, rows or columns.
struct Buffer {
  const char* name = "";
  void* data = nullptr;
  int64_t groups = 0, rows = 0, columns = 0;

  template <class T>
  T* pointer() const {
    return static_cast<T*>(data);
  }
};

// The first error is kept, and from there on no buffer is looked at. So a handler may ask for all
// it wants, and look at status() before it uses any.
//
// Programs are traced by this package, so a mismatch is a bug, or a program that another version
// has exported.
class Buffers {
 public:
  Buffers(const char* op, ffi::RemainingArgs operands, ffi::RemainingRets results)
      : op_(op), operands_(operands), results_(results) {}

  // The next one. All dims but the last multiply to kMostCount at most, and so does the last.
  Buffer operand(const char* name, ffi::DataType type, const Shape& shape);
  Buffer result(const char* name, ffi::DataType type, const Shape& shape);

  // Another error of the call: `what` comes after the name of the operation.
  void fail(const std::string& what, const std::string& got, const std::string& expected);
  // That no buffer is left over.
  void require_end();

  const Status& status() const { return status_; }

 private:
  Buffer check(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type,
               const Shape& shape);
  Buffer mismatch(const char* name, const std::string& got, ffi::DataType type, const Shape& shape);

  const char* op_;
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  size_t next_operand_ = 0, next_result_ = 0;
  Status status_;
};

// Lines and columns of the scales of a matrix [rows, columns], as ScaleTile says.
struct ScaleShape {
  int64_t lines, columns;
};
ScaleShape scale_shape(ScaleTile tile, int64_t rows, int64_t columns);

}  // namespace fp8gemm
