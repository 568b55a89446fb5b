// The attributes of a custom call, as the C++ struct that the kernel is specialised on, and as the
// text of the program to compile.
#pragma once

#include <string>
#include <vector>

#include "attributes.h"
#include "jit.h"
#include "kernels/params.cuh"
#include "status.h"

namespace fp8gemm {

enum class Kernel : int { kPersistent, kFewRows };

struct KernelSpec {
  Kernel kernel;
  GemmSpec gemm;
  int num_sms;  // upper bound of the launch, 0 for all; not part of the compiled code
};

Result<KernelSpec> parse_gemm_spec(const Attributes& attributes);

// Names of the rows of the variant table, in the order of enum Variant.
std::vector<std::string> variant_names();

// A whole CUDA C++ program: the spec, the wgmma wrapper for its block_n, the kernel, entry point.
ProgramText program_text(const KernelSpec& spec);

int threads(const KernelSpec& spec);
int cluster_size(const KernelSpec& spec);

}  // namespace fp8gemm
