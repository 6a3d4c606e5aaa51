// Drives a Scheduler without a model: requests are "run" by committing a few masks at random, and
// every plan is checked for what must hold of any plan.
#pragma once

#include <memory>
#include <set>

#include "engine/scheduler.h"
#include "testing.h"

namespace optimus::testing {

class ScheduledRequests {
 public:
  explicit ScheduledRequests(const EngineConfig& config, unsigned seed = 1)
      : config(config), scheduler(config), commits(config.block_length), rng_(seed) {}

  Request* add(int prompt_len, int max_tokens) {
    requests.push_back(std::make_unique<Request>());
    Request* request = requests.back().get();
    request->id = requests.size();
    // Prompts start alike, so that the prefix cache has work.
    for (int i = 0; i < prompt_len; ++i) {
      request->prompt.push_back(i < 2 * config.block_length ? 1 : random_int(rng_, 0, 3));
    }
    request->params.max_tokens = max_tokens;
    request->commit_context = commits.context(request->params.unmasking_strategy,
                                              request->params.confidence_threshold, 1);
    request->metrics.arrival_s = now_s;
    scheduler.add(request);
    return request;
  }

  // Plans, checks and applies one step.
  StepPlan step() {
    StepPlan plan = scheduler.plan(now_s, latency, commits);
    check(plan);
    for (const SeqPlan& seq : plan.seqs) apply(seq);
    commits.advance(static_cast<int>(plan.seqs.size()));
    now_s += step_ms > 0 ? step_ms * 1e-3 : plan.predicted_ms * 1e-3;
    return plan;
  }

  // Steps until every request is finished; returns the number of steps.
  int run_all() {
    int steps = 0;
    while (scheduler.num_running() + scheduler.num_waiting() > 0) {
      EXPECT_FALSE(step().seqs.empty()) << "an empty plan with requests left";
      if (++steps > 20000 || ::testing::Test::HasFailure()) {
        ADD_FAILURE() << "stopped after " << steps << " steps";
        break;
      }
    }
    return steps;
  }

  int num_preemptions() const {
    int count = 0;
    for (const auto& request : requests) count += request->metrics.num_preemptions;
    return count;
  }

  void expect_all_pages_free() {
    PagePool& pool = scheduler.pool();
    EXPECT_EQ(pool.num_free() + scheduler.prefix_cache().num_cached(), pool.num_pages());
    scheduler.prefix_cache().clear();
    EXPECT_EQ(pool.num_free(), pool.num_pages());
  }

  EngineConfig config;
  Scheduler scheduler;
  LatencyModel latency;
  CommitModel commits;
  double now_s = 0;
  double step_ms = 0;  // time a step takes; 0 = what the latency model predicts
  std::vector<std::unique_ptr<Request>> requests;

 private:
  void check(const StepPlan& plan) {
    std::set<const Request*> in_step;
    std::set<int> slots;
    int rows = 0, prefill_rows = 0, num_decoding = 0;
    int64_t kv_tokens = 0;
    for (const SeqPlan& seq : plan.seqs) {
      const Request& request = *seq.request;
      EXPECT_TRUE(in_step.insert(seq.request).second) << "twice in a step";
      EXPECT_TRUE(slots.insert(request.slot).second);
      EXPECT_TRUE(request.slot >= 0 && request.slot < config.max_num_seqs);
      bool is_prefill = seq.prefill_len > 0;
      const bool is_last_slice = is_prefill && request.num_computed == request.prefill_target;
      EXPECT_EQ(request.status,
                is_prefill && !is_last_slice ? RequestStatus::prefilling : RequestStatus::decoding);
      EXPECT_EQ(seq.slot, request.slot);
      EXPECT_EQ(seq.prefill_len % config.grid(), 0) << "part of a block";
      int end = is_prefill ? seq.prefill_start + seq.prefill_len
                           : request.block_start + (config.grid() > 1 ? config.grid() : 0);
      EXPECT_LE(is_prefill ? end : 0, request.prefill_target);
      EXPECT_EQ(is_prefill ? end : request.num_computed, request.num_computed);
      EXPECT_GE(static_cast<int>(request.pages.size()) * config.page_size, end);
      EXPECT_GE(seq.chunk_length, is_prefill ? 0 : 1);
      if (must_refresh(request) && !is_prefill) {
        EXPECT_TRUE(seq.refresh) << "a due block was not refreshed";
      }
      num_decoding += !is_prefill;
      kv_tokens += end;
      prefill_rows += seq.prefill_len;
      rows += is_prefill ? seq.prefill_len
                         : scheduler.decode_rows(request, seq.chunk_length, seq.refresh);
    }
    EXPECT_EQ(plan.num_rows, rows);
    EXPECT_EQ(plan.most_rows, rows);
    EXPECT_EQ(plan.prefill_rows, prefill_rows);
    EXPECT_EQ(plan.num_decoding, num_decoding);
    EXPECT_EQ(plan.kv_tokens, kv_tokens);
    EXPECT_EQ(plan.predicted_ms > 0, latency.has_profile() && rows > 0);
    EXPECT_LE(rows, config.max_num_batched_rows);
    check_pages();
  }

