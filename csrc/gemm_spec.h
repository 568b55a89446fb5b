// The attributes of a custom call, as the C++ struct that the kernel is specialised on, and as the
// text of the program to compile.
#pragma once

#include <map>
#include <string>
#include <variant>
#include <vector>

#include "kernels/params.cuh"
#include "status.h"

namespace fp8gemm {

using Attributes = std::map<std::string, std::variant<int64_t, std::string>>;

enum class Kernel : int { kPersistent, kFewRows };

struct KernelSpec {
  Kernel kernel;
  GemmSpec gemm;
  int num_sms;  // upper bound of the launch, 0 for all; not part of the compiled code
};

Result<KernelSpec> parse_spec(const Attributes& attributes);

// Names of the rows of the variant table, in the order of enum Variant.
std::vector<std::string> variant_names();

// A whole CUDA C++ program: the spec, the wgmma wrapper for its block_n, the kernel, entry point.
std::string program_text(const KernelSpec& spec);

constexpr const char* kEntryPoint = "fp8_gemm";

int threads(const KernelSpec& spec);
int cluster_size(const KernelSpec& spec);

}  // namespace fp8gemm
