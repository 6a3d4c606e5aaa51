#include "engine/simulator.h"

#include "bindings/names.h"

namespace optimus {

void bind_simulator(py::module_& m) {
  py::class_<CommitTrace>(m, "CommitTrace")
      .def(py::init(
               [](int prompt_len, std::vector<int32_t> row_begin, std::vector<float> confidences) {
                 CommitTrace trace{prompt_len, std::move(row_begin), std::move(confidences)};
                 trace.validate();
                 return trace;
               }),
           py::kw_only(), py::arg("prompt_len"), py::arg("row_begin"), py::arg("confidences"))
      .def_readonly("prompt_len", &CommitTrace::prompt_len)
      .def_readonly("row_begin", &CommitTrace::row_begin)
      .def_readonly("confidences", &CommitTrace::confidences)
      .def_property_readonly("num_tokens", &CommitTrace::num_tokens)
      .def("confidence", &CommitTrace::confidence, py::arg("first_mask"), py::arg("idx"));

  py::class_<SimulatorConfig>(m, "SimulatorConfig")
      .def(py::init<>())
      .def_readwrite("engine", &SimulatorConfig::engine)
      .def_readwrite("latency", &SimulatorConfig::latency)
      .def_readwrite("profile", &SimulatorConfig::profile)
      .def_readwrite("without_profile", &SimulatorConfig::without_profile)
      .def_readwrite("host_ms", &SimulatorConfig::host_ms)
      .def_readwrite("jitter", &SimulatorConfig::jitter)
      .def_readwrite("outlier_share", &SimulatorConfig::outlier_share)
      .def_readwrite("outlier_factor", &SimulatorConfig::outlier_factor)
      .def_readwrite("slowdowns", &SimulatorConfig::slowdowns)
      .def_readwrite("seed", &SimulatorConfig::seed);

  py::class_<SimulatedRequest>(m, "SimulatedRequest")
      .def_readonly("id", &SimulatedRequest::id)
      .def_readonly("prompt_len", &SimulatedRequest::prompt_len)
      .def_readonly("num_tokens", &SimulatedRequest::num_tokens)
      .def_readonly("metrics", &SimulatedRequest::metrics);

  py::class_<Simulator>(m, "Simulator")
      .def(py::init<const SimulatorConfig&, std::vector<CommitTrace>>(), py::arg("config"),
           py::arg("traces"))
      .def("add_request", &Simulator::add_request, py::arg("arrival_s"), py::arg("prompt_len"),
           py::arg("trace"), py::arg("params"))
      .def("run", &Simulator::run, py::arg("until_s"), py::arg("max_steps"),
           py::call_guard<py::gil_scoped_release>())
      .def("take_finished", &Simulator::take_finished)
      .def_property_readonly("now_s", &Simulator::now_s)
      .def_property_readonly("oracle_s", &Simulator::oracle_s)
      .def_property_readonly("needed_rows", &Simulator::needed_rows)
      .def_property_readonly("num_unfinished",
                             [](Simulator& self) { return self.core().num_unfinished(); })
      .def("step_records", [](Simulator& self) { return self.core().log().records(); })
      .def("reliability", [](Simulator& self) { return reliability(self.core().commits()); });
}

}  // namespace optimus
