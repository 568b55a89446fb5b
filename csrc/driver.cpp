#include "driver.h"

#include <dlfcn.h>
#include <glob.h>

#include <atomic>

#include "once.h"

namespace fp8gemm {
namespace {

// Looks a symbol up and leaves the first missing name in `missing`.
template <class Function>
void lookup(void* library, const char* name, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function && missing.empty()) missing = name;
}

Result<const Driver*> open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    return Status::error(message("no NVIDIA driver", "libcuda.so.1 could not be opened",
                                 "a CUDA driver, 12.3 or newer",
                                 "install the NVIDIA driver, or run on the CPU"));
  }
  Driver d;
  std::string missing;
  lookup(library, "cuInit", d.init, missing);
  lookup(library, "cuDriverGetVersion", d.version, missing);
  lookup(library, "cuGetErrorString", d.error_string, missing);
  lookup(library, "cuDeviceGetCount", d.device_count, missing);
  lookup(library, "cuDeviceGet", d.device_get, missing);
  lookup(library, "cuDeviceGetName", d.device_name, missing);
  lookup(library, "cuDeviceGetAttribute", d.device_attribute, missing);
  lookup(library, "cuCtxGetCurrent", d.context_current, missing);
  lookup(library, "cuCtxSetCurrent", d.context_set_current, missing);
  lookup(library, "cuCtxGetDevice", d.context_device, missing);
  lookup(library, "cuCtxGetId", d.context_id, missing);
  lookup(library, "cuStreamGetCtx", d.stream_context, missing);
  lookup(library, "cuModuleLoadData", d.module_load, missing);
  lookup(library, "cuModuleGetFunction", d.module_function, missing);
  lookup(library, "cuFuncSetAttribute", d.function_set_attribute, missing);
  lookup(library, "cuLaunchKernelEx", d.launch, missing);
  lookup(library, "cuTensorMapEncodeTiled", d.encode_tiled, missing);
  if (!missing.empty()) {
    return Status::error(message("the NVIDIA driver is too old", "no symbol " + missing,
                                 "a CUDA driver, 12.3 or newer", "update the NVIDIA driver"));
  }
  return new Driver(d);  // leaked on purpose: handlers may run while the process ends
}

// NVRTC 13.0 looks for its builtins on the system's path alone, and takes those that are loaded.
void load_builtins(const std::string& nvrtc) {
  const std::string pattern = nvrtc.substr(0, nvrtc.rfind('/') + 1) + "libnvrtc-builtins.so*";
  glob_t found;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc; ++i) dlopen(found.gl_pathv[i], RTLD_NOW | RTLD_LOCAL);
    globfree(&found);
  }
}

Result<const Nvrtc*> open_nvrtc(const std::string& path) {
  const std::string fix =
      "pip install nvidia-cuda-nvrtc-cu12 for CUDA 12, or nvidia-cuda-nvrtc for CUDA 13; or set "
      "JAX_FP8GEMM_NVRTC to libnvrtc.so";
  if (path.empty()) {
    return Status::error(message("no run-time compiler", "NVRTC was not found",
                                 "libnvrtc.so.12 or .13 from pip or a CUDA toolkit", fix));
  }
  const ForkWaits fork_waits;
  load_builtins(path);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    return Status::error(message("the run-time compiler does not load",
                                 path + " (" + (reason ? reason : "no reason given") + ")",
                                 "libnvrtc.so.12 or .13", fix));
  }
  Nvrtc n = {};
  n.path = path;
  std::string missing;
  lookup(library, "nvrtcVersion", n.version, missing);
  lookup(library, "nvrtcGetErrorString", n.error_string, missing);
  lookup(library, "nvrtcCreateProgram", n.create, missing);
  lookup(library, "nvrtcDestroyProgram", n.destroy, missing);
  lookup(library, "nvrtcCompileProgram", n.compile, missing);
  lookup(library, "nvrtcGetProgramLogSize", n.log_size, missing);
  lookup(library, "nvrtcGetProgramLog", n.log, missing);
  lookup(library, "nvrtcGetCUBINSize", n.cubin_size, missing);
  lookup(library, "nvrtcGetCUBIN", n.cubin, missing);
  lookup(library, "nvrtcGetPTXSize", n.ptx_size, missing);
  lookup(library, "nvrtcGetPTX", n.ptx, missing);
  if (!missing.empty() || n.version(&n.major, &n.minor) != 0) {
    return Status::error(message("the run-time compiler is not usable",
                                 path + (missing.empty() ? "" : " without " + missing),
                                 "NVRTC 12.3 or newer", fix));
  }
  return new Nvrtc(n);  // leaked on purpose, as the driver's
}

auto& compilers = *new OnceTable<std::string, const Nvrtc*>;  // by their paths
std::atomic<const Driver*> the_driver{nullptr};

}  // namespace

// NOTE: two threads may open it at once, which does no harm. So no lock is held that a forked child
// could find taken.
Result<const Driver*> driver() {
  if (const Driver* opened = the_driver.load()) return opened;
  auto opened = open_driver();
  if (opened.ok()) the_driver.store(*opened);
  return opened;
}

Result<const Nvrtc*> nvrtc(const std::string& path) {
  return compilers.get(path, [&] { return open_nvrtc(path); });
}

Status check(const Driver& driver, CUresult result, const std::string& what) {
  if (result == 0) return {};
  const char* words = nullptr;
  driver.error_string(result, &words);
  return Status::error(message(
      "the CUDA driver refused a call",
      what + ": " + (words ? words : "unknown CUDA error") + " (" + std::to_string(result) + ")",
      "success",
      "an error of an earlier kernel may show up here: run the program "
      "under compute-sanitizer"));
}

}  // namespace fp8gemm
