// Enumerations as the strings users write, for every file of the bindings.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/check.h"
#include "engine/batch.h"
#include "engine/commit_model.h"

namespace py = pybind11;

namespace optimus {

// Enumerations cross the border as the strings users write.
template <class E>
struct Names {
  const char* field;
  std::vector<std::pair<E, const char*>> names;

  const char* of(E value) const {
    for (const auto& [known, name] : names) {
      if (known == value) return name;
    }
    throw std::logic_error(concat("unnamed ", field));
  }
  E parse(const std::string& text) const {
    std::string choices;
    for (const auto& [value, name] : names) {
      if (text == name) return value;
      choices += (choices.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument(concat("[", field, "] must be one of ", choices, ", got ", text));
  }
};

inline const Names<DType> kDTypes{"dtype",
                                  {{DType::float32, "float32"}, {DType::bfloat16, "bfloat16"}}};
inline const Names<Device> kDevices{"device", {{Device::cpu, "cpu"}, {Device::cuda, "cuda"}}};
inline const Names<DecodeMode> kDecodeModes{
    "decode_mode",
    {{DecodeMode::ar, "ar"},
     {DecodeMode::block, "block"},
     {DecodeMode::chunk, "chunk"},
     {DecodeMode::schedule, "schedule"},
     {DecodeMode::elastic, "elastic"},
     {DecodeMode::elastic_per_request, "elastic_per_request"}}};
inline const Names<KvPolicy> kKvPolicies{
    "kv_policy",
    {{KvPolicy::freeze, "freeze"}, {KvPolicy::refresh, "refresh"}, {KvPolicy::auto_, "auto"}}};
inline const Names<UnmaskingStrategy> kStrategies{
    "unmasking_strategy",
    {{kLowConfidenceDynamic, "low_confidence_dynamic"},
     {kLowConfidenceStatic, "low_confidence_static"},
     {kSequential, "sequential"},
     {kEntropyBounded, "entropy_bounded"}}};
inline const Names<RequestStatus> kStatuses{"status",
                                            {{RequestStatus::waiting, "waiting"},
                                             {RequestStatus::prefilling, "prefilling"},
                                             {RequestStatus::decoding, "decoding"},
                                             {RequestStatus::finished, "finished"}}};

inline py::object finish_reason(FinishReason reason) {
  switch (reason) {
    case FinishReason::none:
      return py::none();
    case FinishReason::stop:
      return py::str("stop");
    case FinishReason::length:
      return py::str("length");
    case FinishReason::abort:
      return py::str("abort");
  }
  throw std::logic_error("unnamed finish_reason");
}

template <class Owner, class E>
void def_enum(py::class_<Owner>& cls, const char* name, E Owner::*field, const Names<E>& names) {
  cls.def_property(
      name, [field, &names](const Owner& self) { return names.of(self.*field); },
      [field, &names](Owner& self, const std::string& text) { self.*field = names.parse(text); });
}

// {"by_probability", "by_rank"}: lists of (count, sum of predictions, commits).
py::dict reliability(const CommitModel& commits);

// Each file of the bindings adds its part of the module.
void bind_configs(py::module_& m);
void bind_outputs(py::module_& m);
void bind_simulator(py::module_& m);

}  // namespace optimus
