// LatencyModel: interpolation, extrapolation, online correction and its robustness.
#include "engine/latency_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

namespace optimus {
namespace {

LatencyModel make(std::vector<LatencyModel::Point> points) {
  LatencyModel model;
  model.set_profile(std::move(points));
  return model;
}

TEST(LatencyModel, InterpolatesAndExtrapolates) {
  const LatencyModel model = make({{8, 4.0}, {16, 2.0}, {32, 6.0}});
  EXPECT_DOUBLE_EQ(model.predict(0), 4.0);
  EXPECT_DOUBLE_EQ(model.predict(8), 4.0);
  EXPECT_DOUBLE_EQ(model.predict(12), 3.0) << "a dip that was measured stays";
  EXPECT_DOUBLE_EQ(model.predict(16), 2.0);
  EXPECT_DOUBLE_EQ(model.predict(20), 3.0);
  EXPECT_DOUBLE_EQ(model.predict(32), 6.0);
  EXPECT_DOUBLE_EQ(model.predict(64), 14.0);
}

TEST(LatencyModel, NeverFallsBeyondTheLastPoint) {
  EXPECT_DOUBLE_EQ(make({{8, 4.0}, {16, 2.0}}).predict(1000000), 2.0);
  EXPECT_DOUBLE_EQ(make({{8, 4.0}}).predict(1000000), 4.0);
}

TEST(LatencyModel, ProfileIsCheckedAndReplaceable) {
  LatencyModel model;
  EXPECT_FALSE(model.has_profile());
  EXPECT_THROW(model.predict(1), std::logic_error);
  model.observe(1, 1.0);  // nothing to correct
  EXPECT_THROW(model.set_profile({{2, 1.0}, {2, 1.0}}), std::invalid_argument);
  EXPECT_THROW(model.set_profile({{2, 1.0}, {1, 1.0}}), std::invalid_argument);
  EXPECT_THROW(model.set_profile({{2, 0.0}}), std::invalid_argument);
  EXPECT_THROW(model.set_profile({{2, std::nan("")}}), std::invalid_argument);
  EXPECT_FALSE(model.has_profile());
  model.set_profile({{2, 1.0}});
  for (int i = 0; i < 100; ++i) model.observe(2, 2.0);
  EXPECT_GT(model.predict(2), 1.5);
  model.set_profile({{2, 1.0}});
  EXPECT_DOUBLE_EQ(model.predict(2), 1.0) << "a new profile starts uncorrected";
  model.set_profile({});
  EXPECT_FALSE(model.has_profile());
}

TEST(LatencyModel, CorrectionIsLocalAndConverges) {
  LatencyModel model = make({{10, 1.0}, {20, 2.0}, {30, 3.0}, {40, 4.0}});
  for (int i = 0; i < 400; ++i) model.observe(24, 4.8);  // twice the profile
  EXPECT_NEAR(model.predict(24), 4.8, 0.01);
  EXPECT_GT(model.predict(20), 2.0);
  EXPECT_GT(model.predict(30), 3.0);
  EXPECT_DOUBLE_EQ(model.predict(10), 1.0);
  EXPECT_DOUBLE_EQ(model.predict(40), 4.0);
  EXPECT_EQ(model.profile()[1].ms, 2.0) << "the profile itself stays as measured";
}

TEST(LatencyModel, CorrectionAtAPointMovesThatPointOnly) {
  LatencyModel model = make({{10, 1.0}, {20, 2.0}, {30, 3.0}});
  for (int i = 0; i < 400; ++i) model.observe(20, 1.0);
  EXPECT_NEAR(model.predict(20), 1.0, 0.01);
  EXPECT_DOUBLE_EQ(model.predict(10), 1.0);
  EXPECT_DOUBLE_EQ(model.predict(30), 3.0);
}

TEST(LatencyModel, CorrectionBeyondTheLastPointScalesTheLine) {
  LatencyModel model = make({{10, 1.0}, {20, 2.0}});
  for (int i = 0; i < 400; ++i) model.observe(40, 8.0);  // twice the extrapolation
  EXPECT_NEAR(model.predict(40), 8.0, 0.02);
  EXPECT_NEAR(model.predict(80), 16.0, 0.04);
}

TEST(LatencyModel, OutliersMoveLittle) {
  LatencyModel model = make({{10, 1.0}, {20, 2.0}});
  model.observe(15, 1e6);
  EXPECT_GT(model.predict(15), 1.5);
  EXPECT_LT(model.predict(15), 1.5 * 1.03);
  model = make({{10, 1.0}, {20, 2.0}});
  model.observe(15, 1e-6);
  EXPECT_LT(model.predict(15), 1.5);
  EXPECT_GT(model.predict(15), 1.5 * 0.97);
  const double before = model.predict(15);
  model.observe(15, 0.0);
  model.observe(15, -1.0);
  model.observe(15, std::nan(""));
  model.observe(15, std::numeric_limits<double>::infinity());
  EXPECT_DOUBLE_EQ(model.predict(15), before) << "what is no time is no observation";
}

TEST(LatencyModel, RareOutliersDoNotBias) {
  LatencyModel model = make({{10, 1.0}, {20, 2.0}});
  std::mt19937 random(1);
  for (int i = 0; i < 5000; ++i) model.observe(15, i % 50 == 49 ? 150.0 : 1.5);
  EXPECT_NEAR(model.predict(15), 1.5, 0.05);
}

TEST(LatencyModel, PredictionsStayPositiveWhateverIsObserved) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<LatencyModel::Point> points;
    int rows = 0;
    const int num_points = 1 + static_cast<int>(random() % 6);
    for (int i = 0; i < num_points; ++i) {
      rows += 1 + static_cast<int>(random() % 100);
      points.push_back({rows, 0.01 + static_cast<double>(random() % 1000)});
    }
    LatencyModel model = make(points);
    for (int i = 0; i < 2000; ++i) {
      const double ms = random() % 2 == 0 ? 1e-300 : 1e300;
      model.observe(static_cast<int>(random() % 700), trial % 2 == 0 ? 1e-300 : ms);
    }
    for (int n = 0; n < 1000; n += 7) {
      ASSERT_GT(model.predict(n), 0.0) << "trial " << trial << ", rows " << n;
      ASSERT_TRUE(std::isfinite(model.predict(n)));
    }
  }
}

}  // namespace
}  // namespace optimus
