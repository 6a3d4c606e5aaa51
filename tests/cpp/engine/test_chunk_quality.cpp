// ChunkPolicy under measured quality: no request gets a length, or a treatment of its finished
// blocks, that was measured to be below the floor.
#include "engine/policy_cases.h"

namespace optimus {
namespace {

using namespace testing;

const std::vector<float> kThresholds = {0.5f, 0.9f, 0.97f};

std::vector<MeasuredArm> random_arms(Rng& rng) {
  std::vector<MeasuredArm> arms;
  for (float threshold : kThresholds) {
    if (random_int(rng, 0, 4) == 0) continue;
    for (bool refresh : {false, true}) {
      for (int chunk_length : kArms) {
        if (random_int(rng, 0, 3) == 0) continue;
        const double accuracy = 0.01 * random_int(rng, 50, 100);
        arms.push_back({threshold, chunk_length, refresh, accuracy, 0.01 * random_int(rng, -8, 5)});
      }
    }
  }
  return arms;
}

// One context per threshold; some requests with easy histories.
struct Batch {
  explicit Batch(Rng& rng, int count) : commits(32), history() {
    for (float threshold : kThresholds) commits.context(kLowConfidenceDynamic, threshold, 1);
    history.num_evaluated = history.num_committed = 8;
    for (int i = 0; i < 500; ++i) {
      for (int context = 0; context < 3; ++context) {
        commits.observe(context, random_int(rng, 0, 31), history, true);
      }
    }
    for (int i = 0; i < count; ++i) {
      const int context = random_int(rng, 0, 2);
      loads.push_back({random_int(rng, 1, 32), 2, 100, context, kThresholds[context],
                       random_int(rng, 0, 1) ? &history : nullptr});
    }
  }
  CommitModel commits;
  MaskHistory history;
  std::vector<RequestLoad> loads;
};

// Is any of the arms good enough, with a treatment that the KV policy allows?
bool any_admitted(const QualityFloor& quality, KvPolicy policy, float threshold) {
  for (int chunk_length : kArms) {
    for (bool refresh : {false, true}) {
      if (policy != KvPolicy::auto_ && refresh != (policy == KvPolicy::refresh)) continue;
      if (quality.admits(threshold, chunk_length, refresh)) return true;
    }
  }
  return false;
}

TEST(ChunkQuality, NobodyGetsWhatWasMeasuredBelowTheFloor) {
  int num_restricted = 0, num_hopeless = 0;
  for (unsigned seed = 1; seed <= 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    const ChunkPolicyKind kind =
        seed % 2 ? ChunkPolicyKind::elastic : ChunkPolicyKind::elastic_per_request;
    ChunkPolicyConfig config = policy_config(kind);
    config.kv_policy = static_cast<KvPolicy>(seed / 2 % 3);
    std::optional<double> floor;
    if (random_int(rng, 0, 1)) floor = 0.01 * random_int(rng, 50, 100);
    const QualityFloor quality(random_arms(rng), floor);
    config.quality = quality;
    ChunkPolicy policy(config);
    Batch batch(rng, random_int(rng, 1, 40));
    const LatencyModel latency = random_curve(rng);
    for (int step = 0; step < 3; ++step) {
      policy.choose(batch.loads, {}, latency, batch.commits);
      for (size_t i = 0; i < batch.loads.size(); ++i) {
        const RequestLoad& load = batch.loads[i];
        const int length = policy.chunk_lengths()[i];
        const bool refresh = policy.needs_refresh()[i] != 0;
        ASSERT_GE(length, 1);
        if (config.kv_policy != KvPolicy::auto_) {
          ASSERT_EQ(refresh, config.kv_policy == KvPolicy::refresh);
        }
        if (!any_admitted(quality, config.kv_policy, load.threshold)) {
          ++num_hopeless;
          continue;
        }
        // A block's last masks may be fewer than the shortest length that is good enough.
        const bool all_masks = length == load.num_masked;
        ASSERT_TRUE(quality.admits(load.threshold, length, refresh) || all_masks)
            << "threshold " << load.threshold << ", length " << length << ", refresh " << refresh;
        num_restricted += !quality.admits(load.threshold, 32, refresh);
      }
    }
  }
  EXPECT_GT(num_restricted, 1000);
  EXPECT_GT(num_hopeless, 100);
}

TEST(ChunkQuality, WhereNothingIsGoodEnoughTheMostAccurate) {
  for (ChunkPolicyKind kind : {ChunkPolicyKind::elastic, ChunkPolicyKind::elastic_per_request}) {
    ChunkPolicyConfig config = policy_config(kind);
    config.kv_policy = KvPolicy::auto_;
    config.quality = QualityFloor({{0.9f, 2, false, 0.70, -0.2},
                                   {0.9f, 8, false, 0.75, -0.1},
                                   {0.9f, 32, false, 0.60, -0.3},
                                   {0.9f, 4, true, 0.80, -0.05},
                                   {0.9f, 32, true, 0.65, -0.2}},
                                  std::nullopt);
    ChunkPolicy policy(config);
    policy.choose(batch(3), {}, h200(), prior_commits());
    EXPECT_EQ(policy.needs_refresh(), std::vector<uint8_t>(3, 1));
    for (int length : policy.chunk_lengths()) {
      EXPECT_EQ(config.quality.accuracy(0.9f, length, true), 0.80) << "length " << length;
    }
  }
}

TEST(ChunkQuality, ShortChunksMayBeTheWorseOnes) {
  // c = 2 was measured below the floor, 4 to 16 are good enough, 32 is not.
  ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic_per_request);
  config.quality = QualityFloor(
      {{0.9f, 2, false, 0.7, -0.1}, {0.9f, 16, false, 0.9, 0.1}, {0.9f, 32, false, 0.8, -0.01}},
      std::nullopt);
  const LatencyModel steep = latency_of({{1, 0.01}, {10000, 100.0}});
  const LatencyModel flat = latency_of({{1, 5.0}, {10000, 5.0}});
  for (ChunkPolicyKind kind : {ChunkPolicyKind::elastic, ChunkPolicyKind::elastic_per_request}) {
    config.kind = kind;
    ChunkPolicy cautious(config), greedy(config);
    cautious.choose(batch(20), {}, steep, prior_commits());
    for (int length : cautious.chunk_lengths()) EXPECT_TRUE(length >= 3 && length <= 8) << length;
    greedy.choose(batch(20), {}, flat, prior_commits());
    for (int length : greedy.chunk_lengths()) EXPECT_EQ(length, 16);
    std::vector<RequestLoad> last_masks = batch(4, 1);
    greedy.choose(last_masks, {}, flat, prior_commits());
    for (int length : greedy.chunk_lengths()) EXPECT_GE(length, 1) << "never no row";
  }
}

TEST(ChunkQuality, AutoAsksForARefreshWhereFrozenBlocksAreWorse) {
  ChunkPolicyConfig config = policy_config(ChunkPolicyKind::elastic);
  config.kv_policy = KvPolicy::auto_;
  std::vector<MeasuredArm> arms;
  for (int chunk_length : kArms) {
    arms.push_back({0.9f, chunk_length, false, 0.9, chunk_length <= 8 ? 0.01 : -0.05});
    arms.push_back({0.9f, chunk_length, true, 0.9, 0.02});
  }
  config.quality = QualityFloor(arms, std::nullopt);
  // Rows are free: the whole block, which must be refreshed.
  const LatencyModel flat = latency_of({{1, 5.0}, {10000, 5.0}});
  ChunkPolicy policy(config);
  policy.choose(batch(2), {}, flat, prior_commits());
  EXPECT_EQ(policy.chunk_lengths(), std::vector<int>(2, 32));
  EXPECT_EQ(policy.needs_refresh(), std::vector<uint8_t>(2, 1));
  // Rows cost: short chunks, frozen.
  const LatencyModel steep = latency_of({{1, 0.01}, {10000, 100.0}});
  ChunkPolicy busy(config);
  busy.choose(batch(200), {}, steep, prior_commits());
  for (int length : busy.chunk_lengths()) EXPECT_LE(length, 8);
  EXPECT_EQ(busy.needs_refresh(), std::vector<uint8_t>(200, 0));
}

}  // namespace
}  // namespace optimus
