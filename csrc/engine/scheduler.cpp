#include "engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "core/check.h"

namespace optimus {
namespace {

int round_down(int value, int multiple) { return value / multiple * multiple; }
int divide_up(int value, int by) { return (value + by - 1) / by; }

ChunkPolicyConfig policy_config(const EngineConfig& config) {
  ChunkPolicyConfig policy;
  policy.block_length = config.block_length;
  policy.kv_policy = config.kv_policy;
  switch (config.decode_mode) {
    case DecodeMode::ar:
      policy.chunk_lengths = {1};
      return policy;
    case DecodeMode::block:
      policy.chunk_lengths = {config.block_length};
      return policy;
    case DecodeMode::chunk:
      policy.chunk_lengths = {config.chunk_length};
      return policy;
    case DecodeMode::schedule:
      policy.kind = ChunkPolicyKind::schedule;
      policy.schedule = config.chunk_schedule;
      return policy;
    case DecodeMode::elastic:
      policy.kind = ChunkPolicyKind::elastic;
      break;
    case DecodeMode::elastic_per_request:
      policy.kind = ChunkPolicyKind::elastic_per_request;
      break;
  }
  policy.chunk_lengths = config.chunk_arms;
  if (policy.chunk_lengths.empty()) {
    for (int c = 2; c < config.block_length; c *= 2) policy.chunk_lengths.push_back(c);
    policy.chunk_lengths.push_back(config.block_length);
  }
  policy.quality = QualityFloor(config.measured_arms, config.quality_floor);
  policy.target_tpot_ms = config.target_tpot_ms;
  return policy;
}

// Decoding the current block again from a clean context commits the same tokens: nothing in it
// depends on load, and refreshed context does not depend on how it came about.
bool replays_exactly(const EngineConfig& config) {
  return !config.is_elastic() && config.decode_mode != DecodeMode::schedule &&
         config.kv_policy == KvPolicy::refresh;
}

}  // namespace

void validate(const EngineConfig& c) {
  auto at_least = [](const char* name, int value, int low) {
    OPTIMUS_CHECK(value >= low, "[engine_config] ", name, " must be at least ", low, ", got ",
                  value);
  };
  auto chunk = [&](const char* name, int value) {
    OPTIMUS_CHECK(value >= 1 && value <= c.block_length, "[engine_config] ", name,
                  " must be between 1 and block_length ", c.block_length, ", got ", value);
  };
  at_least("block_length", c.block_length, 1);
  OPTIMUS_CHECK(c.block_length <= kMaxBlockLength, "[engine_config] block_length must be at most ",
                kMaxBlockLength, ", got ", c.block_length);
  at_least("max_num_seqs", c.max_num_seqs, 1);
  at_least("page_size", c.page_size, 1);
  at_least("num_pages", c.num_pages, 1);
  at_least("max_model_len", c.max_model_len, c.grid());
  at_least("num_threads", c.num_threads, 0);
  at_least("step_log_size", c.step_log_size, 0);
  for (const auto& [name, value] : {std::pair("target_tpot_ms", c.target_tpot_ms),
                                    std::pair("target_ttft_ms", c.target_ttft_ms)}) {
    OPTIMUS_CHECK(std::isfinite(value) && value >= 0, "[engine_config] ", name,
                  " must not be negative, got ", value);
  }
  // Room for a refreshed block and a current one beside the prompts' quarter.
  at_least("max_num_batched_rows", c.max_num_batched_rows, 4 * c.grid());
  OPTIMUS_CHECK(c.page_size % c.grid() == 0 || c.grid() % c.page_size == 0,
                "[engine_config] page_size must be a multiple of block_length ", c.grid(),
                " or divide it, got ", c.page_size);
  OPTIMUS_CHECK(
      !c.async_scheduling || c.decode_mode != DecodeMode::elastic_per_request,
      "[engine_config] async_scheduling does not go with elastic_per_request, which plans "
      "by the results of the last step");
  if (c.decode_mode == DecodeMode::chunk) chunk("chunk_length", c.chunk_length);
  for (int arm : c.chunk_arms) chunk("chunk_arms", arm);
}

Scheduler::Scheduler(const EngineConfig& config)
    : config_(config),
      pool_(config.num_pages),
      prefix_cache_(pool_, config.page_size, config.grid(), config.enable_prefix_cache),
      policy_(policy_config(config)) {
  for (int slot = config.max_num_seqs - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  if (config.shuffle_pages) {
    std::vector<int32_t> pages;
    for (int i = 0; i < config.num_pages; ++i) pages.push_back(pool_.allocate());
    std::shuffle(pages.begin(), pages.end(), std::mt19937(config.num_pages));
    for (int32_t page : pages) pool_.release(page);
  }
}

void Scheduler::add(Request* request) {
  request->block_start = config_.decode_mode == DecodeMode::ar
                             ? request->prompt_len()
                             : round_down(request->prompt_len(), config_.block_length);
  waiting_.push_back(request);
}

void Scheduler::remove(Request* request) {
  auto waiting = std::find(waiting_.begin(), waiting_.end(), request);
  if (waiting != waiting_.end()) waiting_.erase(waiting);
  refused_with_ = -1;
  auto running = std::find(running_.begin(), running_.end(), request);
  if (running != running_.end()) {
    running_.erase(running);
    give_back(request);
  }
}

const StepPlan& Scheduler::plan(double now_s, const LatencyModel& latency,
                                const CommitModel& commits, bool is_ahead) {
  ++step_;
  preempted_ = false;
  plan_.clear();
  plan_.is_ahead = is_ahead;
  bool fits = secure_decode_pages();
  if (fits) {
    admit();
    fits = plan_decode(latency, commits);
  }
  if (!fits) {
    --step_;
    return plan_;
  }
  plan_prefill(now_s, latency);
  if (latency.has_profile() && !plan_.seqs.empty())
    plan_.predicted_ms = latency.predict(plan_.load());
  return plan_;
}

int Scheduler::window_end(const Request& request) const {
  return config_.decode_mode == DecodeMode::ar ? request.block_start
                                               : request.block_start + config_.block_length;
}

// Positions that must have pages before a decode step: everything its rows read or write. A request
// does not go beyond its last block.
int Scheduler::pages_end(const Request& request) const {
  const int end = window_end(request), grid = config_.grid();
  if (!may_slide(request)) return end;
  return std::max(end, std::min(end + grid, divide_up(request.max_len(), grid) * grid));
}

// Oldest first; whoever finds no page takes those of the youngest, itself at the worst. False: not
// while these may be in the step in progress.
bool Scheduler::secure_decode_pages() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Request* request = running_[i];
    while (request->status == RequestStatus::decoding &&
           !grow_pages(request, pages_end(*request))) {
      if (plan_.is_ahead) return false;
      OPTIMUS_INVARIANT(running_.size() > 1, "request ", request->id,
                        " does not fit the kv cache alone");
      preempt_youngest();
    }
  }
  return true;
}

