#include "disk_cache.h"

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string_view>

#include "files.h"

namespace fp8gemm {
namespace {

constexpr char kMagic[] = "jax_fp8gemm kernel 1\n";

// FNV-1a, 64 bits (Fowler, Noll, Vo). Names files and finds damage; a collision of names does no
// harm, since an entry holds its whole key.
uint64_t fnv1a(const std::string& text, uint64_t hash = 14695981039346656037ull) {
  for (unsigned char byte : text) hash = (hash ^ byte) * 1099511628211ull;
  return hash;
}

void append(std::string& to, const std::string& part) {
  const uint64_t size = part.size();
  to.append(reinterpret_cast<const char*>(&size), sizeof size);
  to.append(part);
}

// Takes one part off the front of `rest`; false when it is cut short.
bool take(std::string_view& rest, std::string& part) {
  uint64_t size;
  if (rest.size() < sizeof size) return false;
  std::memcpy(&size, rest.data(), sizeof size);
  rest.remove_prefix(sizeof size);
  if (rest.size() < size) return false;
  part.assign(rest.substr(0, size));
  rest.remove_prefix(size);
  return true;
}

std::string checksum(const std::string& text) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(fnv1a(text)));
  return digits;
}

}  // namespace

std::string DiskCache::path(const std::string& key) const {
  return folder_ + "/" + checksum(key) + ".kernel";
}

std::optional<CompiledKernel> DiskCache::load(const std::string& key) const {
  const std::string text = read_file(path(key));
  const size_t magic = sizeof kMagic - 1;
  if (text.compare(0, magic, kMagic) != 0) return std::nullopt;
  std::string_view rest = std::string_view(text).substr(magic);
  std::string sum, body, found_key;
  if (!take(rest, sum) || !take(rest, body) || checksum(body) != sum) return std::nullopt;
  std::string_view parts = body;
  CompiledKernel kernel;
  if (!take(parts, found_key) || found_key != key) return std::nullopt;
  if (!take(parts, kernel.log) || !take(parts, kernel.cubin)) return std::nullopt;
  return kernel;
}

void DiskCache::store(const std::string& key, const CompiledKernel& kernel) const {
  std::string body, text = kMagic;
  append(body, key);
  append(body, kernel.log);
  append(body, kernel.cubin);
  append(text, checksum(body));
  append(text, body);

  make_folders(folder_);
  static std::atomic<int> counter{0};
  static const unsigned process = std::random_device{}();  // hosts may share the folder
  const std::string temporary = path(key) + "." + std::to_string(process) + "." +
                                std::to_string(getpid()) + "." + std::to_string(counter++) + ".tmp";
  // Losing a race against another writer is fine: both wrote the same kernel.
  if (write_file(temporary, text) && rename(temporary.c_str(), path(key).c_str()) == 0) return;
  unlink(temporary.c_str());
  static std::atomic<bool> warned{false};
  if (!warned.exchange(true)) {
    std::fprintf(stderr,
                 "jax_fp8gemm: cannot write the kernel cache in %s; kernels are compiled anew in "
                 "every process. Set JAX_FP8GEMM_CACHE_DIR to a folder that can be written.\n",
                 folder_.c_str());
  }
}

}  // namespace fp8gemm
