// From the text of a program to a kernel on a device: memory, disk, or NVRTC.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "disk_cache.h"
#include "driver.h"
#include "status.h"

namespace fp8gemm {

// What _native.py found and the environment says.
struct JitOptions {
  std::string nvrtc;  // path of the library; empty: none
  std::string cache_dir;
  bool verbose = false;  // a line on stderr for each kernel
  std::string dump_dir;  // where source, PTX and cubin go; empty: nowhere
  std::string version;   // of this library
};

void set_options(const JitOptions& options);
JitOptions options();

// A whole CUDA C++ program, and what its launch needs.
struct ProgramText {
  std::string name;  // for people
  std::string text;
  std::string entry_point;
  int shared_bytes;  // dynamic shared memory
};

// A kernel on one device, ready to launch.
struct LoadedKernel {
  CUfunction function;
  int multiprocessors;
};

// One compiled kernel, loaded on as many devices as use it.
class Program {
 public:
  Program(ProgramText source, CompiledKernel compiled, std::string origin, double seconds)
      : source(std::move(source)),
        compiled(std::move(compiled)),
        origin(std::move(origin)),
        seconds(seconds) {}

  // Loads on the device of `stream` the first time; a lock and a look-up after that.
  Result<LoadedKernel> load(CUstream stream, int device);

  const ProgramText source;
  const CompiledKernel compiled;
  const std::string origin;  // "disk" or "nvrtc"
  const double seconds;      // that reading or compiling took

 private:
  std::mutex mutex_;
  std::map<int, LoadedKernel> loaded_;
};

// Compiled at most once in a process, whatever the number of threads.
Result<std::shared_ptr<Program>> program(const ProgramText& source);

struct CacheFacts {
  int programs = 0;  // in memory
  int from_disk = 0;
  int compiled = 0;
};
CacheFacts cache_facts();

}  // namespace fp8gemm
