// The Python module jax_fp8gemm._ext. _native.py is its only importer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

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

void configure(const std::string& nvrtc, const std::string& cache_dir, bool verbose,
               const std::string& dump_dir, const std::string& version) {
  set_options({nvrtc, cache_dir, verbose, dump_dir, version});
}

Attributes attributes_of(const nb::dict& dict) {
  Attributes attributes;
  for (auto [key, value] : dict) {
    const std::string name = nb::cast<std::string>(key);
    if (nb::isinstance<nb::str>(value)) {
      attributes[name] = nb::cast<std::string>(value);
    } else {
      attributes[name] = nb::cast<int64_t>(nb::int_(nb::borrow(value)));
    }
  }
  return attributes;
}

void raise(const Status& status) {
  if (!status.ok()) throw nb::value_error(status.message().c_str());
}

template <class Spec>
ProgramText text_of(Result<Spec> spec) {
  raise(spec.status());
  return program_text(*spec);
}

nb::dict compile(const nb::dict& dict) {
  const Attributes attributes = attributes_of(dict);
  const auto source = attributes.count("kernel") ? text_of(parse_gemm_spec(attributes))
                                                 : text_of(parse_quantize_spec(attributes));
  Result<std::shared_ptr<Program>> made = [&] {
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
  d.version(&version);
  d.device_count(&count);
  facts["driver"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  nb::list devices;
  for (int i = 0; i < count; ++i) {
    CUdevice device;
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
  m.def("configure", configure, nb::arg("nvrtc"), nb::arg("cache_dir"), nb::arg("verbose"),
        nb::arg("dump_dir"), nb::arg("version"));
  m.def("compile", compile, nb::arg("attributes"));
  m.def("variant_names", variant_names);
  m.def("cache_facts", cache_facts_dict);
  m.def("nvrtc_facts", nvrtc_facts);
  m.def("device_facts", device_facts);
}

}  // namespace fp8gemm
