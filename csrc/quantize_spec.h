// The attributes of a quantising custom call, and the text of the program to compile.
#pragma once

#include "attributes.h"
#include "jit.h"
#include "kernels/plan.cuh"

namespace fp8gemm {

// Never a spec that why_illegal() refuses.
Result<QuantizeSpec> parse_quantize_spec(const Attributes& attributes);

ProgramText program_text(const QuantizeSpec& spec);

}  // namespace fp8gemm
