// Decides each step: who decodes with how many masks, whose prompt advances, who is admitted, who
// must give pages back. Knows requests and pages; knows neither kernels nor tensors.
//
// Order of service: admissions in arrival order, then decode rows (least recently served first),
// then unfinished prompts in order of admission, all under one row budget of which prompts keep a
// quarter. Prompts take what is left of it; with target_tpot_ms only as many rows as let decoding
// requests keep their pace, but at least what target_ttft_ms needs, and never nothing for long. When
// pages run out, cached prefixes go first, then the youngest request is preempted: its pages are
// freed and its known tokens are recomputed later. A request that fits the cache alone always
// progresses, so there is no deadlock.
#pragma once

#include <deque>
#include <vector>

#include "engine/batch.h"
#include "engine/chunk_policy.h"
#include "engine/prefix_cache.h"

namespace optimus {

class Scheduler {
 public:
  explicit Scheduler(const EngineConfig& config);

  void add(Request* request);
  // Removes a request wherever it is and frees what it holds.
  void remove(Request* request);
  // The plan of the next step, valid until the next call. No sequences: nothing to do. With `is_ahead` of
  // the step after the one in progress; then no sequences can also mean that it has to wait for the
  // results of that one, where pages or rows might not suffice otherwise.
  const StepPlan& plan(double now_s, const LatencyModel& latency, const CommitModel& commits,
                       bool is_ahead = false);
  // All that run wait again, and are computed anew.
  void preempt_all();
  // Registers the pages of `request` that are full and clean.
  void cache_clean_pages(Request* request);

  // Decode rows of a request in a step, exactly if no step of it is in flight.
  int decode_rows(const Request& request, int chunk_length, bool refresh) const;
  // Keys that its decode rows read.
  int window_end(const Request& request) const;
  // Pages a request of this many tokens needs at its longest.
  int pages_for(int num_tokens) const { return config_.pages_for(num_tokens); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int num_running() const { return static_cast<int>(running_.size()); }
  // What the last plan came to.
  void observe(int commits, double forward_ms) { policy_.observe(commits, forward_ms); }
  const ChunkPolicy& policy() const { return policy_; }
  PagePool& pool() { return pool_; }
  PrefixCache& prefix_cache() { return prefix_cache_; }

 private:
  bool secure_decode_pages();
  void admit();
  bool plan_decode(const LatencyModel& latency, const CommitModel& commits);
  void choose_chunks(const LatencyModel& latency, const CommitModel& commits);
  bool must_refresh(const Request& request) const;
  void plan_prefill(double now_s, const LatencyModel& latency);
  void refresh_where_free(const LatencyModel& latency, int budget);
  int prompt_rows_left() const;
  int prefill_room(double now_s, const LatencyModel& latency) const;
  int due_prefill_rows(double now_s, double step_ms) const;

  // What a step in flight may make of a request: masks it evaluates, whether these may be the last of
  // their block, whether the next step may have a previous block to feed, and how many rows at most.
  int masks_in_flight(const Request& request) const;
  bool may_slide(const Request& request) const;
  bool may_feed_previous(const Request& request) const;
  int most_decode_rows(const Request& request, int chunk_length, bool refresh) const;
  int pages_end(const Request& request) const;
  void begin_decode(Request* request);
  bool start(Request* request);
  bool grow_pages(Request* request, int num_tokens);
  void preempt_youngest();
  void give_back(Request* request);

  EngineConfig config_;
  PagePool pool_;
  PrefixCache prefix_cache_;
  ChunkPolicy policy_;
  std::deque<Request*> waiting_;
  std::vector<Request*> running_;  // in order of admission
  std::vector<int> free_slots_;
  uint64_t step_ = 0;
  bool preempted_ = false;  // in this step: nobody is admitted
  int refused_with_ = -1;   // pages there were when waiting_.front() did not fit, -1 = not refused
  StepPlan plan_;
  int last_prefill_rows_ = 0;  // of the last step with prompts in it
  uint64_t last_prefill_step_ = 0;
  // Working memory of plan_decode.
  std::vector<Request*> decoding_;
  std::vector<RequestLoad> loads_;
};

}  // namespace optimus
