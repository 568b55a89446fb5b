// What the XLA FFI handlers share: attributes, stages, errors. For buffers see ffi_buffers.h.
#pragma once

#include <string>
#include <utility>

#include "attributes.h"
#include "driver.h"
#include "jit.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace fp8gemm {

namespace ffi = xla::ffi;

ffi::Error to_error(const Status& status);

// All of them, so that the parser of the spec can name what is missing or of another type.
Attributes read_attributes(const ffi::Dictionary& dictionary);

// Compiles for a call site: instantiate's state.
template <class Spec>
struct CallState {
  static ffi::TypeId id;
  Spec spec;
  const Program* program;
};
// NOTE: outside the class: inside it the type is incomplete and its destructor would never run.
template <class Spec>
ffi::TypeId CallState<Spec>::id = {};

// Every run, before a CUDA graph is captured: loads the kernel in a context that has not got it.
template <class Spec>
ffi::Error initialize(CUstream stream, CallState<Spec>* state, ffi::RemainingArgs,
                      ffi::RemainingRets, ffi::Dictionary) {
  return to_error(state->program->load(stream).status());
}

// What initialize and execute are given.
template <class Spec, class Binding>
auto bind_call(Binding&& stage) {
  return std::forward<Binding>(stage)
      .template Ctx<ffi::PlatformStream<CUstream>>()
      .template Ctx<ffi::State<CallState<Spec>>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

}  // namespace fp8gemm
