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
constexpr const char* kStores[] = {"tma", "direct"};  // in the order of the enum
const Names kKernels = {{"persistent", "Kernel::kPersistent"}, {"few_rows", "Kernel::kFewRows"}};

std::string code(const Names& names, int index) { return names[index].code; }

std::string spec_text(const GemmSpec& s) {
  return "constexpr GemmSpec kSpec = {\n" + field("kernel", code(kKernels, int(s.kernel))) +
         field("variant", code(kVariants, int(s.variant))) +
         field("lhs_scale", code(kScaleTiles, int(s.lhs_scale))) +
         field("rhs_scale", code(kScaleTiles, int(s.rhs_scale))) +
         field("rhs", code(kRhs, int(s.rhs))) + field("out", code(kOuts, int(s.out))) +
         field("accumulate", s.accumulate) + field("block_m", s.block_m) +
         field("block_n", s.block_n) + field("stages", s.stages) +
         field("multicast", code(kMulticasts, int(s.multicast))) + field("split_k", s.split_k) +
         field("group_m", s.group_m) + field("aligned", s.aligned) +
         field("leave_rest", s.leave_rest) + "};\n";
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

// For people: of a dump, and in what JAX_FP8GEMM_VERBOSE prints.
std::string short_name(const GemmSpec& s) {
  char name[128];
  std::snprintf(name, sizeof name, "%s_%dx%d_s%d_mc%d_k%d_v%d_l%d_r%d%d_o%d%d_g%d_t%d%s",
                kKernels[int(s.kernel)].attribute, s.block_m, s.block_n, s.stages, int(s.multicast),
                s.split_k, int(s.variant), int(s.lhs_scale), int(s.rhs_scale), int(s.rhs),
                int(s.out), int(s.accumulate), s.group_m, int(store(s)),
                s.leave_rest ? "_rest" : "");
  return name;
}

Status refusal(const GemmSpec& s, const char* reason) {
  const auto number = [](const char* name, int value) {
    return std::string(", ") + name + " " + std::to_string(value);
  };
  return Status::error(
      message(std::string("gemm: ") + reason,
              std::string("variant ") + kVariants[int(s.variant)].attribute + ", kernel " +
                  kKernels[int(s.kernel)].attribute + number("block_m", s.block_m) +
                  number("block_n", s.block_n) + number("stages", s.stages) + ", multicast " +
                  kMulticasts[int(s.multicast)].attribute + number("split_k", s.split_k) +
                  number("group_m", s.group_m),
              "a config that a kernel can have",
              std::string("leave config out, so that one is chosen; or ") + kTraceAgain));
}

void read_problem(AttributeReader& read, GemmSpec& spec) {
  spec.variant = read.name_of<Variant>("variant", kVariants);
  spec.lhs_scale = read.name_of<ScaleTile>("lhs_scale", kScaleTiles);
  spec.rhs_scale = read.name_of<ScaleTile>("rhs_scale", kScaleTiles);
  spec.rhs = read.name_of<Rhs>("rhs", kRhs);
  spec.out = read.name_of<Out>("out", kOuts);
  spec.accumulate = read.flag("accumulate");
  spec.aligned = read.flag("aligned");
}

}  // namespace

Result<GemmSpec> parse_gemm_problem(const Attributes& attributes) {
  AttributeReader read(attributes);
  GemmSpec spec{};
  read_problem(read, spec);
  if (!read.status().ok()) return read.status();
  return spec;
}

Result<GemmCall> parse_gemm_call(const Attributes& attributes) {
  AttributeReader read(attributes);
  GemmCall call{};
  GemmSpec& spec = call.spec;
  spec.kernel = read.name_of<Kernel>("kernel", kKernels);
  read_problem(read, spec);
  spec.block_m = read.integer("block_m");
  spec.block_n = read.integer("block_n");
  spec.stages = read.integer("stages");
  spec.multicast = read.name_of<Multicast>("multicast", kMulticasts);
  spec.split_k = read.integer("split_k");
  spec.group_m = read.integer("group_m");
  spec.leave_rest = read.optional_integer("leave_rest", 1) != 0;
  call.pair = read.optional_integer("pair", 1) != 0;
  call.num_sms = read.optional_integer("num_sms", INT32_MAX);
  if (!read.status().ok()) return read.status();
  if (const char* reason = why_illegal(spec)) return refusal(spec, reason);
  if (spec.leave_rest && spec.variant != Variant::kRagged) {
    return refusal(spec, "only the ragged variant can leave rows past its groups");
  }
  if (call.pair && !is_cast(spec.rhs)) return refusal(spec, "only a bf16 rhs can be a pair");
  // One kernel for both, where results do not leave by the copy engine anyway.
  if (store(spec) == Store::kDirect) spec.aligned = false;
  return call;
}

std::optional<Kernel> kernel_named(std::string_view attribute) {
  const auto found = find_name(kKernels, attribute);
  return found ? std::optional(static_cast<Kernel>(*found)) : std::nullopt;
}

std::optional<Multicast> multicast_named(std::string_view attribute) {
  const auto found = find_name(kMulticasts, attribute);
  return found ? std::optional(static_cast<Multicast>(*found)) : std::nullopt;
}

const char* name_of(Store store) { return kStores[int(store)]; }

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const Name& name : kVariants) names.push_back(name.attribute);
  return names;
}

ProgramText program_text(const GemmSpec& spec) {
  const bool few_rows = spec.kernel == Kernel::kFewRows;
  const std::string header = few_rows ? "gemm_few_rows" : "gemm";
  const std::string text =
      "#include \"params.cuh\"\n\nnamespace fp8gemm {\n\n" + spec_text(spec) + "\n" +
      wgmma_text(instruction_columns(spec)) + "\n}  // namespace fp8gemm\n\n#include \"" + header +
      ".cuh\"\n\nextern \"C\" __global__ void __launch_bounds__(" + std::to_string(threads(spec)) +
      ", 1) " + kEntryPoint +
      "(const __grid_constant__ fp8gemm::GemmParams params) {\n  fp8gemm::" +
      (few_rows ? "few_rows" : "gemm") + "_kernel<fp8gemm::kSpec>(params);\n}\n";
  return {short_name(spec), text, kEntryPoint, shared_bytes(spec)};
}

}  // namespace fp8gemm
