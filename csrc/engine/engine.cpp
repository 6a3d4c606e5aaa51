#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

EngineConfig resolve(EngineConfig config, const Model& model) {
  OPTIMUS_CHECK(model.is_loaded(), "[engine] the model's weights are not loaded");
  OPTIMUS_CHECK(config.decode_mode == DecodeMode::ar || model.config().mask_token_id >= 0,
                "[engine] only decode_mode ar works without a mask_token_id");
  // The published loop always runs the clean block once more; causal KV is clean as it is.
  if (config.row_mode() != RowMode::chunk) config.kv_policy = KvPolicy::refresh;
  validate(config);
  return config;
}

void check_params(const SamplingParams& p) {
  // Below it, logits / temperature overflows fp32 and the order of tokens is lost.
  constexpr float kLowestTemperature = 1e-4f;
  bool is_greedy = p.temperature == 0;
  OPTIMUS_CHECK(is_greedy || (std::isfinite(p.temperature) && p.temperature >= kLowestTemperature),
                "[sampling_params] temperature must be 0 (greedy) or at least ", kLowestTemperature,
                ", got ", p.temperature);
  OPTIMUS_CHECK(p.top_k >= 0, "[sampling_params] top_k must be >= 0, got ", p.top_k);
  OPTIMUS_CHECK(p.top_p > 0 && p.top_p <= 1, "[sampling_params] top_p must be in (0, 1], got ",
                p.top_p);
  OPTIMUS_CHECK(p.confidence_threshold >= 0 && p.confidence_threshold <= 1,
                "[sampling_params] confidence_threshold must be in [0, 1], got ",
                p.confidence_threshold);
  OPTIMUS_CHECK(p.entropy_bound >= 0, "[sampling_params] entropy_bound must be >= 0, got ",
                p.entropy_bound);
  OPTIMUS_CHECK(p.denoising_steps >= 0, "[sampling_params] denoising_steps must be >= 0, got ",
                p.denoising_steps);
  OPTIMUS_CHECK(p.max_tokens == -1 || p.max_tokens >= 1,
                "[sampling_params] max_tokens must be at least 1, got ", p.max_tokens);
}

bool contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

Engine::Engine(std::shared_ptr<const Model> model, const EngineConfig& config)
    : model_(std::move(model)),
      config_(resolve(config, *model_)),
      scheduler_(config_),
      runner_(*model_, config_, scheduler_.pages_for(config_.max_model_len)),
      commits_(config_.block_length) {}

void Engine::check_prompt(const std::vector<int32_t>& prompt) const {
  OPTIMUS_CHECK(!prompt.empty(), "[add_request] the prompt is empty");
  int prompt_len = static_cast<int>(prompt.size());
  OPTIMUS_CHECK(prompt_len < config_.max_model_len, "[add_request] a prompt of ", prompt_len,
                " tokens leaves no room in max_model_len ", config_.max_model_len);
  for (int32_t id : prompt) {
    OPTIMUS_CHECK(id >= 0 && id < model_->config().vocab_size,
                  "[add_request] token ids must be in [0, ", model_->config().vocab_size, "), got ",
                  id);
  }
}

uint64_t Engine::add_request(std::vector<int32_t> prompt, SamplingParams params) {
  check_prompt(prompt);
  check_params(params);
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
  request->metrics.arrival_s = now_s();
  scheduler_.add(request.get());
  uint64_t id = request->id;
  requests_[id] = std::move(request);
  ++num_unfinished_;
  return id;
}

StepOutput Engine::step() {
  StepOutput output;
  double start = now_s();
  StepPlan plan = scheduler_.plan(latency_, commits_);
  if (plan.seqs.empty()) return output;

  double forward_start = now_s();
  StepResult result = runner_.run(plan);
  double forward_ms = (now_s() - forward_start) * 1e3;

  update(plan, result, output);
  if (latency_.has_profile()) latency_.observe(result.num_rows, forward_ms);
  output.record = {++step_,
                   result.num_rows,
                   plan.prefill_rows,
                   result.num_logit_rows,
                   static_cast<int>(plan.seqs.size()),
                   plan.chunk_length,
                   plan.refresh_rows,
                   output.record.commits,
                   plan.predicted_ms,
                   forward_ms,
                   (now_s() - start) * 1e3,
                   plan.reason};
  return output;
}

