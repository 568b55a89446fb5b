// Whole files. Without iostreams: the extension shares its process with other copies of the C++
// library, and their locales do not mix.
#pragma once

#include <string>

namespace fp8gemm {

// The bytes of a file; empty when it cannot be read.
std::string read_file(const std::string& path);

// Writes a new file and makes sure that it is on the disk; false when that fails.
bool write_file(const std::string& path, const std::string& bytes);

// Makes a folder and those above it, as far as that is possible.
void make_folders(const std::string& path);

}  // namespace fp8gemm
