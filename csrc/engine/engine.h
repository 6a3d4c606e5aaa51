// The engine: requests in, tokens out. step() = plan, run, update.
#pragma once

#include <memory>
#include <unordered_map>

#include "engine/runner.h"
#include "engine/scheduler.h"

namespace optimus {

class Engine {
 public:
  // The model must be loaded and outlive the engine.
  Engine(std::shared_ptr<const Model> model, const EngineConfig& config);

  const EngineConfig& config() const { return config_; }
  const Model& model() const { return *model_; }

  // Queues a request. Throws std::invalid_argument, and changes nothing, when it can never run.
  uint64_t add_request(std::vector<int32_t> prompt, SamplingParams params);
  StepOutput step();
  bool has_unfinished() const { return num_unfinished_ > 0; }
  const Request& request(uint64_t id) const;
  // Ends a request after `num_tokens` output tokens: the caller found a stop string there.
  void stop_request(uint64_t id, int num_tokens);
  void abort(uint64_t id);
  // Forgets a finished request.
  void release(uint64_t id);

  // Measures forwards over row counts and installs the table. Only while idle.
  std::vector<LatencyModel::Point> profile(int repeats);
  void set_profile(std::vector<LatencyModel::Point> points);
  std::vector<float> forward(const std::vector<int32_t>& token_ids,
                             const std::vector<int32_t>& positions,
                             const std::vector<int32_t>& kv_limits,
                             const std::vector<int32_t>& page_ids);

  Scheduler& scheduler() { return scheduler_; }
  const Runner& runner() const { return runner_; }

 private:
  void check_prompt(const std::vector<int32_t>& prompt) const;
  Request& find(uint64_t id, const char* what);
  void update(const StepPlan& plan, const StepResult& result, StepOutput& output);
  void update_prefill(const SeqPlan& seq);
  // Returns the number of logits rows of the sequence.
  int update_decode(const SeqPlan& seq, const StepResult& result, int first_logit_row,
                    RequestUpdate& update);
  void record_commit(Request& request, int output_idx, OutputToken token, RequestUpdate& update);
  // Finds the end of the output among newly known tokens.
  FinishReason check_finished(Request& request);
  void finish(Request& request, FinishReason reason);
  void check_idle(const char* what) const;

  std::shared_ptr<const Model> model_;
  EngineConfig config_;
  Scheduler scheduler_;
  Runner runner_;
  LatencyModel latency_;
  CommitModel commits_;
  std::unordered_map<uint64_t, std::unique_ptr<Request>> requests_;
  uint64_t next_id_ = 1;
  uint64_t step_ = 0;
  int num_unfinished_ = 0;
};

}  // namespace optimus
