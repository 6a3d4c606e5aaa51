// LatencyModel::observe: a lasting change is followed at once and for every row count, single slow
// steps and clocks that jump change nothing, and the shape follows where steps are really run.
#include "engine/latency_model.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

LatencyProfile flat_then_linear(bool is_padded = false) {
  LatencyProfile profile;
  for (int rows = 16; rows <= 512; rows += 16) {
    profile.decode.push_back({rows, 4.0 + 0.02 * std::max(0, rows - 128)});
  }
  profile.is_padded = is_padded;
  return profile;
}

LatencyModel fresh(bool is_padded = false) {
  LatencyModel model;
  model.set_profile(flat_then_linear(is_padded));
  return model;
}

double true_ms(int rows, bool is_padded = false) {
  return flat_then_linear(is_padded).ms({rows, 0, 0});
}

// Steps of random sizes that take what the profile says, times `factor`.
void run(LatencyModel& model, Rng& rng, int steps, double factor = 1.0, double noise = 0.0) {
  std::normal_distribution<> normal(0, 1);
  for (int i = 0; i < steps; ++i) {
    const int rows = random_int(rng, 1, 500);
    model.observe({rows, 0, 0}, true_ms(rows) * factor * std::exp(noise * normal(rng)));
  }
}

TEST(LatencyOnline, OneSlowStepMovesNothingWheneverItComes) {
  for (int before : {0, 1, 2, 5, 8, 20, 200}) {
    for (double factor : {20.0, 1e6, 0.05}) {
      for (bool is_padded : {false, true}) {
        SCOPED_TRACE(std::to_string(before) + " steps before");
        LatencyModel model = fresh(is_padded);
        Rng rng(before + 1);
        for (int i = 0; i < before; ++i) {
          model.observe({200, 0, 0}, true_ms(200, is_padded));
        }
        model.observe({200, 0, 0}, factor * true_ms(200, is_padded));
        for (int rows : {16, 100, 192, 200, 208, 500}) {
          const double expected = true_ms(rows, is_padded);
          EXPECT_NEAR(model.predict({rows, 0, 0}), expected, 0.02 * expected) << rows << " rows";
        }
        model.observe({200, 0, 0}, true_ms(200, is_padded));
        EXPECT_NEAR(model.predict({200, 0, 0}), true_ms(200, is_padded), 0.08);
      }
    }
  }
}

TEST(LatencyOnline, RareSlowStepsDoNotBias) {
  LatencyModel model = fresh();
  Rng rng(2);
  for (int i = 0; i < 5000; ++i) {
    const int rows = random_int(rng, 1, 500);
    model.observe({rows, 0, 0}, true_ms(rows) * (i % 50 == 49 ? 20.0 : 1.0));
    for (int probe : {16, 100, 200, 500}) {
      const double expected = true_ms(probe);
      ASSERT_NEAR(model.predict({probe, 0, 0}), expected, 0.02 * expected) << "step " << i;
    }
  }
}

TEST(LatencyOnline, LastingChangeIsFollowedAtEverySize) {
  for (double factor : {1.7, 0.6, 1.2}) {
    for (int before : {0, 3, 100}) {
      SCOPED_TRACE("factor " + std::to_string(factor) + " after " + std::to_string(before));
      LatencyModel model = fresh();
      Rng rng(3);
      run(model, rng, before);
      for (int i = 0; i < 12; ++i) model.observe({200, 0, 0}, factor * true_ms(200));
      for (int rows : {1, 16, 100, 200, 300, 512, 1000}) {  // only 200 was run
        const double expected = factor * true_ms(rows);
        EXPECT_NEAR(model.predict({rows, 0, 0}), expected, 0.03 * expected) << rows << " rows";
      }
    }
  }
}

TEST(LatencyOnline, ComesBackWhenTheNeighbourLeaves) {
  LatencyModel model = fresh();
  Rng rng(4);
  run(model, rng, 50, 1.0, 0.02);
  run(model, rng, 50, 1.7, 0.02);
  EXPECT_NEAR(model.predict({100, 0, 0}), 1.7 * true_ms(100), 0.05 * 1.7 * true_ms(100));
  run(model, rng, 15, 1.0, 0.02);
  EXPECT_NEAR(model.predict({100, 0, 0}), true_ms(100), 0.05 * true_ms(100));
}

TEST(LatencyOnline, NoiseDoesNotAddUp) {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    LatencyModel model = fresh();
    Rng rng(seed);
    run(model, rng, 3000, 1.0, 0.05);
    for (int rows = 8; rows <= 500; rows += 12) {
      ASSERT_NEAR(model.predict({rows, 0, 0}), true_ms(rows), 0.06 * true_ms(rows))
          << "seed " << seed << ", " << rows << " rows";
    }
  }
}

