// LatencyProfile and LatencyModel::predict: what was measured comes back as measured: steps where
// rows are padded, lines between points otherwise, dips, the cost of reading keys and of prefill.
// Online correction is in test_latency_online.cpp.
#include "engine/latency_model.h"

#include <stdexcept>

#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

LatencyModel make(LatencyProfile profile) {
  LatencyModel model;
  model.set_profile(std::move(profile));
  return model;
}

LatencyModel make(std::vector<LatencyProfile::Point> decode, bool is_padded = false) {
  LatencyProfile profile;
  profile.decode = std::move(decode);
  profile.is_padded = is_padded;
  return make(std::move(profile));
}

double predict(const LatencyModel& model, int rows) { return model.predict({rows, 0, 0}); }

TEST(LatencyModel, InterpolatesAndExtrapolates) {
  const LatencyModel model = make({{8, 4.0}, {16, 2.0}, {32, 6.0}});
  EXPECT_DOUBLE_EQ(predict(model, 0), 4.0);
  EXPECT_DOUBLE_EQ(predict(model, 8), 4.0);
  EXPECT_DOUBLE_EQ(predict(model, 12), 3.0) << "a dip that was measured stays";
  EXPECT_DOUBLE_EQ(predict(model, 16), 2.0);
  EXPECT_DOUBLE_EQ(predict(model, 20), 3.0);
  EXPECT_DOUBLE_EQ(predict(model, 32), 6.0);
  EXPECT_DOUBLE_EQ(predict(model, 64), 14.0);
}

TEST(LatencyModel, NeverFallsBeyondTheLastPoint) {
  for (bool is_padded : {false, true}) {
    EXPECT_DOUBLE_EQ(predict(make({{8, 4.0}, {16, 2.0}}, is_padded), 1000000), 2.0);
    EXPECT_DOUBLE_EQ(predict(make({{8, 4.0}}, is_padded), 1000000), 4.0);
  }
}

TEST(LatencyModel, PaddedRowsCostWhatTheNextSizeCosts) {
  const LatencyModel model = make({{8, 4.0}, {16, 2.0}, {32, 6.0}}, /*is_padded=*/true);
  for (int rows = 1; rows <= 32; ++rows) {
    EXPECT_EQ(predict(model, rows), rows <= 8 ? 4.0 : rows <= 16 ? 2.0 : 6.0) << rows << " rows";
    EXPECT_EQ(model.padded_rows(rows), rows <= 8 ? 8 : rows <= 16 ? 16 : 32) << rows << " rows";
  }
  EXPECT_DOUBLE_EQ(predict(model, 64), 14.0) << "no graph is that large: along the last two";
  EXPECT_EQ(model.padded_rows(64), 64);
  const LatencyModel linear = make({{8, 4.0}, {16, 2.0}, {32, 6.0}});
  for (int rows : {1, 8, 9, 33}) EXPECT_EQ(linear.padded_rows(rows), rows);
  EXPECT_EQ(LatencyModel().padded_rows(5), 5);
}

TEST(LatencyModel, RandomCurvesComeBackAsMeasured) {
  for (unsigned seed = 1; seed <= 200; ++seed) {
    Rng rng(seed);
    std::vector<LatencyProfile::Point> points;
    int rows = 0;
    for (int i = random_int(rng, 1, 12); i > 0; --i) {
      rows += random_int(rng, 1, 40);
      points.push_back({rows, 0.1 * random_int(rng, 1, 500)});
    }
    const bool is_padded = seed % 2 == 0;
    const LatencyModel model = make(points, is_padded);
    for (const auto& point : points) ASSERT_NEAR(predict(model, point.rows), point.ms, 1e-9);
    for (size_t i = 1; i < points.size(); ++i) {
      const auto &a = points[i - 1], &b = points[i];
      for (int r = a.rows + 1; r < b.rows; ++r) {
        const double line = a.ms + (b.ms - a.ms) * (r - a.rows) / (b.rows - a.rows);
        ASSERT_NEAR(predict(model, r), is_padded ? b.ms : line, 1e-9)
            << "seed " << seed << ", " << r << " rows";
      }
    }
  }
}

TEST(LatencyModel, KeysAddTheirOwnCurve) {
  LatencyProfile profile;
  profile.decode = {{8, 4.0}, {16, 8.0}};
  profile.kv = {{1000, 1.0}, {3000, 2.0}, {4000, 1.5}};
  const LatencyModel model = make(profile);
  EXPECT_DOUBLE_EQ(model.predict({8, 0, 0}), 4.0);
  EXPECT_DOUBLE_EQ(model.predict({8, 0, 500}), 4.5) << "from nothing to the first point";
  EXPECT_DOUBLE_EQ(model.predict({8, 0, 1000}), 5.0);
  EXPECT_DOUBLE_EQ(model.predict({16, 0, 2000}), 9.5);
  EXPECT_DOUBLE_EQ(model.predict({16, 0, 3500}), 9.75);
  EXPECT_DOUBLE_EQ(model.predict({16, 0, 4000}), 9.5);
  EXPECT_DOUBLE_EQ(model.predict({16, 0, 1000000}), 9.5) << "never falling beyond the last";
  profile.kv = {{1000, 1.0}, {3000, 2.0}};
  EXPECT_DOUBLE_EQ(make(profile).predict({8, 0, 7000}), 8.0) << "along the last two";
  profile.kv = {{1000, 1.0}};
  EXPECT_DOUBLE_EQ(make(profile).predict({8, 0, 7000}), 11.0);
}

