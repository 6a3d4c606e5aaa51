// What a decision costs: ChunkPolicy::choose() for 1 to 256 decoding requests, batch-wide and per
// request, with a padded curve of a GPU and one that is linear between its points.
//
// Requests stand anywhere in their blocks; their histories hold the confidences of the masks that did
// not commit: bimodal, as measured. The decision is taken once per step on the host, so its bar is
// 20 us for 256 requests.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <random>
#include <vector>

#include "engine/chunk_policy.h"

namespace optimus {
namespace {

constexpr int kBlockLength = 32;
constexpr float kThreshold = 0.9f;

// Graph sizes as a GPU runner captures them; flat to 150 rows, then 23 us a row.
LatencyModel latency(bool is_padded) {
  LatencyProfile profile;
  for (int rows = 1; rows <= 8; rows *= 2) profile.decode.push_back({rows, 4.1});
  for (int rows = 16; rows <= 256; rows += 16) {
    profile.decode.push_back({rows, 4.2 + 0.023 * std::max(0, rows - 150)});
  }
  for (int rows = 320; rows <= 4096; rows += rows / 4) {
    profile.decode.push_back({rows, 4.2 + 0.023 * (rows - 150)});
  }
  profile.prefill = profile.decode;
  profile.kv = {{100000, 0.5}, {1000000, 4.0}};
  profile.is_padded = is_padded;
  LatencyModel model;
  model.set_profile(profile);
  return model;
}

struct Requests {
  explicit Requests(int count) : commits(kBlockLength), histories(count) {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform;
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
    const int context = commits.context(kLowConfidenceDynamic, kThreshold, 1);
    for (MaskHistory& history : histories) {
      history.num_evaluated = 1 + below(12);
      history.num_committed = 1 + below(history.num_evaluated);
      history.confidence.resize(history.num_evaluated - history.num_committed);
      for (float& c : history.confidence) {
        c = below(4) == 0 ? 0.9f * uniform(random) : 0.3f * uniform(random);
      }
      loads.push_back({1 + below(kBlockLength), history.num_committed, 256 + below(2048), context,
                       kThreshold, &history});
    }
    for (int i = 0; i < 20000; ++i) {
      const MaskHistory& history = histories[below(count)];
      const int rank = below(16);
      const float seen = history.confidence_of(rank);
      const double probability = seen >= 0 ? seen : 1.0 / (1.0 + 0.3 * rank);
      commits.observe(context, rank, history, uniform(random) < probability);
    }
    for (int c = 2; c <= kBlockLength; c *= 2) {
      for (int i = 0; i < 200; ++i) commits.observe_step(context, c, c, 1 + below(c) / 2);
    }
  }
  CommitModel commits;
  std::vector<MaskHistory> histories;
  std::vector<RequestLoad> loads;
};

void choose(benchmark::State& state, ChunkPolicyKind kind, bool is_padded) {
  const Requests requests(static_cast<int>(state.range(0)));
  const LatencyModel model = latency(is_padded);
  ChunkPolicyConfig config;
  config.kind = kind;
  config.block_length = kBlockLength;
  config.chunk_lengths = {2, 4, 8, 16, 32};
  config.kv_policy = KvPolicy::auto_;
  ChunkPolicy policy(config);
  int64_t rows = 0;
  for (auto _ : state) {
    const ChunkDecision decision =
        policy.choose(requests.loads, {64, 64, 64}, model, requests.commits);
    benchmark::DoNotOptimize(decision);
    rows += policy.chunk_lengths().back();
  }
  benchmark::DoNotOptimize(rows);
}

void arguments(benchmark::internal::Benchmark* bench) {
  for (int count : {1, 16, 64, 256}) bench->Arg(count);
  bench->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(choose, elastic_padded, ChunkPolicyKind::elastic, true)->Apply(arguments);
BENCHMARK_CAPTURE(choose, elastic_linear, ChunkPolicyKind::elastic, false)->Apply(arguments);
BENCHMARK_CAPTURE(choose, per_request_padded, ChunkPolicyKind::elastic_per_request, true)
    ->Apply(arguments);
BENCHMARK_CAPTURE(choose, per_request_linear, ChunkPolicyKind::elastic_per_request, false)
    ->Apply(arguments);

}  // namespace
}  // namespace optimus
