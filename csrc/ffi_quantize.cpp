#include "ffi_quantize.h"

#include <algorithm>

#include "ffi_common.h"
#include "quantize_spec.h"

namespace fp8gemm {
namespace {

using QuantizeState = CallState<QuantizeSpec>;
const ffi::TypeInfo kQuantizeStateInfo = ffi::MakeTypeInfo<QuantizeState>();

ffi::ErrorOr<std::unique_ptr<QuantizeState>> instantiate(ffi::Dictionary dictionary) {
  auto spec = parse_quantize_spec(read_attributes(
      dictionary, {"pow2", "rows", "transposed", "grouped", "gather", "pair", "aligned"},
      {"source", "type", "tile"}));
  if (!spec.ok()) return ffi::Unexpected(to_error(spec.status()));
  auto made = program(program_text(*spec));
  if (!made.ok()) return ffi::Unexpected(to_error(made.status()));
  return std::make_unique<QuantizeState>(QuantizeState{*spec, *made});
}

using Shape = std::initializer_list<int64_t>;  // a negative size fits any

// Takes buffers one after the other and keeps the first error.
class Buffers {
 public:
  using Buffer = std::optional<ffi::AnyBuffer>;

  Buffers(ffi::RemainingArgs args, ffi::RemainingRets results) : args_(args), results_(results) {}

  Buffer operand(const char* name, ffi::DataType type, Shape shape) {
    if (next_operand_ >= args_.size()) return fail(name, "nothing", type, shape);
    return check(*args_.get<ffi::AnyBuffer>(next_operand_++), name, type, shape);
  }

  Buffer result(const char* name, ffi::DataType type, Shape shape) {
    if (next_result_ >= results_.size()) return fail(name, "nothing", type, shape);
    return check(**results_.get<ffi::AnyBuffer>(next_result_++), name, type, shape);
  }

  const Status& status() const { return status_; }

 private:
  Buffer check(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type, Shape shape) {
    const auto dims = buffer.dimensions();
    bool fits = buffer.element_type() == type && dims.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) {
      fits = dims[i] <= INT32_MAX && (shape.begin()[i] < 0 || shape.begin()[i] == dims[i]);
    }
    if (fits) return buffer;
    return fail(name,
                "element type " + std::to_string(int(buffer.element_type())) + ", shape " +
                    shape_text(buffer),
                type, shape);
  }