// A request that did not fit is not tried again before there are more pages than then.
void Scheduler::admit() {
  while (!waiting_.empty() && !free_slots_.empty() && !preempted_) {
    const int pages = pool_.num_free() + prefix_cache_.num_evictable();
    if (refused_with_ >= 0 && pages <= refused_with_ && !running_.empty()) return;
    refused_with_ = start(waiting_.front()) ? -1 : pages;
    if (refused_with_ >= 0) return;
    waiting_.pop_front();
  }
}

// Gives a waiting request a slot, the cached prefix of its tokens, and pages up to its first decode
// window. False (and nothing taken) when pages are short.
bool Scheduler::start(Request* request) {
  int target =
      config_.decode_mode == DecodeMode::ar ? request->block_start - 1 : request->block_start;
  std::vector<int32_t> tokens(target);
  for (int i = 0; i < target; ++i) tokens[i] = request->token_at(i);
  PrefixCache::Match match = prefix_cache_.match(tokens.data(), target);
  request->pages = std::move(match.pages);
  // One spare page per running request, so that an admission does not cause the next preemption.
  int spare = static_cast<int>(running_.size());
  int needed = divide_up(window_end(*request), config_.page_size) + spare -
               static_cast<int>(request->pages.size());
  bool fits = pool_.num_free() + prefix_cache_.num_evictable() >= needed &&
              grow_pages(request, window_end(*request));
  if (!fits) {
    for (int32_t page : request->pages) pool_.release(page);
    request->pages.clear();
    return false;
  }
  request->slot = free_slots_.back();
  free_slots_.pop_back();
  request->num_computed = request->num_clean = match.num_tokens;
  request->num_registered_pages = match.num_tokens / config_.page_size;
  request->prefill_target = target;
  request->previous_block_pending = false;
  request->in_flight = {};
  if (request->metrics.nfe == 0) request->metrics.cached_prompt_tokens = match.num_tokens;
  request->status = RequestStatus::prefilling;
  if (match.num_tokens == target) begin_decode(request);
  running_.push_back(request);
  return true;
}

