#include "jit.h"

#include <chrono>
#include <cstdio>
#include <exception>
#include <future>
#include <vector>

#include "files.h"
#include "kernel_sources.h"

namespace fp8gemm {
namespace {

const std::vector<const char*> kFlags = {
    "--gpu-architecture=sm_90a", "-std=c++20", "-default-device",
    "--ptxas-options=-v",  // registers and spills, into the log
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

using Log = std::string;

Log program_log(const Nvrtc& nvrtc, nvrtcProgram program) {
  size_t size = 0;
  nvrtc.log_size(program, &size);
  Log log(size, '\0');
  if (size) nvrtc.log(program, log.data());
  while (!log.empty() && log.back() == '\0') log.pop_back();
  return log;
}

Result<CompiledKernel> compile(const Nvrtc& nvrtc, const std::string& text, std::string* ptx) {
  std::vector<const char*> names, sources;
  for (const KernelSource& source : kernel_sources()) {
    names.push_back(source.name);
    sources.push_back(source.text);
  }
  nvrtcProgram program;
  if (nvrtc.create(&program, text.c_str(), "fp8_gemm.cu", static_cast<int>(names.size()),
                   sources.data(), names.data()) != 0) {
    return Status::error(message("NVRTC does not take the program", nvrtc.path,
                                 "NVRTC 12.3 or newer", "set JAX_FP8GEMM_NVRTC to another one"));
  }
  const int code = nvrtc.compile(program, static_cast<int>(kFlags.size()), kFlags.data());
  CompiledKernel kernel{"", program_log(nvrtc, program)};
  size_t size = 0;
  if (code == 0 && nvrtc.cubin_size(program, &size) == 0) {
    kernel.cubin.resize(size);
    nvrtc.cubin(program, kernel.cubin.data());
    if (ptx && nvrtc.ptx_size(program, &size) == 0) {
      ptx->resize(size);
      nvrtc.ptx(program, ptx->data());
    }
  }
  nvrtc.destroy(&program);
  if (kernel.cubin.empty()) {
    return Status::error(message("the kernel does not compile",
                                 std::string(nvrtc.error_string(code)) + " from " + nvrtc.path,
                                 "NVRTC 12.3 or newer, and for a product a legal GemmConfig",
                                 "see what the compiler says:\n" + kernel.log));
  }
  return kernel;
}

void dump(const std::string& folder, const std::string& name, const std::string& text,
          const std::string& ptx, const CompiledKernel& kernel) {
  make_folders(folder);
  const std::string base = folder + "/" + name;
  const bool good = write_file(base + ".cu", text) &&
                    write_file(base + ".ptx", ptx.c_str()) &&  // without the final zero byte
                    write_file(base + ".log", kernel.log) &&
                    write_file(base + ".cubin", kernel.cubin);
  if (!good) {
    std::fprintf(stderr, "jax_fp8gemm: cannot write to JAX_FP8GEMM_DUMP, %s\n", folder.c_str());
  }
}

// Everything that the machine code depends on, but for the patch level of NVRTC, which it does not
// tell.
std::string cache_key(const Nvrtc& nvrtc, const std::string& text, const std::string& version) {
  std::string key = "jax_fp8gemm " + version + "\nnvrtc " + std::to_string(nvrtc.major) + "." +
                    std::to_string(nvrtc.minor) + "\n";
  for (const char* flag : kFlags) key += std::string(flag) + "\n";
  key += text;
  for (const KernelSource& source : kernel_sources()) key += source.text;
  return key;
}

Result<std::shared_ptr<Program>> make_program(const ProgramText& source) {
  const JitOptions options = fp8gemm::options();
  const auto start = std::chrono::steady_clock::now();
  auto nvrtc = fp8gemm::nvrtc(options.nvrtc);
  if (!nvrtc.ok()) return nvrtc.status();

  const std::string key = cache_key(**nvrtc, source.text, options.version);
  const DiskCache cache(options.cache_dir);
  const bool dumping = !options.dump_dir.empty();
  std::optional<CompiledKernel> kernel;
  if (!dumping) kernel = cache.load(key);
  const std::string origin = kernel ? "disk" : "nvrtc";
  if (!kernel) {
    std::string ptx;
    auto compiled = compile(**nvrtc, source.text, dumping ? &ptx : nullptr);
    if (!compiled.ok()) return compiled.status();
    kernel = std::move(*compiled);
    cache.store(key, *kernel);
    if (dumping) dump(options.dump_dir, source.name, source.text, ptx, *kernel);
  }
  const double seconds = seconds_since(start);
  if (options.verbose) {
    std::fprintf(stderr, "jax_fp8gemm: %s from %s in %.0f ms\n", source.name.c_str(),
                 origin.c_str(), 1e3 * seconds);
  }
  return std::make_shared<Program>(source, std::move(*kernel), origin, seconds);
}

using ProgramResult = Result<std::shared_ptr<Program>>;

// NOTE: others wait for the result, so that there must be one, whatever happens.
ProgramResult make_program_or_error(const ProgramText& source) {
  try {
    return make_program(source);
  } catch (const std::exception& e) {
    return Status::error(message("the kernel could not be made", e.what(), "memory for its text",
                                 "free some memory"));
  }
}

// The one piece of global state: programs by text. Leaked on purpose, since XLA may still destroy
// executables while the process ends.
struct Registry {
  std::mutex mutex;
  JitOptions options;
  std::map<std::string, std::shared_future<ProgramResult>> programs;
  CacheFacts facts;
};
Registry& registry() {
  static Registry& it = *new Registry;
  return it;
}

}  // namespace

void set_options(const JitOptions& options) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().options = options;
}

JitOptions options() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  return registry().options;
}

