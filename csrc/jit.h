// From the text of a program to a kernel on a device: memory, disk, or NVRTC.
#pragma once

#include <memory>
#include <string>

#include "disk_cache.h"
#include "driver.h"
#include "status.h"

namespace fp8gemm {

// What native.py found and the environment says.
struct JitOptions {
  std::string nvrtc;          // path of the library; empty: none
  std::string cache_dir;      // empty: none
  std::string cache_warning;  // printed when the first kernel is made; empty: none
  bool verbose = false;       // a line on stderr for each kernel
  std::string dump_dir;       // where source, PTX and cubin go; empty: nowhere
  std::string version;        // of this library
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

// A kernel in one CUDA context, ready to launch.
struct LoadedKernel {
  CUfunction function;
  int multiprocessors;
};

// One compiled kernel.
struct Program {
  // Loads it in the context of `stream` the first time, while only those wait who want just that; a
  // look-up afterwards.
  Result<LoadedKernel> load(CUstream stream) const;

  ProgramText source;
  CompiledKernel compiled;
  std::string origin;  // "disk" or "nvrtc"
  double seconds;      // that reading or compiling took
};

// Compiled at most once in a process, whatever the number of threads, and kept as long as that.
Result<const Program*> program(const ProgramText& source);

struct CacheFacts {
  int programs = 0;  // in memory
  int from_disk = 0;
  int compiled = 0;
};
CacheFacts cache_facts();

}  // namespace fp8gemm