TEST(LatencyOnline, ShapeFollowsWhereStepsAreRun) {
  for (bool is_padded : {false, true}) {
    LatencyModel model = fresh(is_padded);
    const double profiled = true_ms(300, is_padded);
    // As profiled at two sizes, 20% slower at a third.
    for (int i = 0; i < 2000; ++i) {
      const int rows = i % 3 == 0 ? 64 : i % 3 == 1 ? 160 : 304;
      model.observe({rows, 0, 0}, true_ms(rows, is_padded) * (rows == 304 ? 1.2 : 1.0));
    }
    EXPECT_NEAR(model.predict({304, 0, 0}), 1.2 * profiled, 0.04 * profiled);
    EXPECT_NEAR(model.predict({64, 0, 0}), true_ms(64), 0.03 * true_ms(64));
    EXPECT_NEAR(model.predict({160, 0, 0}), true_ms(160), 0.03 * true_ms(160));
    EXPECT_NEAR(model.predict({480, 0, 0}), true_ms(480), 0.03 * true_ms(480));
  }
}

TEST(LatencyOnline, NonMonotoneCurveStaysAsMeasured) {
  LatencyProfile profile;
  profile.decode = {{16, 5.0}, {32, 9.0}, {64, 4.0}, {128, 12.0}, {256, 11.0}};
  for (bool is_padded : {false, true}) {
    profile.is_padded = is_padded;
    LatencyModel model;
    model.set_profile(profile);
    Rng rng(5);
    for (int i = 0; i < 1000; ++i) {
      const int rows = random_int(rng, 1, 256);
      model.observe({rows, 0, 0}, profile.ms({rows, 0, 0}));
    }
    for (int rows = 1; rows <= 256; ++rows) {
      ASSERT_NEAR(model.predict({rows, 0, 0}), profile.ms({rows, 0, 0}), 1e-9);
    }
  }
}

TEST(LatencyOnline, WhatIsNoTimeIsNoObservation) {
  LatencyModel model = fresh();
  Rng rng(6);
  run(model, rng, 100, 1.3, 0.05);
  const double before = model.predict({200, 0, 0}), error = model.relative_error(200);
  for (int i = 0; i < 20; ++i) {
    for (double bad : {0.0, -5.0, std::nan(""), std::numeric_limits<double>::infinity(),
                       -std::numeric_limits<double>::infinity()}) {
      model.observe({200, 0, 0}, bad);
    }
  }
  EXPECT_EQ(model.predict({200, 0, 0}), before);
  EXPECT_EQ(model.relative_error(200), error);
}

TEST(LatencyOnline, RelativeErrorSaysHowGoodPredictionsAre) {
  Rng rng(7);
  LatencyModel exact = fresh(), noisy = fresh(), bad = fresh();
  run(exact, rng, 300);
  run(noisy, rng, 300, 1.0, 0.05);
  run(bad, rng, 300, 1.0, 0.4);
  EXPECT_LT(exact.relative_error(200), 0.01);
  EXPECT_NEAR(noisy.relative_error(200), 0.05, 0.02) << "about the standard deviation";
  EXPECT_GT(bad.relative_error(200), 0.2);
  const double calm = exact.relative_error(200);
  for (int i = 0; i < 3; ++i) exact.observe({200, 0, 0}, 2 * true_ms(200));
  EXPECT_GT(exact.relative_error(200), calm + 0.02) << "surprises count at once";
  EXPECT_GT(noisy.relative_error(1024), noisy.relative_error(512)) << "beyond what was measured";
  EXPECT_GT(noisy.relative_error(4096), noisy.relative_error(1024));
}

TEST(LatencyOnline, PredictionsStayPositiveWhateverIsObserved) {
  Rng rng(8);
  for (int trial = 0; trial < 20; ++trial) {
    LatencyProfile profile;
    int rows = 0;
    for (int i = random_int(rng, 1, 6); i > 0; --i) {
      rows += random_int(rng, 1, 100);
      profile.decode.push_back({rows, 0.01 + random_int(rng, 0, 1000)});
    }
    profile.is_padded = trial % 3 == 0;
    LatencyModel model;
    model.set_profile(profile);
    for (int i = 0; i < 2000; ++i) {
      const double ms = trial % 2 == 0 || random_int(rng, 0, 1) ? 1e-300 : 1e300;
      model.observe({random_int(rng, 0, 700), 0, random_int(rng, 0, 100000)}, ms);
    }
    for (int n = 0; n < 1000; n += 7) {
      ASSERT_GT(model.predict({n, 0, 0}), 0.0) << "trial " << trial << ", rows " << n;
      ASSERT_TRUE(std::isfinite(model.predict({n, 0, 0})));
      ASSERT_TRUE(std::isfinite(model.relative_error(n)));
    }
  }
}

}  // namespace
}  // namespace optimus
