// A discrete-event simulator: the engine's own scheduler, policies, row building and unmasking, with
// a virtual clock, a stated latency curve and recorded confidences in place of a model.
#pragma once

#include <deque>
#include <random>
#include <unordered_map>

#include "core/parallel.h"
#include "engine/commit_process.h"
#include "engine/engine_core.h"

namespace optimus {

struct SimulatorConfig {
  EngineConfig engine;
  LatencyProfile latency;        // what steps really take
  LatencyProfile profile;        // what the engine believes at the start; empty = `latency`
  bool without_profile = false;  // the engine believes nothing
  double host_ms = 0;            // between two steps
  double jitter = 0;             // relative standard deviation of a step's time
  double outlier_share = 0;      // of steps that take outlier_factor times as long
  double outlier_factor = 10;
  std::vector<std::pair<double, double>> slowdowns;  // (from this second on, time factor)
  uint64_t seed = 0;
};

struct SimulatedRequest {
  uint64_t id = 0;
  int prompt_len = 0, num_tokens = 0;
  RequestMetrics metrics;
};

class Simulator {
 public:
  Simulator(const SimulatorConfig& config, std::vector<CommitTrace> traces);

  // A request that arrives at `arrival_s`; arrivals must not descend. It decodes trace `trace` until
  // max_tokens of `params` (ids do not matter: eos and stop tokens never appear).
  uint64_t add_request(double arrival_s, int prompt_len, int trace, SamplingParams params);
  // One step, or an idle jump to the next arrival. False when nothing is left to do.
  bool step();
  // Steps until nothing is left, `until_s` has come or `max_steps` were run; returns their number.
  int64_t run(double until_s, int64_t max_steps);

  double now_s() const { return now_s_; }
  // What the same steps would have taken with only the rows that turned out to be needed: the bound
  // of an oracle that commits what this run commits. At most now_s().
  double oracle_s() const { return now_s_ - spared_s_; }
  // Rows of that: prompts included.
  int64_t needed_rows() const { return needed_rows_; }
  const EngineCore& core() const { return core_; }
  EngineCore& core() { return core_; }
  // Requests that finished since the last call, in the order in which they did.
  std::vector<SimulatedRequest> take_finished();

 private:
  struct Arrival {
    double arrival_s;
    uint64_t id;
    std::vector<int32_t> prompt;
    SamplingParams params;
  };
  void admit_arrivals();
  void fill_confidences(const StepPlan& plan);
  int count_needed(const StepPlan& plan) const;
  double step_ms(const StepLoad& load);

  SimulatorConfig config_;
  std::vector<CommitTrace> traces_;
  EngineCore core_;
  DecodeBuffers buffers_;
  ThreadPool threads_;
  std::deque<Arrival> arrivals_;
  std::unordered_map<uint64_t, int> trace_of_;  // by request id
  std::vector<SimulatedRequest> finished_;
  std::mt19937_64 random_;
  double now_s_ = 0, spared_s_ = 0, last_arrival_s_ = 0;
  uint64_t num_added_ = 0;
  int64_t needed_rows_ = 0;
};

}  // namespace optimus
