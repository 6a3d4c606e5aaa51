// ChunkPolicy batch-wide: fixed, schedule, and elastic against brute force on any curve; hysteresis,
// targets, fallbacks, and what it does on a curve measured on an H200.
#include <stdexcept>

#include "engine/policy_cases.h"

namespace optimus {
namespace {

using namespace testing;

int h200_choice(int batch_size) {
  return ChunkPolicy(policy_config(ChunkPolicyKind::elastic))
      .choose(batch(batch_size), {}, h200(), prior_commits())
      .chunk_length;
}

TEST(ChunkPolicy, WholeBlockAtLowLoadSmallChunksAtHighLoad) {
  EXPECT_EQ(h200_choice(1), 32);
  EXPECT_EQ(h200_choice(2), 32);
  for (int size : {128, 192, 256, 512}) EXPECT_LE(h200_choice(size), 8) << "batch " << size;
  int previous = 32;
  for (int size = 1; size <= 512; size *= 2) {
    EXPECT_LE(h200_choice(size), previous) << "batch " << size;
    previous = h200_choice(size);
  }
}

TEST(ChunkPolicy, MixtureOfExpertsCurveKeepsTheWholeBlock) {
  // Rises while more experts are touched, then flat to 2000 rows.
  const LatencyModel latency = latency_of({{1, 1.0}, {64, 4.0}, {2048, 4.4}, {4096, 8.8}});
  const auto decision = ChunkPolicy(policy_config(ChunkPolicyKind::elastic))
                            .choose(batch(32), {}, latency, prior_commits());
  EXPECT_EQ(decision.chunk_length, 32);
}

TEST(ChunkPolicy, LongContextsMakeStepsPrecious) {
  // Keys are read once per request and step, however many rows it has: fewer, larger steps.
  LatencyProfile profile = h200().profile();
  profile.kv = {{64 * 16384, 20.0}};
  LatencyModel latency;
  latency.set_profile(profile);
  std::vector<RequestLoad> loads = batch(64);
  ChunkPolicy near(policy_config(ChunkPolicyKind::elastic)),
      far(policy_config(ChunkPolicyKind::elastic));
  const int short_context = near.choose(loads, {}, latency, prior_commits()).chunk_length;
  for (RequestLoad& load : loads) load.context_len = 16384;
  EXPECT_GT(far.choose(loads, {}, latency, prior_commits()).chunk_length, short_context);
}

TEST(ChunkPolicy, PromptsArePaidAnyway) {
  const auto choose = [](int batch_size, int prefill_rows) {
    return ChunkPolicy(policy_config(ChunkPolicyKind::elastic))
        .choose(batch(batch_size), {prefill_rows, prefill_rows, 0}, h200(), prior_commits())
        .chunk_length;
  };
  EXPECT_EQ(choose(8, 0), 16);
  // Beyond the knee every row costs, and a prompt does not make it cheaper.
  EXPECT_LE(choose(8, 2048), 8);
  for (int rows : {1024, 2048, 4000}) {
    EXPECT_EQ(choose(64, rows), choose(64, 1024)) << rows << " rows of prompts";
  }
}

TEST(ChunkPolicy, DecisionCarriesItsEstimate) {
  const CommitModel commits = prior_commits();
  const auto loads = batch(4);
  const StepLoad other{10, 10, 100};
  ChunkPolicy policy(policy_config(ChunkPolicyKind::elastic));
  const auto decision = policy.choose(loads, other, h200(), commits);
  const ArmEstimate expected =
      obvious_estimate(decision.chunk_length, false, loads, other, h200(), commits);
  EXPECT_NEAR(decision.expected_commits, expected.commits, 1e-9);
  EXPECT_NEAR(decision.predicted_ms, expected.ms, 1e-9);
  EXPECT_STREQ(decision.reason, "best");
  EXPECT_EQ(policy.chunk_lengths(), std::vector<int>(4, decision.chunk_length));
  EXPECT_EQ(policy.needs_refresh(), std::vector<uint8_t>(4, 0));
  ASSERT_EQ(policy.arms().size(), 2 * kArms.size());
  for (const ArmEstimate& arm : policy.arms()) {
    const ArmEstimate same =
        obvious_estimate(arm.chunk_length, arm.refresh, loads, other, h200(), commits);
    EXPECT_NEAR(arm.rows, same.rows, 1e-9);
    EXPECT_NEAR(arm.tpot_ms, same.tpot_ms, 1e-9);
  }
  EXPECT_EQ(chosen_arm(policy).chunk_length, decision.chunk_length);
}

// ------------------------------------------------------------------------- against brute force

struct Case {
  explicit Case(unsigned seed)
      : rng(seed),
        latency(random_curve(rng)),
        commits(random_commits(rng)),
        loads(random_batch(rng, 60)) {
    if (random_int(rng, 0, 1)) {
      other.rows = random_int(rng, 1, 300);
      other.prefill_rows = random_int(rng, 0, other.rows);
      other.kv_tokens = random_int(rng, 0, 5000);
    }
  }
  ObviousChoice obvious(const ChunkPolicy& policy, const std::vector<bool>& open) const {
    return ObviousChoice(policy, open, loads, other, latency, commits);
  }
  Rng rng;
  LatencyModel latency;
  CommitModel commits;
  std::vector<RequestLoad> loads;
  StepLoad other;
};

// Rows are rounded: sums in another order may land on the other side of a half, and so may ties.
constexpr double kTie = 1e-6;

TEST(ChunkPolicy, ArgmaxEqualsBruteForceOnRandomCurves) {
  std::vector<int> times_chosen(33, 0);
  for (unsigned seed = 1; seed <= 2000; ++seed) {
    Case c(seed);
    const bool refresh = seed % 3 == 0;
    ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic, kArms, 0.0);
    config.kv_policy = refresh ? KvPolicy::refresh : KvPolicy::freeze;
    ChunkPolicy policy(config);
    const auto decision = policy.choose(c.loads, c.other, c.latency, c.commits);
    const ObviousChoice obvious = c.obvious(policy, {refresh});
    const ArmEstimate& chosen = obvious.at(decision.chunk_length, refresh);
    ASSERT_GE(chosen.score, obvious.best().score - kTie * chosen.commits) << "seed " << seed;
    ASSERT_NEAR(decision.expected_commits, chosen.commits, kTie * chosen.commits);
    ASSERT_NEAR(decision.predicted_ms, chosen.ms, kTie * chosen.ms);
    ASSERT_EQ(decision.refresh, refresh);
    if (c.other.rows == 0) {  // without prompts: the most commits per time
      for (const ArmEstimate& arm : obvious.arms) {
        ASSERT_GE(chosen.rate() * (1 + chosen.optimism),
                  arm.rate() * (1 + arm.optimism) * (1 - kTie))
            << "seed " << seed;
      }
    }
    ++times_chosen[decision.chunk_length];
  }
  for (int arm : kArms) EXPECT_GT(times_chosen[arm], 20) << "curves too tame for arm " << arm;
}

TEST(ChunkPolicy, AutoRefreshesWhereItIsFree) {
  int num_refreshed = 0, num_frozen = 0;
  for (unsigned seed = 1; seed <= 1000; ++seed) {
    Case c(seed);
    ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic, kArms, 0.0);
    config.kv_policy = KvPolicy::auto_;
    ChunkPolicy policy(config);
    const auto decision = policy.choose(c.loads, c.other, c.latency, c.commits);
    const ObviousChoice obvious = c.obvious(policy, {false, true});
    const ArmEstimate& best = obvious.best();
    const ArmEstimate& refreshed = *obvious.best([](const auto& arm) { return arm.refresh; });
    const double lost = (best.score - refreshed.score) / best.commits;
    if (std::abs(lost - 0.02) < 1e-4) continue;
    ASSERT_EQ(decision.refresh, lost < 0.02) << "seed " << seed;
    const ArmEstimate& chosen = obvious.at(decision.chunk_length, decision.refresh);
    ASSERT_NEAR(chosen.score, decision.refresh ? refreshed.score : best.score, kTie * best.commits)
        << "seed " << seed;
    (decision.refresh ? num_refreshed : num_frozen) += 1;
  }
  EXPECT_GT(num_refreshed, 50);
  EXPECT_GT(num_frozen, 50);
}

