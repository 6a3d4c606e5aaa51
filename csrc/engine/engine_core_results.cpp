// What the results of a step do: to the requests that were in it, to what callers are told, and to the
// models of time and commits.
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "engine/engine_core.h"

namespace optimus {
namespace {

bool contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

void EngineCore::apply(const StepResult& result, double forward_ms, double now_s) {
  OPTIMUS_INVARIANT(num_planned_ > 0, "update without a plan");
  const StepPlan& plan = plans_[0];
  advance_clock(now_s);
  changes_.clear();
  new_commits_.clear();
  observations_.clear();
  record_ = {};
  count_rows(plan, result);
  int row = 0;
  for (const SeqPlan& seq : plan.seqs) {
    if (seq.prefill_len > 0) {
      if (seq.request != nullptr) update_prefill(seq);
      continue;
    }
    const int first = row;
    while (row < result.num_logit_rows && result.logit_slots[row] == seq.slot) ++row;
    if (seq.request != nullptr) update_decode(seq, result, first, row);
  }
  record_.commits = static_cast<int>(new_commits_.size());
  if (plan.num_decoding > 0) {
    scheduler_.observe(record_.commits, forward_ms + latency_.overhead_ms());
  }
  latency_.observe({record_.rows, record_.prefill_rows, record_.kv_tokens}, forward_ms);
  write_record(plan, result, forward_ms);
  // Steps that follow each other at once: what the forward does not explain is host work.
  follows_ = last_end_s_ >= 0;
  if (follows_) latency_.observe_overhead((now_s_ - last_end_s_) * 1e3 - forward_ms);
  last_end_s_ = num_unfinished_ > 0 ? now_s_ : -1;
  pop_plan();
}

// Of the step that is applied, before it is: what it really had.
void EngineCore::count_rows(const StepPlan& plan, const StepResult& result) {
  int rows = 0;
  bool all_there = true;
  for (const SeqPlan& seq : plan.seqs) {
    all_there &= seq.request != nullptr;
    if (seq.prefill_len > 0) {
      rows += seq.prefill_len;
      record_.kv_tokens += seq.prefill_start + seq.prefill_len;
    } else if (seq.request != nullptr) {
      const int own = scheduler_.decode_rows(*seq.request, seq.chunk_length, seq.refresh);
      rows += own;
      record_.refresh_rows +=
          own - scheduler_.decode_rows(*seq.request, seq.chunk_length, /*refresh=*/false);
      record_.kv_tokens += scheduler_.window_end(*seq.request);
    }
  }
  OPTIMUS_INVARIANT(!all_there || rows == result.num_rows, "a step of ", rows,
                    " rows came back with ", result.num_rows);
  record_.rows = result.num_rows;
  record_.prefill_rows = plan.prefill_rows;
  record_.logit_rows = result.num_logit_rows;
}

StepOutput EngineCore::report() {
  learn();
  StepOutput output;
  output.updates.reserve(changes_.size());
  auto commit = new_commits_.cbegin();
  for (const Change& change : changes_) {
    change.request->metrics.chunk_histogram[change.num_masks] += 1;
    output.updates.push_back({change.request->id,
                              {commit, commit + change.num_commits},
                              change.num_known,
                              change.reason});
    commit += change.num_commits;
  }
  log_.push(record_);
  output.record = std::move(record_);
  return output;
}

void EngineCore::learn() {
  if (config_.decode_mode == DecodeMode::ar) return;
  const CommitModel::Observation* masks = observations_.data();
  for (const Change& change : changes_) {
    const int context = change.request->commit_context;
    commits_.observe(context, masks, change.num_masks);
    // What another chunk length left behind is not what this one meets in its steady state.
    if (has_usual_chunks() && change.kept_length) {
      commits_.observe_step(context, change.chunk_length, change.num_masks, change.num_committed);
    }
    if (change.num_wasted > 0) {
      commits_.observe_waste(context, change.chunk_length, change.num_wasted);
    }
    masks += change.num_masks;
  }
  commits_.advance(static_cast<int>(changes_.size()));
}

void EngineCore::write_record(const StepPlan& plan, const StepResult& result, double forward_ms) {
  StepRecord& record = record_;
  const ChunkDecision& decision = plan.decision;
  record.step = ++step_;
  record.start_s = std::max(plan.planned_s, last_end_s_);
  record.num_seqs = static_cast<int>(plan.seqs.size());
  record.num_decoding = static_cast<int>(changes_.size());
  record.num_waiting = scheduler_.num_waiting();
  record.chunk_length = decision.chunk_length;
  record.refresh = decision.refresh;
  for (int i = 0; i < result.num_logit_rows;) {
    int end = i + 1;
    while (end < result.num_logit_rows && result.logit_slots[end] == result.logit_slots[i]) ++end;
    record.chunk_lengths.push_back(static_cast<uint16_t>(end - i));
    i = end;
  }
  record.expected_commits = decision.expected_commits;
  record.predicted_ms = plan.predicted_ms;
  record.forward_ms = forward_ms;
  record.step_ms = (now_s_ - record.start_s) * 1e3;
  record.is_ahead = plan.is_ahead;
  record.meets_target = decision.meets_target;
  record.reason = decision.reason;
  for (const ArmEstimate& arm : plan.arms) {  // those that differ
    const bool is_known = std::any_of(record.arms.begin(), record.arms.end(), [&](const auto& a) {
      return a.chunk_length == arm.chunk_length && a.rows == arm.rows;
    });
    if (!is_known || arm.verdict == ChunkPolicy::kChosen) record.arms.push_back(arm);
  }
}

void EngineCore::update_prefill(const SeqPlan& seq) {
  Request& request = *seq.request;
  request.num_clean = seq.prefill_start + seq.prefill_len;
  request.metrics.prefill_rows += seq.prefill_len;
  scheduler_.cache_clean_pages(&request);
}

void EngineCore::update_decode(const SeqPlan& seq, const StepResult& result, int first, int last) {
  Request& request = *seq.request;
  const int slot = seq.slot, grid = config_.grid();
  request.in_flight.num_steps -= 1;
  request.metrics.nfe += 1;
  request.metrics.decode_rows += scheduler_.decode_rows(request, seq.chunk_length, seq.refresh);

  // The step fed the previous block (ar: the last token) in a clean context: its KV is clean.
  const bool fed_clean =
      config_.decode_mode == DecodeMode::ar || (seq.refresh && request.previous_block_pending);
  if (fed_clean && request.num_clean == request.block_start - grid) {
    request.num_clean = request.block_start;
    scheduler_.cache_clean_pages(&request);
  }
  request.previous_block_pending = result.block_start[slot] != request.block_start;
  Change change{&request, last - first, seq.chunk_length,
                seq.chunk_length == request.last_chunk_length};
  look_at(request, seq, result, first, change);
  const size_t num_before = new_commits_.size();
  for (int i : committed_rows_) {
    OutputToken token{result.candidates.token_ids[i], result.candidates.logprob[i],
                      result.candidates.confidence[i], request.metrics.nfe};
    int output_idx = request.block_start + result.logit_offsets[i] - request.prompt_len();
    record_commit(request, output_idx, token);
  }
  if (request.previous_block_pending) request.replays_block = false;
  request.block_start = request.num_computed = result.block_start[slot];
  request.num_fresh = result.num_fresh[slot];
  request.num_masked = result.num_masked[slot];

  FinishReason reason = check_finished(request);
  const int first_mask = request.prompt_len() + request.num_known;
  request.history.num_known_ahead =
      std::max(0, request.block_start + grid - first_mask - request.num_masked);
  if (reason != FinishReason::none) {
    auto beyond_end = [&](const Commit& c) { return c.output_idx >= request.num_known; };
    new_commits_.erase(
        std::remove_if(new_commits_.begin() + num_before, new_commits_.end(), beyond_end),
        new_commits_.end());
    change.num_wasted = finish(request, reason);
  }
  change.num_commits = static_cast<int>(new_commits_.size() - num_before);
  change.num_known = request.num_known;
  change.reason = reason;
  changes_.push_back(change);
}

bool EngineCore::has_usual_chunks() const {
  return config_.decode_mode != DecodeMode::ar &&
         config_.decode_mode != DecodeMode::elastic_per_request;
}

void EngineCore::look_at(Request& request, const SeqPlan& seq, const StepResult& result, int first,
                         Change& change) {
  const int count = change.num_masks;
  const float* confidence = result.candidates.confidence + first;
  const uint8_t* committed = result.candidates.committed + first;
  MaskHistory& history = request.history;
  // Which masks commit, nobody can predict: there are no branches on it.
  committed_rows_.resize(count);
  for (int i = 0; i < count; ++i) {
    committed_rows_[change.num_committed] = first + i;
    change.num_committed += committed[i] != 0;
  }
  committed_rows_.resize(change.num_committed);
  if (config_.decode_mode != DecodeMode::ar) {
    // A sole commit may be the one that every step makes, whatever its rule accepts.
    const bool by_threshold = request.params.unmasking_strategy == kLowConfidenceDynamic;
    const float needed = change.num_committed > 1 ? -1.0f
                         : by_threshold           ? request.params.confidence_threshold
                                                  : 1.0f;
    const CommitModel::Cells cells(history);
    const size_t at = observations_.size();
    observations_.resize(at + count);
    for (int i = 0; i < count; ++i) {
      const bool accepted = (committed[i] != 0) & (confidence[i] > needed);
      observations_[at + i] = {static_cast<uint16_t>(cells[i]), accepted};
    }
  }
  if (has_usual_chunks()) {
    request.num_learned_commits += change.num_committed;
    request.last_chunk_length = seq.chunk_length;
  }
  request.block_needs_refresh |= seq.needs_refresh;
  if (request.previous_block_pending) {  // a new block: how the last one ended still tells
    request.previous_needs_refresh = request.block_needs_refresh;
    request.block_needs_refresh = false;
  }
  history.confidence.resize(count);
  int num_left = 0;
  for (int i = 0; i < count; ++i) {
    history.confidence[num_left] = confidence[i];
    num_left += committed[i] == 0;
  }
  history.confidence.resize(num_left);
  history.num_evaluated = count;
  history.num_committed = change.num_committed;
  history.advance_pace();
}

void EngineCore::record_commit(Request& request, int output_idx, OutputToken token) {
  if (output_idx >= request.params.max_tokens) return;  // the block's last positions
  if (output_idx >= static_cast<int>(request.output.size())) {
    request.output.resize(output_idx + 1);
  }
  OutputToken& known = request.output[output_idx];
  if (known.step != 0) return;  // decoded again after a preemption: the same token
  known = token;
  new_commits_.push_back({output_idx, token});
  if (request.metrics.first_token_s == 0) request.metrics.first_token_s = now_s_;
}

FinishReason EngineCore::check_finished(Request& request) {
  const SamplingParams& params = request.params;
  while (request.num_known < static_cast<int>(request.output.size()) &&
         request.output[request.num_known].step != 0) {
    int32_t token = request.output[request.num_known++].token_id;
    bool is_stop = contains(params.stop_token_ids, token) ||
                   (!params.ignore_eos && contains(config_.eos_token_ids, token));
    if (is_stop) return FinishReason::stop;
    if (request.num_known == params.max_tokens) return FinishReason::length;
  }
  return FinishReason::none;
}

}  // namespace optimus
