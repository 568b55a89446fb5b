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
         field("aligned", s.aligned) + "};\n";
}

int dynamic_shared_bytes(const QuantizeSpec& spec) {
  if (spec.source == Source::kSwiglu) return sizeof(SwigluOperands);
  return spec.source == Source::kSwigluBackward ? sizeof(BackwardShared) : 0;
}

// CTAs that share a multiprocessor: as many as registers and shared memory allow without spills.
// Numbers of 8 and 16 bits stay packed, and leave room for a third or a fourth.
int residents(const QuantizeSpec& spec) {
  if (!spec.aligned || is_persistent(spec)) return 1;
  if (tile_rows(spec) < 128) return spec.type == Float::kF32 ? 6 : 8;
  const bool packed =
      spec.source == Source::kFloat && spec.type != Float::kF32 && spec.tile == ScaleTile::k1x128;
  const bool swiglu_rows = spec.source == Source::kSwiglu && !spec.transposed && spec.pow2;
  if (spec.source == Source::kFp8) return 4;
  return packed || swiglu_rows ? 3 : 2;
}

}  // namespace

Result<QuantizeSpec> parse_quantize_spec(const Attributes& attributes) {
  AttributeReader read(attributes);
  QuantizeSpec spec;
  spec.source = read.name_of<Source>("source", kSources);
  spec.type = read.name_of<Float>("type", kFloats);
  spec.tile = read.name_of<ScaleTile>("tile", kTiles);
  spec.pow2 = read.integer("pow2") != 0;
  spec.rows = read.integer("rows") != 0;
  spec.transposed = read.integer("transposed") != 0;
  spec.grouped = read.integer("grouped") != 0;
  spec.gather = read.integer("gather") != 0;
  spec.pair = read.integer("pair") != 0;
  spec.aligned = read.integer("aligned") != 0;
  if (!read.status().ok()) return read.status();
  return spec;
}

ProgramText program_text(const QuantizeSpec& spec) {
  char name[128];
  std::snprintf(name, sizeof name, "quantize_%s_%s_%s%s%s%s%s%s%s%s",
                kSources[int(spec.source)].attribute, kFloats[int(spec.type)].attribute,
                kTiles[int(spec.tile)].attribute, spec.pow2 ? "_pow2" : "",
                spec.rows ? "_rows" : "", spec.transposed ? "_transposed" : "",
                spec.grouped ? "_grouped" : "", spec.gather ? "_gather" : "",
                spec.pair ? "_pair" : "", spec.aligned ? "" : "_unaligned");
  const std::string text = "#include \"params.cuh\"\n\nnamespace fp8gemm {\n\n" + spec_text(spec) +
                           "\n}  // namespace fp8gemm\n\n#include \"quantize.cuh\"\n\n"
                           "extern \"C\" __global__ void __launch_bounds__(" +
                           std::to_string(quantize_threads(spec)) + ", " +
                           std::to_string(residents(spec)) + ") " + kEntryPoint +
                           "(const __grid_constant__ fp8gemm::QuantizeParams params) {\n"
                           "  fp8gemm::quantize_kernel<fp8gemm::kSpec>(params);\n}\n";
  return {name, text, kEntryPoint, dynamic_shared_bytes(spec)};
}

}  // namespace fp8gemm
