// SHA-256, which names the entries of the kernel cache and finds damage in them.
#pragma once

#include <string>
#include <string_view>

namespace fp8gemm {

// The digest of `text`, in 64 hexadecimal digits. Source: FIPS 180-4, section 6.2.
std::string sha256(std::string_view text);

}  // namespace fp8gemm