ProgramResult program(const ProgramText& source) {
  std::promise<ProgramResult> promise;
  std::shared_future<ProgramResult> future;
  bool mine = false;
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto found = registry().programs.find(source.text);
    if (found != registry().programs.end()) {
      future = found->second;
    } else {
      mine = true;
      future = promise.get_future().share();
      registry().programs.emplace(source.text, future);
    }
  }
  if (!mine) return future.get();

  ProgramResult made = make_program_or_error(source);
  promise.set_value(made);
  std::lock_guard<std::mutex> lock(registry().mutex);
  if (!made.ok()) {
    registry().programs.erase(source.text);  // what failed may be fixed before the next try
  } else {
    CacheFacts& facts = registry().facts;
    ++facts.programs;
    ++((*made)->origin == "disk" ? facts.from_disk : facts.compiled);
  }
  return made;
}

CacheFacts cache_facts() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  return registry().facts;
}

Result<LoadedKernel> Program::load(CUstream stream, int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = loaded_.find(device);
  if (found != loaded_.end()) return found->second;

  auto opened = driver();
  if (!opened.ok()) return opened.status();
  const Driver& d = **opened;
  CUcontext before = nullptr, context = nullptr;
  CUdevice handle;
  Status status = check(d, d.context_current(&before), "cuCtxGetCurrent");
  if (status.ok()) status = check(d, d.stream_context(stream, &context), "cuStreamGetCtx");
  if (status.ok()) status = check(d, d.context_set_current(context), "cuCtxSetCurrent");
  if (!status.ok()) return status;

  int major = 0, minor = 0;
  LoadedKernel kernel{};
  CUmodule module;
  status = check(d, d.context_device(&handle), "cuCtxGetDevice");
  if (status.ok()) {
    d.device_attribute(&major, kDeviceAttributeComputeCapabilityMajor, handle);
    d.device_attribute(&minor, kDeviceAttributeComputeCapabilityMinor, handle);
    d.device_attribute(&kernel.multiprocessors, kDeviceAttributeMultiprocessorCount, handle);
    if (major != 9 || minor != 0) {
      status = Status::error(
          message("this GPU cannot run the kernels",
                  "compute capability " + std::to_string(major) + "." + std::to_string(minor),
                  "9.0 (H100, H200, H800, H20, GH200)",
                  "run on a Hopper GPU, or on the CPU with "
                  "jax.default_device(jax.devices('cpu')[0])"));
    }
  }
  if (status.ok()) {
    // The module lives as long as the process: executables on other threads may hold its kernel.
    status = check(d, d.module_load(&module, compiled.cubin.data()), "cuModuleLoadData");
  }
  if (status.ok()) {
    status = check(d, d.module_function(&kernel.function, module, source.entry_point.c_str()),
                   "cuModuleGetFunction");
  }
  if (status.ok()) {
    status = check(d,
                   d.function_set_attribute(kernel.function, kFuncAttributeMaxDynamicSharedBytes,
                                            source.shared_bytes),
                   "cuFuncSetAttribute");
  }
  d.context_set_current(before);
  if (!status.ok()) return status;
  loaded_.emplace(device, kernel);
  return kernel;
}

}  // namespace fp8gemm
