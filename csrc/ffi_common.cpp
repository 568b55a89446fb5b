#include "ffi_common.h"

namespace fp8gemm {

ffi::Error to_error(const Status& status) {
  return status.ok() ? ffi::Error::Success() : ffi::Error::Internal(status.message());
}

Attributes read_attributes(const ffi::Dictionary& dictionary) {
  Attributes attributes;
  for (std::string_view name : dictionary) {
    auto& value = attributes[std::string(name)];
    if (dictionary.contains<int64_t>(name)) {
      value = *dictionary.get<int64_t>(name);
    } else if (dictionary.contains<std::string_view>(name)) {
      value = std::string(*dictionary.get<std::string_view>(name));
    }
  }
  return attributes;
}

}  // namespace fp8gemm
