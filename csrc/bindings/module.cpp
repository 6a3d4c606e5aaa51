// Python bindings: conversions and the GIL, no logic. Types are described in python/optimus/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine/engine.h"

namespace py = pybind11;
using namespace optimus;

namespace {

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

const Names<DType> kDTypes{"dtype", {{DType::float32, "float32"}, {DType::bfloat16, "bfloat16"}}};
const Names<DecodeMode> kDecodeModes{"decode_mode",
                                     {{DecodeMode::ar, "ar"},
                                      {DecodeMode::block, "block"},
                                      {DecodeMode::chunk, "chunk"},
                                      {DecodeMode::elastic, "elastic"}}};
const Names<KvPolicy> kKvPolicies{
    "kv_policy",
    {{KvPolicy::freeze, "freeze"}, {KvPolicy::refresh, "refresh"}, {KvPolicy::auto_, "auto"}}};
const Names<UnmaskingStrategy> kStrategies{"unmasking_strategy",
                                           {{kLowConfidenceDynamic, "low_confidence_dynamic"},
                                            {kLowConfidenceStatic, "low_confidence_static"},
                                            {kSequential, "sequential"},
                                            {kEntropyBounded, "entropy_bounded"}}};
const Names<RequestStatus> kStatuses{"status",
                                     {{RequestStatus::waiting, "waiting"},
                                      {RequestStatus::prefilling, "prefilling"},
                                      {RequestStatus::decoding, "decoding"},
                                      {RequestStatus::finished, "finished"}}};

py::object finish_reason(FinishReason reason) {
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

void bind_model(py::module_& m) {
  py::class_<ModelConfig> config(m, "ModelConfig");
  config.def(py::init<>())
      .def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("num_layers", &ModelConfig::num_layers)
      .def_readwrite("num_q_heads", &ModelConfig::num_q_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("max_position_embeddings", &ModelConfig::max_position_embeddings)
      .def_readwrite("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readwrite("rope_theta", &ModelConfig::rope_theta)
      .def_readwrite("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_readwrite("mask_token_id", &ModelConfig::mask_token_id)
      .def_readwrite("true_vocab_size", &ModelConfig::true_vocab_size);
  def_enum(config, "dtype", &ModelConfig::dtype, kDTypes);

  auto load = [](Model& self, const std::string& name, const py::array& data) {
    std::vector<int64_t> shape(data.shape(), data.shape() + data.ndim());
    if (data.dtype().is(py::dtype::of<uint16_t>())) {
      auto bits = py::array_t<uint16_t, py::array::c_style>::ensure(data);
      self.load_tensor(name, shape, DType::bfloat16, bits.data());
    } else if (data.dtype().kind() == 'f') {
      auto values = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(data);
      self.load_tensor(name, shape, DType::float32, values.data());
    } else {
      throw std::invalid_argument(concat("[load_tensor] ", name,
                                         " must be floating point or bfloat16 as uint16, got ",
                                         std::string(py::str(data.dtype()))));
    }
  };
  py::class_<Model, std::shared_ptr<Model>>(m, "Model")
      .def(py::init<const ModelConfig&>(), py::arg("config"))
      .def_property_readonly("config", &Model::config)
      .def("expected_tensors",
           [](const Model& self) {
             py::dict shapes;
             for (const auto& [name, shape] : self.expected_tensors()) {
               shapes[py::str(name)] = py::tuple(py::cast(shape));
             }
             return shapes;
           })
      .def("load_tensor", load, py::arg("name"), py::arg("data"))
      .def("finish_loading", &Model::finish_loading)
      .def("num_parameters", &Model::num_parameters)
      .def("weight_bytes", &Model::weight_bytes);
}

void bind_configs(py::module_& m) {
  py::class_<EngineConfig> config(m, "EngineConfig");
  config.def(py::init<>())
      .def_readwrite("block_length", &EngineConfig::block_length)
      .def_readwrite("chunk_length", &EngineConfig::chunk_length)
      .def_readwrite("recompute_block", &EngineConfig::recompute_block)
      .def_readwrite("chunk_arms", &EngineConfig::chunk_arms)
      .def_readwrite("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readwrite("max_num_batched_rows", &EngineConfig::max_num_batched_rows)
      .def_readwrite("max_model_len", &EngineConfig::max_model_len)
      .def_readwrite("page_size", &EngineConfig::page_size)
      .def_readwrite("num_pages", &EngineConfig::num_pages)
      .def_readwrite("enable_prefix_cache", &EngineConfig::enable_prefix_cache)
      .def_readwrite("num_threads", &EngineConfig::num_threads)
      .def_readwrite("eos_token_ids", &EngineConfig::eos_token_ids)
      .def_readwrite("shuffle_pages", &EngineConfig::shuffle_pages);
  def_enum(config, "decode_mode", &EngineConfig::decode_mode, kDecodeModes);
  def_enum(config, "kv_policy", &EngineConfig::kv_policy, kKvPolicies);

  py::class_<SamplingParams> params(m, "SamplingParams");
  params.def(py::init<>())
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("confidence_threshold", &SamplingParams::confidence_threshold)
      .def_readwrite("entropy_bound", &SamplingParams::entropy_bound)
      .def_readwrite("denoising_steps", &SamplingParams::denoising_steps);
  def_enum(params, "unmasking_strategy", &SamplingParams::unmasking_strategy, kStrategies);
}

// One list per field of the output tokens, as Python reads them.
template <class Field>
auto output_column(Field OutputToken::*field) {
  return [field](const Request& self) {
    std::vector<Field> values;
    for (const OutputToken& token : self.output) values.push_back(token.*field);
    return values;
  };
}

void bind_outputs(py::module_& m) {
  py::class_<RequestMetrics>(m, "RequestMetrics")
      .def_readonly("nfe", &RequestMetrics::nfe)
      .def_readonly("decode_rows", &RequestMetrics::decode_rows)
      .def_readonly("prefill_rows", &RequestMetrics::prefill_rows)
      .def_readonly("cached_prompt_tokens", &RequestMetrics::cached_prompt_tokens)
      .def_readonly("num_preemptions", &RequestMetrics::num_preemptions)
      .def_readonly("chunk_histogram", &RequestMetrics::chunk_histogram)
      .def_readonly("arrival_s", &RequestMetrics::arrival_s)
      .def_readonly("first_token_s", &RequestMetrics::first_token_s)
      .def_readonly("finish_s", &RequestMetrics::finish_s);
  py::class_<Commit>(m, "Commit")
      .def_readonly("output_idx", &Commit::output_idx)
      .def_property_readonly("token_id", [](const Commit& c) { return c.token.token_id; })
      .def_property_readonly("logprob", [](const Commit& c) { return c.token.logprob; })
      .def_property_readonly("confidence", [](const Commit& c) { return c.token.confidence; })
      .def_property_readonly("step", [](const Commit& c) { return c.token.step; });
  py::class_<RequestUpdate>(m, "RequestUpdate")
      .def_readonly("id", &RequestUpdate::id)
      .def_readonly("commits", &RequestUpdate::commits)
      .def_readonly("num_known", &RequestUpdate::num_known)
      .def_property_readonly("finish_reason",
                             [](const RequestUpdate& u) { return finish_reason(u.finish_reason); });
  py::class_<StepRecord>(m, "StepRecord")
      .def_readonly("step", &StepRecord::step)
      .def_readonly("rows", &StepRecord::rows)
      .def_readonly("prefill_rows", &StepRecord::prefill_rows)
      .def_readonly("logit_rows", &StepRecord::logit_rows)
      .def_readonly("num_seqs", &StepRecord::num_seqs)
      .def_readonly("chunk_length", &StepRecord::chunk_length)
      .def_readonly("refresh_rows", &StepRecord::refresh_rows)
      .def_readonly("commits", &StepRecord::commits)
      .def_readonly("predicted_ms", &StepRecord::predicted_ms)
      .def_readonly("forward_ms", &StepRecord::forward_ms)
      .def_readonly("step_ms", &StepRecord::step_ms)
      .def_readonly("reason", &StepRecord::reason);
  py::class_<StepOutput>(m, "StepOutput")
      .def_readonly("updates", &StepOutput::updates)
      .def_readonly("record", &StepOutput::record);
  py::class_<Request>(m, "RequestState")
      .def_readonly("id", &Request::id)
      .def_readonly("prompt_token_ids", &Request::prompt)
      .def_property_readonly("status", [](const Request& r) { return kStatuses.of(r.status); })
      .def_property_readonly("finish_reason",
                             [](const Request& r) { return finish_reason(r.finish_reason); })
      .def_property_readonly("output_token_ids", output_column(&OutputToken::token_id))
      .def_property_readonly("output_logprobs", output_column(&OutputToken::logprob))
      .def_property_readonly("output_confidences", output_column(&OutputToken::confidence))
      .def_property_readonly("output_steps", output_column(&OutputToken::step))
      .def_readonly("metrics", &Request::metrics);
}

py::array_t<float> forward(Engine& self, const std::vector<int32_t>& token_ids,
                           const std::vector<int32_t>& positions,
                           const std::vector<int32_t>& kv_limits,
                           const std::vector<int32_t>& page_ids) {
  std::vector<float> logits = self.forward(token_ids, positions, kv_limits, page_ids);
  py::ssize_t rows = static_cast<py::ssize_t>(token_ids.size());
  return py::array_t<float>({rows, static_cast<py::ssize_t>(logits.size()) / rows}, logits.data());
}

py::list as_pairs(const std::vector<LatencyModel::Point>& points) {
  py::list pairs;
  for (const auto& point : points) pairs.append(py::make_tuple(point.rows, point.ms));
  return pairs;
}

void bind_engine(py::module_& m) {
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::shared_ptr<Model> model, const EngineConfig& config) {
             return std::make_unique<Engine>(std::move(model), config);
           }),
           py::arg("model"), py::arg("config"))
      .def_property_readonly("config", &Engine::config)
      .def("add_request", &Engine::add_request, py::arg("prompt_token_ids"), py::arg("params"))
      .def("step", &Engine::step, py::call_guard<py::gil_scoped_release>())
      .def("has_unfinished", &Engine::has_unfinished)
      .def("request", &Engine::request, py::arg("id"), py::return_value_policy::copy)
      .def("stop_request", &Engine::stop_request, py::arg("id"), py::arg("num_tokens"))
      .def("abort", &Engine::abort, py::arg("id"))
      .def("release", &Engine::release, py::arg("id"))
      .def(
          "profile", [](Engine& self, int repeats) { return as_pairs(self.profile(repeats)); },
          py::arg("repeats") = 3)
      .def(
          "set_profile",
          [](Engine& self, const std::vector<std::pair<int, double>>& pairs) {
            std::vector<LatencyModel::Point> points;
            for (const auto& [rows, ms] : pairs) points.push_back({rows, ms});
            self.set_profile(std::move(points));
          },
          py::arg("points"))
      .def("forward", &forward, py::arg("token_ids"), py::arg("positions"), py::arg("kv_limits"),
           py::arg("page_ids"))
      .def_property_readonly("num_free_pages",
                             [](Engine& self) { return self.scheduler().pool().num_free(); })
      .def_property_readonly(
          "num_cached_pages",
          [](Engine& self) { return self.scheduler().prefix_cache().num_evictable(); })
      .def_property_readonly("num_waiting",
                             [](Engine& self) { return self.scheduler().num_waiting(); })
      .def_property_readonly("num_running",
                             [](Engine& self) { return self.scheduler().num_running(); })
      .def_property_readonly("memory", [](Engine& self) {
        py::dict bytes;
        bytes["weights"] = self.model().weight_bytes();
        bytes["kv_cache"] = self.runner().kv_cache_bytes();
        bytes["activations"] = self.runner().activation_bytes();
        bytes["state"] = self.runner().state_bytes();
        return bytes;
      });
}

void bind_pages(py::module_& m) {
  py::class_<PagePool>(m, "PagePool")
      .def(py::init<int>(), py::arg("num_pages"))
      .def("allocate", &PagePool::allocate)
      .def("retain", &PagePool::retain, py::arg("page"))
      .def("release", &PagePool::release, py::arg("page"))
      .def("ref_count", &PagePool::ref_count, py::arg("page"))
      .def_property_readonly("num_pages", &PagePool::num_pages)
      .def_property_readonly("num_free", &PagePool::num_free);
  py::class_<PrefixCache>(m, "PrefixCache")
      .def(py::init<PagePool&, int, int, bool>(), py::keep_alive<1, 2>(), py::arg("pool"),
           py::arg("page_size"), py::arg("alignment"), py::arg("enabled") = true)
      .def(
          "match",
          [](PrefixCache& self, const std::vector<int32_t>& tokens) {
            auto match = self.match(tokens.data(), static_cast<int>(tokens.size()));
            return py::make_tuple(match.pages, match.num_tokens);
          },
          py::arg("tokens"))
      .def(
          "insert",
          [](PrefixCache& self, const std::vector<int32_t>& tokens,
             const std::vector<int32_t>& pages, int num_registered, int num_full) {
            int64_t needed = int64_t(num_full) * self.page_size();
            if (static_cast<int64_t>(tokens.size()) < needed) {
              throw std::invalid_argument(concat("[prefix_cache] ", num_full, " full pages need ",
                                                 needed, " tokens, got ", tokens.size()));
            }
            self.insert(tokens.data(), pages, num_registered, num_full);
          },
          py::arg("tokens"), py::arg("pages"), py::arg("num_registered"), py::arg("num_full"))
      .def("evict", &PrefixCache::evict, py::arg("num_pages"))
      .def("clear", &PrefixCache::clear)
      .def_property_readonly("num_evictable", &PrefixCache::num_evictable)
      .def_property_readonly("num_cached", &PrefixCache::num_cached);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Optimus: C++ engine for block-diffusion language models";
  bind_model(m);
  bind_configs(m);
  bind_outputs(m);
  bind_engine(m);
  bind_pages(m);
}
