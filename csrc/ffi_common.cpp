#include "ffi_common.h"

namespace fp8gemm {

ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::Internal(status.message());
}

std::string shape_text(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t dim : buffer.dimensions()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  }
  return text + "]";
}

Attributes read_attributes(const ffi::Dictionary& dictionary,
                           std::initializer_list<const char*> integers,
                           std::initializer_list<const char*> strings) {
  Attributes attributes;
  for (const char* name : integers) {
    auto value = dictionary.get<int64_t>(name);
    if (value.has_value()) attributes[name] = *value;
  }
  for (const char* name : strings) {
    auto value = dictionary.get<std::string_view>(name);
    if (value.has_value()) attributes[name] = std::string(*value);
  }
  return attributes;
}

Status wrong_operand(const std::string& what, const std::string& got, const std::string& expected) {
  return Status::error(
      message(what, got, expected, "trace the program again with this version of jax_fp8gemm"));
}

}  // namespace fp8gemm
