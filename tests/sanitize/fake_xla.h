// Calls the handlers as XLA does, without XLA: the C API of their side, and call frames made by
// hand, which may hold what no program of ours has.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

// The C API leaves these two to XLA.
struct XLA_FFI_Error {
  std::string message;
};
struct XLA_FFI_ExecutionContext {
  void* stream;
  void* state;
};

namespace fake {

inline XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->message};
}
inline void error_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
inline void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
inline XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = args->ctx->stream;
  return nullptr;
}
inline XLA_FFI_Error* set_state(XLA_FFI_State_Set_Args* args) {
  args->ctx->state = args->state;
  return nullptr;
}
inline XLA_FFI_Error* get_state(XLA_FFI_State_Get_Args* args) {
  args->state = args->ctx->state;
  return nullptr;
}

inline XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = error_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_Stream_Get = get_stream;
  api.XLA_FFI_State_Set = set_state;
  api.XLA_FFI_State_Get = get_state;
  return api;
}

struct Array {
  int type;  // XLA_FFI_DataType
  std::vector<int64_t> dims;
  void* data;
  bool is_array = true;
};

using Attributes = std::map<std::string, std::variant<int64_t, std::string, double>>;

// A custom call of a program.
struct Call {
  Attributes attributes;
  std::vector<Array> operands, results;
};

// The arrays of a call as the C API has them.
struct Arrays {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
  std::vector<int> kinds;

  explicit Arrays(std::vector<Array>& arrays) {
    for (Array& each : arrays) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType(each.type),
                         each.data, int64_t(each.dims.size()), each.dims.data()});
      kinds.push_back(each.is_array ? 1 : 0);
    }
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  }
};

// Attributes as the C API has them.
struct AttributeArrays {
  std::vector<XLA_FFI_ByteSpan> names, strings;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<void*> values;

  explicit AttributeArrays(Attributes& attributes) {
    const size_t size = attributes.size();
    names.reserve(size), strings.reserve(size), scalars.reserve(size);
    for (auto& [name, value] : attributes) {
      names.push_back({name.data(), name.size()});
      name_pointers.push_back(&names.back());
      if (auto* text = std::get_if<std::string>(&value)) {
        strings.push_back({text->data(), text->size()});
        types.push_back(XLA_FFI_AttrType_STRING);
        values.push_back(&strings.back());
        continue;
      }
      auto* number = std::get_if<int64_t>(&value);
      scalars.push_back({number ? XLA_FFI_DataType_S64 : XLA_FFI_DataType_F64,
                         number ? static_cast<void*>(number) : std::get_if<double>(&value)});
      types.push_back(XLA_FFI_AttrType_SCALAR);
      values.push_back(&scalars.back());
    }
  }
};

// One stage of a call. Returns the error's text, or "".
inline std::string run(XLA_FFI_Handler* handler, XLA_FFI_ExecutionStage stage, Call call,
                       XLA_FFI_ExecutionContext& context) {
  static const XLA_FFI_Api api = make_api();
  Arrays operands(call.operands), results(call.results);
  AttributeArrays attributes(call.attributes);
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &context;
  frame.stage = stage;
  if (stage != XLA_FFI_ExecutionStage_INSTANTIATE) {
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(operands.pointers.size()),
                  reinterpret_cast<XLA_FFI_ArgType*>(operands.kinds.data()),
                  operands.pointers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, int64_t(results.pointers.size()),
                  reinterpret_cast<XLA_FFI_RetType*>(results.kinds.data()),
                  results.pointers.data()};
  }
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,        nullptr,
                 int64_t(attributes.names.size()), attributes.types.data(),
                 attributes.name_pointers.data(),  attributes.values.data()};
  const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  return error ? error->message : "";
}

}  // namespace fake
