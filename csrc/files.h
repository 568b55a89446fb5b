// Files and folders. Without iostreams: the extension shares its process with other copies of the
// C++ library, and their locales do not mix.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <utility>

namespace fp8gemm {

// An open file or folder, closed at the end of its life.
class OpenFile {
 public:
  OpenFile() = default;
  explicit OpenFile(int file) : file_(file) {}
  OpenFile(OpenFile&& other) : file_(std::exchange(other.file_, -1)) {}
  OpenFile& operator=(OpenFile&& other) {
    std::swap(file_, other.file_);
    return *this;
  }
  ~OpenFile() { close(); }

  bool ok() const { return file_ >= 0; }
  int get() const { return file_; }
  // Also tells whether what was written has arrived, as far as close() knows.
  bool close() { return file_ < 0 || ::close(std::exchange(file_, -1)) == 0; }

 private:
  int file_ = -1;
};

// Reads to the end, which must come within `most` bytes; false when that fails.
bool read_all(const OpenFile& file, size_t most, std::string& bytes);

// False, with the reason in errno, when not all could be written.
bool write_all(const OpenFile& file, const std::string& bytes);

// Writes a file anew; false when that fails.
bool write_file(const std::string& path, const std::string& bytes);

// Makes a folder and those above it, as far as that is possible.
void make_folders(const std::string& path, mode_t mode);

// Who may have written what is open? "" when only this user or root, else who: "owned by user 7".
std::string written_by_others(const struct stat& status);

}  // namespace fp8gemm
