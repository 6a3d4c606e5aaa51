// Which rows a step has: decode rows by the chunk policy, then prompts in what is left.
#include <algorithm>
#include <cmath>

#include "engine/scheduler.h"

namespace optimus {
namespace {

constexpr int kPrefillShare = 4;        // prompts keep 1 / this of the row budget
constexpr int kLeastSlice = 32;         // rows of prompts, if targets leave fewer: none
constexpr int kMaxPrefillPause = 8;     // steps without any prompt row while prompts wait
constexpr int kPrefillCandidates = 64;  // sizes of prompt slices that are tried

}  // namespace

// Whether a finished block must be fed once more, whatever that costs.
bool Scheduler::must_refresh(const Request& request) const {
  if (!may_feed_previous(request) || config_.row_mode() == RowMode::ar) return false;
  if (config_.kv_policy != KvPolicy::auto_) return config_.kv_policy == KvPolicy::refresh;
  const bool needs = request.in_flight.num_steps > 0
                         ? request.block_needs_refresh || request.in_flight.needs_refresh
                         : request.previous_needs_refresh;
  return plan_.decision.refresh || needs;
}

int Scheduler::prompt_rows_left() const {
  int rows = 0;
  for (const Request* request : running_) {
    if (request->status != RequestStatus::prefilling) continue;
    rows += request->prefill_target - request->num_computed;
  }
  return rows;
}

void Scheduler::choose_chunks(const LatencyModel& latency, const CommitModel& commits) {
  loads_.clear();
  for (const Request* request : decoding_) {
    loads_.push_back({request->num_masked, decode_rows(*request, 0, must_refresh(*request)),
                      window_end(*request), request->commit_context,
                      request->params.confidence_threshold, &request->history});
  }
  // What prompts will take of the step: all they want, unless a target slowed them down lately.
  StepLoad other;
  other.rows = std::min(prompt_rows_left(), config_.max_num_batched_rows -
                                                config_.max_num_batched_rows / kPrefillShare);
  if (config_.target_tpot_ms > 0 && step_ - last_prefill_step_ <= 1 && last_prefill_rows_ > 0) {
    other.rows = std::min(other.rows, last_prefill_rows_);
  }
  other.prefill_rows = other.rows;
  plan_.decision = policy_.choose(loads_, other, latency, commits);
}

// False: more rows than the budget might come of a plan made ahead.
bool Scheduler::plan_decode(const LatencyModel& latency, const CommitModel& commits) {
  decoding_.clear();
  bool prompts_wait = false;
  for (Request* request : running_) {
    if (request->status == RequestStatus::decoding) decoding_.push_back(request);
    prompts_wait |= request->status == RequestStatus::prefilling;
  }
  if (decoding_.empty()) return true;
  std::stable_sort(decoding_.begin(), decoding_.end(), [](const Request* a, const Request* b) {
    return a->last_scheduled_step < b->last_scheduled_step;
  });
  choose_chunks(latency, commits);

  int budget = config_.max_num_batched_rows;
  if (prompts_wait) budget -= budget / kPrefillShare;
  const std::vector<int>& lengths = policy_.chunk_lengths();
  for (size_t i = 0; i < decoding_.size(); ++i) {
    const Request& request = *decoding_[i];
    const bool refresh = must_refresh(request);
    const int most_rows = most_decode_rows(request, lengths[i], refresh);
    if (plan_.most_rows + most_rows > budget) {
      if (!plan_.is_ahead) continue;
      plan_.clear();
      return false;
    }
    const int rows = decode_rows(request, lengths[i], refresh);
    if (refresh) plan_.refresh_rows += rows - decode_rows(request, lengths[i], false);
    plan_.num_rows += rows;
    plan_.most_rows += most_rows;
    plan_.kv_tokens += window_end(request);
    plan_.seqs.push_back(
        {decoding_[i], request.slot, 0, 0, lengths[i], refresh, policy_.needs_refresh()[i] != 0});
  }
  for (const SeqPlan& seq : plan_.seqs) seq.request->last_scheduled_step = step_;
  plan_.num_decoding = static_cast<int>(plan_.seqs.size());
  if (config_.kv_policy == KvPolicy::auto_ && config_.row_mode() == RowMode::chunk) {
    refresh_where_free(latency, budget);
  }
  return true;
}

// After everybody's rows are known: whether more of them are free depends on the whole step.
void Scheduler::refresh_where_free(const LatencyModel& latency, int budget) {
  for (SeqPlan& seq : plan_.seqs) {
    if (seq.refresh || !may_feed_previous(*seq.request)) continue;
    const int extra = most_decode_rows(*seq.request, seq.chunk_length, true) -
                      most_decode_rows(*seq.request, seq.chunk_length, false);
    if (plan_.most_rows + extra > budget || !refresh_is_free(latency, plan_.load(), extra))
      continue;
    seq.refresh = true;
    plan_.num_rows += extra;
    plan_.most_rows += extra;
    plan_.refresh_rows += extra;
  }
}

// Prompt rows that must run now for the oldest prompts to make target_ttft_ms, if steps take
// `step_ms`.
int Scheduler::due_prefill_rows(double now_s, double step_ms) const {
  int due = 0, rows = 0;
  for (const Request* request : running_) {
    if (request->status != RequestStatus::prefilling) continue;
    rows += request->prefill_target - request->num_computed;
    const double left_ms =
        config_.target_ttft_ms - (now_s - request->metrics.arrival_s) * 1e3 - step_ms;
    const double steps = std::max(1.0, left_ms / std::max(step_ms, 1e-6));
    due = std::max(due, static_cast<int>(std::min(1e9, std::ceil(rows / steps))));
  }
  return due;
}

// Rows that prompts may take in this step.
int Scheduler::prefill_room(double now_s, const LatencyModel& latency) const {
  const int room = config_.max_num_batched_rows - plan_.most_rows;
  if (config_.target_tpot_ms <= 0 || !latency.has_profile() || plan_.num_decoding == 0) return room;
  const int grid = config_.grid();
  // Each decoding request commits this many tokens in a step, so a step may take that much longer
  // than a token.
  const double commits =
      std::max(1.0, plan_.decision.expected_commits / std::max<size_t>(loads_.size(), 1));
  const double limit_ms = config_.target_tpot_ms * commits;
  const auto step_ms = [&](int rows) {
    StepLoad load = plan_.load();
    load.rows += rows;
    load.prefill_rows += rows;
    return latency.predict(load);
  };
  const int stride = std::max(grid, room / kPrefillCandidates / grid * grid);
  int fits = room / grid * grid;
  while (fits > 0 && step_ms(fits) > limit_ms) fits = std::max(0, fits - stride);
  // Crumbs of a prompt only spread its cost over many steps; while there is time, it can wait.
  const int slice = std::min(prompt_rows_left(), kLeastSlice);
  if (fits < slice) fits = 0;
  int least = 0;
  if (config_.target_ttft_ms > 0) least = due_prefill_rows(now_s, step_ms(fits));
  if (least < slice) least = 0;
  if (step_ >= last_prefill_step_ + kMaxPrefillPause) {
    least = std::max(least, config_.max_num_batched_rows / kPrefillShare);
  }
  return std::min(room, std::max(fits, (least + grid - 1) / grid * grid));
}

void Scheduler::plan_prefill(double now_s, const LatencyModel& latency) {
  const bool prompts_wait = std::any_of(
      running_.begin(), running_.end(),
      [](const Request* request) { return request->status == RequestStatus::prefilling; });
  if (!prompts_wait) {
    last_prefill_step_ = step_;
    last_prefill_rows_ = 0;
    return;
  }
  const int grid = config_.grid();
  int room = prefill_room(now_s, latency) / grid * grid;
  for (Request* request : running_) {
    if (request->status != RequestStatus::prefilling) continue;
    const int length = std::min(room, request->prefill_target - request->num_computed);
    if (length <= 0) break;
    plan_.seqs.push_back({request, request->slot, request->num_computed, length});
    room -= length;
    plan_.num_rows += length;
    plan_.most_rows += length;
    plan_.prefill_rows += length;
    request->num_computed += length;
    plan_.kv_tokens += request->num_computed;
    request->last_scheduled_step = step_;
    if (request->num_computed == request->prefill_target) begin_decode(request);
  }
  if (plan_.prefill_rows > 0) {
    last_prefill_step_ = step_;
    last_prefill_rows_ = plan_.prefill_rows;
  }
}

}  // namespace optimus
