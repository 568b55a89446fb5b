// The text of csrc/kernels, put into the extension when it is built (cmake/embed.cmake).
#pragma once

#include <span>

namespace fp8gemm {

struct KernelSource {
  const char* name;  // as #include names it
  const char* text;
};

std::span<const KernelSource> kernel_sources();

}  // namespace fp8gemm
