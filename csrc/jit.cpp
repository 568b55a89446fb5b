#include "jit.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <utility>
#include <vector>

#include "files.h"
#include "kernel_sources.h"
#include "once.h"

namespace fp8gemm {
namespace {

const std::vector<const char*> kFlags = {
    "--gpu-architecture=sm_90a", "-std=c++20", "-default-device",
    "--ptxas-options=-v",  // registers and spills, into the log
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A program of NVRTC's, destroyed at the end of its life.
class NvrtcProgram {
 public:
  NvrtcProgram(const Nvrtc& nvrtc, const std::string& text) : nvrtc_(nvrtc) {
    std::vector<const char*> names, sources;
    for (const KernelSource& source : kernel_sources()) {
      names.push_back(source.name);
      sources.push_back(source.text);
    }
    code_ = nvrtc.create(&program_, text.c_str(), "fp8_gemm.cu", static_cast<int>(names.size()),
                         sources.data(), names.data());
  }
  ~NvrtcProgram() {
    if (program_) nvrtc_.destroy(&program_);
  }
  NvrtcProgram(const NvrtcProgram&) = delete;

  void compile() {
    if (code_ == 0) {
      code_ = nvrtc_.compile(program_, static_cast<int>(kFlags.size()), kFlags.data());
    }
  }

  // The first that was not 0, success.
  int code() const { return code_; }

  // One of the texts that NVRTC made: `size` tells its bytes, `copy` copies them.
  std::string take(int (*size)(nvrtcProgram, size_t*), int (*copy)(nvrtcProgram, char*)) {
    size_t bytes = 0;
    std::string text;
    if (code_ == 0) code_ = size(program_, &bytes);
    if (code_ == 0) text.resize(bytes);
    if (code_ == 0 && bytes > 0) code_ = copy(program_, text.data());
    return code_ == 0 ? text : "";
  }

  // Of a program that failed, too.
  std::string log() const {
    size_t bytes = 0;
    if (!program_ || nvrtc_.log_size(program_, &bytes) != 0) return "";
    std::string log(bytes, '\0');
    if (bytes > 0 && nvrtc_.log(program_, log.data()) != 0) return "";
    while (!log.empty() && log.back() == '\0') log.pop_back();
    return log;
  }

 private:
  const Nvrtc& nvrtc_;
  nvrtcProgram program_ = nullptr;
  int code_ = 0;
};

// ptx: where that goes too, or null.
Result<CompiledKernel> compile(const Nvrtc& nvrtc, const std::string& text, std::string* ptx) {
  const ForkWaits fork_waits;
  NvrtcProgram program(nvrtc, text);
  if (program.code() != 0) {
    return Status::error(
        message("NVRTC does not take the program",
                std::string(nvrtc.error_string(program.code())) + " from " + nvrtc.path,
                "NVRTC 12.3 or newer", "set JAX_FP8GEMM_NVRTC to another one"));
  }
  program.compile();
  CompiledKernel kernel{"", program.log()};
  kernel.cubin = program.take(nvrtc.cubin_size, nvrtc.cubin);
  if (ptx) *ptx = program.take(nvrtc.ptx_size, nvrtc.ptx);
  if (program.code() != 0 || kernel.cubin.empty()) {
    return Status::error(
        message("the kernel does not compile",
                std::string(nvrtc.error_string(program.code())) + " from " + nvrtc.path,
                "NVRTC 12.3 or newer, and for a GEMM a legal GemmConfig",
                std::string("if an older version exported the program: ") + kTraceAgain +
                    "; else see what the compiler says:\n" + kernel.log));
  }
  return kernel;
}

void dump(const std::string& folder, const std::string& name, const std::string& text,
          const std::string& ptx, const CompiledKernel& kernel) {
  make_folders(folder, 0755);
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

// All that is global: the options, the programs by their texts, and their kernels by the contexts'
// ids. A context's id, unlike its handle, is never used again. Leaked on purpose, as OnceTable
// says; the options and facts are guarded by shared_state().
JitOptions& global_options = *new JitOptions;
CacheFacts& global_facts = *new CacheFacts;
auto& programs = *new OnceTable<std::string, const Program*>;
auto& kernels = *new OnceTable<std::pair<const Program*, uint64_t>, LoadedKernel>;

Result<const Program*> make_program(const ProgramText& source) {
  const JitOptions options = fp8gemm::options();
  const auto start = std::chrono::steady_clock::now();
  auto nvrtc = fp8gemm::nvrtc(options.nvrtc);
  if (!nvrtc.ok()) return nvrtc.status();

  if (!options.cache_warning.empty()) warn_of_cache(options.cache_warning);
  const std::string key = cache_key(**nvrtc, source.text, options.version);
  const DiskCache cache(options.cache_dir, options.version);
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
  {
    std::lock_guard<std::mutex> lock(shared_state());
    ++global_facts.programs;
    ++(origin == "disk" ? global_facts.from_disk : global_facts.compiled);
  }
  return new Program{source, std::move(*kernel), origin, seconds};
}

// ---- Loading ------------------------------------------------------------------------------------

// The context whose kernels run on a stream, as long as this lives the current one.
class CurrentContext {
 public:
  CurrentContext(const Driver& driver, CUcontext context) : driver_(driver) {
    status_ = check(driver, driver.context_current(&before_), "cuCtxGetCurrent");
    if (status_.ok()) {
      status_ = check(driver, driver.context_set_current(context), "cuCtxSetCurrent");
      set_ = status_.ok();
    }
  }
  ~CurrentContext() {
    if (set_) driver_.context_set_current(before_);
  }
  CurrentContext(const CurrentContext&) = delete;

  const Status& status() const { return status_; }

 private:
  const Driver& driver_;
  CUcontext before_ = nullptr;
  bool set_ = false;
  Status status_;
};

Status read_attribute(const Driver& d, int& value, int attribute, CUdevice device) {
  return check(d, d.device_attribute(&value, attribute, device), "cuDeviceGetAttribute");
}

// That the current device is one that the kernels are compiled for; and how many multiprocessors it
// has.
Status check_device(const Driver& d, int& multiprocessors) {
  CUdevice device = 0;
  int major = 0, minor = 0;
  Status status = check(d, d.context_device(&device), "cuCtxGetDevice");
  const std::pair<int*, int> wanted[] = {{&major, kDeviceAttributeComputeCapabilityMajor},
                                         {&minor, kDeviceAttributeComputeCapabilityMinor},
                                         {&multiprocessors, kDeviceAttributeMultiprocessorCount}};
  for (const auto& [value, attribute] : wanted) {
    if (status.ok()) status = read_attribute(d, *value, attribute, device);
  }
  if (!status.ok() || (major == 9 && minor == 0)) return status;
  return Status::error(
      message("this GPU cannot run the kernels",
              "compute capability " + std::to_string(major) + "." + std::to_string(minor),
              "9.0 (H100, H200, H800, H20, GH200)",
              "run on a Hopper GPU, or on the CPU with "
              "jax.default_device(jax.devices('cpu')[0])"));
}

Result<LoadedKernel> load_in(const Driver& d, CUcontext context, const Program& program) {
  const CurrentContext current(d, context);
  if (!current.status().ok()) return current.status();
  LoadedKernel kernel{};
  Status status = check_device(d, kernel.multiprocessors);
  if (!status.ok()) return status;
  // The module lives as long as the process: executables on other threads may hold its kernel.
  CUmodule module = nullptr;
  status = check(d, d.module_load(&module, program.compiled.cubin.data()), "cuModuleLoadData");
  if (!status.ok()) return status;
  status = check(d, d.module_function(&kernel.function, module, program.source.entry_point.c_str()),
                 "cuModuleGetFunction");
  if (!status.ok()) return status;
  status = check(d,
                 d.function_set_attribute(kernel.function, kFuncAttributeMaxDynamicSharedBytes,
                                          program.source.shared_bytes),
                 "cuFuncSetAttribute");
  if (!status.ok()) return status;
  return kernel;
}

}  // namespace

void set_options(const JitOptions& options) {
  std::lock_guard<std::mutex> lock(shared_state());
  global_options = options;
}

JitOptions options() {
  std::lock_guard<std::mutex> lock(shared_state());
  return global_options;
}

CacheFacts cache_facts() {
  std::lock_guard<std::mutex> lock(shared_state());
  return global_facts;
}

Result<const Program*> program(const ProgramText& source) {
  return programs.get(source.text, [&] { return make_program(source); });
}

Result<LoadedKernel> Program::load(CUstream stream) const {
  auto opened = driver();
  if (!opened.ok()) return opened.status();
  const Driver& d = **opened;
  CUcontext context = nullptr;
  unsigned long long id = 0;
  Status status = check(d, d.stream_context(stream, &context), "cuStreamGetCtx");
  if (status.ok()) status = check(d, d.context_id(context, &id), "cuCtxGetId");
  if (!status.ok()) return status;
  return kernels.get({this, id}, [&] { return load_in(d, context, *this); });
}

}  // namespace fp8gemm