// The prompt (or what is recomputed) is in the pages before the next step.
void Scheduler::begin_decode(Request* request) {
  request->status = RequestStatus::decoding;
  request->window_open = false;
  request->history = {};
  request->block_needs_refresh = request->previous_needs_refresh = false;
  int grid = config_.grid();
  int known_end = request->prompt_len() + (request->replays_block ? 0 : request->num_known);
  int known = std::max(0, std::min(known_end - request->block_start, grid));
  request->num_fresh = config_.decode_mode == DecodeMode::ar ? 1 : known;
  request->num_masked = config_.decode_mode == DecodeMode::ar ? 1 : grid - known;
}

bool Scheduler::grow_pages(Request* request, int num_tokens) {
  int missing = divide_up(num_tokens, config_.page_size) - static_cast<int>(request->pages.size());
  if (missing > pool_.num_free()) prefix_cache_.evict(missing - pool_.num_free());
  if (missing > pool_.num_free()) return false;
  for (int i = 0; i < missing; ++i) request->pages.push_back(pool_.allocate());
  return true;
}

void Scheduler::preempt_youngest() {
  Request* request = running_.back();
  running_.pop_back();
  give_back(request);
  preempted_ = true;
  request->status = RequestStatus::waiting;
  request->metrics.num_preemptions += 1;
  request->replays_block = replays_exactly(config_);
  if (!request->replays_block) {
    // Tokens behind a mask go: their neighbours' KV is gone. What was streamed in order stays.
    std::fill(request->output.begin() + request->num_known, request->output.end(), OutputToken{});
  }
  waiting_.push_front(request);
  refused_with_ = -1;
}

void Scheduler::preempt_all() {
  while (!running_.empty()) preempt_youngest();
}

void Scheduler::give_back(Request* request) {
  for (int32_t page : request->pages) pool_.release(page);
  request->pages.clear();
  request->num_computed = request->num_clean = request->num_registered_pages = 0;
  free_slots_.push_back(request->slot);
  request->slot = -1;
}

int Scheduler::decode_rows(const Request& request, int chunk_length, bool refresh) const {
  int previous = request.previous_block_pending ? request.num_fresh : 0;
  switch (config_.row_mode()) {
    case RowMode::ar:
      return 1;
    case RowMode::block:
      return previous + config_.block_length;
    case RowMode::chunk:
      break;
  }
  int refreshed = refresh && request.previous_block_pending ? config_.block_length - previous : 0;
  return request.num_fresh + refreshed + std::min(chunk_length, request.num_masked);
}

int Scheduler::masks_in_flight(const Request& request) const {
  if (request.in_flight.num_steps == 0) return 0;
  return config_.row_mode() == RowMode::chunk
             ? std::min(request.in_flight.chunk_length, request.num_masked)
             : request.num_masked;
}

bool Scheduler::may_slide(const Request& request) const {
  return request.in_flight.num_steps > 0 && masks_in_flight(request) == request.num_masked;
}

bool Scheduler::may_feed_previous(const Request& request) const {
  return request.in_flight.num_steps > 0 ? may_slide(request) : request.previous_block_pending;
}

// Whatever the step in flight commits becomes a row, its other masks may; and when all of them commit,
// a new block begins.
int Scheduler::most_decode_rows(const Request& request, int chunk_length, bool refresh) const {
  if (request.in_flight.num_steps == 0) return decode_rows(request, chunk_length, refresh);
  const bool slides = may_slide(request);
  switch (config_.row_mode()) {
    case RowMode::ar:
      return 1;
    case RowMode::block:
      return (slides ? 2 : 1) * config_.block_length;
    case RowMode::chunk:
      break;
  }
  const int fresh = masks_in_flight(request);
  if (!slides) return std::min(fresh + chunk_length, request.num_masked);
  return (refresh ? config_.block_length : fresh) + std::min(chunk_length, config_.block_length);
}

void Scheduler::cache_clean_pages(Request* request) {
  int num_full = request->num_clean / config_.page_size;
  if (!config_.enable_prefix_cache || num_full <= request->num_registered_pages) return;
  std::vector<int32_t> tokens(size_t(num_full) * config_.page_size);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = request->token_at(static_cast<int>(i));
  prefix_cache_.insert(tokens.data(), request->pages, request->num_registered_pages, num_full);
  request->num_registered_pages = num_full;
  // Where the same tokens were cached before, their pages take the place of the request's own. Or
  // they would be pinned beside these by the request's later pages, which hang on them: a request
  // could then fill a pool that holds it twice over.
  const PrefixCache::Match cached =
      prefix_cache_.match(tokens.data(), static_cast<int>(tokens.size()));
  for (size_t i = 0; i < cached.pages.size(); ++i) {
    const int32_t own = std::exchange(request->pages[i], cached.pages[i]);
    pool_.release(own);  // the match holds the cached one
  }
}

}  // namespace optimus