TEST(ChunkPolicy, TargetIsAConstraintOrThenTheGoal) {
  int num_met = 0, num_missed = 0;
  for (unsigned seed = 1; seed <= 1000; ++seed) {
    Case c(seed);
    ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic, kArms, 0.0);
    double fastest = 1e300, slowest = 0;
    for (int arm : kArms) {
      const double tpot =
          obvious_estimate(arm, false, c.loads, c.other, c.latency, c.commits, 32, kArms).tpot_ms;
      fastest = std::min(fastest, tpot);
      slowest = std::max(slowest, tpot);
    }
    if (slowest - fastest < kTie * fastest) continue;
    config.target_tpot_ms =
        std::max(fastest + (slowest - fastest) * (random_int(c.rng, -5, 15) + 0.5) / 10, 1e-6);
    ChunkPolicy policy(config);
    const auto decision = policy.choose(c.loads, c.other, c.latency, c.commits);
    const ObviousChoice obvious = c.obvious(policy, {false});
    const ArmEstimate* best =
        obvious.best([&](const ArmEstimate& arm) { return arm.tpot_ms <= config.target_tpot_ms; });
    const ArmEstimate& chosen = obvious.at(decision.chunk_length, false);
    ASSERT_EQ(decision.meets_target, best != nullptr) << "seed " << seed;
    if (best != nullptr) {
      ASSERT_LE(chosen.tpot_ms, config.target_tpot_ms * (1 + kTie)) << "seed " << seed;
      ASSERT_GE(chosen.score, best->score - kTie * best->commits) << "seed " << seed;
      num_met += 1;
    } else {
      ASSERT_LE(chosen.tpot_ms, fastest * (1 + kTie)) << "seed " << seed;
      ASSERT_STREQ(decision.reason, "target_tpot_ms cannot be met: fastest");
      num_missed += 1;
    }
  }
  EXPECT_GT(num_met, 200);
  EXPECT_GT(num_missed, 50);
}

