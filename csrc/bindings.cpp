// The Python module jax_fp8gemm._ext. _native.py is its only importer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "ffi_gemm.h"
#include "ffi_quantize.h"
#include "gemm_spec.h"
#include "jit.h"
#include "quantize_spec.h"

namespace nb = nanobind;

namespace fp8gemm {
namespace {

template <class T>
nb::capsule capsule(T* pointer) {
  return nb::capsule(reinterpret_cast<const void*>(pointer));
}

nb::dict targets() {
  nb::dict gemm;
  gemm["instantiate"] = capsule(gemm_instantiate);
  gemm["initialize"] = capsule(gemm_initialize);
  gemm["execute"] = capsule(gemm_execute);
  nb::dict quantize;
  quantize["instantiate"] = capsule(quantize_instantiate);
  quantize["initialize"] = capsule(quantize_initialize);
  quantize["execute"] = capsule(quantize_execute);
  nb::dict all;
  all["jax_fp8gemm_gemm_v1"] = gemm;
  all["jax_fp8gemm_quantize_v1"] = quantize;
  return all;
}

nb::dict state_types() {
  nb::dict gemm;
  gemm["type_id"] = capsule(gemm_state_id());
  gemm["type_info"] = capsule(gemm_state_info());
  nb::dict quantize;
  quantize["type_id"] = capsule(quantize_state_id());
  quantize["type_info"] = capsule(quantize_state_info());
  nb::dict all;
  all["jax_fp8gemm_gemm_state_v1"] = gemm;
  all["jax_fp8gemm_quantize_state_v1"] = quantize;
  return all;
}

void configure(const std::string& nvrtc, const std::string& cache_dir,
               const std::string& cache_warning, bool verbose, const std::string& dump_dir,
               const std::string& version) {
  set_options({nvrtc, cache_dir, cache_warning, verbose, dump_dir, version});
}

// A Python integer, or the nearest one that fits: a parser will say that it is out of range.
int64_t nearest_int64(nb::handle value) {
  int overflow = 0;
  const nb::int_ number(nb::borrow(value));
  const int64_t found = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  return overflow ? (overflow > 0 ? INT64_MAX : INT64_MIN) : found;
}

Attributes attributes_of(const nb::dict& dict) {
  Attributes attributes;
  for (auto [key, value] : dict) {
    const std::string name = nb::cast<std::string>(key);
    if (nb::isinstance<nb::str>(value)) {
      attributes[name] = nb::cast<std::string>(value);
    } else {
      attributes[name] = nearest_int64(value);
    }
  }
  return attributes;
}

void raise(const Status& status) {
  if (!status.ok()) throw nb::value_error(status.message().c_str());
}

template <class T>
T value_or_raise(Result<T> result) {
  raise(result.status());
  return *result;
}

ProgramText text_of(const Attributes& attributes) {
  if (attributes.count("kernel")) {
    return program_text(value_or_raise(parse_gemm_call(attributes)).spec);
  }
  return program_text(value_or_raise(parse_quantize_spec(attributes)));
}

nb::dict compile(const nb::dict& dict) {
  const ProgramText source = text_of(attributes_of(dict));
  Result<const Program*> made = [&] {
    nb::gil_scoped_release release;
    return program(source);
  }();
  raise(made.status());
  const Program& program = **made;
  nb::dict facts;
  facts["cubin"] = nb::bytes(program.compiled.cubin.data(), program.compiled.cubin.size());
  facts["log"] = program.compiled.log;
  facts["source"] = source.text;
  facts["origin"] = program.origin;
  facts["seconds"] = program.seconds;
  return facts;
}

// ---- The plan -----------------------------------------------------------------------------------

int nearest_int(nb::handle value) {
  return static_cast<int>(std::clamp<int64_t>(nearest_int64(value), INT32_MIN, INT32_MAX));
}

std::string_view text(nb::handle value) {
  return nb::isinstance<nb::str>(value) ? nb::borrow<nb::str>(value).c_str() : "";
}

// Adds a config to what is computed. Returns why it cannot be one, or null.
// config: (kernel, block_m, block_n, stages, multicast, split_k, group_m).
const char* add_config(const nb::tuple& config, GemmSpec& spec) {
  if (config.size() != 7) {
    throw nb::value_error(
        "a config has kernel, block_m, block_n, stages, multicast, split_k, group_m");
  }
  const auto kernel = kernel_named(text(config[0]));
  const auto multicast = multicast_named(text(config[4]));
  spec.kernel = kernel.value_or(Kernel::kPersistent);
  spec.block_m = nearest_int(config[1]);
  spec.block_n = nearest_int(config[2]);
  spec.stages = nearest_int(config[3]);
  spec.multicast = multicast.value_or(Multicast::kNone);
  spec.split_k = nearest_int(config[5]);
  spec.group_m = nearest_int(config[6]);
  if (!kernel) return "kernel must be persistent or few_rows";
  return multicast ? nullptr : "multicast must be none, lhs or rhs";
}

// (reason, shared_bytes, threads, cluster_size, registers, store) of each config: why there can be
// no such kernel, or None; numbers are 0 and the store "" where one of the config's is out of
// range. problem: attributes of the custom call, see parse_gemm_problem(). steps: of 128 along k.
nb::list plan(const nb::dict& problem, const nb::list& configs, int64_t steps) {
  GemmSpec spec = value_or_raise(parse_gemm_problem(attributes_of(problem)));
  const int k_steps = static_cast<int>(std::clamp<int64_t>(steps, 0, kAnySteps));
  nb::list plans;
  for (nb::handle config : configs) {
    const char* reason = add_config(nb::cast<nb::tuple>(config), spec);
    const bool known = !reason && !out_of_range(spec);
    if (!reason) reason = why_illegal(spec, k_steps);
    nb::object why = reason ? nb::object(nb::str(reason)) : nb::none();
    plans.append(known ? nb::make_tuple(why, shared_bytes(spec), threads(spec), cluster_size(spec),
                                        registers(spec), name_of(store(spec)))
                       : nb::make_tuple(why, 0, 0, 0, 0, ""));
  }
  return plans;
}

// The most stages, up to those of each config, that are legal; 0 where there are none.
nb::list deepest(const nb::dict& problem, const nb::list& configs, int64_t steps) {
  GemmSpec spec = value_or_raise(parse_gemm_problem(attributes_of(problem)));
  const int k_steps = static_cast<int>(std::clamp<int64_t>(steps, 0, kAnySteps));
  nb::list stages;
  for (nb::handle config : configs) {
    const char* reason = add_config(nb::cast<nb::tuple>(config), spec);
    stages.append(reason ? 0 : deepest_stages(spec, k_steps));
  }
  return stages;
}

// (threads, residents, dynamic shared bytes, rows of a tile) of a cast.
nb::tuple cast_plan(const nb::dict& attributes) {
  const QuantizeSpec spec = value_or_raise(parse_quantize_spec(attributes_of(attributes)));
  return nb::make_tuple(quantize_threads(spec), residents(spec), shared_bytes(spec),
                        tile_rows(spec));
}

// ---- Facts --------------------------------------------------------------------------------------

nb::dict cache_facts_dict() {
  const CacheFacts facts = cache_facts();
  nb::dict dict;
  dict["folder"] = options().cache_dir;
  dict["programs"] = facts.programs;
  dict["from_disk"] = facts.from_disk;
  dict["compiled"] = facts.compiled;
  return dict;
}

// Version of the compiler, or the error that says how to get one.
nb::dict nvrtc_facts() {
  nb::dict facts;
  auto opened = nvrtc(options().nvrtc);
  if (!opened.ok()) {
    facts["error"] = opened.status().message();
    return facts;
  }
  facts["path"] = (*opened)->path;
  facts["version"] = std::to_string((*opened)->major) + "." + std::to_string((*opened)->minor);
  return facts;
}

nb::dict device_facts() {
  nb::dict facts;
  auto opened = driver();
  if (!opened.ok()) {
    facts["error"] = opened.status().message();
    return facts;
  }
  const Driver& d = **opened;
  const Status started = check(d, d.init(0), "cuInit");
  if (!started.ok()) {
    facts["error"] = started.message();
    return facts;
  }
  int version = 0, count = 0;
  const Status counted = check(d, d.device_count(&count), "cuDeviceGetCount");
  if (!counted.ok()) {
    facts["error"] = counted.message();
    return facts;
  }
  d.version(&version);
  facts["driver"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  nb::list devices;
  for (int i = 0; i < count; ++i) {
    CUdevice device = 0;
    char name[128] = "";
    int major = 0, minor = 0;
    d.device_get(&device, i);
    d.device_name(name, sizeof name, device);
    d.device_attribute(&major, kDeviceAttributeComputeCapabilityMajor, device);
    d.device_attribute(&minor, kDeviceAttributeComputeCapabilityMinor, device);
    nb::dict one;
    one["name"] = std::string(name);
    one["compute_capability"] = std::to_string(major) + "." + std::to_string(minor);
    devices.append(one);
  }
  facts["devices"] = devices;
  return facts;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.def("targets", targets);
  m.def("state_types", state_types);
  m.def("configure", configure, nb::arg("nvrtc"), nb::arg("cache_dir"), nb::arg("cache_warning"),
        nb::arg("verbose"), nb::arg("dump_dir"), nb::arg("version"));
  m.def("compile", compile, nb::arg("attributes"));
  m.def("plan", plan, nb::arg("problem"), nb::arg("configs"), nb::arg("steps") = kAnySteps);
  m.def("deepest", deepest, nb::arg("problem"), nb::arg("configs"), nb::arg("steps") = kAnySteps);
  m.def("cast_plan", cast_plan, nb::arg("attributes"));
  m.def("variant_names", variant_names);
  m.def("cache_facts", cache_facts_dict);
  m.def("nvrtc_facts", nvrtc_facts);
  m.def("device_facts", device_facts);
}

}  // namespace fp8gemm
