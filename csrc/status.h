// Errors as values: nothing in this library throws across a boundary.
#pragma once

#include <optional>
#include <string>
#include <utility>

namespace fp8gemm {

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status error(std::string message) { return Status(std::move(message)); }

  bool ok() const { return !message_.has_value(); }
  const std::string& message() const { return *message_; }

 private:
  explicit Status(std::string message) : message_(std::move(message)) {}
  std::optional<std::string> message_;
};

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) {}

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& operator*() { return *value_; }
  T* operator->() { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

// The one form of every message (errors.py has the same): what, got, expected, fix.
inline std::string message(const std::string& what, const std::string& got,
                           const std::string& expected, const std::string& fix) {
  return "jax_fp8gemm: " + what + "\n  got       " + got + "\n  expected  " + expected +
         "\n  fix       " + fix;
}

// What to do about a program that does not fit this version: it was exported by another one.
inline constexpr char kTraceAgain[] =
    "export or trace the program again with this version of jax_fp8gemm";

}  // namespace fp8gemm
