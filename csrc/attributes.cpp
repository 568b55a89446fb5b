#include "attributes.h"

namespace fp8gemm {

int AttributeReader::index_of(const std::string& name, const std::string& value,
                              const Names& names) {
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (value == names[i].attribute) return static_cast<int>(i);
    known += std::string(i ? ", " : "") + names[i].attribute;
  }
  fail("attribute " + name + " has an unknown value", "\"" + value + "\"", "one of " + known);
  return 0;
}

void AttributeReader::fail(const std::string& what, const std::string& got,
                           const std::string& expected) {
  if (!status_.ok()) return;
  status_ = Status::error(
      message(what, got, expected, "use the Python package this extension was built with"));
}

std::string field(const char* name, const std::string& value) {
  return std::string("    .") + name + " = " + value + ",\n";
}

std::string field(const char* name, const char* value) { return field(name, std::string(value)); }

std::string field(const char* name, int value) { return field(name, std::to_string(value)); }

std::string field(const char* name, bool value) {
  return field(name, std::string(value ? "true" : "false"));
}

}  // namespace fp8gemm
