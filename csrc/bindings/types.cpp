// The plain types of the module: configurations, profiles, records, requests.
#include "bindings/names.h"
#include "engine/engine_core.h"

namespace optimus {
namespace {

template <class P, class X, class Y>
auto pairs_property(std::vector<P> LatencyProfile::*points, X P::*x, Y P::*y) {
  return std::pair(
      [=](const LatencyProfile& self) {
        std::vector<std::pair<X, Y>> pairs;
        for (const P& point : self.*points) pairs.emplace_back(point.*x, point.*y);
        return pairs;
      },
      [=](LatencyProfile& self, const std::vector<std::pair<X, Y>>& pairs) {
        (self.*points).clear();
        for (const auto& [first, second] : pairs) (self.*points).push_back({first, second});
      });
}

void bind_latency_profile(py::module_& m) {
  using Point = LatencyProfile::Point;
  using KvPoint = LatencyProfile::KvPoint;
  const auto decode = pairs_property(&LatencyProfile::decode, &Point::rows, &Point::ms);
  const auto prefill = pairs_property(&LatencyProfile::prefill, &Point::rows, &Point::ms);
  const auto kv = pairs_property(&LatencyProfile::kv, &KvPoint::kv_tokens, &KvPoint::extra_ms);
  py::class_<LatencyProfile>(m, "LatencyProfile")
      .def(py::init<>())
      .def_property("decode", decode.first, decode.second)
      .def_property("prefill", prefill.first, prefill.second)
      .def_property("kv", kv.first, kv.second)
      .def_readwrite("is_padded", &LatencyProfile::is_padded)
      .def("validate", &LatencyProfile::validate)
      .def(
          "ms",
          [](const LatencyProfile& self, int rows, int prefill_rows, int64_t kv_tokens) {
            self.validate();
            return self.ms({rows, prefill_rows, kv_tokens});
          },
          py::arg("rows"), py::arg("prefill_rows") = 0, py::arg("kv_tokens") = 0);
}

// One list per field of the commits.
template <class Field>
auto commit_column(Field field) {
  return [field](const RequestUpdate& self) {
    py::list values(self.commits.size());
    for (size_t i = 0; i < self.commits.size(); ++i) values[i] = field(self.commits[i]);
    return values;
  };
}

py::list finished_ids(const StepOutput& output) {
  py::list ids;
  for (const RequestUpdate& update : output.updates) {
    if (update.finish_reason != FinishReason::none) ids.append(update.id);
  }
  return ids;
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

}  // namespace

void bind_configs(py::module_& m) {
  py::class_<MeasuredArm>(m, "MeasuredArm")
      .def(py::init([](float threshold, int chunk_length, bool refresh, double accuracy,
                       double difference_upper) {
             return MeasuredArm{threshold, chunk_length, refresh, accuracy, difference_upper};
           }),
           py::kw_only(), py::arg("threshold"), py::arg("chunk_length"), py::arg("refresh"),
           py::arg("accuracy"), py::arg("difference_upper"))
      .def_readonly("threshold", &MeasuredArm::threshold)
      .def_readonly("chunk_length", &MeasuredArm::chunk_length)
      .def_readonly("refresh", &MeasuredArm::refresh)
      .def_readonly("accuracy", &MeasuredArm::accuracy)
      .def_readonly("difference_upper", &MeasuredArm::difference_upper);
  bind_latency_profile(m);
  py::class_<EngineConfig> config(m, "EngineConfig");
  config.def(py::init<>())
      .def_readwrite("block_length", &EngineConfig::block_length)
      .def_readwrite("chunk_length", &EngineConfig::chunk_length)
      .def_readwrite("recompute_block", &EngineConfig::recompute_block)
      .def_readwrite("chunk_schedule", &EngineConfig::chunk_schedule)
      .def_readwrite("chunk_arms", &EngineConfig::chunk_arms)
      .def_readwrite("measured_arms", &EngineConfig::measured_arms)
      .def_readwrite("quality_floor", &EngineConfig::quality_floor)
      .def_readwrite("target_tpot_ms", &EngineConfig::target_tpot_ms)
      .def_readwrite("target_ttft_ms", &EngineConfig::target_ttft_ms)
      .def_readwrite("step_log_size", &EngineConfig::step_log_size)
      .def_readwrite("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readwrite("max_num_batched_rows", &EngineConfig::max_num_batched_rows)
      .def_readwrite("max_model_len", &EngineConfig::max_model_len)
      .def_readwrite("page_size", &EngineConfig::page_size)
      .def_readwrite("num_pages", &EngineConfig::num_pages)
      .def_readwrite("gpu_memory_utilization", &EngineConfig::gpu_memory_utilization)
      .def_readwrite("cuda_graphs", &EngineConfig::cuda_graphs)
      .def_readwrite("async_scheduling", &EngineConfig::async_scheduling)
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
      .def_property_readonly("positions",
                             commit_column([](const Commit& c) { return c.output_idx; }))
      .def_property_readonly("token_ids",
                             commit_column([](const Commit& c) { return c.token.token_id; }))
      .def_property_readonly("num_forwards",
                             [](const RequestUpdate& u) {
                               return u.commits.empty() ? 0 : u.commits.back().token.step;
                             })
      .def_readonly("num_known", &RequestUpdate::num_known)
      .def_property_readonly("finish_reason",
                             [](const RequestUpdate& u) { return finish_reason(u.finish_reason); });
  py::class_<ArmEstimate>(m, "ArmEstimate")
      .def_readonly("chunk_length", &ArmEstimate::chunk_length)
      .def_readonly("refresh", &ArmEstimate::refresh)
      .def_readonly("commits", &ArmEstimate::commits)
      .def_readonly("rows", &ArmEstimate::rows)
      .def_readonly("ms", &ArmEstimate::ms)
      .def_readonly("tpot_ms", &ArmEstimate::tpot_ms)
      .def_readonly("alone_ms", &ArmEstimate::alone_ms)
      .def_readonly("optimism", &ArmEstimate::optimism)
      .def_readonly("score", &ArmEstimate::score)
      .def_property_readonly("verdict", [](const ArmEstimate& a) { return a.verdict; });
  py::class_<StepRecord>(m, "StepRecord")
      .def_readonly("step", &StepRecord::step)
      .def_readonly("start_s", &StepRecord::start_s)
      .def_readonly("rows", &StepRecord::rows)
      .def_readonly("prefill_rows", &StepRecord::prefill_rows)
      .def_readonly("refresh_rows", &StepRecord::refresh_rows)
      .def_readonly("logit_rows", &StepRecord::logit_rows)
      .def_readonly("num_seqs", &StepRecord::num_seqs)
      .def_readonly("num_decoding", &StepRecord::num_decoding)
      .def_readonly("num_waiting", &StepRecord::num_waiting)
      .def_readonly("kv_tokens", &StepRecord::kv_tokens)
      .def_readonly("chunk_length", &StepRecord::chunk_length)
      .def_readonly("refresh", &StepRecord::refresh)
      .def_readonly("chunk_lengths", &StepRecord::chunk_lengths)
      .def_readonly("commits", &StepRecord::commits)
      .def_readonly("expected_commits", &StepRecord::expected_commits)
      .def_readonly("predicted_ms", &StepRecord::predicted_ms)
      .def_readonly("forward_ms", &StepRecord::forward_ms)
      .def_readonly("step_ms", &StepRecord::step_ms)
      .def_property_readonly("plan_ms", [](const StepRecord& r) { return r.host.plan_ms; })
      .def_property_readonly("launch_ms", [](const StepRecord& r) { return r.host.launch_ms; })
      .def_property_readonly("wait_ms", [](const StepRecord& r) { return r.host.wait_ms; })
      .def_property_readonly("apply_ms", [](const StepRecord& r) { return r.host.apply_ms; })
      .def_property_readonly("idle_ms", [](const StepRecord& r) { return r.host.idle_ms; })
      .def_property_readonly("rows_ms", [](const StepRecord& r) { return r.host.rows_ms; })
      .def_readonly("meets_target", &StepRecord::meets_target)
      .def_readonly("is_ahead", &StepRecord::is_ahead)
      .def_readonly("reason", &StepRecord::reason)
      .def_readonly("arms", &StepRecord::arms);
  py::class_<StepOutput>(m, "StepOutput")
      .def_readonly("updates", &StepOutput::updates)
      .def_property_readonly("finished_ids", &finished_ids)
      // A copy: whoever keeps records does not keep the updates.
      .def_property_readonly("record", [](const StepOutput& o) { return o.record; })
      .def_property_readonly(
          "is_idle", [](const StepOutput& o) { return o.record.rows == 0 && o.updates.empty(); });
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
      .def_readonly("block_start", &Request::block_start)
      .def_property_readonly("open_confidences",
                             [](const Request& r) { return r.history.confidence; })
      .def_readonly("metrics", &Request::metrics);
}

py::dict reliability(const CommitModel& commits) {
  const auto columns = [](const auto& bins) {
    py::list rows;
    for (const CommitModel::Reliability& bin : bins) {
      rows.append(py::make_tuple(bin.count, bin.predicted, bin.committed));
    }
    return rows;
  };
  py::dict result;
  result["by_probability"] = columns(commits.reliability());
  result["by_rank"] = columns(commits.reliability_by_rank());
  return result;
}

}  // namespace optimus
