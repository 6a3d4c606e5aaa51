// ChunkPolicy: the argmax against brute force, hysteresis, fallbacks, and what it does on a curve
// measured on an H200.
#include "engine/chunk_policy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace optimus {
namespace {

const std::vector<int> kArms = {2, 4, 8, 16, 32};

LatencyModel profile(std::vector<LatencyModel::Point> points) {
  LatencyModel model;
  model.set_profile(std::move(points));
  return model;
}

// GEMMs of SDAR-8B shapes: flat to about 150 rows, then linear.
LatencyModel h200() {
  return profile({{1, 4.06},
                  {32, 4.24},
                  {64, 4.28},
                  {128, 4.65},
                  {192, 5.57},
                  {256, 6.86},
                  {512, 12.2},
                  {1024, 23.3},
                  {4096, 93.6}});
}

std::vector<RequestLoad> batch(int size, int num_masked = 32) {
  return std::vector<RequestLoad>(size, RequestLoad{num_masked, 3});
}

double rows_of(int arm, const std::vector<RequestLoad>& loads, int other_rows,
               const CommitModel& commits) {
  double rows = other_rows;
  for (const RequestLoad& load : loads) {
    const int n = std::min(arm, load.num_masked);
    rows += n == 0 ? load.num_fresh : n + commits.expected_commits(n);
  }
  return rows;
}

double commits_of(int arm, const std::vector<RequestLoad>& loads, const CommitModel& commits) {
  double sum = 0;
  for (const RequestLoad& load : loads) {
    sum += commits.expected_commits(std::min(arm, load.num_masked));
  }
  return sum;
}

double rate_of(int arm, const std::vector<RequestLoad>& loads, int other_rows,
               const LatencyModel& latency, const CommitModel& commits) {
  const double rows = rows_of(arm, loads, other_rows, commits);
  return commits_of(arm, loads, commits) / latency.predict(static_cast<int>(std::lround(rows)));
}

int h200_choice(int batch_size) {
  return ChunkPolicy::elastic(kArms, 32)
      .choose(batch(batch_size), 0, h200(), CommitModel(32))
      .chunk_length;
}

TEST(ChunkPolicy, WholeBlockAtLowLoadSmallChunksAtHighLoad) {
  EXPECT_EQ(h200_choice(1), 32);
  EXPECT_EQ(h200_choice(2), 32);
  for (int size : {128, 192, 256, 512}) EXPECT_LE(h200_choice(size), 4) << "batch " << size;
  int previous = 32;
  for (int size = 1; size <= 512; size *= 2) {
    EXPECT_LE(h200_choice(size), previous) << "batch " << size;
    previous = h200_choice(size);
  }
}

TEST(ChunkPolicy, MixtureOfExpertsCurveKeepsTheWholeBlock) {
  // Rises while more experts are touched, then flat to 2000 rows.
  const LatencyModel latency = profile({{1, 1.0}, {64, 4.0}, {2048, 4.4}, {4096, 8.8}});
  const auto decision =
      ChunkPolicy::elastic(kArms, 32).choose(batch(32), 0, latency, CommitModel(32));
  EXPECT_EQ(decision.chunk_length, 32);
}

TEST(ChunkPolicy, PrefillRowsCountAsLoad) {
  const CommitModel commits(32);
  EXPECT_EQ(ChunkPolicy::elastic(kArms, 32).choose(batch(8), 0, h200(), commits).chunk_length, 16);
  // A long prefill is paid anyway: a few hundred rows more are a small share of the step.
  EXPECT_EQ(ChunkPolicy::elastic(kArms, 32).choose(batch(8), 8192, h200(), commits).chunk_length,
            32);
}

TEST(ChunkPolicy, DecisionCarriesItsEstimate) {
  const CommitModel commits(32);
  const auto loads = batch(4);
  const auto decision = ChunkPolicy::elastic(kArms, 32).choose(loads, 10, h200(), commits);
  EXPECT_DOUBLE_EQ(decision.expected_commits, 4 * commits.expected_commits(decision.chunk_length));
  const double rows = rows_of(decision.chunk_length, loads, 10, commits);
  EXPECT_DOUBLE_EQ(decision.predicted_ms, h200().predict(static_cast<int>(std::lround(rows))));
  EXPECT_STREQ(decision.reason, "best");
}

TEST(ChunkPolicy, ArgmaxEqualsBruteForceOnRandomProfiles) {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  std::vector<int> times_chosen(33, 0);
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<LatencyModel::Point> points;
    for (int rows = 0; points.size() < 12;) {
      rows += 1 + below(120);
      points.push_back({rows, 0.5 + below(100) * 0.1 + (trial % 2) * 0.02 * rows});
    }
    const LatencyModel latency = profile(points);
    CommitModel commits(32);
    for (int i = below(500); i > 0; --i) commits.observe(below(32), below(3) == 0);
    std::vector<RequestLoad> loads(1 + below(60));
    for (RequestLoad& load : loads) load = {below(33), below(6)};
    loads[0].num_masked = 1 + below(32);
    const int other_rows = below(2) * below(300);

    const auto decision =
        ChunkPolicy::elastic(kArms, 32, 0.0).choose(loads, other_rows, latency, commits);
    double best = 0;
    for (int arm : kArms) best = std::max(best, rate_of(arm, loads, other_rows, latency, commits));
    const double chosen = rate_of(decision.chunk_length, loads, other_rows, latency, commits);
    ASSERT_NEAR(chosen, best, 1e-9 * best) << "trial " << trial;
    ASSERT_NEAR(decision.expected_commits / decision.predicted_ms, best, 1e-9 * best);
    ++times_chosen[decision.chunk_length];
  }
  for (int arm : kArms) EXPECT_GT(times_chosen[arm], 30) << "profiles too tame for arm " << arm;
}

