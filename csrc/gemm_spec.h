// The attributes of a GEMM's custom call, as the C++ struct that the kernel is specialised on, and
// as the text of the program to compile.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attributes.h"
#include "jit.h"
#include "kernels/plan.cuh"
#include "status.h"

namespace fp8gemm {

// What a call site says: the spec that is compiled, and what only its launch needs.
struct GemmCall {
  GemmSpec spec;
  bool pair;    // a bf16 rhs lies in two arrays, side by side by their last dims
  int num_sms;  // that the launch may use; 0: all
};

// Never a spec that why_illegal() refuses.
Result<GemmCall> parse_gemm_call(const Attributes& attributes);

// What is computed, whatever the config: the fields of the spec up to `accumulate`, and `aligned`.
Result<GemmSpec> parse_gemm_problem(const Attributes& attributes);

std::optional<Kernel> kernel_named(std::string_view attribute);
std::optional<Multicast> multicast_named(std::string_view attribute);
const char* name_of(Store store);

// Names of the rows of the variant table, in the order of enum Variant.
std::vector<std::string> variant_names();

// A whole CUDA C++ program: the spec, the wgmma wrapper for its block_n, the kernel, entry point.
ProgramText program_text(const GemmSpec& spec);

}  // namespace fp8gemm
