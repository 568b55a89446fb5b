// What the XLA FFI handlers share: attributes, checks of buffers, errors.
#pragma once

#include <initializer_list>
#include <memory>
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

std::string shape_text(const ffi::AnyBuffer& buffer);

// Attributes that are absent or of another type stay out; the parser of the spec names them.
Attributes read_attributes(const ffi::Dictionary& dictionary,
                           std::initializer_list<const char*> integers,
                           std::initializer_list<const char*> strings);

// Programs are traced by primitives.py, so a mismatch is a bug, or a program exported by another
// version. `what`: operation and operand.
Status wrong_operand(const std::string& what, const std::string& got, const std::string& expected);

// Compiles for a call site: instantiate's state.
template <class Spec>
struct CallState {
  static ffi::TypeId id;
  Spec spec;
  std::shared_ptr<Program> program;
};
// NOTE: outside the class: inside it the type is incomplete and its destructor would never run.
template <class Spec>
ffi::TypeId CallState<Spec>::id = {};

// Every run, before a CUDA graph is captured: loads the kernel on a device that has not got it.
template <class Spec>
ffi::Error initialize(CUstream stream, int32_t device, CallState<Spec>* state, ffi::RemainingArgs,
                      ffi::RemainingRets, ffi::Dictionary) {
  return to_error(state->program->load(stream, device).status());
}

// What initialize and execute are given.
template <class Spec, class Binding>
auto bind_call(Binding&& stage) {
  return std::forward<Binding>(stage)
      .template Ctx<ffi::PlatformStream<CUstream>>()
      .template Ctx<ffi::DeviceOrdinal>()
      .template Ctx<ffi::State<CallState<Spec>>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs();
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fp8gemm
