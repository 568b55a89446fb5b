// Compiled kernels on disk: one file each, safe against other processes, killed writers and other
// users. docs/compilation.md says what is trusted.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "files.h"

namespace fp8gemm {

struct CompiledKernel {
  std::string cubin;
  std::string log;  // of the compiler: registers, spills
};

// Best effort: whatever goes wrong gives one warning in a process, and kernels are compiled.
class DiskCache {
 public:
  // folder: "" for no cache on disk. version: of this library.
  DiskCache(std::string folder, std::string version)
      : folder_(std::move(folder)), version_(std::move(version)) {}

  // The kernel whose key text is `key`; nothing when there is none, or one that is damaged or that
  // others may have written.
  std::optional<CompiledKernel> load(const std::string& key) const;

  // Also removes what is old, see tidy().
  void store(const std::string& key, const CompiledKernel& kernel) const;

 private:
  OpenFile open_folder() const;
  std::string entry_name(const std::string& digest) const;
  std::optional<std::string> read_entry(const OpenFile& folder, const std::string& name) const;
  std::string write_entry(const OpenFile& folder, const std::string& name,
                          const std::string& text) const;
  void tidy(const OpenFile& folder) const;
  void refuse(const std::string& what, const std::string& got) const;

  std::string folder_;
  std::string version_;
};

// The one warning of a process about its cache.
void warn_of_cache(const std::string& text);

}  // namespace fp8gemm
