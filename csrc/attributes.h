// The attributes of a custom call, and reading a spec from them: the first error is kept.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "status.h"

namespace fp8gemm {

// std::monostate: of another type.
using Attributes = std::map<std::string, std::variant<std::monostate, int64_t, std::string>>;

// An enumerator's name as an attribute, and in the kernel's C++.
struct Name {
  const char* attribute;
  const char* code;
};
using Names = std::vector<Name>;  // in the order of the enum

// Where `attribute` is among the names.
std::optional<int> find_name(const Names& names, std::string_view attribute);

class AttributeReader {
 public:
  explicit AttributeReader(const Attributes& attributes) : attributes_(attributes) {}

  int integer(const std::string& name);
  bool flag(const std::string& name) { return integer_between(name, 0, 1) != 0; }
  // Absent: 0. Else from 0 to `most`.
  int optional_integer(const std::string& name, int64_t most);

  template <class Enum>
  Enum name_of(const std::string& name, const Names& names) {
    const std::string* value = find<std::string>(name, "a string");
    return value ? static_cast<Enum>(index_of(name, *value, names)) : Enum{};
  }

  const Status& status() const { return status_; }

 private:
  int integer_between(const std::string& name, int64_t least, int64_t most);

  template <class T>
  const T* find(const std::string& name, const char* kind) {
    auto it = attributes_.find(name);
    if (it == attributes_.end()) {
      fail("attribute " + name + " is missing", "no " + name, kind);
      return nullptr;
    }
    const T* value = std::get_if<T>(&it->second);
    if (!value) fail("attribute " + name + " has the wrong type", "another type", kind);
    return value;
  }

  int index_of(const std::string& name, const std::string& value, const Names& names);
  void fail(const std::string& what, const std::string& got, const std::string& expected);

  const Attributes& attributes_;
  Status status_;
};

// A field of a designated initialiser in C++ text.
std::string field(const char* name, const std::string& value);
std::string field(const char* name, int value);
std::string field(const char* name, const char* value);
std::string field(const char* name, bool value);

}  // namespace fp8gemm
