// The XLA FFI handlers of jax_fp8gemm_quantize_v1.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace fp8gemm {

XLA_FFI_Error* quantize_instantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* quantize_initialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* quantize_execute(XLA_FFI_CallFrame* frame);

// Of the state that instantiate makes and the other stages read.
xla::ffi::TypeId* quantize_state_id();
const xla::ffi::TypeInfo* quantize_state_info();

}  // namespace fp8gemm
