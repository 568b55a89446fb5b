#include "files.h"

#include <fcntl.h>

#include <cerrno>

namespace fp8gemm {

bool read_all(const OpenFile& file, size_t most, std::string& bytes) {
  char buffer[1 << 16];
  for (;;) {
    const ssize_t count = read(file.get(), buffer, sizeof buffer);
    if (count == 0) return true;
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 || bytes.size() + count > most) return false;
    bytes.append(buffer, count);
  }
}

bool write_all(const OpenFile& file, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t count = write(file.get(), bytes.data() + done, bytes.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    done += count;
  }
  return true;
}

bool write_file(const std::string& path, const std::string& bytes) {
  OpenFile file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  return file.ok() && write_all(file, bytes) && file.close();
}

void make_folders(const std::string& path, mode_t mode) {
  for (size_t slash = path.find('/', 1); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    mkdir(path.substr(0, slash).c_str(), mode);
  }
  mkdir(path.c_str(), mode);
}

std::string written_by_others(const struct stat& status) {
  if (status.st_uid != geteuid() && status.st_uid != 0) {
    return "owned by user " + std::to_string(status.st_uid);
  }
  if (status.st_mode & S_IWOTH) return "writable by everyone";
  if (status.st_mode & S_IWGRP) return "writable by group " + std::to_string(status.st_gid);
  return "";
}

}  // namespace fp8gemm
