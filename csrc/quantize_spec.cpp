#include "quantize_spec.h"

#include <cstdio>

namespace fp8gemm {
namespace {

constexpr const char* kEntryPoint = "fp8_quantize";

const Names kSources = {{"float", "Source::kFloat"},
                        {"fp8", "Source::kFp8"},
                        {"swiglu", "Source::kSwiglu"},
                        {"swiglu_backward", "Source::kSwigluBackward"}};
const Names kFloats = {{"bf16", "Float::kBf16"}, {"f16", "Float::kF16"}, {"f32", "Float::kF32"}};
const Names kTiles = {
    {"1x128", "ScaleTile::k1x128"}, {"128x128", "ScaleTile::k128x128"}, {"1xk", "ScaleTile::k1xK"}};

std::string spec_text(const QuantizeSpec& s) {
  return "constexpr QuantizeSpec kSpec = {\n" + field("source", kSources[int(s.source)].code) +
         field("type", kFloats[int(s.type)].code) + field("tile", kTiles[int(s.tile)].code) +
         field("pow2", s.pow2) + field("rows", s.rows) + field("transposed", s.transposed) +
         field("grouped", s.grouped) + field("gather", s.gather) + field("pair", s.pair) +
         field("shared_columns", s.shared_columns) + field("aligned", s.aligned) + "};\n";
}

std::string short_name(const QuantizeSpec& spec) {
  char name[128];
  std::snprintf(
      name, sizeof name, "quantize_%s_%s_%s%s%s%s%s%s%s%s%s", kSources[int(spec.source)].attribute,
      kFloats[int(spec.type)].attribute, kTiles[int(spec.tile)].attribute, spec.pow2 ? "_pow2" : "",
      spec.rows ? "_rows" : "", spec.transposed ? "_transposed" : "",
      spec.grouped ? "_grouped" : "", spec.gather ? "_gather" : "", spec.pair ? "_pair" : "",
      spec.shared_columns ? "_shared" : "", spec.aligned ? "" : "_unaligned");
  return name;
}

}  // namespace

Result<QuantizeSpec> parse_quantize_spec(const Attributes& attributes) {
  AttributeReader read(attributes);
  QuantizeSpec spec{};
  spec.source = read.name_of<Source>("source", kSources);
  spec.type = read.name_of<Float>("type", kFloats);
  spec.tile = read.name_of<ScaleTile>("tile", kTiles);
  spec.pow2 = read.flag("pow2");
  spec.rows = read.flag("rows");
  spec.transposed = read.flag("transposed");
  spec.grouped = read.flag("grouped");
  spec.gather = read.flag("gather");
  spec.pair = read.flag("pair");
  spec.shared_columns = read.optional_integer("shared_columns", 1) != 0;
  spec.aligned = read.flag("aligned");
  if (!read.status().ok()) return read.status();
  if (const char* reason = why_illegal(spec)) {
    return Status::error(message(std::string("quantize: ") + reason, short_name(spec),
                                 "a cast that a kernel can do", kTraceAgain));
  }
  return spec;
}

ProgramText program_text(const QuantizeSpec& spec) {
  const std::string text = "#include \"params.cuh\"\n\nnamespace fp8gemm {\n\n" + spec_text(spec) +
                           "\n}  // namespace fp8gemm\n\n#include \"quantize.cuh\"\n\n"
                           "extern \"C\" __global__ void __launch_bounds__(" +
                           std::to_string(quantize_threads(spec)) + ", " +
                           std::to_string(residents(spec)) + ") " + kEntryPoint +
                           "(const __grid_constant__ fp8gemm::QuantizeParams params) {\n"
                           "  fp8gemm::quantize_kernel<fp8gemm::kSpec>(params);\n}\n";
  return {short_name(spec), text, kEntryPoint, shared_bytes(spec)};
}

}  // namespace fp8gemm