TEST(ChunkPolicy, HysteresisDoesNotKeepAnArmThatMissesTheTarget) {
  ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic, {2, 4}, 5.0);
  const CommitModel commits = prior_commits();
  const auto loads = batch(1);
  const LatencyModel before = latency_of({{3, 1.0}, {4, 1.0}, {7, 100.0}});
  const LatencyModel after = latency_of({{3, 1.0}, {4, 1.4}, {7, 1.4}});
  ChunkPolicy free(config);
  ASSERT_EQ(free.choose(loads, {}, before, commits).chunk_length, 2);
  ASSERT_EQ(free.choose(loads, {}, after, commits).chunk_length, 2) << "kept";
  const double two = obvious_estimate(2, false, loads, {}, after, commits).tpot_ms;
  const double four = obvious_estimate(4, false, loads, {}, after, commits).tpot_ms;
  ASSERT_LT(four, two);
  config.target_tpot_ms = (two + four) / 2;
  ChunkPolicy bound(config);
  ASSERT_EQ(bound.choose(loads, {}, before, commits).chunk_length, 2);
  EXPECT_EQ(bound.choose(loads, {}, after, commits).chunk_length, 4);
}

TEST(ChunkPolicy, SwitchesOnlyForMoreThanTheMinimumGain) {
  Rng rng(2);
  const CommitModel commits = prior_commits();
  const auto loads = batch(4);
  constexpr double kMinGain = 0.1;
  ChunkPolicy policy(policy_config(ChunkPolicyKind::elastic, kArms, kMinGain));
  int current = 0, num_switches = 0, num_kept = 0;
  for (int step = 0; step < 2000; ++step) {
    std::vector<LatencyProfile::Point> points;
    const double slope = 0.001 * random_int(rng, 1, 80);
    for (int rows = 8; rows <= 256; rows += 8) {
      points.push_back({rows, 4.0 + slope * rows + 0.001 * random_int(rng, 0, 999)});
    }
    const LatencyModel latency = latency_of(points);
    const auto decision = policy.choose(loads, {}, latency, commits);
    const ObviousChoice obvious(policy, {false}, loads, {}, latency, commits);
    const int best = obvious.best().chunk_length;
    const bool is_worth_it =
        current == 0 || obvious.best().score - obvious.at(current, false).score >
                            kMinGain * obvious.at(current, false).commits;
    ASSERT_EQ(decision.chunk_length, is_worth_it ? best : current) << "step " << step;
    if (best != decision.chunk_length) {
      ASSERT_STREQ(decision.reason, "kept: gain below min_gain");
    }
    num_switches += current != 0 && decision.chunk_length != current;
    num_kept += best != decision.chunk_length;
    current = decision.chunk_length;
  }
  EXPECT_GT(num_switches, 0);
  EXPECT_GT(num_kept, 100);
}

