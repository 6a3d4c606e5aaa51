#include "engine/engine_core.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {

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

void EngineCore::note_host(const HostTimes& host) {
  record_.host = host;
  if (!follows_) record_.host.idle_ms = record_.host.rows_ms = 0;
}

bool EngineCore::is_void() const {
  const std::vector<SeqPlan>& seqs = plans_[0].seqs;
  return num_planned_ > 0 && std::all_of(seqs.begin(), seqs.end(),
                                         [](const SeqPlan& seq) { return seq.request == nullptr; });
}

void EngineCore::drop_plan() {
  pop_plan();
  last_end_s_ = -1;  // its time is nobody's
}

void EngineCore::forget_plans() {
  num_planned_ = 0;
  last_end_s_ = -1;
  scheduler_.preempt_all();
}

void EngineCore::pop_plan() {
  OPTIMUS_INVARIANT(num_planned_ > 0, "no plan to drop");
  std::swap(plans_[0], plans_[1]);
  --num_planned_;
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
