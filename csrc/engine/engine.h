// The engine: requests in, tokens out. step() = plan, run, update.
#pragma once

#include <memory>

#include "engine/engine_core.h"
#include "engine/runner.h"

namespace optimus {

class Engine {
 public:
  // The model must be loaded and outlive the engine.
  Engine(std::shared_ptr<const Model> model, const EngineConfig& config);

  const EngineConfig& config() const { return core_.config(); }
  const Model& model() const { return *model_; }

  // Queues a request. Throws std::invalid_argument, and changes nothing, when it can never run.
  uint64_t add_request(std::vector<int32_t> prompt, SamplingParams params);
  StepOutput step();
  bool has_unfinished() const { return core_.has_unfinished(); }
  const Request& request(uint64_t id) const { return core_.request(id); }
  // Ends a request after `num_tokens` output tokens: the caller found a stop string there.
  void stop_request(uint64_t id, int num_tokens);
  void abort(uint64_t id);
  // Forgets a finished request.
  void release(uint64_t id) { core_.release(id); }

  // Measures forwards over row counts and contexts and installs the curves. Only while idle.
  LatencyProfile profile(int repeats);
  void set_profile(LatencyProfile profile);
  // Rows of one sequence over the given pages; fp32 logits [rows, vocab_size]. Only while idle.
  std::vector<float> forward(const std::vector<int32_t>& token_ids,
                             const std::vector<int32_t>& positions,
                             const std::vector<int32_t>& kv_limits,
                             const std::vector<int32_t>& page_ids);

  EngineCore& core() { return core_; }
  Scheduler& scheduler() { return core_.scheduler(); }
  const Runner& runner() const { return runner_; }

 private:
  class ProfilePages;
  std::vector<int> profile_rows() const;

  std::shared_ptr<const Model> model_;
  EngineCore core_;
  Runner runner_;
};

}  // namespace optimus
