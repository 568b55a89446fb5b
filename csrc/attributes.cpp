#include "attributes.h"

namespace fp8gemm {

std::optional<int> find_name(const Names& names, std::string_view attribute) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (attribute == names[i].attribute) return static_cast<int>(i);
  }
  return {};
}

int AttributeReader::integer(const std::string& name) {
  return integer_between(name, INT32_MIN, INT32_MAX);
}

int AttributeReader::optional_integer(const std::string& name, int64_t most) {
  return attributes_.count(name) ? integer_between(name, 0, most) : 0;
}

int AttributeReader::integer_between(const std::string& name, int64_t least, int64_t most) {
  const int64_t* value = find<int64_t>(name, "an integer");
  if (!value) return 0;
  if (*value >= least && *value <= most) return static_cast<int>(*value);
  fail("attribute " + name + " is out of range", std::to_string(*value),
       "from " + std::to_string(least) + " to " + std::to_string(most));
  return 0;
}

int AttributeReader::index_of(const std::string& name, const std::string& value,
                              const Names& names) {
  const auto found = find_name(names, value);
  if (found) return *found;
  std::string known;
  for (const Name& each : names) known += (known.empty() ? "" : ", ") + std::string(each.attribute);
  fail("attribute " + name + " has an unknown value", "\"" + value + "\"", "one of " + known);
  return 0;
}

void AttributeReader::fail(const std::string& what, const std::string& got,
                           const std::string& expected) {
  if (!status_.ok()) return;
  status_ = Status::error(message(what, got, expected, kTraceAgain));
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
