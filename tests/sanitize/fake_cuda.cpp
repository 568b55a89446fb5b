// NVRTC and the CUDA driver, as far as csrc/driver.h declares them, without a compiler or a GPU.
// The library is opened as the real ones are: as libnvrtc.so by its path, as libcuda.so.1 by its
// name.
#include "fake_cuda.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kFailure = 999;  // CUDA_ERROR_UNKNOWN
constexpr int kInvalidContext = 201, kInvalidHandle = 400;

struct Context {
  std::atomic<uint64_t> id;
};
Context contexts[fake::kContexts] = {{1}, {2}, {3}, {4}};
std::atomic<uint64_t> next_id{5};

struct Stream {
  Context* context;
};
Stream streams[fake::kContexts] = {{&contexts[0]}, {&contexts[1]}, {&contexts[2]}, {&contexts[3]}};

struct Module {
  uint64_t context_id;
};
thread_local Context* current = nullptr;

struct Program {
  std::string text, log;
  bool compiled = false;
};

bool fails(fake::Failing call) { return fake_knobs.failing == call; }

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// An ELF, as far as anyone looks.
std::string cubin_of(const Program& program) {
  return "\x7f"
         "ELF " +
         program.text;
}

template <class Text>
int copy(const Text& text, char* to) {
  std::memcpy(to, text.c_str(), text.size());
  return 0;
}

}  // namespace

extern "C" {

fake::Knobs fake_knobs;

void* fake_stream(int context) { return &streams[context]; }

void fake_reset_context(int context) { contexts[context].id = next_id++; }

// ---- NVRTC --------------------------------------------------------------------------------------

int nvrtcVersion(int* major, int* minor) {
  *major = 12, *minor = 9;
  return 0;
}

const char* nvrtcGetErrorString(int code) { return code ? "FAKE_ERROR" : "FAKE_SUCCESS"; }

int nvrtcCreateProgram(Program** program, const char* text, const char*, int headers,
                       const char* const* sources, const char* const* names) {
  if (fails(fake::kCreate)) return 1;
  for (int i = 0; i < headers; ++i) {
    if (!std::strlen(sources[i]) || !std::strlen(names[i])) return 1;
  }
  ++fake_knobs.live_programs;
  *program = new Program{text, "", false};
  return 0;
}

int nvrtcDestroyProgram(Program** program) {
  --fake_knobs.live_programs;
  delete *program;
  *program = nullptr;
  return 0;
}

int nvrtcCompileProgram(Program* program, int, const char* const*) {
  sleep_ms(fake_knobs.compile_ms);
  program->log = "fake log: registers";
  if (fails(fake::kCompile)) return 6;
  ++fake_knobs.compilations;
  program->compiled = true;
  return 0;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program->log.size() + 1;
  return fails(fake::kLog);
}

int nvrtcGetProgramLog(Program* program, char* log) { return copy(program->log, log); }

int nvrtcGetCUBINSize(Program* program, size_t* size) {
  if (!program->compiled || fails(fake::kCubinSize)) return 1;
  *size = fails(fake::kEmptyCubin) ? 0 : cubin_of(*program).size();
  return 0;
}

int nvrtcGetCUBIN(Program* program, char* cubin) {
  return fails(fake::kCubin) ? 1 : copy(cubin_of(*program), cubin);
}

int nvrtcGetPTXSize(Program*, size_t* size) {
  *size = 4;
  return fails(fake::kPtx);
}

int nvrtcGetPTX(Program*, char* ptx) { return copy(std::string("ptx"), ptx); }

// ---- The driver ---------------------------------------------------------------------------------

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
  *version = 12090;
  return 0;
}

int cuGetErrorString(int, const char** words) {
  *words = "fake error";
  return 0;
}

int cuDeviceGetCount(int* count) {
  *count = fake::kContexts;
  return 0;
}

int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}

int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "fake H200", size);
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (fails(fake::kAttribute)) return kFailure;
  *value = attribute == 75 ? (fails(fake::kOldDevice) ? 8 : 9) : attribute == 76 ? 0 : 132;
  return 0;
}

int cuCtxGetCurrent(Context** context) {
  *context = current;
  return 0;
}

int cuCtxSetCurrent(Context* context) {
  if (fails(fake::kSetContext)) return kFailure;
  current = context;
  return 0;
}

int cuCtxGetDevice(int* device) {
  if (!current) return kInvalidContext;
  *device = static_cast<int>(current - contexts);
  return 0;
}

int cuCtxGetId(Context* context, unsigned long long* id) {
  *id = context->id;
  return fails(fake::kContextId) ? kFailure : 0;
}

int cuStreamGetCtx(Stream* stream, Context** context) {
  *context = stream->context;
  return fails(fake::kStreamContext) ? kFailure : 0;
}

int cuModuleLoadData(Module** module, const void* cubin) {
  if (fails(fake::kModuleLoad) || std::memcmp(cubin,
                                              "\x7f"
                                              "ELF",
                                              4) != 0)
    return kFailure;
  if (!current) return kInvalidContext;
  sleep_ms(fake_knobs.load_ms);
  ++fake_knobs.modules;
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Module>> all;  // as long as the process
  std::lock_guard<std::mutex> lock(mutex);
  all.push_back(std::make_unique<Module>(Module{current->id}));
  *module = all.back().get();
  return 0;
}

int cuModuleGetFunction(Module** function, Module* module, const char* name) {
  if (fails(fake::kFunction) || !std::strlen(name)) return kFailure;
  *function = module;
  return 0;
}

int cuFuncSetAttribute(Module*, int, int) { return fails(fake::kFunctionAttribute) ? kFailure : 0; }

// The beginning of CUlaunchConfig: three sizes of the grid, three of a block, bytes, the stream.
struct LaunchConfig {
  unsigned sizes[7];
  Stream* stream;
};

int cuLaunchKernelEx(const LaunchConfig* config, Module* function, void** arguments, void**) {
  if (fails(fake::kLaunch) || !arguments[0]) return kFailure;
  for (int i = 0; i < 6; ++i) {
    if (config->sizes[i] == 0) return kFailure;
  }
  if (function->context_id != config->stream->context->id) return kInvalidHandle;
  ++fake_knobs.launches;
  return 0;
}

int cuTensorMapEncodeTiled(void* map, int, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int,
                           int, int, int) {
  if (fails(fake::kEncode) || !address) return kFailure;
  uint64_t sum = 0;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return kFailure;
    if (i + 1 < rank && strides[i] % 16) return kFailure;
    sum += dims[i];
  }
  std::memset(map, static_cast<int>(sum), 128);
  return 0;
}
}
