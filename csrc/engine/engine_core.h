// The host half of decoding: requests in, plans out, results in, tokens out. Knows neither kernels
// nor clocks: the engine drives it with a model and the time of day, the simulator with a commit
// process and a virtual clock.
#pragma once

#include <memory>
#include <unordered_map>

#include "engine/decode_buffers.h"
#include "engine/scheduler.h"
#include "engine/step_log.h"

namespace optimus {

class EngineCore {
 public:
  EngineCore(const EngineConfig& config, int vocab_size);

  const EngineConfig& config() const { return config_; }

  // Queues a request. Throws std::invalid_argument, and changes nothing, when it can never run.
  uint64_t add_request(std::vector<int32_t> prompt, SamplingParams params, double now_s);
  // The next step; no sequences = nothing to do. Then update(). Or, before that, a second plan, made
  // ahead of what the first comes to; no sequences = it has to wait for that.
  const StepPlan& plan(double now_s);
  // What came of the oldest plan: `forward_ms` its run took, `now_s` when it was done.
  StepOutput update(const StepResult& result, double forward_ms, double now_s) {
    apply(result, forward_ms, now_s);
    return report();
  }
  // The same in two halves: first what the next plan needs, then what callers and the commit model
  // learn of the step. The next step may be planned and started in between; its plan then knows
  // what was learned until the step before.
  void apply(const StepResult& result, double forward_ms, double now_s);
  StepOutput report();
  // Between apply() and report().
  void note_host(const HostTimes& host);
  // Whether all requests of the oldest plan have ended since it was made; then it can be dropped.
  bool is_void() const;
  void drop_plan();
  // After a failure: no plan will be updated. Whoever was running waits again, as after a preemption.
  void forget_plans();

  bool has_unfinished() const { return num_unfinished_ > 0; }
  int num_unfinished() const { return num_unfinished_; }
  const Request& request(uint64_t id) const;
  // Ends a request after `num_tokens` output tokens: the caller found a stop string there.
  void stop_request(uint64_t id, int num_tokens, double now_s);
  void abort(uint64_t id, double now_s);
  // Forgets a finished request.
  void release(uint64_t id);

  Scheduler& scheduler() { return scheduler_; }
  const Scheduler& scheduler() const { return scheduler_; }
  LatencyModel& latency() { return latency_; }
  const CommitModel& commits() const { return commits_; }
  StepLog& log() { return log_; }
  // `what` needs the engine to itself: throws while requests are unfinished.
  void check_idle(const char* what) const;

 private:
  // What apply() did to a request that decodes.
  struct Change {
    Request* request;
    int num_masks;  // rows
    int chunk_length;
    bool kept_length;       // of the step before
    int num_committed = 0;  // masks
    int num_commits = 0;    // of those, new to the request
    int num_wasted = 0, num_known = 0;
    FinishReason reason = FinishReason::none;
  };
  void check_prompt(const std::vector<int32_t>& prompt) const;
  Request& find(uint64_t id, const char* what);
  double advance_clock(double now_s);
  void update_prefill(const SeqPlan& seq);
  // With the sequence's logits rows [first, last).
  void update_decode(const SeqPlan& seq, const StepResult& result, int first, int last);
  // Notes what became of the rows from `first` on, for the commit model, and what they said, for the
  // request; committed_rows_ are those that committed.
  void look_at(Request& request, const SeqPlan& seq, const StepResult& result, int first,
               Change& change);
  void learn();  // of all that was noted
  // Rows by marginal gain have none: small ones go to requests in hard stretches.
  bool has_usual_chunks() const;
  void record_commit(Request& request, int output_idx, OutputToken token);
  FinishReason check_finished(Request& request);
  // Returns how many of its commits nobody wanted.
  int finish(Request& request, FinishReason reason);
  void finish_at_once(Request& request, FinishReason reason);  // between steps
  void forget_in_flight(const Request& request);
  void pop_plan();
  void count_rows(const StepPlan& plan, const StepResult& result);
  void write_record(const StepPlan& plan, const StepResult& result, double forward_ms);

  EngineConfig config_;
  int vocab_size_;
  Scheduler scheduler_;
  LatencyModel latency_;
  CommitModel commits_;
  StepLog log_;
  StepPlan plans_[2];    // of the step in progress, and of the one after it
  int num_planned_ = 0;  // of plans_
  // Of the step between apply() and report().
  std::vector<Change> changes_;
  std::vector<Commit> new_commits_;                     // of all changes
  std::vector<CommitModel::Observation> observations_;  // of all changes
  StepRecord record_;
  bool follows_ = false;             // at once behind another step
  std::vector<int> committed_rows_;  // of one request
  std::unordered_map<uint64_t, std::unique_ptr<Request>> requests_;
  int num_unfinished_ = 0;
  uint64_t next_id_ = 1, step_ = 0;
  double now_s_ = 0;        // never falls, whatever the caller's clock does
  double last_end_s_ = -1;  // when the last step ended; -1 = the engine was idle since
};

}  // namespace optimus