void Engine::update(const StepPlan& plan, const StepResult& result, StepOutput& output) {
  int logit_row = 0;
  for (const SeqPlan& seq : plan.seqs) {
    if (seq.prefill_len > 0) {
      update_prefill(seq);
      continue;
    }
    RequestUpdate update;
    logit_row += update_decode(seq, result, logit_row, update);
    output.record.commits += static_cast<int>(update.commits.size());
    output.updates.push_back(std::move(update));
  }
}

void Engine::update_prefill(const SeqPlan& seq) {
  Request& request = *seq.request;
  request.num_computed += seq.prefill_len;
  request.num_clean = request.num_computed;
  request.metrics.prefill_rows += seq.prefill_len;
  scheduler_.cache_clean_pages(&request);
  if (request.num_computed == request.prefill_target) scheduler_.begin_decode(&request);
}

int Engine::update_decode(const SeqPlan& seq, const StepResult& result, int first,
                          RequestUpdate& update) {
  Request& request = *seq.request;
  const int slot = request.slot, grid = config_.grid();
  int last = first;
  while (last < result.num_logit_rows && result.logit_slots[last] == slot) ++last;
  request.metrics.nfe += 1;
  request.metrics.chunk_histogram[last - first] += 1;
  request.metrics.decode_rows += scheduler_.decode_rows(request, seq.chunk_length, seq.refresh);

  // The step fed the previous block (ar: the last token) in a clean context: its KV is clean.
  bool fed_clean = config_.decode_mode == DecodeMode::ar || seq.refresh;
  if (fed_clean && request.num_clean == request.block_start - grid) {
    request.num_clean = request.block_start;
    scheduler_.cache_clean_pages(&request);
  }
  request.previous_block_pending = result.block_start[slot] != request.block_start;
  for (int i = first; i < last; ++i) {
    commits_.observe(i - first, result.candidates.committed[i]);
    if (!result.candidates.committed[i]) continue;
    OutputToken token{result.candidates.token_ids[i], result.candidates.logprob[i],
                      result.candidates.confidence[i], request.metrics.nfe};
    int output_idx = request.block_start + result.logit_offsets[i] - request.prompt_len();
    record_commit(request, output_idx, token, update);
  }
  if (request.previous_block_pending) request.replays_block = false;
  request.block_start = request.num_computed = result.block_start[slot];
  request.num_fresh = result.num_fresh[slot];
  request.num_masked = result.num_masked[slot];

  FinishReason reason = check_finished(request);
  update.id = request.id;
  update.num_known = request.num_known;
  update.finish_reason = reason;
  if (reason != FinishReason::none) {
    auto beyond_end = [&](const Commit& c) { return c.output_idx >= request.num_known; };
    update.commits.erase(std::remove_if(update.commits.begin(), update.commits.end(), beyond_end),
                         update.commits.end());
    finish(request, reason);
  }
  return last - first;
}

void Engine::record_commit(Request& request, int output_idx, OutputToken token,
                           RequestUpdate& update) {
  if (output_idx >= request.params.max_tokens) return;  // the block's last positions
  if (output_idx >= static_cast<int>(request.output.size())) {
    request.output.resize(output_idx + 1);
  }
  OutputToken& known = request.output[output_idx];
  if (known.step != 0) return;  // decoded again after a preemption: the same token
  known = token;
  update.commits.push_back({output_idx, token});
  if (request.metrics.first_token_s == 0) request.metrics.first_token_s = now_s();
}

