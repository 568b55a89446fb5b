#include "ffi_gemm.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "ffi_buffers.h"
#include "ffi_common.h"
#include "gemm_spec.h"
#include "tensor_map.h"

namespace fp8gemm {
namespace {

using GemmState = CallState<GemmCall>;
const ffi::TypeInfo kGemmStateInfo = ffi::MakeTypeInfo<GemmState>();

ffi::ErrorOr<std::unique_ptr<GemmState>> instantiate(ffi::Dictionary dictionary) {
  auto call = parse_gemm_call(read_attributes(dictionary));
  if (!call.ok()) return ffi::Unexpected(to_error(call.status()));
  auto made = program(program_text(call->spec));
  if (!made.ok()) return ffi::Unexpected(to_error(made.status()));
  return std::make_unique<GemmState>(GemmState{*call, *made});
}

// In the order of the custom call: lhs, rhs, [rhs_right], lhs_scale, [rhs_scale], [group_data],
// [init]. A bf16 rhs has no scales; without a right half, that is itself again.
struct Operands {
  Buffer lhs, rhs, rhs_right, lhs_scale, rhs_scale, group_data, out;
  int64_t m = 0, n = 0, k = 0, groups = 1;
};

// A stack of matrices, or one matrix.
Shape matrices(bool has_groups, int64_t groups, int64_t rows, int64_t columns) {
  return has_groups ? Shape{groups, rows, columns} : Shape{rows, columns};
}

Buffer read_scales(Buffers& buffers, const char* name, ScaleTile tile, bool has_groups,
                   int64_t groups, int64_t rows, int64_t k) {
  const ScaleShape shape = scale_shape(tile, rows, k);
  return buffers.operand(name, ffi::F32, matrices(has_groups, groups, shape.lines, shape.columns));
}

// A bf16 rhs as it lies, [n, k] or [k, n]: in one array, or in two by its last dim.
void read_bf16_rhs(const GemmCall& call, Buffers& buffers, int64_t groups, Operands& o) {
  o.rhs = buffers.operand("rhs", ffi::BF16, {groups, kAnySize, kAnySize});
  o.rhs_right = o.rhs;
  const int64_t rows = o.rhs.rows, columns = o.rhs.columns;
  if (call.pair) {
    o.rhs_right =
        buffers.operand("the right half of rhs", ffi::BF16, {o.rhs.groups, rows, columns});
  }
  const int64_t whole = call.pair ? 2 * columns : columns;
  const bool transposed = call.spec.rhs == Rhs::kBf16Transposed;
  o.n = transposed ? whole : rows;
  if ((transposed ? rows : whole) != o.k) {
    buffers.fail("k differs between lhs and rhs", std::to_string(transposed ? rows : whole),
                 std::to_string(o.k));
  }
  if (columns % (call.pair ? kScaleBlock : 8)) {
    buffers.fail("rows of a bf16 rhs cannot be copied", std::to_string(columns) + " columns",
                 "a multiple of 8, or of 128 in each half of a pair");
  }
}

void read_rhs(const GemmCall& call, Buffers& buffers, Operands& o) {
  const bool has_groups = rhs_has_groups(call.spec.variant);
  const int64_t groups = lhs_has_groups(call.spec.variant) ? o.lhs.groups : kAnySize;
  if (is_cast(call.spec.rhs)) return read_bf16_rhs(call, buffers, groups, o);
  o.rhs = buffers.operand("rhs", ffi::F8E4M3FN, matrices(has_groups, groups, kAnySize, o.k));
  o.n = o.rhs.rows;
}

// The output, and what it adds to.
void read_out(const GemmSpec& spec, Buffers& buffers, Operands& o) {
  const bool has_groups = out_has_groups(spec.variant);
  const int64_t groups = rhs_has_groups(spec.variant) ? o.rhs.groups : kAnySize;
  const auto type = spec.out == Out::kF32 ? ffi::F32 : ffi::BF16;
  o.out = buffers.result("the output", type, matrices(has_groups, groups, o.m, o.n));
  o.groups = rhs_has_groups(spec.variant) ? o.rhs.groups : o.out.groups;
  const int64_t row_bytes = o.n * (spec.out == Out::kF32 ? 4 : 2);
  if (spec.aligned && row_bytes % 16) {
    buffers.fail("rows of the output are not aligned", std::to_string(row_bytes) + " bytes",
                 "a multiple of 16, as attribute aligned says");
  }
}

void read_init(const GemmSpec& spec, Buffers& buffers, const Operands& o) {
  const bool has_groups = out_has_groups(spec.variant);
  const Buffer init = buffers.operand("init", ffi::F32, matrices(has_groups, o.groups, o.m, o.n));
  if (init.data != o.out.data) {
    buffers.fail("init is not aliased to the output", "two buffers", "one buffer");
  }
}

void read_operands(const GemmCall& call, Buffers& buffers, Operands& o) {
  const GemmSpec& spec = call.spec;
  const bool lhs_groups = lhs_has_groups(spec.variant), rhs_groups = rhs_has_groups(spec.variant);
  o.lhs = buffers.operand("lhs", ffi::F8E4M3FN, matrices(lhs_groups, kAnySize, kAnySize, kAnySize));
  o.m = o.lhs.rows, o.k = o.lhs.columns;
  read_rhs(call, buffers, o);
  read_out(spec, buffers, o);
  o.lhs_scale =
      read_scales(buffers, "the scales of lhs", spec.lhs_scale, lhs_groups, o.groups, o.m, o.k);
  if (!is_cast(spec.rhs)) {
    o.rhs_scale =
        read_scales(buffers, "the scales of rhs", spec.rhs_scale, rhs_groups, o.groups, o.n, o.k);
  }
  if (spec.variant == Variant::kContiguous) {
    o.group_data = buffers.operand("the group of each row", ffi::S32, {o.m});
  } else if (is_grouped(spec.variant)) {
    o.group_data = buffers.operand("the sizes of groups", ffi::S32, {o.groups});
  }
  if (spec.accumulate) read_init(spec, buffers, o);
  // NOTE: a cluster may have more CTAs than k has steps, where an exported program takes any k:
  // some then add zeros. why_illegal() refuses it only since it is slow.
  buffers.require_end();
}

TensorMapShape bf16_tile_shape(const Buffer& stored) {
  return {kTensorMapBfloat16,
          3,
          {uint64_t(stored.columns), uint64_t(stored.rows), uint64_t(stored.groups)},
          {kScaleBlock, kScaleBlock, 1},
          false};
}

TensorMapShape tile_shape(const Buffer& operand, int rows) {
  return {kTensorMapUint8,
          2,
          {uint64_t(operand.columns), uint64_t(operand.groups * operand.rows)},
          {kBlockK, uint32_t(copied_rows(rows, int(operand.rows)))},
          true};
}

// The last block's tile, where there are others and they have more rows: see has_tails().
std::optional<TensorMapShape> tail_shape(const GemmSpec& spec, const Buffer& operand, int rows) {
  const int64_t left = operand.rows % rows;
  if (!has_tails(spec) || operand.rows < rows || left == 0) return std::nullopt;
  TensorMapShape shape = tile_shape(operand, rows);
  shape.box[1] = uint32_t(left);
  return shape;
}

// `rows` of the operand, of which `block_rows` make a tile.
TensorMapShape row_scale_shape(const Buffer& scale, int block_rows, int64_t rows) {
  return {kTensorMapFloat32,
          2,
          {uint64_t(scale.columns), uint64_t(scale.groups * scale.rows)},
          {uint32_t(copied_rows(block_rows, int(rows))), 1},
          false};
}

// Output blocks, a cluster's neighbours counted as one; an upper bound where sizes are on the
// device.
int64_t cluster_blocks(const GemmSpec& spec, const GemmParams& params) {
  const int rows = spec.block_m * (spec.multicast == Multicast::kRhs ? 2 : 1);
  const int columns = spec.block_n * (spec.multicast == Multicast::kLhs ? 2 : 1);
  const int64_t n_blocks = ceil_div(params.n, columns), m_blocks = ceil_div(params.m, rows);
  if (spec.variant == Variant::kRagged) return (m_blocks + params.groups) * n_blocks;
  return m_blocks * n_blocks * (out_has_groups(spec.variant) ? params.groups : 1);
}

// CTAs to launch: one wave at most, evenly loaded where the number of blocks is known; with split_k
// one cluster for each block.
int64_t grid_size(const GemmCall& call, int64_t blocks, int multiprocessors) {
  const int cluster = cluster_size(call.spec);
  if (call.spec.split_k > 1) return blocks * cluster;
  const int sms = call.num_sms > 0 ? std::min(call.num_sms, multiprocessors) : multiprocessors;
  const int64_t workers = std::max(sms / cluster, 1);
  if (is_grouped(call.spec.variant)) return std::min(blocks, workers) * cluster;
  return ceil_div(blocks, ceil_div(blocks, workers)) * cluster;
}

Status encode_maps(const Driver& driver, const GemmSpec& spec, const Operands& o,
                   GemmParams& params) {
  Status status = encode(driver, params.lhs, tile_shape(o.lhs, spec.block_m), o.lhs.data, "lhs");
  auto then = [&](TensorMap& map, const TensorMapShape& shape, const Buffer& operand) {
    if (status.ok()) status = encode(driver, map, shape, operand.data, operand.name);
  };
  const bool casts = is_cast(spec.rhs);
  then(params.rhs, casts ? bf16_tile_shape(o.rhs) : tile_shape(o.rhs, spec.block_n), o.rhs);
  if (auto shape = tail_shape(spec, o.lhs, spec.block_m)) then(params.lhs_tail, *shape, o.lhs);
  if (auto shape = tail_shape(spec, o.rhs, spec.block_n)) then(params.rhs_tail, *shape, o.rhs);
  if (casts) then(params.rhs_right, bf16_tile_shape(o.rhs_right), o.rhs_right);
  if (is_per_row(spec.lhs_scale)) {
    then(params.lhs_scale, row_scale_shape(o.lhs_scale, spec.block_m, o.lhs.rows), o.lhs_scale);
  }
  if (is_per_row(spec.rhs_scale)) {
    then(params.rhs_scale, row_scale_shape(o.rhs_scale, spec.block_n, o.rhs.rows), o.rhs_scale);
  }
  if (store(spec) == Store::kTma) {
    const TensorMapShape shape = {
        spec.out == Out::kF32 ? kTensorMapFloat32 : kTensorMapBfloat16,
        3,
        {uint64_t(o.out.columns), uint64_t(o.out.rows), uint64_t(o.out.groups)},
        {uint32_t(store_columns(spec.block_n, spec.out)), kSubTileRows, 1},
        true};
    then(params.out, shape, o.out);
  }
  return status;
}

Status launch(const Driver& driver, const GemmCall& call, const LoadedKernel& kernel,
              CUstream stream, GemmParams& params) {
  const GemmSpec& spec = call.spec;
  const int64_t blocks = cluster_blocks(spec, params);
  const int64_t grid = grid_size(call, blocks, kernel.multiprocessors);
  // The scheduler counts them, and those of group_m rows of blocks, in ints.
  const int64_t strip = spec.group_m * ceil_div(int64_t{params.n}, spec.block_n);
  if (std::max({blocks, grid, strip}) > INT32_MAX) {
    return Status::error(message("gemm: too many output blocks",
                                 std::to_string(std::max({blocks, grid, strip})), "below 2^31",
                                 "take larger blocks, or a smaller group_m"));
  }
  CUlaunchAttribute cluster = {kLaunchAttributeClusterDimension, {}, {}};
  cluster.value.cluster = {unsigned(cluster_size(spec)), 1, 1};
  const CUlaunchConfig config = {
      .grid_x = unsigned(grid),
      .grid_y = 1,
      .grid_z = 1,
      .block_x = unsigned(threads(spec)),
      .block_y = 1,
      .block_z = 1,
      .shared_bytes = unsigned(shared_bytes(spec)),
      .stream = stream,
      .attributes = &cluster,
      .attribute_count = cluster_size(spec) > 1 ? 1u : 0u,
  };
  void* arguments[] = {&params};
  return check(driver, driver.launch(&config, kernel.function, arguments, nullptr),
               "cuLaunchKernelEx");
}

GemmParams make_params(const GemmCall& call, const Operands& o) {
  GemmParams params{};
  params.lhs_scale_data = o.lhs_scale.pointer<float>();
  params.rhs_scale_data = o.rhs_scale.pointer<float>();
  params.left_columns = call.pair ? int32_t(o.rhs.columns) : INT32_MAX;
  params.out_data = o.out.data;
  params.m = int32_t(o.m);
  params.n = int32_t(o.n);
  params.k = int32_t(o.k);
  params.groups = int32_t(o.groups);
  params.group_data = o.group_data.pointer<int32_t>();
  return params;
}

ffi::Error execute(CUstream stream, GemmState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results, ffi::Dictionary) {
  const GemmCall& call = state->spec;
  Operands o;
  Buffers buffers("gemm", args, results);
  read_operands(call, buffers, o);
  if (!buffers.status().ok()) return to_error(buffers.status());
  if (o.out.groups == 0 || o.m == 0 || o.n == 0) return ffi::Error::Success();
  auto kernel = state->program->load(stream);
  if (!kernel.ok()) return to_error(kernel.status());
  const Driver& driver = **fp8gemm::driver();
  GemmParams params = make_params(call, o);
  const Status status = encode_maps(driver, call.spec, o, params);
  if (!status.ok()) return to_error(status);
  return to_error(launch(driver, call, *kernel, stream, params));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(instantiate_handler, instantiate, ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER(initialize_handler, initialize<GemmCall>,
                       bind_call<GemmCall>(ffi::Ffi::BindInitialize()));

XLA_FFI_DEFINE_HANDLER(execute_handler, execute, bind_call<GemmCall>(ffi::Ffi::BindExecute()),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* gemm_instantiate(XLA_FFI_CallFrame* frame) { return instantiate_handler(frame); }
XLA_FFI_Error* gemm_initialize(XLA_FFI_CallFrame* frame) { return initialize_handler(frame); }
XLA_FFI_Error* gemm_execute(XLA_FFI_CallFrame* frame) { return execute_handler(frame); }

ffi::TypeId* gemm_state_id() { return &GemmState::id; }
const ffi::TypeInfo* gemm_state_info() { return &kGemmStateInfo; }

}  // namespace fp8gemm
