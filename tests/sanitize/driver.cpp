// Host code under sanitizers, without Python: run.py builds and runs it.
//   driver LIBNVRTC FOLDER    both of fake_cuda.cpp; a folder for the kernel cache
// What a check here says counts little beside what the sanitizers say of the code that it runs.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "disk_cache.h"
#include "fake_cuda.h"
#include "fake_xla.h"
#include "ffi_gemm.h"
#include "ffi_quantize.h"
#include "files.h"
#include "gemm_spec.h"
#include "jit.h"
#include "kernel_sources.h"
#include "quantize_spec.h"
#include "sha256.h"

namespace fp8gemm {

std::span<const KernelSource> kernel_sources() {
  static const KernelSource all[] = {{"params.cuh", "// params"}, {"gemm.cuh", "// gemm"}};
  return all;
}

namespace {

constexpr int kThreads = 8, kRounds = 60;
constexpr int64_t kM = 64, kN = 64, kK = 256;

void expect(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "not so: %s\n", what.c_str());
  std::exit(1);
}

void expect_part(const std::string& text, const std::string& part) {
  expect(text.find(part) != std::string::npos, "\"" + text + "\" has \"" + part + "\"");
}

fake::Knobs* knobs = nullptr;
void* (*stream_of)(int) = nullptr;
void (*reset_context)(int) = nullptr;

void open_fake(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  expect(library && library == driver, "the fake libraries are one, and found as the real ones");
  knobs = static_cast<fake::Knobs*>(dlsym(library, "fake_knobs"));
  stream_of = reinterpret_cast<void* (*)(int)>(dlsym(library, "fake_stream"));
  reset_context = reinterpret_cast<void (*)(int)>(dlsym(library, "fake_reset_context"));
}

void in_threads(const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// ---- Digests ------------------------------------------------------------------------------------

// Source: FIPS 180-4's examples (SHA256.pdf of NIST's cryptographic standards), and the digest of
// nothing.
void test_sha256() {
  const std::pair<std::string, const char*> known[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {std::string(1000000, 'a'),
       "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto& [text, digest] : known) expect(sha256(text) == digest, digest);
}

// ---- Calls --------------------------------------------------------------------------------------

alignas(16) char memory[16];  // what arrays point at: nothing on the host reads it

fake::Call gemm_call(int block_n = 8, int group_m = 8) {
  return {{{"variant", "dense"},
           {"lhs_scale", "1x128"},
           {"rhs_scale", "128x128"},
           {"rhs", "fp8"},
           {"out", "bf16"},
           {"accumulate", int64_t{0}},
           {"aligned", int64_t{1}},
           {"kernel", "few_rows"},
           {"block_m", int64_t{64}},
           {"block_n", int64_t{block_n}},
           {"stages", int64_t{4}},
           {"multicast", "none"},
           {"split_k", int64_t{1}},
           {"group_m", int64_t{group_m}}},
          {{XLA_FFI_DataType_F8E4M3FN, {kM, kK}, memory},
           {XLA_FFI_DataType_F8E4M3FN, {kN, kK}, memory},
           {XLA_FFI_DataType_F32, {kK / 128, kM}, memory},
           {XLA_FFI_DataType_F32, {1, 4}, memory}},
          {{XLA_FFI_DataType_BF16, {kM, kN}, memory}}};
}

fake::Call cast_call() {
  fake::Call call = {{{"source", "float"}, {"type", "bf16"}, {"tile", "1x128"}},
                     {{XLA_FFI_DataType_BF16, {1, kM, kK}, memory}},
                     {{XLA_FFI_DataType_F8E4M3FN, {1, kM, kK}, memory},
                      {XLA_FFI_DataType_F32, {1, kK / 128, kM}, memory}}};
  for (const char* flag : {"transposed", "grouped", "gather", "pair"}) {
    call.attributes[flag] = int64_t{0};
  }
  for (const char* flag : {"pow2", "rows", "aligned"}) call.attributes[flag] = int64_t{1};
  return call;
}

struct Handlers {
  XLA_FFI_Handler *instantiate, *initialize, *execute;
  const xla::ffi::TypeInfo* state;
};
Handlers gemm_handlers() {
  return {gemm_instantiate, gemm_initialize, gemm_execute, gemm_state_info()};
}
Handlers cast_handlers() {
  return {quantize_instantiate, quantize_initialize, quantize_execute, quantize_state_info()};
}

// All stages of `traced`, the last with the arrays of `run`; the first error, or "".
std::string run_call(const Handlers& handlers, const fake::Call& traced, const fake::Call& run,
                     int context) {
  XLA_FFI_ExecutionContext execution{stream_of(context), nullptr};
  std::string error =
      fake::run(handlers.instantiate, XLA_FFI_ExecutionStage_INSTANTIATE, traced, execution);
  if (!error.empty()) return error;
  error = fake::run(handlers.initialize, XLA_FFI_ExecutionStage_INITIALIZE, traced, execution);
  if (error.empty()) {
    error = fake::run(handlers.execute, XLA_FFI_ExecutionStage_EXECUTE, run, execution);
  }
  handlers.state->deleter(execution.state);
  return error;
}

std::string run_call(const Handlers& handlers, const fake::Call& call, int context = 0) {
  return run_call(handlers, call, call, context);
}

void configure(const char* nvrtc, const std::string& folder) {
  JitOptions options;
  options.nvrtc = nvrtc, options.cache_dir = folder, options.version = "0.0.0";
  set_options(options);
}

void test_calls() {
  expect(run_call(gemm_handlers(), gemm_call()).empty(), "a GEMM runs");
  expect(run_call(cast_handlers(), cast_call()).empty(), "a cast runs");
  expect(knobs->launches == 2 && knobs->modules == 2, "both are launched");
  expect(run_call(gemm_handlers(), gemm_call(), 1).empty(), "a GEMM runs in another context");
  expect(knobs->modules == 3, "each context has its own module");
  reset_context(1);
  expect(run_call(gemm_handlers(), gemm_call(), 1).empty(), "a GEMM runs in a new context");
  expect(knobs->modules == 4, "a new context has its own module, whatever its handle");
}

// ---- What hand-made programs hold ---------------------------------------------------------------

void test_hand_made_arrays() {
  fake::Call call = gemm_call();
  call.operands[1].is_array = false;
  expect_part(run_call(gemm_handlers(), gemm_call(), call, 0), "got       no array");
  call = gemm_call();
  call.operands.pop_back();
  expect_part(run_call(gemm_handlers(), gemm_call(), call, 0), "got       no operand");
  call = gemm_call();
  call.results.clear();
  expect_part(run_call(gemm_handlers(), gemm_call(), call, 0), "got       no result");
  call = cast_call();
  call.results[0].is_array = false;
  expect_part(run_call(cast_handlers(), cast_call(), call, 0), "got       no array");
  call = cast_call();
  call.results.push_back(call.results[0]);
  expect_part(run_call(cast_handlers(), cast_call(), call, 0), "too many buffers");
}

template <class T>
const T& one_of(const std::vector<T>& all, std::mt19937& random) {
  return all[random() % all.size()];
}

void change_array(fake::Array& array, std::mt19937& random) {
  static const std::vector<int64_t> sizes = {0, 1, 3, 64, 128, 256, INT32_MAX, int64_t{1} << 40};
  switch (random() % 5) {
    case 0:
      array.is_array = false;
      break;
    case 1:
      array.type = static_cast<int>(random() % 34);
      break;
    case 2:
      array.dims.push_back(one_of(sizes, random));
      break;
    case 3:
      if (!array.dims.empty()) array.dims.pop_back();
      break;
    default:
      if (!array.dims.empty()) array.dims[random() % array.dims.size()] = one_of(sizes, random);
  }
}

void change_attribute(fake::Attributes& attributes, std::mt19937& random) {
  using Value = fake::Attributes::mapped_type;
  static const std::vector<Value> values = {
      int64_t{0},  int64_t{1},  int64_t{2},        int64_t{-1}, int64_t{3},  int64_t{64},
      int64_t{16}, INT64_MAX,   INT64_MIN,         "",          "fp8",       "bf16",
      "ragged",    "masked",    "128x128",         "1xk",       "tensor",    "persistent",
      "lhs",       "swiglu",    "swiglu_backward", "f32",       0.5,         "contiguous",
      "batched",   int64_t{32}, int64_t{128},      int64_t{8},  "transposed"};
  const size_t index = random() % attributes.size();
  auto entry = std::next(attributes.begin(), static_cast<std::ptrdiff_t>(index));
  if (random() % 8 == 0) {
    attributes.erase(entry);
  } else {
    entry->second = one_of(values, random);
  }
}

// Programs that were changed at random: each gives an error or is launched.
void test_changed_programs() {
  std::mt19937 random(20261130);
  int launched = 0;
  for (int i = 0; i < 4000; ++i) {
    const bool gemm = random() % 2;
    fake::Call traced = gemm ? gemm_call() : cast_call();
    for (uint32_t n = random() % 3; n > 0; --n) change_attribute(traced.attributes, random);
    fake::Call run = traced;
    for (uint32_t n = random() % 3; n > 0; --n) {
      auto& arrays = random() % 2 ? run.operands : run.results;
      change_array(arrays[random() % arrays.size()], random);
    }
    launched += run_call(gemm ? gemm_handlers() : cast_handlers(), traced, run, 0).empty();
  }
  expect(launched > 100, "some programs stay right");
}

// ---- Failures -----------------------------------------------------------------------------------

void test_failures() {
  const std::pair<fake::Failing, const char*> known[] = {
      {fake::kCreate, "NVRTC does not take the program"},
      {fake::kCompile, "the kernel does not compile"},
      {fake::kCubinSize, "the kernel does not compile"},
      {fake::kCubin, "the kernel does not compile"},
      {fake::kEmptyCubin, "the kernel does not compile"},
      {fake::kStreamContext, "cuStreamGetCtx: fake error (999)"},
      {fake::kContextId, "cuCtxGetId"},
      {fake::kSetContext, "cuCtxSetCurrent"},
      {fake::kAttribute, "cuDeviceGetAttribute"},
      {fake::kOldDevice, "compute capability 8.0"},
      {fake::kModuleLoad, "cuModuleLoadData"},
      {fake::kFunction, "cuModuleGetFunction"},
      {fake::kFunctionAttribute, "cuFuncSetAttribute"},
      {fake::kEncode, "tensor map of lhs"},
      {fake::kLaunch, "cuLaunchKernelEx"}};
  int block_n = 8;
  for (const auto& [call, words] : known) {
    const fake::Call fresh = gemm_call(block_n, 6);
    knobs->failing = call;
    expect_part(run_call(gemm_handlers(), fresh), words);
    knobs->failing = fake::kNothing;
    expect(run_call(gemm_handlers(), fresh).empty(), "what failed is tried again");
    block_n += 8;
  }
  knobs->failing = fake::kLog;
  expect(run_call(gemm_handlers(), gemm_call(8, 9)).empty(), "a log is not needed");
  knobs->failing = fake::kNothing;
  expect(knobs->live_programs == 0, "NVRTC's programs are destroyed");
}

void test_exceptional_options(const char* nvrtc, const std::string& folder) {
  configure("", folder);
  expect_part(run_call(gemm_handlers(), gemm_call(8, 10)), "no run-time compiler");
  configure("/nowhere/libnvrtc.so", folder);
  expect_part(run_call(gemm_handlers(), gemm_call(8, 10)), "does not load");
  JitOptions dumping;
  dumping.nvrtc = nvrtc, dumping.verbose = true, dumping.dump_dir = folder + "-dump";
  set_options(dumping);
  expect(run_call(gemm_handlers(), gemm_call(8, 10)).empty(), "dumps, without a cache on disk");
  configure(nvrtc, folder);
}

// ---- The cache on disk --------------------------------------------------------------------------

void test_disk_cache(const std::string& folder) {
  const DiskCache cache(folder, "1.0"), other(folder, "1.1");
  expect(!cache.load("key"), "an empty cache has nothing");
  const CompiledKernel kernel{std::string("cu\0bin", 6), "log"};
  cache.store("key", kernel);
  const auto loaded = cache.load("key");
  expect(loaded && loaded->cubin == kernel.cubin && loaded->log == "log",
         "what is stored is there");
  expect(!other.load("key") && !cache.load("another key"), "keys and versions are kept apart");

  const std::string path = folder + "/" + sha256("key") + "-1.0.kernel";
  std::string good;
  const OpenFile file(open(path.c_str(), O_RDONLY));
  expect(file.ok() && read_all(file, 1 << 20, good) && good.size() > 64, "the entry can be read");
  std::string few;
  expect(!read_all(OpenFile(open(path.c_str(), O_RDONLY)), 10, few), "no more than asked is read");
  for (size_t size = 0; size < good.size(); ++size) {  // cut short, and one byte changed
    std::string bad = good;
    bad[size] ^= 0x20;
    expect(write_file(path, good.substr(0, size)) && !cache.load("key"), "a part is no entry");
    expect(write_file(path, bad) && !cache.load("key"), "a damaged entry is none");
  }
  unlink(path.c_str());
  expect(mkfifo(path.c_str(), 0600) == 0 && !cache.load("key"), "a FIFO is no entry");
  cache.store("key", kernel);
  expect(cache.load("key").has_value(), "and is replaced");
}

void test_disk_cache_in_threads(const std::string& folder) {
  in_threads([&](int thread) {
    const DiskCache cache(folder, "1.0");
    for (int i = 0; i < kRounds; ++i) {
      const std::string key = std::to_string((i + thread) % 5);
      const auto loaded = cache.load(key);
      expect(!loaded || loaded->log == key, "entries are whole");
      cache.store(key, {"cubin", key});
    }
  });
}

// ---- All at once --------------------------------------------------------------------------------

// Threads compile and launch the same and other kernels, while calls fail and contexts go.
void test_threads() {
  in_threads([](int thread) {
    std::mt19937 random(thread);
    for (int i = 0; i < kRounds; ++i) {
      if (thread == 0) knobs->failing = static_cast<int>(random() % fake::kCalls);
      if (thread == 1 && i % 8 == 0) reset_context(3);
      const int block_n = 8 * (1 + static_cast<int>(random() % 16));
      const bool gemm = random() % 4 != 0;
      // Errors are what the failing calls give; crashes and races are none of them.
      if (gemm) run_call(gemm_handlers(), gemm_call(block_n, 12), static_cast<int>(random() % 4));
      if (!gemm) run_call(cast_handlers(), cast_call(), static_cast<int>(random() % 4));
      (void)cache_facts();
    }
  });
  knobs->failing = fake::kNothing;
  for (int context = 0; context < fake::kContexts; ++context) {
    expect(run_call(gemm_handlers(), gemm_call(8, 12), context).empty(), "all is well afterwards");
  }
}

// One compilation and one module for a context, however many ask at once.
void test_once() {
  knobs->compile_ms = 50, knobs->load_ms = 20;
  const int compilations = knobs->compilations, modules = knobs->modules;
  in_threads([](int thread) {
    const std::string error = run_call(gemm_handlers(), gemm_call(8, 14), thread % 2);
    expect(error.empty(), error);
  });
  expect(knobs->compilations == compilations + 1, "one compilation");
  expect(knobs->modules == modules + 2, "one module for each context");
  knobs->compile_ms = 0, knobs->load_ms = 0;
}

int run_all(const char* nvrtc, const std::string& folder) {
  open_fake(nvrtc);
  gemm_state_id()->type_id = 1;  // as registering them does
  quantize_state_id()->type_id = 2;
  configure(nvrtc, folder + "/kernels");
  test_sha256();
  test_calls();
  test_hand_made_arrays();
  test_changed_programs();
  test_failures();
  test_exceptional_options(nvrtc, folder + "/kernels");
  test_disk_cache(folder + "/entries");
  test_disk_cache_in_threads(folder + "/entries");
  test_threads();
  test_once();
  expect(knobs->live_programs == 0, "NVRTC's programs are destroyed");
  std::puts("all as it should be");
  return 0;
}

}  // namespace
}  // namespace fp8gemm

int main(int count, char** arguments) {
  if (count != 3) {
    std::fputs("driver LIBNVRTC FOLDER\n", stderr);
    return 2;
  }
  return fp8gemm::run_all(arguments[1], arguments[2]);
}
