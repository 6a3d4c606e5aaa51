// Decides each step: who decodes with how many masks, whose prompt advances, who is admitted, who
// must give pages back. Knows requests and pages; knows neither kernels nor tensors.
//
// Order of service: admissions in arrival order, then decode rows (least recently served first), then
// unfinished prompts, under one row budget of which prompts keep a quarter. When pages run out, cached prefixes go
// first, then the youngest request is preempted: its pages are freed and its known tokens are
// recomputed later. A request that fits the cache alone always progresses, so there is no deadlock.
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
  StepPlan plan(const LatencyModel& latency, const CommitModel& commits);
  // The prompt (or what is recomputed) is in the pages: decoding starts with the next step.
  void begin_decode(Request* request);
  // Registers the pages of `request` that are full and clean.
  void cache_clean_pages(Request* request);

  // Decode rows of a request in a step, exactly.
  int decode_rows(const Request& request, int chunk_length, bool refresh) const;
  // Pages a request of this many tokens needs at its longest.
  int pages_for(int num_tokens) const;
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  int num_running() const { return static_cast<int>(running_.size()); }
  PagePool& pool() { return pool_; }
  PrefixCache& prefix_cache() { return prefix_cache_; }

 private:
  void secure_decode_pages();
  void admit();
  void plan_decode(StepPlan& plan, const LatencyModel& latency, const CommitModel& commits);
  void plan_prefill(StepPlan& plan);
  bool wants_refresh(const Request& request, const LatencyModel& latency, int batch_rows) const;

  int window_end(const Request& request) const;
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
};

}  // namespace optimus