  // A finished block that the KV policy, or the arm that decoded it, wants fed once more.
  bool must_refresh(const Request& request) const {
    if (!request.previous_block_pending || config.row_mode() == RowMode::ar) return false;
    return config.kv_policy == KvPolicy::refresh ||
           (config.kv_policy == KvPolicy::auto_ && request.previous_needs_refresh);
  }

  void check_pages() {
    std::set<int32_t> held;
    size_t num_held = 0;
    for (const auto& request : requests) {
      held.insert(request->pages.begin(), request->pages.end());
      num_held += request->pages.size();
      bool runs = request->status == RequestStatus::prefilling ||
                  request->status == RequestStatus::decoding;
      EXPECT_EQ(runs, request->slot >= 0);
      EXPECT_TRUE(runs || request->pages.empty()) << "pages held while not running";
      EXPECT_LE(request->pages.size(), size_t(scheduler.pages_for(request->max_len())));
    }
    PagePool& pool = scheduler.pool();
    int used = pool.num_pages() - pool.num_free();
    if (!config.enable_prefix_cache) {
      EXPECT_EQ(held.size(), num_held) << "a page of two requests";
      EXPECT_EQ(used, static_cast<int>(held.size()));
    }
    EXPECT_GE(used, static_cast<int>(held.size()));
    EXPECT_LE(used, static_cast<int>(held.size()) + scheduler.prefix_cache().num_cached());
    for (int32_t page : held) EXPECT_GE(pool.ref_count(page), 1);
  }

  void apply(const SeqPlan& seq) {
    Request& request = *seq.request;
    if (seq.prefill_len > 0) {
      request.num_clean = seq.prefill_start + seq.prefill_len;
      scheduler.cache_clean_pages(&request);
      return;
    }
    request.window_open = true;
    request.metrics.nfe += 1;
    int evaluated = std::min(seq.chunk_length, request.num_masked);
    int num_committed = random_int(rng_, 1, evaluated);
    learn(request, seq, evaluated, num_committed);
    for (int i = 0; i < num_committed; ++i) commit_next(request);
    // Block mode keeps the known positions of the current block fresh until it is complete.
    bool keeps = config.row_mode() == RowMode::block && !request.previous_block_pending;
    request.num_fresh = num_committed + (keeps ? request.num_fresh : 0);
    request.previous_block_pending = false;
    if (request.num_masked == 0) {
      request.block_start += config.grid();
      request.num_computed = request.block_start;
      request.num_masked = config.grid();
      request.previous_block_pending = true;
      request.replays_block = false;
    }
    if (request.num_known == request.params.max_tokens) {
      scheduler.remove(&request);
      request.status = RequestStatus::finished;
    }
  }

  void learn(Request& request, const SeqPlan& seq, int evaluated, int num_committed) {
    if (config.decode_mode != DecodeMode::ar) {
      commits.observe_step(request.commit_context, seq.chunk_length, evaluated, num_committed);
      for (int i = 0; i < evaluated; ++i) {
        commits.observe(request.commit_context, i, request.history, i < num_committed);
      }
    }
    request.block_needs_refresh |= seq.needs_refresh;
    if (request.previous_block_pending) {
      request.previous_needs_refresh = request.block_needs_refresh;
      request.block_needs_refresh = false;
    }
    request.history.confidence.clear();
    for (int i = num_committed; i < evaluated; ++i) {
      request.history.confidence.push_back(0.01f * random_int(rng_, 0, 90));
    }
    request.history.num_evaluated = evaluated;
    request.history.num_committed = num_committed;
  }

  // Commits the first mask; the token is a function of its place, so a replay commits the same.
  void commit_next(Request& request) {
    int position = request.block_start + config.grid() - request.num_masked--;
    int output_idx = position - request.prompt_len();
    if (output_idx >= request.params.max_tokens) return;  // the block's last positions
    EXPECT_LE(output_idx, request.num_known) << "a known token was lost";
    if (output_idx < request.num_known) return;  // replayed
    request.output.push_back({output_idx % 4, 0.0f, 1.0f, request.metrics.nfe});
    ++request.num_known;
  }

  Rng rng_;
};

}  // namespace optimus::testing
