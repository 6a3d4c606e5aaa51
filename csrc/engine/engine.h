// The engine: requests in, tokens out. step() = plan, run, update.
//
// On CUDA the device works while the caller deals with a step's output: step() returns with the next
// step started. What is added then waits for the step after it; what is ended then has its rows in it,
// for nothing. With async_scheduling the step after that is planned first of all, so that the device has
// its rows before the host has seen what the one in progress commits.
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
  // Whether there is something left to step() for.
  bool has_unfinished() const { return core_.has_unfinished(); }
  const Request& request(uint64_t id) const { return core_.request(id); }
  // Ends a request after `num_tokens` output tokens: the caller found a stop string there.
  void stop_request(uint64_t id, int num_tokens);
  void abort(uint64_t id);
  // Forgets a finished request.
  void release(uint64_t id);

  // Measures forwards over row counts and contexts and installs the curves. Only while idle.
  LatencyProfile profile(int repeats);
  // Median milliseconds of a step of `rows` mask rows in as many sequences as `contexts`, which
  // read so many positions. Only while idle.
  double time_forward(int rows, const std::vector<int>& contexts, int repeats);
  // The matrix products alone of a step of `rows` rows. Only while idle.
  double time_gemms(int rows, int repeats);
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
  bool start_step();   // false: nothing to do, or not before the step in progress is done
  void finish_step();  // to core_.report()
  void drop_void_step();
  template <class Work>
  auto guarded(const Work& work);
  std::vector<int> profile_rows() const;
  double median_ms(int rows, const std::vector<int>& contexts, bool with_logits, int repeats,
                   const std::vector<int32_t>& pages);

  std::shared_ptr<const Model> model_;
  Runner runner_;  // before core_: it knows how many pages there are
  EngineCore core_;
  HostTimes host_[2];    // of the steps that are started
  int num_started_ = 0;  // and not finished
};

}  // namespace optimus
