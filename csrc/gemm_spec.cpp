#include "gemm_spec.h"

namespace fp8gemm {
namespace {

// An enumerator's name as an attribute, and in the kernel's C++.
struct Name {
  const char* attribute;
  const char* code;
};
using Names = std::vector<Name>;  // in the order of the enum

const Names kVariants = {{"dense", "Variant::kDense"},
                         {"batched", "Variant::kBatched"},
                         {"ragged", "Variant::kRagged"},
                         {"contiguous", "Variant::kContiguous"},
                         {"masked", "Variant::kMasked"},
                         {"ragged_contracting", "Variant::kRaggedContracting"}};
const Names kScaleTiles = {{"1x128", "ScaleTile::k1x128"},
                           {"128x128", "ScaleTile::k128x128"},
                           {"1xk", "ScaleTile::k1xK"},
                           {"tensor", "ScaleTile::kTensor"}};
const Names kOuts = {{"bf16", "Out::kBf16"}, {"f32", "Out::kF32"}};
const Names kMulticasts = {
    {"none", "Multicast::kNone"}, {"lhs", "Multicast::kLhs"}, {"rhs", "Multicast::kRhs"}};
const Names kStores = {{"tma", "Store::kTma"}, {"direct", "Store::kDirect"}};
const Names kKernels = {{"persistent", "gemm"}, {"few_rows", "few_rows"}};

// Reads attributes one by one and keeps the first error.
class Reader {
 public:
  explicit Reader(const Attributes& attributes) : attributes_(attributes) {}

  int integer(const std::string& name) {
    const int64_t* value = find<int64_t>(name, "an integer");
    return value ? static_cast<int>(*value) : 0;
  }

  template <class Enum>
  Enum name_of(const std::string& name, const Names& names) {
    const std::string* value = find<std::string>(name, "a string");
    if (!value) return Enum{};
    std::string known;
    for (size_t i = 0; i < names.size(); ++i) {
      if (*value == names[i].attribute) return static_cast<Enum>(i);
      known += std::string(i ? ", " : "") + names[i].attribute;
    }
    fail("attribute " + name + " has an unknown value", "\"" + *value + "\"", "one of " + known);
    return Enum{};
  }

  const Status& status() const { return status_; }

 private:
  template <class T>
  const T* find(const std::string& name, const char* kind) {
    auto it = attributes_.find(name);
    if (it == attributes_.end()) {
      fail("attribute " + name + " is missing", "no " + name, kind);
      return nullptr;
    }
    const T* value = std::get_if<T>(&it->second);
    if (!value) fail("attribute " + name + " has the wrong type", "another type", kind);
    return value;
  }

  void fail(const std::string& what, const std::string& got, const std::string& expected) {
    if (!status_.ok()) return;
    status_ = Status::error(message(what, got, expected,
                                    "use the Python package this extension was built with"));
  }

  const Attributes& attributes_;
  Status status_;
};

std::string code(const Names& names, int index) { return names[index].code; }

std::string field(const char* name, const std::string& value) {
  return std::string("    .") + name + " = " + value + ",\n";
}

std::string field(const char* name, int value) { return field(name, std::to_string(value)); }

std::string spec_text(const GemmSpec& s) {
  return "constexpr GemmSpec kSpec = {\n" + field("variant", code(kVariants, int(s.variant))) +
         field("lhs_scale", code(kScaleTiles, int(s.lhs_scale))) +
         field("rhs_scale", code(kScaleTiles, int(s.rhs_scale))) +
         field("out", code(kOuts, int(s.out))) +
         field("accumulate", std::string(s.accumulate ? "true" : "false")) +
         field("block_m", s.block_m) + field("block_n", s.block_n) + field("stages", s.stages) +
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
         "      \"wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) +
         "k32.f32.e4m3.e4m3 {" + numbered("%", r, "") + "}, " + operand(0) + ", " + operand(1) +
         ", p, 1, 1;\\n}\\n\"\n      : " + numbered("\"+f\"(d[", r, "])") +
         "\n      : \"l\"(lhs), \"l\"(rhs), \"r\"(int(accumulate)));\n}\n";
}

}  // namespace

Result<KernelSpec> parse_spec(const Attributes& attributes) {
  Reader read(attributes);
  KernelSpec spec;
  spec.kernel = read.name_of<Kernel>("kernel", kKernels);
  spec.gemm.variant = read.name_of<Variant>("variant", kVariants);
  spec.gemm.lhs_scale = read.name_of<ScaleTile>("lhs_scale", kScaleTiles);
  spec.gemm.rhs_scale = read.name_of<ScaleTile>("rhs_scale", kScaleTiles);
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

std::string program_text(const KernelSpec& spec) {
  const std::string name = code(kKernels, int(spec.kernel));
  const std::string header = spec.kernel == Kernel::kFewRows ? "gemm_few_rows" : "gemm";
  return "#include \"params.cuh\"\n\nnamespace fp8gemm {\n\n" + spec_text(spec.gemm) + "\n" +
         wgmma_text(spec.gemm.block_n) + "\n}  // namespace fp8gemm\n\n#include \"" + header +
         ".cuh\"\n\nextern \"C\" __global__ void __launch_bounds__(" +
         std::to_string(threads(spec)) + ", 1) " + kEntryPoint +
         "(const __grid_constant__ fp8gemm::GemmParams params) {\n  fp8gemm::" + name +
         "_kernel<fp8gemm::kSpec>(params);\n}\n";
}

int threads(const KernelSpec& spec) {
  return spec.kernel == Kernel::kFewRows ? 320 : 384;  // as the kernels' headers lay them out
}

int cluster_size(const KernelSpec& spec) {
  if (spec.kernel == Kernel::kFewRows) return spec.gemm.split_k;
  return spec.gemm.multicast == Multicast::kNone ? 1 : 2;
}

}  // namespace fp8gemm
