// Python bindings: conversions and the GIL, no logic. Types are described in python/optimus/_C.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/names.h"
#include "engine/engine.h"
#include "models/linear.h"

using namespace optimus;

namespace {

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
      const void* values = bits.data();
      py::gil_scoped_release others_run;
      self.load_tensor(name, shape, DType::bfloat16, values);
    } else if (data.dtype().kind() == 'f') {
      auto floats = py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(data);
      const void* values = floats.data();
      py::gil_scoped_release others_run;
      self.load_tensor(name, shape, DType::float32, values);
    } else {
      throw std::invalid_argument(concat("[load_tensor] ", name,
                                         " must be floating point or bfloat16 as uint16, got ",
                                         std::string(py::str(data.dtype()))));
    }
  };
  py::class_<Model, std::shared_ptr<Model>>(m, "Model")
      .def(py::init([](const ModelConfig& model_config, const std::string& device) {
             return std::make_shared<Model>(model_config, kDevices.parse(device));
           }),
           py::arg("config"), py::arg("device") = "cpu")
      .def_property_readonly("config", &Model::config)
      .def_property_readonly("device", [](const Model& self) { return kDevices.of(self.device()); })
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

py::array_t<float> forward(Engine& self, const std::vector<int32_t>& token_ids,
                           const std::vector<int32_t>& positions,
                           const std::vector<int32_t>& kv_limits,
                           const std::vector<int32_t>& page_ids) {
  std::vector<float> logits = self.forward(token_ids, positions, kv_limits, page_ids);
  py::ssize_t rows = static_cast<py::ssize_t>(token_ids.size());
  return py::array_t<float>({rows, static_cast<py::ssize_t>(logits.size()) / rows}, logits.data());
}

void bind_engine(py::module_& m) {
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::shared_ptr<Model> model, const EngineConfig& config) {
             py::gil_scoped_release others_run;  // graphs are captured
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
      .def("profile", &Engine::profile, py::arg("repeats") = 3,
           py::call_guard<py::gil_scoped_release>())
      .def("set_profile", &Engine::set_profile, py::arg("profile"))
      .def_property_readonly("overhead_ms",
                             [](Engine& self) { return self.core().latency().overhead_ms(); })
      .def(
          "predict_ms",
          [](Engine& self, int rows, int prefill_rows, int64_t kv_tokens) {
            return self.core().latency().predict({rows, prefill_rows, kv_tokens});
          },
          py::arg("rows"), py::arg("prefill_rows") = 0, py::arg("kv_tokens") = 0)
      .def(
          "relative_error",
          [](Engine& self, int rows) { return self.core().latency().relative_error(rows); },
          py::arg("rows"))
      .def("step_records", [](Engine& self) { return self.core().log().records(); })
      .def("reliability", [](Engine& self) { return reliability(self.core().commits()); })
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
      .def_property_readonly("memory",
                             [](Engine& self) {
                               py::dict bytes;
                               bytes["weights"] = self.model().weight_bytes();
                               bytes["kv_cache"] = self.runner().kv_cache_bytes();
                               bytes["activations"] = self.runner().activation_bytes();
                               bytes["state"] = self.runner().state_bytes();
                               bytes["graphs"] = self.runner().graph_bytes();
                               return bytes;
                             })
      .def_property_readonly("padded_rows",
                             [](Engine& self) { return self.runner().padded_rows(); })
      .def_property_readonly(
          "graphs",
          [](Engine& self) {
            py::list graphs;
            for (const Runner::CapturedGraph& graph : self.runner().captured_graphs()) {
              graphs.append(py::make_tuple(graph.rows, graph.capture_ms, graph.bytes));
            }
            return graphs;
          })
      .def("time_forward", &Engine::time_forward, py::arg("rows"), py::arg("contexts"),
           py::arg("repeats") = 3, py::call_guard<py::gil_scoped_release>())
      .def("time_gemms", &Engine::time_gemms, py::arg("rows"), py::arg("repeats") = 3,
           py::call_guard<py::gil_scoped_release>());
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

// The library's GEMM, whether or not it is what this machine's models run.
void bind_bf16_gemm(py::module_& m) {
  using Matrix = py::array_t<uint16_t, py::array::c_style>;
  const auto multiply = [](const Matrix& x, const Matrix& weight, int num_threads) {
    OPTIMUS_CHECK(x.ndim() == 2 && weight.ndim() == 2 && x.shape(1) == weight.shape(1),
                  "[bf16_gemm] need x [rows, k] and weight [n, k], got ", x.ndim(), " and ",
                  weight.ndim(), " dimensions, last ", x.ndim() > 0 ? x.shape(x.ndim() - 1) : 0,
                  " and ", weight.ndim() > 0 ? weight.shape(weight.ndim() - 1) : 0);
    Matrix out({x.shape(0), weight.shape(0)});
    ThreadPool threads(num_threads);
    bf16_gemm(x.data(), weight.data(), out.mutable_data(), static_cast<int>(x.shape(0)),
              static_cast<int>(weight.shape(0)), static_cast<int>(x.shape(1)), threads);
    return out;
  };
  m.def("bf16_gemm", multiply, py::arg("x"), py::arg("weight"), py::arg("num_threads") = 1);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Optimus: C++ engine for block-diffusion language models";
  m.def("cuda_problem", &cuda_problem);
  m.def("cuda_device_name", &cuda_device_name);
  m.def("cuda_memory", [] {
    const DeviceMemoryInfo info = cuda_memory();
    return py::make_tuple(info.free, info.total);
  });
  bind_bf16_gemm(m);
  bind_model(m);
  bind_configs(m);
  bind_outputs(m);
  bind_engine(m);
  bind_pages(m);
  bind_simulator(m);
}
