// Loads, curves and commit models for the tests of ChunkPolicy, and the batch-wide estimate written
// down once more in its obvious form.
#pragma once

#include "engine/chunk_policy.h"
#include "testing.h"

namespace optimus::testing {

inline const std::vector<int> kArms = {2, 4, 8, 16, 32};
constexpr float kThreshold = 0.9f;

inline ChunkPolicyConfig policy_config(ChunkPolicyKind kind, std::vector<int> chunk_lengths = kArms,
                                       double min_gain = 0.02) {
  ChunkPolicyConfig config;
  config.kind = kind;
  config.chunk_lengths = std::move(chunk_lengths);
  config.min_gain = min_gain;
  return config;
}

inline LatencyModel latency_of(std::vector<LatencyProfile::Point> decode, bool is_padded = false) {
  LatencyProfile profile;
  profile.decode = std::move(decode);
  profile.is_padded = is_padded;
  LatencyModel model;
  model.set_profile(std::move(profile));
  return model;
}

// GEMMs of SDAR-8B shapes: flat to about 150 rows, then linear.
inline LatencyModel h200(bool is_padded = false) {
  return latency_of({{1, 4.06},
                     {32, 4.24},
                     {64, 4.28},
                     {128, 4.65},
                     {192, 5.57},
                     {256, 6.86},
                     {512, 12.2},
                     {1024, 23.3},
                     {4096, 93.6}},
                    is_padded);
}

// Any curve: flat pieces, dips, steps.
inline LatencyModel random_curve(Rng& rng) {
  std::vector<LatencyProfile::Point> points;
  const double slope = 0.02 * random_int(rng, 0, 1);
  for (int rows = 0; points.size() < 12;) {
    rows += random_int(rng, 1, 120);
    points.push_back({rows, 0.5 + 0.1 * random_int(rng, 0, 99) + slope * rows});
  }
  return latency_of(points, random_int(rng, 0, 1) == 1);
}

// A model with one context that was told of random steps at some chunk lengths.
inline CommitModel random_commits(Rng& rng, int block_length = 32) {
  CommitModel model(block_length);
  const int context = model.context(kLowConfidenceDynamic, kThreshold, 1);
  for (int i = random_int(rng, 0, 20); i > 0; --i) {
    const int chunk_length = 1 << random_int(rng, 0, 5);
    const int commits = random_int(rng, 1, std::min(chunk_length, random_int(rng, 1, 32)));
    for (int k = random_int(rng, 1, 40); k > 0; --k) {
      model.observe_step(context, chunk_length, random_int(rng, commits, chunk_length), commits);
    }
  }
  return model;
}

inline CommitModel prior_commits(int block_length = 32) {
  CommitModel model(block_length);
  model.context(kLowConfidenceDynamic, kThreshold, 1);
  return model;
}

inline std::vector<RequestLoad> batch(int size, int num_masked = 32) {
  return std::vector<RequestLoad>(size, RequestLoad{num_masked, 3, 64, 0, kThreshold, nullptr});
}

inline std::vector<RequestLoad> random_batch(Rng& rng, int most) {
  std::vector<RequestLoad> loads(random_int(rng, 1, most));
  for (RequestLoad& load : loads) {
    load = {random_int(rng, 0, 32),
            random_int(rng, 0, 5),
            random_int(rng, 32, 2000),
            0,
            kThreshold,
            nullptr};
  }
  loads[0].num_masked = random_int(rng, 1, 32);
  return loads;
}

// One batch-wide chunk length in its steady state: every commit is a fresh row of the next step, and
// of a refreshed block the other positions are rows once more. `alone_ms`: without the prompts.
// `lengths`: those compared; none is believed to commit less than a shorter one.
inline ArmEstimate obvious_estimate(int chunk_length, bool refresh,
                                    const std::vector<RequestLoad>& loads, const StepLoad& other,
                                    const LatencyModel& latency, const CommitModel& commits,
                                    int block_length = 32, const std::vector<int>& lengths = {}) {
  ArmEstimate result;
  double rows = 0;
  int64_t kv_tokens = 0;
  int num_requests = 0;
  for (const RequestLoad& load : loads) {
    kv_tokens += load.context_len;
    if (load.num_masked == 0) {
      rows += load.num_fresh;
      continue;
    }
    CommitModel::Yield yield = commits.yield(load.commit_context, chunk_length);
    for (int length : lengths) {
      if (length > chunk_length) continue;
      yield.commits = std::max(yield.commits, commits.yield(load.commit_context, length).commits);
    }
    rows += yield.masks + yield.commits;
    if (refresh) rows += yield.commits * std::max(0.0, 1 - yield.commits / block_length);
    result.commits += yield.commits;
    ++num_requests;
  }
  const int whole = static_cast<int>(std::lround(rows));
  result.chunk_length = chunk_length;
  result.refresh = refresh;
  result.rows = rows + other.rows;
  result.ms =
      latency.predict({whole + other.rows, other.prefill_rows, other.kv_tokens + kv_tokens});
  result.alone_ms = latency.predict({whole, 0, kv_tokens});
  result.tpot_ms = num_requests > 0 ? result.ms * num_requests / result.commits : 0;
  return result;
}

// What an elastic policy must do: of the arms of `open`, the one whose commits are worth most above
// the time they add to the step, at the price that the best arm makes of time in steps of its own.
// Commits of an arm that was hardly tried are granted some more (`optimism`, as the policy says).
class ObviousChoice {
 public:
  ObviousChoice(const ChunkPolicy& policy, const std::vector<bool>& open,
                const std::vector<RequestLoad>& loads, const StepLoad& other,
                const LatencyModel& latency, const CommitModel& commits) {
    double price = 0;
    std::vector<int> lengths;
    for (const ArmEstimate& known : policy.arms()) lengths.push_back(known.chunk_length);
    for (const ArmEstimate& known : policy.arms()) {
      ArmEstimate arm = obvious_estimate(known.chunk_length, known.refresh, loads, other, latency,
                                         commits, 32, lengths);
      if (std::find(open.begin(), open.end(), arm.refresh) == open.end()) continue;
      arm.optimism = known.optimism;
      EXPECT_TRUE(arm.optimism >= 0 && arm.optimism <= 0.1);
      price = std::max(price, arm.commits * (1 + arm.optimism) / arm.alone_ms);
      arms.push_back(arm);
    }
    const double other_ms = other.rows > 0 ? latency.predict(other) : 0;
    for (ArmEstimate& arm : arms) {
      arm.score = arm.commits * (1 + arm.optimism) - price * (arm.ms - other_ms);
    }
  }
  const ArmEstimate& at(int chunk_length, bool refresh) const {
    for (const ArmEstimate& arm : arms) {
      if (arm.chunk_length == chunk_length && arm.refresh == refresh) return arm;
    }
    ADD_FAILURE() << "chunk " << chunk_length << " was not compared";
    return arms[0];
  }
  // The best among those for which `condition(arm)` holds; null if none.
  template <class Condition>
  const ArmEstimate* best(const Condition& condition) const {
    const ArmEstimate* best = nullptr;
    for (const ArmEstimate& arm : arms) {
      if (condition(arm) && (best == nullptr || arm.score > best->score)) best = &arm;
    }
    return best;
  }
  const ArmEstimate& best() const {
    return *best([](const ArmEstimate&) { return true; });
  }

  std::vector<ArmEstimate> arms;
};

// The arm that choose() settled on batch-wide.
inline ArmEstimate chosen_arm(const ChunkPolicy& policy) {
  for (const ArmEstimate& arm : policy.arms()) {
    if (std::string(arm.verdict) == "chosen") return arm;
  }
  ADD_FAILURE() << "no arm was chosen";
  return {};
}

}  // namespace optimus::testing
