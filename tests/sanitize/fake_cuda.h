// What the test sets and reads of fake_cuda.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace fake {

// Calls that can be made to fail.
enum Failing {
  kNothing,
  kCreate,
  kCompile,
  kCubinSize,
  kCubin,
  kEmptyCubin,
  kPtx,
  kLog,
  kStreamContext,
  kContextId,
  kSetContext,
  kAttribute,
  kOldDevice,
  kModuleLoad,
  kFunction,
  kFunctionAttribute,
  kEncode,
  kLaunch,
  kCalls,
};

struct Knobs {
  std::atomic<int> failing{kNothing};
  std::atomic<int> compile_ms{0};
  std::atomic<int> load_ms{0};
  // What has happened.
  std::atomic<int> compilations{0};
  std::atomic<int> modules{0};
  std::atomic<int> launches{0};
  std::atomic<int> live_programs{0};  // of NVRTC, created and not destroyed
};

constexpr int kContexts = 4;

}  // namespace fake

extern "C" {
extern fake::Knobs fake_knobs;
// A stream of one of the contexts.
void* fake_stream(int context);
// A context that is destroyed and made again has the same handle, another id, and no kernels.
void fake_reset_context(int context);
}
