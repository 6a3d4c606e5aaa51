#include "engine/engine_core.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

bool contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

EngineCore::EngineCore(const EngineConfig& config, int vocab_size)
    : config_((validate(config), config)),
      vocab_size_(vocab_size),
      scheduler_(config_),
      commits_(config_.block_length),
      log_(config_.step_log_size) {}

void EngineCore::check_prompt(const std::vector<int32_t>& prompt) const {
  OPTIMUS_CHECK(!prompt.empty(), "[add_request] the prompt is empty");
  int prompt_len = static_cast<int>(prompt.size());
  OPTIMUS_CHECK(prompt_len < config_.max_model_len, "[add_request] a prompt of ", prompt_len,
                " tokens leaves no room in max_model_len ", config_.max_model_len);
  for (int32_t id : prompt) {
    OPTIMUS_CHECK(id >= 0 && id < vocab_size_, "[add_request] token ids must be in [0, ",
                  vocab_size_, "), got ", id);
  }
}

uint64_t EngineCore::add_request(std::vector<int32_t> prompt, SamplingParams params, double now_s) {
  check_prompt(prompt);
  validate(params);
  int room = config_.max_model_len - static_cast<int>(prompt.size());
  params.max_tokens = params.max_tokens < 0 ? room : std::min(params.max_tokens, room);
  int pages = scheduler_.pages_for(static_cast<int>(prompt.size()) + params.max_tokens);
  OPTIMUS_CHECK(pages <= config_.num_pages, "[add_request] a prompt of ", prompt.size(),
                " tokens with max_tokens ", params.max_tokens, " needs ", pages, " pages of ",
                config_.page_size, " tokens, the kv cache has ", config_.num_pages);

  auto request = std::make_unique<Request>();
  request->id = next_id_++;
  request->prompt = std::move(prompt);
  request->params = std::move(params);
  // It may have arrived while the last step ran: that wait counts.
  const double clock_s = advance_clock(now_s);
  request->metrics.arrival_s = std::isfinite(now_s) ? now_s : clock_s;
  const int steps = request->params.denoising_steps;
  request->commit_context =
      commits_.context(request->params.unmasking_strategy, request->params.confidence_threshold,
                       steps > 0 ? std::max(1, config_.grid() / steps) : 1);
  scheduler_.add(request.get());
  uint64_t id = request->id;
  requests_[id] = std::move(request);
  ++num_unfinished_;
  return id;
}

// A clock that jumps back must not turn durations negative.
double EngineCore::advance_clock(double now_s) {
  if (std::isfinite(now_s)) now_s_ = std::max(now_s_, now_s);
  return now_s_;
}

const StepPlan& EngineCore::plan(double now_s) {
  OPTIMUS_INVARIANT(num_planned_ < 2, "a plan ahead of a plan that is ahead");
  const double planned_s = advance_clock(now_s);
  const StepPlan& next = scheduler_.plan(planned_s, latency_, commits_, num_planned_ > 0);
  if (next.seqs.empty()) {
    if (num_planned_ == 0) last_end_s_ = -1;
    return next;
  }
  StepPlan& plan = plans_[num_planned_++];
  plan = next;
  plan.planned_s = planned_s;
  if (plan.num_decoding > 0) plan.arms = scheduler_.policy().arms();
  for (const SeqPlan& seq : plan.seqs) {
    if (seq.prefill_len > 0) continue;
    Request::InFlight& in_flight = seq.request->in_flight;
    in_flight = {in_flight.num_steps + 1, seq.chunk_length, seq.needs_refresh};
  }
  return plan;
}

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
  drop_plan();
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

void EngineCore::note_host(const HostTimes& host) {
  record_.host = host;
  if (!follows_) record_.host.idle_ms = 0;
}

bool EngineCore::is_void() const {
  const std::vector<SeqPlan>& seqs = plans_[0].seqs;
  return num_planned_ > 0 && std::all_of(seqs.begin(), seqs.end(),
                                         [](const SeqPlan& seq) { return seq.request == nullptr; });
}

void EngineCore::drop_plan() {
  OPTIMUS_INVARIANT(num_planned_ > 0, "no plan to drop");
  std::swap(plans_[0], plans_[1]);
  --num_planned_;
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

int EngineCore::finish(Request& request, FinishReason reason) {
  scheduler_.remove(&request);
  forget_in_flight(request);
  request.output.resize(std::min<size_t>(request.output.size(), request.num_known));
  request.status = RequestStatus::finished;
  request.finish_reason = reason;
  request.metrics.finish_s = now_s_;
  --num_unfinished_;
  return request.num_learned_commits - request.num_known;
}

// What steps in flight come to is nobody's business any more. They may run on: what they write comes
// before what the next owner of the slot and the pages writes.
void EngineCore::forget_in_flight(const Request& request) {
  for (int i = 0; i < num_planned_; ++i) {
    for (SeqPlan& seq : plans_[i].seqs) {
      if (seq.request == &request) seq.request = nullptr;
    }
  }
}

void EngineCore::finish_at_once(Request& request, FinishReason reason) {
  const int wasted = finish(request, reason);
  if (wasted > 0) {
    commits_.observe_waste(request.commit_context, request.last_chunk_length, wasted);
  }
}

Request& EngineCore::find(uint64_t id, const char* what) {
  auto it = requests_.find(id);
  OPTIMUS_CHECK(it != requests_.end(), "[", what, "] unknown request ", id);
  return *it->second;
}

const Request& EngineCore::request(uint64_t id) const {
  return const_cast<EngineCore*>(this)->find(id, "request");
}

void EngineCore::stop_request(uint64_t id, int num_tokens, double now_s) {
  advance_clock(now_s);
  Request& request = find(id, "stop_request");
  OPTIMUS_CHECK(num_tokens >= 0 && num_tokens <= request.num_known,
                "[stop_request] num_tokens must be in [0, ", request.num_known, "], got ",
                num_tokens);
  request.num_known = num_tokens;
  if (request.status != RequestStatus::finished) {
    finish_at_once(request, FinishReason::stop);
  } else {
    request.output.resize(num_tokens);
    request.finish_reason = FinishReason::stop;
  }
}

void EngineCore::abort(uint64_t id, double now_s) {
  advance_clock(now_s);
  Request& request = find(id, "abort");
  if (request.status != RequestStatus::finished) finish_at_once(request, FinishReason::abort);
}

void EngineCore::release(uint64_t id) {
  Request& request = find(id, "release");
  OPTIMUS_CHECK(request.status == RequestStatus::finished, "[release] request ", id,
                " is not finished");
  requests_.erase(id);
}

void EngineCore::check_idle(const char* what) const {
  OPTIMUS_CHECK(num_unfinished_ == 0, "[", what, "] ", num_unfinished_, " requests are unfinished");
}

}  // namespace optimus