TEST(LatencyModel, PrefillRowsPullTowardsThePrefillCurve) {
  LatencyProfile profile;
  profile.decode = {{10, 4.0}, {20, 8.0}};
  EXPECT_DOUBLE_EQ(make(profile).predict({20, 20, 0}), 8.0) << "no prefill curve: as decode";
  profile.prefill = {{10, 2.0}, {20, 4.0}};
  const LatencyModel model = make(profile);
  EXPECT_DOUBLE_EQ(model.predict({20, 0, 0}), 8.0);
  EXPECT_DOUBLE_EQ(model.predict({20, 5, 0}), 7.0);
  EXPECT_DOUBLE_EQ(model.predict({20, 10, 0}), 6.0);
  EXPECT_DOUBLE_EQ(model.predict({20, 20, 0}), 4.0);
  EXPECT_DOUBLE_EQ(model.predict({15, 15, 0}), 3.0);
}

TEST(LatencyModel, OverheadIsAddedToThePrediction) {
  LatencyModel model = make({{8, 4.0}});
  for (int i = 0; i < 10; ++i) model.observe_overhead(0.5);
  EXPECT_DOUBLE_EQ(model.overhead_ms(), 0.5);
  EXPECT_DOUBLE_EQ(predict(model, 8), 4.5);
  for (double bad : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (int i = 0; i < 10; ++i) model.observe_overhead(bad);
  }
  EXPECT_DOUBLE_EQ(model.overhead_ms(), 0.5);
  for (int i = 0; i < 10; ++i) model.observe({8, 0, 0}, 4.0);
  EXPECT_DOUBLE_EQ(predict(model, 8), 4.5) << "the forward itself is as measured";
}

TEST(LatencyModel, ProfileIsCheckedAndReplaceable) {
  LatencyModel model;
  EXPECT_FALSE(model.has_profile());
  EXPECT_THROW(predict(model, 1), std::logic_error);
  model.observe({1, 0, 0}, 1.0);  // nothing to correct
  const auto rejects = [&](const std::string& text, LatencyProfile profile) {
    expect_invalid([&] { model.set_profile(profile); }, text);
    EXPECT_FALSE(model.has_profile());
  };
  const auto of = [](std::vector<LatencyProfile::Point> decode,
                     std::vector<LatencyProfile::Point> prefill = {},
                     std::vector<LatencyProfile::KvPoint> kv = {}) {
    LatencyProfile profile;
    profile.decode = decode;
    profile.prefill = prefill;
    profile.kv = kv;
    return profile;
  };
  rejects("decode rows must ascend from 1, got 2 after 2", of({{2, 1.0}, {2, 1.0}}));
  rejects("decode rows must ascend from 1, got 1 after 2", of({{2, 1.0}, {1, 1.0}}));
  rejects("decode rows must ascend from 1, got 0", of({{0, 1.0}}));
  rejects("decode time of 2 rows must be > 0, got 0", of({{2, 0.0}}));
  rejects("decode time of 2 rows must be > 0, got nan", of({{2, std::nan("")}}));
  rejects("prefill time of 3 rows must be > 0, got -1", of({{2, 1.0}}, {{3, -1.0}}));
  rejects("kv_tokens must ascend from 1, got 5 after 5", of({{2, 1.0}}, {}, {{5, 0}, {5, 1}}));
  rejects("extra time of 5 keys must be >= 0, got -1", of({{2, 1.0}}, {}, {{5, -1.0}}));
  rejects("a profile needs decode points", of({}, {{2, 1.0}}));
  rejects("a profile needs decode points", of({}, {}, {{2, 1.0}}));

  model.set_profile(of({{2, 1.0}}));
  for (int i = 0; i < 100; ++i) model.observe({2, 0, 0}, 2.0);
  EXPECT_GT(predict(model, 2), 1.5);
  EXPECT_EQ(model.profile().decode[0].ms, 1.0) << "the profile itself stays as measured";
  model.set_profile(of({{2, 1.0}}));
  EXPECT_DOUBLE_EQ(predict(model, 2), 1.0) << "a new profile starts uncorrected";
  model.set_profile({});
  EXPECT_FALSE(model.has_profile());
}

}  // namespace
}  // namespace optimus
