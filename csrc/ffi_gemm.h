// The XLA FFI handlers of jax_fp8gemm_gemm_v1.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace fp8gemm {

XLA_FFI_Error* gemm_instantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* gemm_initialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* gemm_execute(XLA_FFI_CallFrame* frame);

// Of the state that instantiate makes and the other stages read.
xla::ffi::TypeId* gemm_state_id();
const xla::ffi::TypeInfo* gemm_state_info();

}  // namespace fp8gemm
