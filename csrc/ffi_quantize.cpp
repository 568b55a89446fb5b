#include "ffi_quantize.h"

#include <algorithm>
#include <string>

#include "ffi_buffers.h"
#include "ffi_common.h"
#include "quantize_spec.h"

namespace fp8gemm {
namespace {

using QuantizeState = CallState<QuantizeSpec>;
const ffi::TypeInfo kQuantizeStateInfo = ffi::MakeTypeInfo<QuantizeState>();

ffi::ErrorOr<std::unique_ptr<QuantizeState>> instantiate(ffi::Dictionary dictionary) {
  auto spec = parse_quantize_spec(read_attributes(dictionary));
  if (!spec.ok()) return ffi::Unexpected(to_error(spec.status()));
  auto made = program(program_text(*spec));
  if (!made.ok()) return ffi::Unexpected(to_error(made.status()));
  return std::make_unique<QuantizeState>(QuantizeState{*spec, *made});
}

ffi::DataType element_type(const QuantizeSpec& spec) {
  if (spec.source == Source::kFp8 || spec.source == Source::kSwigluBackward) return ffi::F8E4M3FN;
  return spec.type == Float::kBf16 ? ffi::BF16 : spec.type == Float::kF16 ? ffi::F16 : ffi::F32;
}

// In the order of quantize_primitive.py.
void read_operands(const QuantizeSpec& spec, Buffers& buffers, QuantizeParams& p) {
  const bool backward = spec.source == Source::kSwigluBackward;
  const Buffer x = buffers.operand("x", element_type(spec), {kAnySize, kAnySize, kAnySize});
  const int64_t batch = x.groups, x_rows = x.rows, width = x.columns;
  int64_t m = x_rows, k = width;
  if (spec.source == Source::kSwiglu || backward) {
    k = width / 2;
    if (width % 2) buffers.fail("x has no two halves", std::to_string(width) + " columns", "even");
  }
  p.x = x.data;
  if (spec.pair) {
    k = 2 * width;
    p.beside =
        buffers.operand("the array beside x", element_type(spec), {batch, x_rows, width}).data;
  }
  if (spec.source == Source::kFp8 || backward) {
    const ScaleShape shape = scale_shape(ScaleTile::k1x128, x_rows, width);
    p.x_scale = buffers.operand("the scales of x", ffi::F32, {batch, shape.lines, shape.columns})
                    .pointer<float>();
  }
  if (spec.gather) {
    const Buffer index = buffers.operand("index", ffi::S32, {kAnySize});
    p.index = index.pointer<int32_t>(), m = index.columns;
  }
  if (backward) {
    p.gradient = buffers.operand("gradient", ffi::BF16, {batch, m, k}).pointer<uint16_t>();
  }
  if (spec.source == Source::kSwiglu || backward) {
    p.row_weight = buffers.operand("row weights", ffi::F32, {m}).pointer<float>();
  }
  if (spec.grouped) {
    const Buffer sizes = buffers.operand("the sizes of groups", ffi::S32, {kAnySize});
    p.group_data = sizes.pointer<int32_t>(), p.groups = int32_t(sizes.columns);
  }
  if (k > kMostCount) {
    buffers.fail("x has too many columns", std::to_string(k), "at most 2^31 - 2048");
  }
  p.m = int32_t(m), p.k = int32_t(k), p.x_rows = int32_t(x_rows), p.batch = int32_t(batch);
}

struct Copy {
  Buffer values, scale;
};
Copy read_copy(const QuantizeSpec& spec, Buffers& buffers, const char* name, const char* scale_name,
               const Shape& shape) {
  const Buffer values = buffers.result(name, ffi::F8E4M3FN, shape);
  const ScaleShape scales = scale_shape(spec.tile, values.rows, values.columns);
  return {values,
          buffers.result(scale_name, ffi::F32, {values.groups, scales.lines, scales.columns})};
}

// What SwiGLU's backward pass has beside the gradient to gate and up as rows, and to gate
// transposed.
void read_backward_results(const QuantizeSpec& spec, Buffers& buffers, QuantizeParams& p) {
  const Shape shape = {p.batch, p.k, p.pitch};
  const Copy up = read_copy(spec, buffers, "the transposed gradient to up",
                            "the scales of the transposed gradient to up", shape);
  p.up_transposed = up.values.pointer<uint8_t>();
  p.up_transposed_scale = up.scale.pointer<float>();
  const Copy activation = read_copy(spec, buffers, "the transposed activation",
                                    "the scales of the transposed activation", shape);
  p.activation = activation.values.pointer<uint8_t>();
  p.activation_scale = activation.scale.pointer<float>();
  p.row_weight_gradient =
      buffers.result("the gradient to row weights", ffi::F32, {p.k / kScaleBlock, p.m})
          .pointer<float>();
}

void read_results(const QuantizeSpec& spec, Buffers& buffers, QuantizeParams& p) {
  const bool backward = spec.source == Source::kSwigluBackward;
  const int64_t batch = p.batch, m = p.m, k = p.k;
  if (spec.rows) {
    const Copy rows =
        read_copy(spec, buffers, "rows", "the scales of rows", {batch, m, backward ? 2 * k : k});
    p.rows = rows.values.pointer<uint8_t>(), p.rows_scale = rows.scale.pointer<float>();
  }
  p.pitch = p.m;
  if (spec.transposed) {
    const Copy copy = read_copy(spec, buffers, "the transposed copy",
                                "the scales of the transposed copy", {batch, k, kAnySize});
    p.transposed = copy.values.pointer<uint8_t>();
    p.transposed_scale = copy.scale.pointer<float>();
    p.pitch = int32_t(copy.values.columns);
  }
  if (backward) read_backward_results(spec, buffers, p);
  buffers.require_end();
}

constexpr int64_t kMostGridYZ = 65535;

Status launch(const Driver& driver, const QuantizeSpec& spec, const LoadedKernel& kernel,
              CUstream stream, int64_t columns, int64_t tiles, QuantizeParams& params) {
  const int64_t y = std::min(tiles, kMostGridYZ), z = ceil_div(tiles, y);
  if (z > kMostGridYZ) {
    return Status::error(message("quantize: too many rows", std::to_string(tiles) + " tiles",
                                 "at most " + std::to_string(kMostGridYZ * kMostGridYZ),
                                 "quantize parts of the array"));
  }
  params.grid_y = int32_t(y);
  CUlaunchConfig config = {
      .grid_x = unsigned(ctas_in_x(spec, columns, tiles, kernel.multiprocessors)),
      .grid_y = unsigned(y),
      .grid_z = unsigned(z),
      .block_x = unsigned(quantize_threads(spec)),
      .block_y = 1,
      .block_z = 1,
      .shared_bytes = unsigned(shared_bytes(spec)),
      .stream = stream,
      .attributes = nullptr,
      .attribute_count = 0,
  };
  if (is_persistent(spec)) {
    config.grid_x = unsigned(std::min<int64_t>(columns * tiles, kernel.multiprocessors));
    config.grid_y = config.grid_z = 1;
  }
  void* arguments[] = {&params};
  return check(driver, driver.launch(&config, kernel.function, arguments, nullptr),
               "cuLaunchKernelEx");
}

ffi::Error execute(CUstream stream, QuantizeState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results, ffi::Dictionary) {
  const QuantizeSpec& spec = state->spec;
  QuantizeParams params{};
  Buffers buffers("quantize", args, results);
  read_operands(spec, buffers, params);
  read_results(spec, buffers, params);
  if (!buffers.status().ok()) return to_error(buffers.status());
  const int64_t columns = grid_x(spec, params);
  const int64_t tiles = params.batch * int64_t{row_tiles(spec, params)};
  if (tiles == 0 || columns == 0) return ffi::Error::Success();
  auto kernel = state->program->load(stream);
  if (!kernel.ok()) return to_error(kernel.status());
  return to_error(launch(**fp8gemm::driver(), spec, *kernel, stream, columns, tiles, params));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(quantize_instantiate_handler, instantiate,
                       ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER(quantize_initialize_handler, initialize<QuantizeSpec>,
                       bind_call<QuantizeSpec>(ffi::Ffi::BindInitialize()));

XLA_FFI_DEFINE_HANDLER(quantize_execute_handler, execute,
                       bind_call<QuantizeSpec>(ffi::Ffi::BindExecute()),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* quantize_instantiate(XLA_FFI_CallFrame* frame) {
  return quantize_instantiate_handler(frame);
}
XLA_FFI_Error* quantize_initialize(XLA_FFI_CallFrame* frame) {
  return quantize_initialize_handler(frame);
}
XLA_FFI_Error* quantize_execute(XLA_FFI_CallFrame* frame) {
  return quantize_execute_handler(frame);
}

ffi::TypeId* quantize_state_id() { return &QuantizeState::id; }
const ffi::TypeInfo* quantize_state_info() { return &kQuantizeStateInfo; }

}  // namespace fp8gemm