TEST(ChunkPolicy, AnArmThatWasHardlyTriedIsGrantedMore) {
  CommitModel commits = prior_commits();
  const auto optimism = [&](int chunk_length) {
    ChunkPolicy policy(policy_config(ChunkPolicyKind::elastic));
    policy.choose(batch(4), {}, h200(), commits);
    for (const ArmEstimate& arm : policy.arms()) {
      if (arm.chunk_length == chunk_length) return arm.optimism;
    }
    return -1.0;
  };
  const double untried = optimism(8);
  EXPECT_GT(untried, 0.01);
  EXPECT_LT(untried, 0.15);
  for (int i = 0; i < 2000; ++i) commits.observe_step(0, 8, 8, 5);
  EXPECT_LT(optimism(8), 0.3 * untried);
  EXPECT_NEAR(optimism(32), untried, 1e-9);
}

TEST(ChunkPolicy, LearnsThatLargeChunksDoNotPay) {
  // What commits is not what the prior says: one mask a step, whatever is evaluated.
  CommitModel commits = prior_commits();
  const LatencyModel latency = latency_of({{1, 1.0}, {1000, 100.0}});
  ChunkPolicy policy(policy_config(ChunkPolicyKind::elastic));
  int chunk_length = 0;
  for (int step = 0; step < 300; ++step) {
    chunk_length = policy.choose(batch(8), {}, latency, commits).chunk_length;
    for (int i = 0; i < 8; ++i) commits.observe_step(0, chunk_length, chunk_length, 1);
    commits.advance(8);
  }
  EXPECT_EQ(chunk_length, 2);
}

// -------------------------------------------------------------------------- fallbacks and the rest

TEST(ChunkPolicy, NoProfileMeansTheTrainedBlock) {
  for (ChunkPolicyKind kind : {ChunkPolicyKind::elastic, ChunkPolicyKind::elastic_per_request}) {
    ChunkPolicy policy(policy_config(kind, {2, 4}));
    for (const auto& loads : {batch(1), batch(300), batch(0)}) {
      const auto decision = policy.choose(loads, {}, LatencyModel(), prior_commits());
      EXPECT_EQ(decision.chunk_length, 32);
      EXPECT_EQ(policy.chunk_lengths(), std::vector<int>(loads.size(), 32));
      EXPECT_STREQ(decision.reason, "no latency profile: the trained block");
      EXPECT_EQ(decision.predicted_ms, 0);
      EXPECT_TRUE(policy.arms().empty());
    }
  }
}

TEST(ChunkPolicy, NothingToDecodeKeepsTheLengthInUse) {
  for (ChunkPolicyKind kind : {ChunkPolicyKind::elastic, ChunkPolicyKind::elastic_per_request}) {
    ChunkPolicy policy(policy_config(kind));
    const CommitModel commits = prior_commits();
    const StepLoad other{512, 512, 0};
    EXPECT_EQ(policy.choose({}, other, h200(), commits).chunk_length, 2) << "none in use yet";
    EXPECT_EQ(policy.choose(batch(1), {}, h200(), commits).chunk_length, 32)
        << "a step without loads must leave no arm behind";
    EXPECT_EQ(policy.choose({}, {}, h200(), commits).chunk_length, 32);
    policy.choose(batch(5, 0), {}, h200(), commits);
    for (int length : policy.chunk_lengths()) EXPECT_GE(length, 1);
    EXPECT_EQ(policy.chunk_lengths().size(), 5u);
    EXPECT_EQ(policy.choose(batch(1), {}, h200(), commits).chunk_length, 32);
  }
}

TEST(ChunkPolicy, FixedIsFixed) {
  ChunkPolicyConfig config = policy_config(ChunkPolicyKind::fixed, {8});
  config.kv_policy = KvPolicy::refresh;
  ChunkPolicy policy(config);
  const CommitModel commits = prior_commits();
  for (int size : {0, 1, 500}) {
    for (const LatencyModel& latency : {h200(), LatencyModel()}) {
      const auto decision = policy.choose(batch(size), {}, latency, commits);
      EXPECT_EQ(decision.chunk_length, 8);
      EXPECT_TRUE(decision.refresh);
      EXPECT_STREQ(decision.reason, "fixed");
      EXPECT_EQ(policy.chunk_lengths(), std::vector<int>(size, 8));
      EXPECT_EQ(policy.needs_refresh(), std::vector<uint8_t>(size, 1));
    }
  }
}

