// Compiled kernels on disk: one file each, safe against other processes and killed writers.
#pragma once

#include <optional>
#include <string>

namespace fp8gemm {

struct CompiledKernel {
  std::string cubin;
  std::string log;  // of the compiler: registers, spills
};

class DiskCache {
 public:
  explicit DiskCache(std::string folder) : folder_(std::move(folder)) {}

  // The entry whose whole key text is `key`; nothing when there is none, or a damaged one.
  std::optional<CompiledKernel> load(const std::string& key) const;

  // Best effort: a folder that cannot be written gives one warning and no cache.
  void store(const std::string& key, const CompiledKernel& kernel) const;

 private:
  std::string path(const std::string& key) const;
  std::string folder_;
};

}  // namespace fp8gemm
