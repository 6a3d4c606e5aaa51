// Host time of a step outside of the model: apply() of the step that ended, plan() of the next one,
// and writing it down for the device, for 1 to 256 requests in each decode mode.
//
// On a GPU that much time passes between the end of a step and the launch of the next one; report()
// follows while the device works. Requests are replaced as they finish, so admissions and prompts are
// part of it. Medians over the steps, in microseconds: of the three parts, of their sum, and of
// report(). Confidences are drawn, bimodal as measured.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <vector>

#include "engine/engine_core.h"
#include "kernels/cpu/kernels.h"

namespace optimus {
namespace {

constexpr int kPromptLen = 100, kMaxTokens = 256, kVocabSize = 1 << 20;
constexpr double kStepMs = 10;

// Flat to 150 rows, then 23 us a row.
LatencyProfile latency() {
  LatencyProfile profile;
  for (int rows = 1; rows <= 8; rows *= 2) profile.decode.push_back({rows, 4.1});
  for (int rows = 16; rows <= 10240; rows += std::max(16, rows / 4)) {
    profile.decode.push_back({rows, 4.2 + 0.023 * std::max(0, rows - 150)});
  }
  profile.is_padded = true;
  return profile;
}

EngineConfig engine_config(DecodeMode mode, int num_requests) {
  EngineConfig config;
  config.decode_mode = mode;
  config.kv_policy = config.row_mode() == RowMode::chunk ? KvPolicy::freeze : KvPolicy::refresh;
  config.max_num_seqs = num_requests;
  config.max_num_batched_rows = std::max(512, num_requests * config.block_length * 5 / 4);
  config.max_model_len = 512;
  config.num_pages = (num_requests + 1) * config.max_model_len / config.page_size;
  config.enable_prefix_cache = false;
  return config;
}

// An engine whose model is a die.
class Loop {
 public:
  struct Times {
    double apply_us, plan_us, write_us, report_us;
  };

  Loop(DecodeMode mode, int num_requests)
      : core_(engine_config(mode, num_requests), kVocabSize),
        buffers_(core_.config(), core_.config().pages_for(core_.config().max_model_len)),
        threads_(1) {
    core_.latency().set_profile(latency());
    for (int i = 0; i < num_requests; ++i) add_request(1 + below(kMaxTokens));
    plan_ = &core_.plan(now_s_);
    buffers_.write_plan(*plan_);
  }

  Times step() {
    run();
    const StepResult result = buffers_.result(buffers_.num_rows(), buffers_.num_logit_rows());
    now_s_ += 1e-3 * kStepMs;
    const double begin = now_us();
    core_.apply(result, kStepMs, now_s_);
    const double applied = now_us();
    const StepOutput output = core_.report();
    const double reported = now_us();
    for (const RequestUpdate& update : output.updates) {
      if (update.finish_reason == FinishReason::none) continue;
      core_.release(update.id);
      add_request(kMaxTokens);
    }
    const double added = now_us();
    plan_ = &core_.plan(now_s_);
    const double planned = now_us();
    buffers_.write_plan(*plan_);
    const double written = now_us();
    return {applied - begin, planned - added, written - planned, reported - applied};
  }

 private:
  static double now_us() {
    return std::chrono::duration<double, std::micro>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  int below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }

  void add_request(int max_tokens) {
    SamplingParams params;
    params.max_tokens = max_tokens;
    std::vector<int32_t> prompt(kPromptLen);
    for (int32_t& id : prompt) id = below(kVocabSize);
    core_.add_request(std::move(prompt), std::move(params), now_s_);
  }

  void run() {
    cpu::open_windows(buffers_.open_windows_params(), threads_);
    cpu::build_rows(buffers_.build_rows_params(0), threads_);
    const Candidates& out = buffers_.candidates();
    for (int row = 0; row < buffers_.num_logit_rows(); ++row) {
      const float draw = static_cast<float>(below(1000)) * 1e-3f;
      out.token_ids[row] = 1;
      out.confidence[row] = below(2) == 0 ? 0.99f + 0.01f * draw : 0.85f * draw;
      out.logprob[row] = std::log(std::max(out.confidence[row], 1e-9f));
      out.entropy[row] = -out.logprob[row];
    }
    cpu::commit_candidates(
        buffers_.unmask_params(nullptr, ModelConfig{}, buffers_.num_logit_rows()));
  }

  std::mt19937 random_{1};
  EngineCore core_;
  DecodeBuffers buffers_;
  ThreadPool threads_;
  const StepPlan* plan_ = nullptr;
  double now_s_ = 0;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

void between_steps(benchmark::State& state, DecodeMode mode, bool is_cold) {
  constexpr size_t kCacheBytes = 64 << 20, kLine = 64;
  std::vector<char> others(is_cold ? kCacheBytes : 0);
  Loop loop(mode, static_cast<int>(state.range(0)));
  for (int i = 0; i < 100; ++i) loop.step();
  std::vector<double> apply, plan, write, sum, report;
  for (auto _ : state) {
    for (size_t i = 0; i < others.size(); i += kLine) benchmark::DoNotOptimize(++others[i]);
    const Loop::Times times = loop.step();
    apply.push_back(times.apply_us);
    plan.push_back(times.plan_us);
    write.push_back(times.write_us);
    report.push_back(times.report_us);
    sum.push_back(times.apply_us + times.plan_us + times.write_us);
    state.SetIterationTime(1e-6 * sum.back());
  }
  state.counters["apply"] = median(apply);
  state.counters["plan"] = median(plan);
  state.counters["write"] = median(write);
  state.counters["sum"] = median(sum);
  state.counters["report"] = median(report);
}

void warm(benchmark::internal::Benchmark* bench) {
  for (int count : {1, 16, 128, 256}) bench->Arg(count);
  bench->Unit(benchmark::kMicrosecond)->UseManualTime()->Iterations(1000);
}
void cold(benchmark::internal::Benchmark* bench) {
  for (int count : {1, 128}) bench->Arg(count);
  bench->Unit(benchmark::kMicrosecond)->UseManualTime()->Iterations(200);
}

BENCHMARK_CAPTURE(between_steps, ar, DecodeMode::ar, false)->Apply(warm);
BENCHMARK_CAPTURE(between_steps, chunk_4, DecodeMode::chunk, false)->Apply(warm);
BENCHMARK_CAPTURE(between_steps, block, DecodeMode::block, false)->Apply(warm);
BENCHMARK_CAPTURE(between_steps, elastic, DecodeMode::elastic, false)->Apply(warm);
BENCHMARK_CAPTURE(between_steps, elastic_per_request, DecodeMode::elastic_per_request, false)
    ->Apply(warm);
BENCHMARK_CAPTURE(between_steps, ar_cold, DecodeMode::ar, true)->Apply(cold);
BENCHMARK_CAPTURE(between_steps, chunk_4_cold, DecodeMode::chunk, true)->Apply(cold);
BENCHMARK_CAPTURE(between_steps, elastic_cold, DecodeMode::elastic, true)->Apply(cold);
BENCHMARK_CAPTURE(between_steps, elastic_per_request_cold, DecodeMode::elastic_per_request, true)
    ->Apply(cold);

}  // namespace
}  // namespace optimus
