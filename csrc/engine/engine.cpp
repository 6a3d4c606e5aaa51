#include "engine/engine.h"

#include <algorithm>
#include <chrono>

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

}  // namespace

Engine::Engine(std::shared_ptr<const Model> model, const EngineConfig& config)
    : model_(std::move(model)),
      core_(resolve(config, *model_), model_->config().vocab_size),
      runner_(*model_, core_.config(), core_.scheduler().pages_for(core_.config().max_model_len)) {}

uint64_t Engine::add_request(std::vector<int32_t> prompt, SamplingParams params) {
  return core_.add_request(std::move(prompt), std::move(params), now_s());
}

StepOutput Engine::step() {
  const StepPlan& plan = core_.plan(now_s());
  if (plan.seqs.empty()) return {};
  const double start_s = now_s();
  const StepResult result = runner_.run(plan);
  const double end_s = now_s();
  return core_.update(result, (end_s - start_s) * 1e3, end_s);
}

void Engine::stop_request(uint64_t id, int num_tokens) {
  core_.stop_request(id, num_tokens, now_s());
}

void Engine::abort(uint64_t id) { core_.abort(id, now_s()); }

// Pages of nobody's, to write rows to and read contexts from.
class Engine::ProfilePages {
 public:
  ProfilePages(Scheduler& scheduler, int count) : pool_(scheduler.pool()) {
    if (pool_.num_free() < count) scheduler.prefix_cache().evict(count - pool_.num_free());
    for (int i = 0; i < count; ++i) ids.push_back(pool_.allocate());
  }
  ~ProfilePages() {
    for (int32_t page : ids) pool_.release(page);
  }
  std::vector<int32_t> ids;

 private:
  PagePool& pool_;
};

LatencyProfile Engine::profile(int repeats) {
  core_.check_idle("profile");
  OPTIMUS_CHECK(repeats >= 1, "[profile] repeats must be at least 1, got ", repeats);
  const EngineConfig& c = config();
  const int most = std::min(c.num_pages, core_.scheduler().pages_for(c.max_model_len));
  ProfilePages pages(core_.scheduler(), most);
  const int capacity = most * c.page_size;

  const auto median = [&](int rows, int num_seqs, int context, bool with_logits) {
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
      times.push_back(runner_.time_forward(rows, num_seqs, context, with_logits, pages.ids));
    }
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[repeats / 2];
  };
  const auto seqs_of = [&](int rows) {
    return std::clamp(rows / std::max(1, c.grid() / 4), 1, c.max_num_seqs);
  };
  const int short_context = std::min(c.grid(), capacity);
  median(std::min(8, c.max_num_batched_rows), 1, short_context, true);  // warm-up

  LatencyProfile profile;
  for (int rows : profile_rows()) {
    profile.decode.push_back({rows, median(rows, seqs_of(rows), short_context, true)});
    profile.prefill.push_back({rows, median(rows, 1, short_context, false)});
  }
  // What reading keys adds: as many sequences as there can be, longer and longer.
  const int rows = std::min(c.max_num_batched_rows, 4 * c.max_num_seqs);
  const int num_seqs = std::min(rows, c.max_num_seqs);
  const double base_ms = median(rows, num_seqs, short_context, true);
  double least = 0;
  for (int context = 4 * short_context; context <= capacity; context *= 4) {
    const double extra = median(rows, num_seqs, context, true) - base_ms;
    least = std::max(least, extra);  // more keys never take less time; what says so is noise
    profile.kv.push_back({int64_t(context) * num_seqs, least});
  }
  set_profile(profile);
  return profile;
}

// Powers of two and the middles between them.
std::vector<int> Engine::profile_rows() const {
  const int most = config().max_num_batched_rows;
  std::vector<int> sizes;
  for (int rows = 1; rows < most; rows *= 2) {
    sizes.push_back(rows);
    const int between = rows + rows / 2;
    if (rows >= 4 && between < most) sizes.push_back(between);
  }
  sizes.push_back(most);
  return sizes;
}

void Engine::set_profile(LatencyProfile profile) {
  core_.latency().set_profile(std::move(profile));
}

std::vector<float> Engine::forward(const std::vector<int32_t>& token_ids,
                                   const std::vector<int32_t>& positions,
                                   const std::vector<int32_t>& kv_limits,
                                   const std::vector<int32_t>& page_ids) {
  core_.check_idle("forward");
  core_.scheduler().prefix_cache().clear();  // the caller may overwrite any page
  return runner_.forward(token_ids, positions, kv_limits, page_ids);
}

}  // namespace optimus