TEST(ChunkPolicy, SwitchesOnlyForMoreThanTheMinimumGain) {
  std::mt19937 random(2);
  const CommitModel commits(32);
  const auto loads = batch(4);
  constexpr double kMinGain = 0.1;
  ChunkPolicy policy = ChunkPolicy::elastic(kArms, 32, kMinGain);
  int current = 0, num_switches = 0, num_kept = 0;
  for (int step = 0; step < 2000; ++step) {
    std::vector<LatencyModel::Point> points;
    const double slope = 0.001 * static_cast<double>(1 + random() % 80);
    for (int rows = 8; rows <= 256; rows += 8) {
      points.push_back({rows, 4.0 + slope * rows + 0.001 * static_cast<double>(random() % 1000)});
    }
    const LatencyModel latency = profile(points);
    int best = 0;
    for (int arm : kArms) {
      if (best == 0 ||
          rate_of(arm, loads, 0, latency, commits) > rate_of(best, loads, 0, latency, commits)) {
        best = arm;
      }
    }
    const bool is_worth_it =
        current == 0 || rate_of(best, loads, 0, latency, commits) >
                            (1 + kMinGain) * rate_of(current, loads, 0, latency, commits);
    const auto decision = policy.choose(loads, 0, latency, commits);
    ASSERT_EQ(decision.chunk_length, is_worth_it ? best : current) << "step " << step;
    if (best != decision.chunk_length) {
      ASSERT_NE(std::string(decision.reason).find("kept"), std::string::npos);
    }
    num_switches += current != 0 && decision.chunk_length != current;
    num_kept += best != decision.chunk_length;
    current = decision.chunk_length;
  }
  EXPECT_GT(num_switches, 0);
  EXPECT_GT(num_kept, 100);
}

TEST(ChunkPolicy, EqualArmsDoNotSwitch) {
  ChunkPolicy policy = ChunkPolicy::elastic(kArms, 32);
  const CommitModel commits(32);
  ASSERT_EQ(policy.choose(batch(1), 0, h200(), commits).chunk_length, 32);
  EXPECT_EQ(policy.choose(batch(1, 2), 0, h200(), commits).chunk_length, 32)
      << "with two masks left all arms are the same step";
}

TEST(ChunkPolicy, NoProfileMeansTheTrainedBlock) {
  ChunkPolicy policy = ChunkPolicy::elastic({2, 4}, 32);
  const CommitModel commits(32);
  for (const auto& loads : {batch(1), batch(300), batch(0)}) {
    const auto decision = policy.choose(loads, 0, LatencyModel(), commits);
    EXPECT_EQ(decision.chunk_length, 32);
    EXPECT_NE(std::string(decision.reason).find("no latency profile"), std::string::npos);
    EXPECT_EQ(decision.predicted_ms, 0);
  }
}

TEST(ChunkPolicy, NothingToDecodeKeepsTheArm) {
  ChunkPolicy policy = ChunkPolicy::elastic(kArms, 32);
  const CommitModel commits(32);
  EXPECT_EQ(policy.choose({}, 512, h200(), commits).chunk_length, 2) << "no arm in use yet";
  EXPECT_EQ(policy.choose(batch(1), 0, h200(), commits).chunk_length, 32)
      << "a step without loads must leave no arm behind";
  EXPECT_EQ(policy.choose({}, 0, h200(), commits).chunk_length, 32);
  EXPECT_EQ(policy.choose(batch(5, 0), 0, h200(), commits).chunk_length, 32);
}

TEST(ChunkPolicy, FixedIsFixed) {
  ChunkPolicy policy = ChunkPolicy::fixed(8);
  EXPECT_TRUE(policy.is_fixed());
  const CommitModel commits(32);
  EXPECT_EQ(policy.choose(batch(1), 0, h200(), commits).chunk_length, 8);
  EXPECT_EQ(policy.choose(batch(500), 0, h200(), commits).chunk_length, 8);
  EXPECT_EQ(policy.choose({}, 0, LatencyModel(), commits).chunk_length, 8);
  EXPECT_FALSE(ChunkPolicy::elastic(kArms, 32).is_fixed());
}

TEST(ChunkPolicy, RejectsBadArms) {
  EXPECT_THROW(ChunkPolicy::fixed(0), std::invalid_argument);
  EXPECT_THROW(ChunkPolicy::elastic({}, 32), std::invalid_argument);
  EXPECT_THROW(ChunkPolicy::elastic({0, 2}, 32), std::invalid_argument);
  EXPECT_THROW(ChunkPolicy::elastic({4, 2}, 32), std::invalid_argument);
  EXPECT_THROW(ChunkPolicy::elastic({2, 64}, 32), std::invalid_argument);
  EXPECT_THROW(ChunkPolicy::elastic({2, 4}, 32, -0.1), std::invalid_argument);
}

TEST(ChunkPolicy, RefreshIsFreeBelowTheKnee) {
  EXPECT_TRUE(refresh_is_free(h200(), 32, 32));
  EXPECT_FALSE(refresh_is_free(h200(), 512, 32));
  EXPECT_FALSE(refresh_is_free(h200(), 128, 64));
  EXPECT_TRUE(refresh_is_free(h200(), 512, 0));
  EXPECT_FALSE(refresh_is_free(LatencyModel(), 1, 1));
  EXPECT_TRUE(refresh_is_free(profile({{1, 100.0}, {2, 101.9}}), 1, 1));
  EXPECT_FALSE(refresh_is_free(profile({{1, 100.0}, {2, 102.1}}), 1, 1));
}

}  // namespace
}  // namespace optimus