FinishReason Engine::check_finished(Request& request) {
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

void Engine::finish(Request& request, FinishReason reason) {
  scheduler_.remove(&request);
  request.output.resize(std::min<size_t>(request.output.size(), request.num_known));
  request.status = RequestStatus::finished;
  request.finish_reason = reason;
  request.metrics.finish_s = now_s();
  --num_unfinished_;
}

Request& Engine::find(uint64_t id, const char* what) {
  auto it = requests_.find(id);
  OPTIMUS_CHECK(it != requests_.end(), "[", what, "] unknown request ", id);
  return *it->second;
}

const Request& Engine::request(uint64_t id) const {
  return const_cast<Engine*>(this)->find(id, "request");
}

void Engine::stop_request(uint64_t id, int num_tokens) {
  Request& request = find(id, "stop_request");
  OPTIMUS_CHECK(num_tokens >= 0 && num_tokens <= request.num_known,
                "[stop_request] num_tokens must be in [0, ", request.num_known, "], got ",
                num_tokens);
  request.num_known = num_tokens;
  if (request.status != RequestStatus::finished) {
    finish(request, FinishReason::stop);
  } else {
    request.output.resize(num_tokens);
    request.finish_reason = FinishReason::stop;
  }
}

void Engine::abort(uint64_t id) {
  Request& request = find(id, "abort");
  if (request.status != RequestStatus::finished) finish(request, FinishReason::abort);
}

void Engine::release(uint64_t id) {
  Request& request = find(id, "release");
  OPTIMUS_CHECK(request.status == RequestStatus::finished, "[release] request ", id,
                " is not finished");
  requests_.erase(id);
}

void Engine::check_idle(const char* what) const {
  OPTIMUS_CHECK(num_unfinished_ == 0, "[", what, "] ", num_unfinished_, " requests are unfinished");
}

std::vector<LatencyModel::Point> Engine::profile(int repeats) {
  check_idle("profile");
  OPTIMUS_CHECK(repeats >= 1, "[profile] repeats must be at least 1, got ", repeats);
  // Pages of nobody's: a place of its own for every row if there is room, read up to about one
  // typical context.
  constexpr int kTypicalContext = 256;
  PagePool& pool = scheduler_.pool();
  int rows_pages = (config_.max_num_batched_rows + config_.page_size - 1) / config_.page_size;
  int wanted =
      std::min({rows_pages, config_.num_pages, scheduler_.pages_for(config_.max_model_len)});
  int context = std::min(kTypicalContext, wanted * config_.page_size);
  if (pool.num_free() < wanted) scheduler_.prefix_cache().evict(wanted - pool.num_free());
  std::vector<int32_t> pages;
  for (int i = 0; i < wanted; ++i) pages.push_back(pool.allocate());

  std::vector<LatencyModel::Point> points;
  auto measure = [&](int rows) {
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
      times.push_back(runner_.time_forward(rows, std::min(rows, config_.grid()), context, pages));
    }
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    points.push_back({rows, times[repeats / 2]});
  };
  runner_.time_forward(1, 1, context, pages);  // warm-up
  for (int rows = 1; rows < config_.max_num_batched_rows; rows *= 2) {
    measure(rows);
    int between = rows + rows / 2;
    if (rows >= 8 && between < config_.max_num_batched_rows) measure(between);
  }
  measure(config_.max_num_batched_rows);
  for (int32_t page : pages) pool.release(page);
  set_profile(points);
  return points;
}

void Engine::set_profile(std::vector<LatencyModel::Point> points) {
  latency_.set_profile(std::move(points));
}

std::vector<float> Engine::forward(const std::vector<int32_t>& token_ids,
                                   const std::vector<int32_t>& positions,
                                   const std::vector<int32_t>& kv_limits,
                                   const std::vector<int32_t>& page_ids) {
  check_idle("forward");
  scheduler_.prefix_cache().clear();  // the caller may overwrite any page
  return runner_.forward(token_ids, positions, kv_limits, page_ids);
}

}  // namespace optimus
