// Runs what a handler of custom calls checks before it launches anything. Built twice: HANDLER is
// ffi_gemm.cpp or ffi_quantize.cpp.
#include HANDLER

#include <sstream>

namespace fp8gemm {
namespace {

// A line for each: a name and a number or a word.
Attributes parse_attributes(std::istream& lines) {
  Attributes attributes;
  for (std::string name, value; lines >> name >> value;) {
    if (value.find_first_not_of("0123456789-") == std::string::npos) {
      attributes[name] = int64_t{std::stoll(value)};
    } else {
      attributes[name] = value;
    }
  }
  return attributes;
}

// A line for each: element type, address, sizes.
struct FakeBuffers {
  std::vector<std::vector<int64_t>> dims;
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;

  explicit FakeBuffers(const char* text) {
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      int64_t type, address, size;
      words >> type >> address;
      dims.emplace_back();
      while (words >> size) dims.back().push_back(size);
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType(type),
                         reinterpret_cast<void*>(address), int64_t(dims.back().size()), nullptr});
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
      buffers[i].dims = dims[i].data();
      pointers.push_back(&buffers[i]);
    }
  }
};

Status check(const Attributes& attributes, Buffers& buffers) {
#ifdef GEMM
  auto call = parse_gemm_call(attributes);
  if (!call.ok()) return call.status();
  Operands operands;
  read_operands(*call, buffers, operands);
#else
  auto spec = parse_quantize_spec(attributes);
  if (!spec.ok()) return spec.status();
  QuantizeParams params{};
  read_operands(*spec, buffers, params);
  read_results(*spec, buffers, params);
#endif
  return buffers.status();
}

}  // namespace
}  // namespace fp8gemm

// Returns the error, or "".
extern "C" const char* check(const char* attributes, const char* operands, const char* results) {
  using namespace fp8gemm;
  static std::string answer;
  FakeBuffers given(operands), made(results);
  std::vector<XLA_FFI_ArgType> arg_types(given.buffers.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(made.buffers.size(), XLA_FFI_RetType_BUFFER);
  const XLA_FFI_Args args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(arg_types.size()),
                             arg_types.data(), given.pointers.data()};
  const XLA_FFI_Rets rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, int64_t(ret_types.size()),
                             ret_types.data(), made.pointers.data()};
  Buffers buffers("test", ffi::RemainingArgs(&args, 0), ffi::RemainingRets(&rets, 0));
  std::istringstream lines(attributes);
  const Status status = check(parse_attributes(lines), buffers);
  answer = status.ok() ? "" : status.message();
  return answer.c_str();
}
