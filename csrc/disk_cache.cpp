#include "disk_cache.h"

#include <dirent.h>
#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string_view>
#include <system_error>
#include <vector>

#include "sha256.h"
#include "status.h"

namespace fp8gemm {
namespace {

constexpr std::string_view kMagic = "jax_fp8gemm kernel 2\n";
constexpr std::string_view kEnding = ".kernel", kTemporaryEnding = ".tmp";

// An entry takes 0.1 to 0.5 MB; no more is read of a file that says to be one.
constexpr size_t kLargestEntry = 64 << 20;

// Of all entries. A tuned model has tens of kernels, so that this holds every model of a user; and
// it is little beside one checkpoint.
constexpr int64_t kLargestFolder = 512 << 20;

// Of a temporary, which lives for milliseconds, and of another version's entry since its last use:
// two versions in use do not throw out each other's.
constexpr int64_t kOldSeconds = 3600;

void append(std::string& to, std::string_view part) {
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

// An entry: the magic line, the digest of the body, the body. A body: the digest of the key, the
// compiler's log, the cubin. Before each part stands its size.
std::string entry_text(const std::string& key_digest, const CompiledKernel& kernel) {
  std::string body, text(kMagic);
  append(body, key_digest);
  append(body, kernel.log);
  append(body, kernel.cubin);
  append(text, sha256(body));
  append(text, body);
  return text;
}

std::optional<CompiledKernel> parse_entry(std::string_view text, const std::string& key_digest) {
  if (!text.starts_with(kMagic)) return std::nullopt;
  text.remove_prefix(kMagic.size());
  std::string digest, body, found_key;
  if (!take(text, digest) || !take(text, body) || sha256(body) != digest) return std::nullopt;
  std::string_view parts = body;
  CompiledKernel kernel;
  if (!take(parts, found_key) || found_key != key_digest) return std::nullopt;
  if (!take(parts, kernel.log) || !take(parts, kernel.cubin)) return std::nullopt;
  return kernel;
}

std::string words_of(int error) { return std::generic_category().message(error); }

// ---- Names of files -----------------------------------------------------------------------------

enum class Kind { kForeign, kTemporary, kEntry, kOtherVersion };

bool is_digest(std::string_view text) {
  return text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

// Entries are "<64 digits>-<version>.kernel", and "<16 digits>.kernel" before version 0.1.0. A
// temporary has more after that: "….kernel.<numbers with dots>.tmp".
Kind kind_of(std::string_view name, std::string_view version) {
  const size_t ending = name.find(kEnding);
  if (ending == std::string_view::npos) return Kind::kForeign;
  const std::string_view stem = name.substr(0, ending);
  std::string_view rest = name.substr(ending + kEnding.size());
  const bool old = stem.size() == 16 && is_digest(stem);
  if (!old && !(stem.size() > 65 && stem[64] == '-' && is_digest(stem.substr(0, 64)))) {
    return Kind::kForeign;
  }
  if (rest.empty()) return !old && stem.substr(65) == version ? Kind::kEntry : Kind::kOtherVersion;
  if (!rest.ends_with(kTemporaryEnding)) return Kind::kForeign;
  rest.remove_suffix(kTemporaryEnding.size());
  const bool numbers = rest.find_first_not_of(".0123456789") == std::string_view::npos;
  return numbers ? Kind::kTemporary : Kind::kForeign;
}

// One that no other writer has: hosts may share the folder, and processes the numbers.
std::string temporary_name(const std::string& entry) {
  static std::atomic<int> counter{0};
  static const unsigned host = std::random_device{}();
  return entry + "." + std::to_string(host) + "." + std::to_string(getpid()) + "." +
         std::to_string(counter++) + std::string(kTemporaryEnding);
}

struct Found {
  std::string name;
  Kind kind;
  int64_t bytes, used;  // when it was written or last read
};

// The files of a folder that are ours by their names.
std::vector<Found> list(const OpenFile& folder, const std::string& version) {
  std::vector<Found> found;
  const int again = openat(folder.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (again < 0) return found;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(fdopendir(again), closedir);
  if (!entries) {
    close(again);
    return found;
  }
  while (const dirent* each = readdir(entries.get())) {
    const Kind kind = kind_of(each->d_name, version);
    struct stat status;
    if (kind == Kind::kForeign) continue;
    if (fstatat(folder.get(), each->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (!S_ISREG(status.st_mode)) continue;
    found.push_back({each->d_name, kind, status.st_size, status.st_mtime});
  }
  return found;
}

}  // namespace

void warn_of_cache(const std::string& text) {
  static std::atomic<bool> warned{false};
  if (!warned.exchange(true)) std::fprintf(stderr, "%s\n", text.c_str());
}

void DiskCache::refuse(const std::string& what, const std::string& got) const {
  warn_of_cache(message(what + ", so kernels are compiled anew", got,
                        "files and a folder that only this user or root may write to, and space",
                        "put this right, or set JAX_FP8GEMM_CACHE_DIR to another folder"));
}

std::string DiskCache::entry_name(const std::string& digest) const {
  return digest + "-" + version_ + std::string(kEnding);
}

// Not open where there is none, or none to trust.
OpenFile DiskCache::open_folder() const {
  OpenFile folder(open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status;
  if (!folder.ok() || fstat(folder.get(), &status) != 0) {
    if (errno != ENOENT) {
      refuse("the folder of the kernel cache cannot be read", folder_ + ": " + words_of(errno));
    }
    return {};
  }
  const std::string others = written_by_others(status);
  if (others.empty()) return folder;
  refuse("the folder of the kernel cache is not used", folder_ + ", " + others);
  return {};
}

std::optional<std::string> DiskCache::read_entry(const OpenFile& folder,
                                                 const std::string& name) const {
  // NOTE: without O_NONBLOCK, opening a FIFO waits for a writer.
  const OpenFile file(
      openat(folder.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  struct stat status;
  std::string why;
  if (!file.ok() || fstat(file.get(), &status) != 0) {
    if (errno == ENOENT) return std::nullopt;
    why = words_of(errno);
  } else if (!S_ISREG(status.st_mode)) {
    why = "not a regular file";
  } else if (status.st_size > int64_t{kLargestEntry}) {
    why = std::to_string(status.st_size) + " bytes";
  } else {
    why = written_by_others(status);
  }
  std::string text;
  if (why.empty() && read_all(file, kLargestEntry, text)) {
    futimens(file.get(), nullptr);  // used now; of no matter where that is not allowed
    return text;
  }
  refuse("an entry of the kernel cache is not used",
         folder_ + "/" + name + ", " + (why.empty() ? "which cannot be read" : why));
  return std::nullopt;
}

std::optional<CompiledKernel> DiskCache::load(const std::string& key) const {
  if (folder_.empty()) return std::nullopt;
  const OpenFile folder = open_folder();
  if (!folder.ok()) return std::nullopt;
  const std::string digest = sha256(key);
  const auto text = read_entry(folder, entry_name(digest));
  return text ? parse_entry(*text, digest) : std::nullopt;
}

// Returns why it could not, or "". Losing a race against another writer is fine: both write the
// same kernel.
std::string DiskCache::write_entry(const OpenFile& folder, const std::string& name,
                                   const std::string& text) const {
  const std::string temporary = temporary_name(name);
  OpenFile file(openat(folder.get(), temporary.c_str(),
                       O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!file.ok()) return words_of(errno);
  if (write_all(file, text) && fsync(file.get()) == 0 && file.close() &&
      renameat(folder.get(), temporary.c_str(), folder.get(), name.c_str()) == 0) {
    return "";
  }
  const std::string why = words_of(errno);
  unlinkat(folder.get(), temporary.c_str(), 0);
  return why;
}

void DiskCache::store(const std::string& key, const CompiledKernel& kernel) const {
  if (folder_.empty()) return;
  make_folders(folder_, 0700);
  const OpenFile folder = open_folder();
  const std::string digest = sha256(key);
  const std::string why = folder.ok()
                              ? write_entry(folder, entry_name(digest), entry_text(digest, kernel))
                              : "it cannot be made";
  if (!why.empty()) return refuse("cannot write the kernel cache", folder_ + ": " + why);
  tidy(folder);
}

// Removes what killed writers and other versions left; then, where there is too much, the entries
// that were used longest ago. Never a file whose name this library did not give.
void DiskCache::tidy(const OpenFile& folder) const {
  const int64_t old = std::time(nullptr) - kOldSeconds;
  std::vector<Found> kept;
  int64_t bytes = 0;
  for (Found& each : list(folder, version_)) {
    if (each.kind != Kind::kEntry && each.used < old) {
      unlinkat(folder.get(), each.name.c_str(), 0);
      continue;
    }
    bytes += each.bytes;
    if (each.kind != Kind::kTemporary) kept.push_back(std::move(each));
  }
  std::sort(kept.begin(), kept.end(),
            [](const Found& a, const Found& b) { return a.used < b.used; });
  for (size_t i = 0; i < kept.size() && bytes > kLargestFolder; ++i) {
    unlinkat(folder.get(), kept[i].name.c_str(), 0);
    bytes -= kept[i].bytes;
  }
}

}  // namespace fp8gemm