  Buffer fail(const char* name, const std::string& got, ffi::DataType type, Shape shape) {
    std::string expected = "element type " + std::to_string(int(type)) + ", shape [";
    for (int64_t size : shape) expected += size < 0 ? " any" : " " + std::to_string(size);
    if (status_.ok()) {
      status_ = wrong_operand(std::string("quantize: ") + name + " does not fit", got,
                              expected + " ], each below 2^31");
    }
    return {};
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets results_;
  size_t next_operand_ = 0, next_result_ = 0;
  Status status_;
};

ffi::DataType element_type(const QuantizeSpec& spec) {
  if (spec.source == Source::kFp8 || spec.source == Source::kSwigluBackward) return ffi::F8E4M3FN;
  return spec.type == Float::kBf16 ? ffi::BF16 : spec.type == Float::kF16 ? ffi::F16 : ffi::F32;
}

template <class T>
T* pointer(const Buffers::Buffer& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

struct Call {
  QuantizeParams params{};
  int64_t columns = 0, tiles = 0;  // tiles: of rows, in all matrices
};

// Shapes of scales, as the copies of ScaleTile lie.
struct ScaleShape {
  int64_t lines, columns;
};
ScaleShape scale_shape(ScaleTile tile, int64_t rows, int64_t columns) {
  if (tile == ScaleTile::k128x128) {
    return {ceil_div(rows, 128), round_up(ceil_div(columns, 128), 4)};
  }
  return {tile == ScaleTile::k1xK ? 1 : ceil_div(columns, 128), round_up(rows, 4)};
}

// In the order of quantize_primitive.py.
void read_operands(const QuantizeSpec& spec, Buffers& buffers, Call& call) {
  QuantizeParams& p = call.params;
  const bool backward = spec.source == Source::kSwigluBackward;
  auto x = buffers.operand("x", element_type(spec), {-1, -1, -1});
  if (!x) return;
  const int64_t batch = x->dimensions()[0], x_rows = x->dimensions()[1], width = x->dimensions()[2];
  int64_t m = x_rows, k = width;
  if (spec.source == Source::kSwiglu || backward) k = width / 2;
  p.x = pointer<void>(x);
  if (spec.pair) {
    k = 2 * width;
    auto beside = buffers.operand("the array beside x", element_type(spec), {batch, x_rows, width});
    if (beside) p.beside = pointer<void>(beside);
  }
  if (spec.source == Source::kFp8 || backward) {
    const ScaleShape shape = scale_shape(ScaleTile::k1x128, x_rows, width);
    auto scale = buffers.operand("the scales of x", ffi::F32, {batch, shape.lines, shape.columns});
    if (scale) p.x_scale = pointer<float>(scale);
  }
  if (spec.gather) {
    auto index = buffers.operand("index", ffi::S32, {-1});
    if (index) p.index = pointer<int32_t>(index), m = index->dimensions()[0];
  }
  if (backward) {
    auto gradient = buffers.operand("gradient", ffi::BF16, {batch, m, k});
    if (gradient) p.gradient = pointer<uint16_t>(gradient);
  }
  if (spec.source == Source::kSwiglu || backward) {
    auto weight = buffers.operand("row weights", ffi::F32, {m});
    if (weight) p.row_weight = pointer<float>(weight);
  }
  if (spec.grouped) {
    auto sizes = buffers.operand("group sizes", ffi::S32, {-1});
    if (sizes) p.group_data = pointer<int32_t>(sizes), p.groups = int32_t(sizes->dimensions()[0]);
  }
  p.m = int32_t(m), p.k = int32_t(k), p.x_rows = int32_t(x_rows);
  p.batch = int32_t(batch);
}

void read_results(const QuantizeSpec& spec, Buffers& buffers, Call& call) {
  QuantizeParams& p = call.params;
  const bool backward = spec.source == Source::kSwigluBackward;
  const int64_t batch = p.batch, m = p.m, k = p.k, width = backward ? 2 * k : k;
  if (spec.rows) {
    const ScaleShape shape = scale_shape(spec.tile, m, width);
    auto rows = buffers.result("rows", ffi::F8E4M3FN, {batch, m, width});
    auto scale = buffers.result("scales of rows", ffi::F32, {batch, shape.lines, shape.columns});
    if (rows && scale) p.rows = pointer<uint8_t>(rows), p.rows_scale = pointer<float>(scale);
  }
  p.pitch = p.m;
  if (spec.transposed) {
    auto copy = buffers.result("the transposed copy", ffi::F8E4M3FN, {batch, k, -1});
    if (!copy) return;
    p.pitch = int32_t(copy->dimensions()[2]), p.transposed = pointer<uint8_t>(copy);
    const ScaleShape shape = scale_shape(spec.tile, k, p.pitch);
    auto scale = buffers.result("scales of the transposed copy", ffi::F32,
                                {batch, shape.lines, shape.columns});
    if (scale) p.transposed_scale = pointer<float>(scale);
  }
  if (backward) {
    const ScaleShape shape = scale_shape(ScaleTile::k1x128, k, p.pitch);
    auto copy = [&](const char* name, uint8_t*& values, float*& scale) {
      auto q = buffers.result(name, ffi::F8E4M3FN, {batch, k, p.pitch});
      auto s = buffers.result(name, ffi::F32, {batch, shape.lines, shape.columns});
      if (q && s) values = pointer<uint8_t>(q), scale = pointer<float>(s);
    };
    copy("the transposed gradient to up, or its scales", p.up_transposed, p.up_transposed_scale);
    copy("the transposed activation, or its scales", p.activation, p.activation_scale);
    auto weights = buffers.result("the gradient to row weights", ffi::F32, {k / 128, m});
    if (weights) p.row_weight_gradient = pointer<float>(weights);
  }
  call.columns = grid_x(spec, p), call.tiles = batch * row_tiles(spec, p);
}

ffi::Error execute(CUstream stream, int32_t device, QuantizeState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results, ffi::Dictionary) {
  Call call;
  Buffers buffers(args, results);
  read_operands(state->spec, buffers, call);
  if (buffers.status().ok()) read_results(state->spec, buffers, call);
  if (!buffers.status().ok()) return to_error(buffers.status());
  if (call.tiles == 0 || call.columns == 0) return ffi::Error::Success();
  const int64_t most = 65535, y = std::min(call.tiles, most), z = ceil_div(call.tiles, y);
  if (z > most) {
    return to_error(wrong_operand("quantize: too many rows", std::to_string(call.tiles) + " tiles",
                                  "at most " + std::to_string(most * most)));
  }
  call.params.grid_y = int32_t(y);
  auto kernel = state->program->load(stream, device);
  if (!kernel.ok()) return to_error(kernel.status());
  const Driver& driver = **fp8gemm::driver();
  CUlaunchConfig config = {unsigned(call.columns),
                           unsigned(y),
                           unsigned(z),
                           unsigned(quantize_threads(state->spec)),
                           1,
                           1,
                           unsigned(state->program->source.shared_bytes),
                           stream,
                           nullptr,
                           0};
  if (is_persistent(state->spec)) {
    const int64_t all = call.columns * call.tiles;
    config.grid_x = unsigned(std::min<int64_t>(all, kernel->multiprocessors));
    config.grid_y = config.grid_z = 1;
  }
  void* arguments[] = {&call.params};
  return to_error(check(driver, driver.launch(&config, kernel->function, arguments, nullptr),
                        "cuLaunchKernelEx"));
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
