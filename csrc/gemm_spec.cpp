#include "gemm_spec.h"

#include <cstdio>

namespace fp8gemm {
namespace {

constexpr const char* kEntryPoint = "fp8_gemm";

const Names kVariants = {
    {"dense", "Variant::kDense"},   {"batched", "Variant::kBatched"},
    {"ragged", "Variant::kRagged"}, {"contiguous", "Variant::kContiguous"},
    {"masked", "Variant::kMasked"}, {"ragged_contracting", "Variant::kRaggedContracting"}};
const Names kScaleTiles = {{"1x128", "ScaleTile::k1x128"},
                           {"128x128", "ScaleTile::k128x128"},
                           {"1xk", "ScaleTile::k1xK"},
                           {"tensor", "ScaleTile::kTensor"}};
const Names kRhs = {
    {"fp8", "Rhs::kFp8"}, {"bf16", "Rhs::kBf16"}, {"bf16_transposed", "Rhs::kBf16Transposed"}};
const Names kOuts = {{"bf16", "Out::kBf16"}, {"f32", "Out::kF32"}};
const Names kMulticasts = {
    {"none", "Multicast::kNone"}, {"lhs", "Multicast::kLhs"}, {"rhs", "Multicast::kRhs"}};
const Names kStores = {{"tma", "Store::kTma"}, {"direct", "Store::kDirect"}};
const Names kKernels = {{"persistent", "gemm"}, {"few_rows", "few_rows"}};

std::string code(const Names& names, int index) { return names[index].code; }

std::string spec_text(const GemmSpec& s) {
  return "constexpr GemmSpec kSpec = {\n" + field("variant", code(kVariants, int(s.variant))) +
         field("lhs_scale", code(kScaleTiles, int(s.lhs_scale))) +
         field("rhs_scale", code(kScaleTiles, int(s.rhs_scale))) +
         field("rhs", code(kRhs, int(s.rhs))) + field("out", code(kOuts, int(s.out))) +
         field("accumulate", s.accumulate) + field("block_m", s.block_m) +
         field("block_n", s.block_n) + field("stages", s.stages) +
         field("multicast", code(kMulticasts, int(s.multicast))) + field("split_k", s.split_k) +
         field("group_m", s.group_m) + field("store", code(kStores, int(s.store))) +
         field("shared_bytes", s.shared_bytes) + "};\n";
}

// "before0after, before1after, ..."
std::string numbered(const char* before, int count, const char* after) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + (before + std::to_string(i) + after);
  return text;
}

// PTX ISA, "wgmma.mma_async": D[64, n] (+)= A[64, 32] · B[n, 32]ᵀ, e4m3, both in shared memory.
std::string wgmma_text(int n) {
  const int r = n / 2;  // accumulator registers of a thread
  auto operand = [&](int i) { return "%" + std::to_string(r + i); };
  return "__device__ __forceinline__ void wgmma_m64k32(float (&d)[" + std::to_string(r) +
         "], uint64_t lhs, uint64_t rhs, bool accumulate) {\n  asm volatile(\n" +
         "      \"{\\n.reg .pred p;\\nsetp.ne.b32 p, " + operand(2) + ", 0;\\n\"\n" +
         "      \"wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k32.f32.e4m3.e4m3 {" +
         numbered("%", r, "") + "}, " + operand(0) + ", " + operand(1) +
         ", p, 1, 1;\\n}\\n\"\n      : " + numbered("\"+f\"(d[", r, "])") +
         "\n      : \"l\"(lhs), \"l\"(rhs), \"r\"(int(accumulate)));\n}\n";
}

std::string short_name(const KernelSpec& spec) {
  const GemmSpec& s = spec.gemm;
  char name[128];
  std::snprintf(name, sizeof name, "%s_%dx%d_s%d_mc%d_k%d_v%d_l%d_r%d%d_o%d%d_g%d_t%d",
                spec.kernel == Kernel::kFewRows ? "few_rows" : "persistent", s.block_m, s.block_n,
                s.stages, int(s.multicast), s.split_k, int(s.variant), int(s.lhs_scale),
                int(s.rhs_scale), int(s.rhs), int(s.out), int(s.accumulate), s.group_m,
                int(s.store));
  return name;
}

}  // namespace

Result<KernelSpec> parse_gemm_spec(const Attributes& attributes) {
  AttributeReader read(attributes);
  KernelSpec spec;
  spec.kernel = read.name_of<Kernel>("kernel", kKernels);
  spec.gemm.variant = read.name_of<Variant>("variant", kVariants);
  spec.gemm.lhs_scale = read.name_of<ScaleTile>("lhs_scale", kScaleTiles);
  spec.gemm.rhs_scale = read.name_of<ScaleTile>("rhs_scale", kScaleTiles);
  spec.gemm.rhs = read.name_of<Rhs>("rhs", kRhs);
  spec.gemm.out = read.name_of<Out>("out", kOuts);
  spec.gemm.accumulate = read.integer("accumulate") != 0;
  spec.gemm.block_m = read.integer("block_m");
  spec.gemm.block_n = read.integer("block_n");
  spec.gemm.stages = read.integer("stages");
  spec.gemm.multicast = read.name_of<Multicast>("multicast", kMulticasts);
  spec.gemm.split_k = read.integer("split_k");
  spec.gemm.group_m = read.integer("group_m");
  spec.gemm.store = read.name_of<Store>("store", kStores);
  spec.gemm.shared_bytes = read.integer("shared_bytes");
  spec.num_sms = read.integer("num_sms");
  if (!read.status().ok()) return read.status();
  return spec;
}

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const Name& name : kVariants) names.push_back(name.attribute);
  return names;
}

ProgramText program_text(const KernelSpec& spec) {
  const std::string name = code(kKernels, int(spec.kernel));
  const std::string header = spec.kernel == Kernel::kFewRows ? "gemm_few_rows" : "gemm";
  const std::string text =
      "#include \"params.cuh\"\n\nnamespace fp8gemm {\n\n" + spec_text(spec.gemm) + "\n" +
      wgmma_text(instruction_columns(spec.gemm)) + "\n}  // namespace fp8gemm\n\n#include \"" +
      header + ".cuh\"\n\nextern \"C\" __global__ void __launch_bounds__(" +
      std::to_string(threads(spec)) + ", 1) " + kEntryPoint +
      "(const __grid_constant__ fp8gemm::GemmParams params) {\n  fp8gemm::" + name +
      "_kernel<fp8gemm::kSpec>(params);\n}\n";
  return {short_name(spec), text, kEntryPoint, spec.gemm.shared_bytes};
}

int threads(const KernelSpec& spec) {
  if (spec.kernel == Kernel::kFewRows) return 320;  // as the kernels' headers lay them out
  return is_cast(spec.gemm.rhs) ? 512 : 384;
}

int cluster_size(const KernelSpec& spec) {
  if (spec.kernel == Kernel::kFewRows) return spec.gemm.split_k;
  return spec.gemm.multicast != Multicast::kNone || is_cast(spec.gemm.rhs) ? 2 : 1;
}

}  // namespace fp8gemm
