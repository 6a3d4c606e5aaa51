#include "engine/scheduler.h"

#include <algorithm>
#include <random>

#include "core/check.h"

namespace optimus {
namespace {

int round_down(int value, int multiple) { return value / multiple * multiple; }
int divide_up(int value, int by) { return (value + by - 1) / by; }

ChunkPolicy make_policy(const EngineConfig& config) {
  switch (config.decode_mode) {
    case DecodeMode::ar:
      return ChunkPolicy::fixed(1);
    case DecodeMode::block:
      return ChunkPolicy::fixed(config.block_length);
    case DecodeMode::chunk:
      return ChunkPolicy::fixed(config.chunk_length);
    case DecodeMode::elastic:
      break;
  }
  std::vector<int> arms = config.chunk_arms;
  if (arms.empty()) {
    for (int c = 2; c < config.block_length; c *= 2) arms.push_back(c);
    arms.push_back(config.block_length);
  }
  return ChunkPolicy::elastic(arms, config.block_length);
}

// Decoding the current block again from a clean context commits the same tokens: nothing in it
// depends on load, and refreshed context does not depend on how it came about.
bool replays_exactly(const EngineConfig& config) {
  return config.decode_mode != DecodeMode::elastic && config.kv_policy == KvPolicy::refresh;
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
  // Room for a refreshed block and a current one beside the prompts' quarter.
  at_least("max_num_batched_rows", c.max_num_batched_rows, 4 * c.grid());
  OPTIMUS_CHECK(c.page_size % c.grid() == 0 || c.grid() % c.page_size == 0,
                "[engine_config] page_size must be a multiple of block_length ", c.grid(),
                " or divide it, got ", c.page_size);
  if (c.decode_mode == DecodeMode::chunk) chunk("chunk_length", c.chunk_length);
  for (int arm : c.chunk_arms) chunk("chunk_arms", arm);
}

Scheduler::Scheduler(const EngineConfig& config)
    : config_(config),
      pool_(config.num_pages),
      prefix_cache_(pool_, config.page_size, config.grid(), config.enable_prefix_cache),
      policy_(make_policy(config)) {
  for (int slot = config.max_num_seqs - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  if (config.shuffle_pages) {
    std::vector<int32_t> pages;
    for (int i = 0; i < config.num_pages; ++i) pages.push_back(pool_.allocate());
    std::shuffle(pages.begin(), pages.end(), std::mt19937(config.num_pages));
    for (int32_t page : pages) pool_.release(page);
  }
}

int Scheduler::pages_for(int num_tokens) const {
  int grid = config_.grid();
  return divide_up(divide_up(num_tokens, grid) * grid, config_.page_size);
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
  auto running = std::find(running_.begin(), running_.end(), request);
  if (running != running_.end()) {
    running_.erase(running);
    give_back(request);
  }
}

StepPlan Scheduler::plan(const LatencyModel& latency, const CommitModel& commits) {
  ++step_;
  preempted_ = false;
  StepPlan plan;
  secure_decode_pages();
  admit();
  plan_decode(plan, latency, commits);
  plan_prefill(plan);
  return plan;
}

// Positions that must have pages before a decode step: everything its rows read or write.
int Scheduler::window_end(const Request& request) const {
  return config_.decode_mode == DecodeMode::ar ? request.block_start
                                               : request.block_start + config_.block_length;
}

// Oldest first; whoever finds no page takes those of the youngest, itself at the worst.
void Scheduler::secure_decode_pages() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Request* request = running_[i];
    while (request->status == RequestStatus::decoding &&
           !grow_pages(request, window_end(*request))) {
      OPTIMUS_INVARIANT(running_.size() > 1, "request ", request->id,
                        " does not fit the kv cache alone");
      preempt_youngest();
    }
  }
}

void Scheduler::admit() {
  while (!waiting_.empty() && !free_slots_.empty() && !preempted_) {
    if (!start(waiting_.front())) return;
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
  if (request->metrics.nfe == 0) request->metrics.cached_prompt_tokens = match.num_tokens;
  request->status = RequestStatus::prefilling;
  if (match.num_tokens == target) begin_decode(request);
  running_.push_back(request);
  return true;
}

void Scheduler::begin_decode(Request* request) {
  request->status = RequestStatus::decoding;
  request->window_open = false;
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
  int refreshed = refresh ? config_.block_length - previous : 0;
  return request.num_fresh + refreshed + std::min(chunk_length, request.num_masked);
}

bool Scheduler::wants_refresh(const Request& request, const LatencyModel& latency,
                              int batch_rows) const {
  if (!request.previous_block_pending || config_.row_mode() == RowMode::ar) return false;
  if (config_.kv_policy != KvPolicy::auto_) return config_.kv_policy == KvPolicy::refresh;
  return refresh_is_free(latency, batch_rows, config_.block_length - request.num_fresh);
}

void Scheduler::plan_decode(StepPlan& plan, const LatencyModel& latency,
                            const CommitModel& commits) {
  std::vector<Request*> decoding;
  bool prompts_wait = false;
  for (Request* request : running_) {
    if (request->status == RequestStatus::decoding) decoding.push_back(request);
    prompts_wait |= request->status == RequestStatus::prefilling;
  }
  if (decoding.empty()) return;
  std::stable_sort(decoding.begin(), decoding.end(), [](const Request* a, const Request* b) {
    return a->last_scheduled_step < b->last_scheduled_step;
  });

  std::vector<RequestLoad> loads;
  for (const Request* request : decoding)
    loads.push_back({request->num_masked, request->num_fresh});
  ChunkDecision decision = policy_.choose(loads, 0, latency, commits);
  plan.chunk_length = decision.chunk_length;
  plan.predicted_ms = decision.predicted_ms;
  plan.reason = decision.reason;

  int budget = config_.max_num_batched_rows;
  if (prompts_wait) budget -= budget / 4;
  int batch_rows = 0;
  for (const Request* request : decoding) {
    batch_rows += decode_rows(*request, plan.chunk_length, false);
  }
  for (Request* request : decoding) {
    bool refresh = wants_refresh(*request, latency, batch_rows);
    int rows = decode_rows(*request, plan.chunk_length, refresh);
    if (plan.num_rows + rows > budget) continue;
    int extra = refresh ? config_.block_length - request->num_fresh : 0;
    batch_rows += extra;
    plan.num_rows += rows;
    plan.refresh_rows += extra;
    plan.seqs.push_back({request, 0, plan.chunk_length, refresh});
    request->last_scheduled_step = step_;
  }
}

void Scheduler::plan_prefill(StepPlan& plan) {
  for (Request* request : running_) {
    if (request->status != RequestStatus::prefilling) continue;
    int room = round_down(config_.max_num_batched_rows - plan.num_rows, config_.grid());
    int length = std::min(room, request->prefill_target - request->num_computed);
    if (length <= 0) return;
    plan.seqs.push_back({request, length, 0, false});
    plan.num_rows += length;
    plan.prefill_rows += length;
    request->last_scheduled_step = step_;
  }
}

void Scheduler::cache_clean_pages(Request* request) {
  int num_full = request->num_clean / config_.page_size;
  if (!config_.enable_prefix_cache || num_full <= request->num_registered_pages) return;
  std::vector<int32_t> tokens(size_t(num_full) * config_.page_size);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = request->token_at(static_cast<int>(i));
  prefix_cache_.insert(tokens.data(), request->pages, request->num_registered_pages, num_full);
  request->num_registered_pages = num_full;
}

}  // namespace optimus
