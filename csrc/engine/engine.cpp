#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/check.h"

namespace optimus {
namespace {

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double ms_between(double begin_s, double end_s) { return (end_s - begin_s) * 1e3; }

EngineConfig resolve(EngineConfig config, const Model& model) {
  OPTIMUS_CHECK(model.is_loaded(), "[engine] the model's weights are not loaded");
  OPTIMUS_CHECK(config.decode_mode == DecodeMode::ar || model.config().mask_token_id >= 0,
                "[engine] only decode_mode ar works without a mask_token_id");
  // The published loop always runs the clean block once more; causal KV is clean as it is.
  if (config.row_mode() != RowMode::chunk) config.kv_policy = KvPolicy::refresh;
  EngineConfig checked = config;
  if (model.device() == Device::cuda) checked.num_pages = std::max(1, config.num_pages);
  validate(checked);
  return config;
}

// Points between those beyond `rows`: there a step costs what it has, not what the next point costs.
void interpolate_from(std::vector<LatencyProfile::Point>& points, int rows) {
  constexpr int kStride = 64;
  std::vector<LatencyProfile::Point> dense;
  for (const LatencyProfile::Point& point : points) {
    if (point.rows > rows && !dense.empty()) {
      const LatencyProfile::Point last = dense.back();
      for (int between = last.rows + kStride; between < point.rows; between += kStride) {
        const double share = double(between - last.rows) / (point.rows - last.rows);
        dense.push_back({between, last.ms + share * (point.ms - last.ms)});
      }
    }
    dense.push_back(point);
  }
  points = std::move(dense);
}

}  // namespace

Engine::Engine(std::shared_ptr<const Model> model, const EngineConfig& config)
    : model_(std::move(model)),
      runner_(*model_, resolve(config, *model_)),
      core_(runner_.config(), model_->config().vocab_size) {}

uint64_t Engine::add_request(std::vector<int32_t> prompt, SamplingParams params) {
  return core_.add_request(std::move(prompt), std::move(params), now_s());
}

// A step that failed takes the others in flight with it. Nobody's tokens are lost: what ran is computed
// again, if that is possible.
template <class Work>
auto Engine::guarded(const Work& work) {
  try {
    return work();
  } catch (...) {
    runner_.forget_steps();
    core_.forget_plans();
    num_started_ = 0;
    throw;
  }
}

bool Engine::start_step() {
  const double begin = now_s();
  const StepPlan& plan = core_.plan(begin);
  if (plan.seqs.empty()) return false;
  const double planned = now_s();
  guarded([&] { runner_.start(plan); });
  host_[num_started_++] = {ms_between(begin, planned), ms_between(planned, now_s())};
  return true;
}

void Engine::finish_step() {
  const double begin = now_s();
  const StepResult result = guarded([&] { return runner_.finish(); });
  const double done = now_s();
  core_.apply(result, runner_.forward_ms(), done);
  host_[0].wait_ms = ms_between(begin, done);
  host_[0].apply_ms = ms_between(done, now_s());
  host_[0].idle_ms = runner_.idle_ms();
  host_[0].rows_ms = runner_.rows_ms();
  core_.note_host(host_[0]);
  host_[0] = host_[1];
  --num_started_;
}

StepOutput Engine::step() {
  if (num_started_ == 0 && !start_step()) return {};
  if (config().async_scheduling) start_step();
  finish_step();
  drop_void_step();
  const bool keeps_busy = runner_.device() == Device::cuda;
  if (keeps_busy && num_started_ == 0 && core_.has_unfinished()) start_step();
  return core_.report();
}

// The step in progress, if nobody is left whom it is for.
void Engine::drop_void_step() {
  if (num_started_ == 0 || !core_.is_void()) return;
  guarded([&] { runner_.finish(); });
  core_.drop_plan();
  host_[0] = host_[1];
  --num_started_;
}

void Engine::stop_request(uint64_t id, int num_tokens) {
  core_.stop_request(id, num_tokens, now_s());
  drop_void_step();
}

void Engine::abort(uint64_t id) {
  core_.abort(id, now_s());
  drop_void_step();
}

void Engine::release(uint64_t id) { core_.release(id); }

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

double Engine::median_ms(int rows, const std::vector<int>& contexts, bool with_logits, int repeats,
                         const std::vector<int32_t>& pages) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    times.push_back(runner_.time_forward(rows, contexts, with_logits, pages));
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

double Engine::time_forward(int rows, const std::vector<int>& contexts, int repeats) {
  core_.check_idle("time_forward");
  const EngineConfig& c = config();
  const int num_seqs = static_cast<int>(contexts.size());
  OPTIMUS_CHECK(rows >= 1 && rows <= c.max_num_batched_rows && num_seqs >= 1 &&
                    num_seqs <= std::min(rows, c.max_num_seqs) && repeats >= 1,
                "[time_forward] rows must be in 1..", c.max_num_batched_rows,
                ", contexts 1 to min(rows, ", c.max_num_seqs, "), repeats positive, got ", rows,
                " rows, ", num_seqs, " contexts, ", repeats, " repeats");
  int64_t needed = 0;
  for (int context : contexts) {
    OPTIMUS_CHECK(context >= 1 && context <= c.max_model_len,
                  "[time_forward] contexts must be in 1..", c.max_model_len, ", got ", context);
    needed += c.pages_for(context);
  }
  OPTIMUS_CHECK(needed <= c.num_pages, "[time_forward] the kv cache has ", c.num_pages,
                " pages, the contexts need ", needed);
  ProfilePages pages(core_.scheduler(),
                     std::min(c.num_pages, std::max(static_cast<int>(needed), c.pages_for(rows))));
  return median_ms(rows, contexts, /*with_logits=*/true, repeats, pages.ids);
}

double Engine::time_gemms(int rows, int repeats) {
  core_.check_idle("time_gemms");
  OPTIMUS_CHECK(rows >= 1 && rows <= config().max_num_batched_rows && repeats >= 1,
                "[time_gemms] rows must be in 1..", config().max_num_batched_rows,
                ", repeats positive, got ", rows, " and ", repeats);
  return runner_.time_gemms(rows, repeats);
}

LatencyProfile Engine::profile(int repeats) {
  core_.check_idle("profile");
  OPTIMUS_CHECK(repeats >= 1, "[profile] repeats must be at least 1, got ", repeats);
  const EngineConfig& c = config();
  const int of_seq = std::min(c.num_pages, c.pages_for(c.max_model_len));
  const int capacity = of_seq * c.page_size;
  const int num_pages =
      static_cast<int>(std::min<int64_t>(c.num_pages, int64_t(of_seq) * c.max_num_seqs));
  ProfilePages pages(core_.scheduler(), num_pages);

  const auto median = [&](int rows, int num_seqs, int context, bool with_logits) {
    return median_ms(rows, std::vector<int>(num_seqs, context), with_logits, repeats, pages.ids);
  };
  const auto seqs_of = [&](int rows) {
    return std::clamp(rows / std::max(1, c.grid() / 4), 1, c.max_num_seqs);
  };
  const int short_context = std::min(c.grid(), capacity);
  median(std::min(8, c.max_num_batched_rows), 1, short_context, true);  // warm-up

  LatencyProfile profile;
  profile.is_padded = runner_.device() == Device::cuda;
  for (int rows : profile_rows()) {
    profile.decode.push_back({rows, median(rows, seqs_of(rows), short_context, true)});
    profile.prefill.push_back({rows, median(rows, 1, short_context, false)});
  }
  if (profile.is_padded) {
    for (auto* points : {&profile.decode, &profile.prefill}) {
      interpolate_from(*points, runner_.padded_rows().back());
    }
  }
  // What reading keys adds: as many sequences as there can be, longer and longer.
  const int rows = std::min(c.max_num_batched_rows, 4 * c.max_num_seqs);
  const int num_seqs = std::min(rows, c.max_num_seqs);
  const double base_ms = median(rows, num_seqs, short_context, true);
  double least = 0;
  for (int context = 4 * short_context; context <= capacity; context *= 4) {
    // Sequences that share pages would read them from a cache.
    const bool fits = int64_t(context + c.page_size - 1) / c.page_size * num_seqs <= num_pages;
    if (!fits && !profile.kv.empty()) break;
    const double extra = median(rows, num_seqs, context, true) - base_ms;
    least = std::max(least, extra);  // more keys never take less time; what says so is noise
    profile.kv.push_back({int64_t(context) * num_seqs, least});
  }
  set_profile(profile);
  return profile;
}

// What steps are padded to; beyond that and on the CPU, powers of two and the middles between them.
std::vector<int> Engine::profile_rows() const {
  const int most = config().max_num_batched_rows;
  std::vector<int> sizes = runner_.padded_rows();
  if (!sizes.empty() && sizes.back() == most) return sizes;
  for (int rows = sizes.empty() ? 1 : 2 * sizes.back(); rows < most; rows *= 2) {
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
