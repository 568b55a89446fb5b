#include "ffi_gemm.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "ffi_common.h"
#include "gemm_spec.h"
#include "tensor_map.h"

namespace fp8gemm {
namespace {

using GemmState = CallState<KernelSpec>;
const ffi::TypeInfo kGemmStateInfo = ffi::MakeTypeInfo<GemmState>();

ffi::ErrorOr<std::unique_ptr<GemmState>> instantiate(ffi::Dictionary dictionary) {
  const Attributes attributes = read_attributes(
      dictionary,
      {"accumulate", "block_m", "block_n", "stages", "split_k", "group_m", "shared_bytes",
       "num_sms"},
      {"kernel", "variant", "lhs_scale", "rhs_scale", "rhs", "out", "multicast", "store"});
  auto spec = parse_gemm_spec(attributes);
  if (!spec.ok()) return ffi::Unexpected(to_error(spec.status()));
  auto made = program(program_text(*spec));
  if (!made.ok()) return ffi::Unexpected(to_error(made.status()));
  return std::make_unique<GemmState>(GemmState{*spec, *made});
}

// An operand as a stack of matrices: [groups, rows, columns].
struct Operand {
  const char* name;
  void* data;
  int64_t groups, rows, columns;
};

// Checks type and rank.
Status read_operand(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType type, int rank,
                    Operand& operand) {
  auto dims = buffer.dimensions();
  if (buffer.element_type() != type || static_cast<int>(dims.size()) != rank) {
    return wrong_operand(
        std::string("gemm: operand ") + name + " has the wrong type",
        "element type " + std::to_string(int(buffer.element_type())) + ", shape " +
            shape_text(buffer),
        "element type " + std::to_string(int(type)) + ", rank " + std::to_string(rank));
  }
  operand = {name, buffer.untyped_data(), rank == 3 ? dims[0] : 1, dims[rank - 2], dims[rank - 1]};
  if (operand.groups * operand.rows > INT32_MAX || operand.columns > INT32_MAX) {
    return wrong_operand(std::string("gemm: operand ") + name + " has too many rows or columns",
                         shape_text(buffer), "rows of all groups and columns below 2^31");
  }
  return {};
}

Status expect_shape(const Operand& operand, int64_t groups, int64_t rows, int64_t columns) {
  if (operand.groups == groups && operand.rows == rows && operand.columns == columns) return {};
  auto text = [](int64_t g, int64_t r, int64_t c) {
    return "[" + std::to_string(g) + ", " + std::to_string(r) + ", " + std::to_string(c) + "]";
  };
  return wrong_operand(std::string("gemm: operand ") + operand.name + " has the wrong shape",
                       text(operand.groups, operand.rows, operand.columns),
                       text(groups, rows, columns));
}

// The layout in memory of the scales of an operand [rows, k], as primitives.py makes it.
Status check_scales(const Operand& scale, ScaleTile tile, int64_t groups, int64_t rows, int64_t k) {
  switch (tile) {
    case ScaleTile::k1x128:
      return expect_shape(scale, groups, ceil_div(k, 128), round_up(rows, 4));
    case ScaleTile::k1xK:
      return expect_shape(scale, groups, 1, round_up(rows, 4));
    case ScaleTile::k128x128:
      return expect_shape(scale, groups, ceil_div(rows, 128), round_up(ceil_div(k, 128), 4));
    case ScaleTile::kTensor:
      return expect_shape(scale, groups, 1, 4);
  }
  return {};
}

// The matrices [n, k] that a rhs of bf16 stands for: itself, or itself with `right` beside it, as
// the other operands' shapes want.
Status whole_rhs(Rhs type, const Operand& rhs, const Operand& right, int64_t n, int64_t k,
                 Operand& whole, int32_t& left_columns) {
  Status status = expect_shape(right, rhs.groups, rhs.rows, rhs.columns);
  if (!status.ok()) return status;
  const bool transposed = type == Rhs::kBf16Transposed;
  const bool pair = (transposed ? n : k) == 2 * rhs.columns;
  if (rhs.columns % (pair ? 128 : 8)) {
    return wrong_operand("gemm: rows of a bf16 rhs cannot be copied",
                         std::to_string(rhs.columns) + " columns",
                         "a multiple of 8; of 128 where two lie side by side");
  }
  whole = rhs;
  left_columns = pair ? int32_t(rhs.columns) : INT32_MAX;
  if (pair) whole.columns *= 2;
  if (transposed) std::swap(whole.rows, whole.columns);
  return {};
}

TensorMapShape bf16_tile_shape(const Operand& stored) {
  return {kTensorMapBfloat16,
          3,
          {uint64_t(stored.columns), uint64_t(stored.rows), uint64_t(stored.groups)},
          {128, 128, 1},
          false};
}

TensorMapShape tile_shape(const Operand& operand, int rows) {
  return {kTensorMapUint8,
          2,
          {uint64_t(operand.columns), uint64_t(operand.groups * operand.rows)},
          {128, uint32_t(copied_rows(rows, int(operand.rows)))},
          true};
}

// `rows` of the operand, of which `block_rows` make a tile.
TensorMapShape row_scale_shape(const Operand& scale, int block_rows, int64_t rows) {
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
int64_t grid_size(const KernelSpec& spec, int64_t blocks, int multiprocessors) {
  const int cluster = cluster_size(spec);
  if (spec.gemm.split_k > 1) return blocks * cluster;
  const int sms = spec.num_sms > 0 ? std::min(spec.num_sms, multiprocessors) : multiprocessors;
  const int64_t workers = std::max(sms / cluster, 1);
  if (is_grouped(spec.gemm.variant)) return std::min(blocks, workers) * cluster;
  return ceil_div(blocks, ceil_div(blocks, workers)) * cluster;
}

struct Operands {
  Operand lhs, rhs, lhs_scale, out;
  Operand rhs_scale;  // or, where rhs is bf16, what lies to the right of it
  int32_t left_columns = 0;
  const int32_t* group_data = nullptr;
  int64_t groups = 1;
};

// Sizes [groups], or the group of each row [m].
Status read_group_data(const ffi::AnyBuffer& buffer, Variant variant, int64_t m, Operands& o) {
  const int64_t expected = variant == Variant::kContiguous ? m : o.groups;
  if (buffer.element_type() != ffi::S32 || int64_t(buffer.element_count()) != expected) {
    return wrong_operand("gemm: the group operand has the wrong type",
                         "element type " + std::to_string(int(buffer.element_type())) + ", shape " +
                             shape_text(buffer),
                         "int32 [" + std::to_string(expected) + "]");
  }
  o.group_data = static_cast<const int32_t*>(buffer.untyped_data());
  return {};
}

Status read_operands(const GemmSpec& spec, ffi::RemainingArgs args, ffi::RemainingRets results,
                     Operands& o) {
  const size_t expected = 4 + is_grouped(spec.variant) + spec.accumulate;
  if (args.size() != expected || results.size() != 1) {
    return wrong_operand("gemm: wrong number of operands", std::to_string(args.size()),
                         std::to_string(expected) + " operands and one result");
  }
  const int lhs_rank = lhs_has_groups(spec.variant) ? 3 : 2;
  const int rhs_rank = rhs_has_groups(spec.variant) ? 3 : 2;
  const int out_rank = out_has_groups(spec.variant) ? 3 : 2;
  const auto out_type = spec.out == Out::kF32 ? ffi::F32 : ffi::BF16;
  Status status;
  auto then = [&](size_t index, const char* name, ffi::DataType type, int rank, Operand& operand) {
    if (status.ok())
      status = read_operand(*args.get<ffi::AnyBuffer>(index), name, type, rank, operand);
  };
  then(0, "lhs", ffi::F8E4M3FN, lhs_rank, o.lhs);
  const bool casts = is_cast(spec.rhs);
  then(1, "rhs", casts ? ffi::BF16 : ffi::F8E4M3FN, rhs_rank, o.rhs);
  then(2, "lhs scale", ffi::F32, lhs_rank, o.lhs_scale);
  then(3, casts ? "rhs right" : "rhs scale", casts ? ffi::BF16 : ffi::F32, rhs_rank, o.rhs_scale);
  if (status.ok()) {
    status = read_operand(**results.get<ffi::AnyBuffer>(0), "out", out_type, out_rank, o.out);
  }
  if (!status.ok()) return status;
  o.groups = std::max(o.rhs.groups, o.out.groups);
  const int64_t lhs_groups = lhs_rank == 3 ? o.groups : 1,
                rhs_groups = rhs_rank == 3 ? o.groups : 1;
  const int64_t m = o.lhs.rows, n = o.out.columns, k = o.lhs.columns;
  status = expect_shape(o.lhs, lhs_groups, m, k);
  Operand rhs = o.rhs;
  if (status.ok() && casts)
    status = whole_rhs(spec.rhs, o.rhs, o.rhs_scale, n, k, rhs, o.left_columns);
  if (status.ok()) status = expect_shape(rhs, rhs_groups, n, k);
  if (status.ok()) status = expect_shape(o.out, out_rank == 3 ? o.groups : 1, m, n);
  if (status.ok()) status = check_scales(o.lhs_scale, spec.lhs_scale, lhs_groups, m, k);
  if (status.ok() && !casts) status = check_scales(o.rhs_scale, spec.rhs_scale, rhs_groups, n, k);
  if (status.ok() && is_grouped(spec.variant)) {
    status = read_group_data(*args.get<ffi::AnyBuffer>(4), spec.variant, m, o);
  }
  if (status.ok() && spec.accumulate) {
    Operand init;
    status =
        read_operand(*args.get<ffi::AnyBuffer>(expected - 1), "init", out_type, out_rank, init);
    if (status.ok()) status = expect_shape(init, o.out.groups, m, n);
    if (status.ok() && init.data != o.out.data) {
      return wrong_operand("gemm: init is not aliased to the output", "two buffers", "one");
    }
  }
  return status;
}

Status encode_maps(const Driver& driver, const GemmSpec& spec, const Operands& o,
                   GemmParams& params) {
  Status status = encode(driver, params.lhs, tile_shape(o.lhs, spec.block_m), o.lhs.data, "lhs");
  auto then = [&](TensorMap& map, const TensorMapShape& shape, const Operand& operand) {
    if (status.ok()) status = encode(driver, map, shape, operand.data, operand.name);
  };
  const bool casts = is_cast(spec.rhs);
  then(params.rhs, casts ? bf16_tile_shape(o.rhs) : tile_shape(o.rhs, spec.block_n), o.rhs);
  if (casts) then(params.rhs_right, bf16_tile_shape(o.rhs), o.rhs_scale);
  if (is_per_row(spec.lhs_scale)) {
    then(params.lhs_scale, row_scale_shape(o.lhs_scale, spec.block_m, o.lhs.rows), o.lhs_scale);
  }
  if (is_per_row(spec.rhs_scale)) {
    then(params.rhs_scale, row_scale_shape(o.rhs_scale, spec.block_n, o.rhs.rows), o.rhs_scale);
  }
  if (spec.store == Store::kTma) {
    const TensorMapShape shape = {
        spec.out == Out::kF32 ? kTensorMapFloat32 : kTensorMapBfloat16,
        3,
        {uint64_t(o.out.columns), uint64_t(o.out.rows), uint64_t(o.out.groups)},
        {uint32_t(store_columns(spec.block_n, spec.out)), 64, 1},
        true};
    then(params.out, shape, o.out);
  }
  return status;
}

Status launch(const Driver& driver, const KernelSpec& spec, const LoadedKernel& kernel,
              CUstream stream, GemmParams& params) {
  const int64_t blocks = cluster_blocks(spec.gemm, params);
  const int64_t grid = grid_size(spec, blocks, kernel.multiprocessors);
  if (blocks > INT32_MAX || grid > INT32_MAX) {
    return wrong_operand("gemm: too many output blocks", std::to_string(blocks), "below 2^31");
  }
  CUlaunchAttribute cluster = {kLaunchAttributeClusterDimension, {}, {}};
  cluster.value.cluster = {unsigned(cluster_size(spec)), 1, 1};
  CUlaunchConfig config = {unsigned(grid),
                           1,
                           1,
                           unsigned(threads(spec)),
                           1,
                           1,
                           unsigned(spec.gemm.shared_bytes),
                           stream,
                           &cluster,
                           cluster_size(spec) > 1 ? 1u : 0u};
  void* arguments[] = {&params};
  return check(driver, driver.launch(&config, kernel.function, arguments, nullptr),
               "cuLaunchKernelEx");
}

ffi::Error execute(CUstream stream, int32_t device, GemmState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets results, ffi::Dictionary) {
  const KernelSpec& spec = state->spec;
  Operands o;
  Status status = read_operands(spec.gemm, args, results, o);
  if (!status.ok()) return to_error(status);
  if (o.out.groups == 0 || o.out.rows == 0 || o.out.columns == 0) return ffi::Error::Success();
  auto kernel = state->program->load(stream, device);
  if (!kernel.ok()) return to_error(kernel.status());
  const Driver& driver = **fp8gemm::driver();
  GemmParams params;
  status = encode_maps(driver, spec.gemm, o, params);
  if (!status.ok()) return to_error(status);
  params.lhs_scale_data = static_cast<const float*>(o.lhs_scale.data);
  params.rhs_scale_data = static_cast<const float*>(o.rhs_scale.data);
  params.left_columns = o.left_columns;
  params.out_data = o.out.data;
  params.m = int32_t(o.lhs.rows);
  params.n = int32_t(o.out.columns);
  params.k = int32_t(o.lhs.columns);
  params.groups = int32_t(o.groups);
  params.group_data = o.group_data;
  return to_error(launch(driver, spec, *kernel, stream, params));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(instantiate_handler, instantiate, ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER(initialize_handler, initialize<KernelSpec>,
                       bind_call<KernelSpec>(ffi::Ffi::BindInitialize()));

XLA_FFI_DEFINE_HANDLER(execute_handler, execute, bind_call<KernelSpec>(ffi::Ffi::BindExecute()),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_Error* gemm_instantiate(XLA_FFI_CallFrame* frame) { return instantiate_handler(frame); }
XLA_FFI_Error* gemm_initialize(XLA_FFI_CallFrame* frame) { return initialize_handler(frame); }
XLA_FFI_Error* gemm_execute(XLA_FFI_CallFrame* frame) { return execute_handler(frame); }

ffi::TypeId* gemm_state_id() { return &GemmState::id; }
const ffi::TypeInfo* gemm_state_info() { return &kGemmStateInfo; }

}  // namespace fp8gemm