TEST(ChunkPolicy, ScheduleIsATable) {
  ChunkPolicyConfig config = policy_config(ChunkPolicyKind::schedule, {});
  config.schedule = {{1, 32}, {4, 8}, {64, 3}};
  ChunkPolicy policy(config);
  const auto length = [&](int size) {
    const auto decision = policy.choose(batch(size), {}, LatencyModel(), prior_commits());
    EXPECT_STREQ(decision.reason, "schedule");
    EXPECT_EQ(policy.chunk_lengths(), std::vector<int>(size, decision.chunk_length));
    return decision.chunk_length;
  };
  EXPECT_EQ(length(0), 32);
  EXPECT_EQ(length(1), 32);
  EXPECT_EQ(length(2), 8);
  EXPECT_EQ(length(4), 8);
  EXPECT_EQ(length(5), 3);
  EXPECT_EQ(length(64), 3);
  EXPECT_EQ(length(65), 3) << "beyond the table: its last entry";
  EXPECT_EQ(length(1), 32) << "and back";
}

TEST(ChunkPolicy, RejectsBadConfigs) {
  const auto rejects = [](const std::string& text, ChunkPolicyConfig config) {
    expect_invalid([&] { ChunkPolicy policy(config); }, text);
  };
  const auto elastic = [](std::vector<int> arms) {
    return policy_config(ChunkPolicyKind::elastic, std::move(arms));
  };
  const auto schedule = [](std::vector<std::pair<int, int>> table) {
    ChunkPolicyConfig config = policy_config(ChunkPolicyKind::schedule, {});
    config.schedule = std::move(table);
    return config;
  };
  rejects("no chunk length to choose", elastic({}));
  rejects("must ascend from 1 to 32, got 0 after 0", elastic({0, 2}));
  rejects("must ascend from 1 to 32, got 2 after 4", elastic({4, 2}));
  rejects("must ascend from 1 to 32, got 2 after 2", elastic({2, 2}));
  rejects("must ascend from 1 to 32, got 64 after 2", elastic({2, 64}));
  rejects("min_gain must not be negative, got -0.1",
          policy_config(ChunkPolicyKind::elastic, {2, 4}, -0.1));
  rejects("fixed takes one chunk length, got 2", policy_config(ChunkPolicyKind::fixed, {2, 4}));
  rejects("no chunk length to choose", schedule({}));
  rejects("schedule entries must ascend from 1, got 0 after 0", schedule({{0, 4}}));
  rejects("schedule entries must ascend from 1, got 3 after 3", schedule({{3, 4}, {3, 2}}));
  rejects("must be between 1 and 32, got 33", schedule({{3, 33}}));
  rejects("must be between 1 and 32, got 0", schedule({{3, 0}}));
  ChunkPolicyConfig config = elastic({2});
  config.target_tpot_ms = -1;
  rejects("target_tpot_ms must not be negative, got -1", config);
  config.target_tpot_ms = std::nan("");
  rejects("target_tpot_ms must not be negative, got nan", config);
}

TEST(ChunkPolicy, RefreshIsFreeBelowTheKnee) {
  const auto is_free = [](const LatencyModel& latency, int rows, int more) {
    return refresh_is_free(latency, {rows, 0, 0}, more);
  };
  EXPECT_TRUE(is_free(h200(), 32, 32));
  EXPECT_FALSE(is_free(h200(), 512, 32));
  EXPECT_FALSE(is_free(h200(), 128, 64));
  EXPECT_TRUE(is_free(h200(), 512, 0));
  EXPECT_TRUE(is_free(h200(/*is_padded=*/true), 260, 250)) << "padding is paid anyway";
  EXPECT_FALSE(is_free(LatencyModel(), 1, 1));
  EXPECT_TRUE(is_free(latency_of({{1, 100.0}, {2, 101.9}}), 1, 1));
  EXPECT_FALSE(is_free(latency_of({{1, 100.0}, {2, 102.1}}), 1, 1));
}

}  // namespace
}  // namespace optimus
