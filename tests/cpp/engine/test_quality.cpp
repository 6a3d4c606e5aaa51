// QualityFloor: which measured arms are good enough, and what counts between measured points.
#include "engine/quality.h"

#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

// accuracy, upper bound of the difference to block decode
MeasuredArm arm(float threshold, int chunk_length, bool refresh, double accuracy, double upper) {
  return {threshold, chunk_length, refresh, accuracy, upper};
}

std::vector<MeasuredArm> measured() {
  return {arm(0.9f, 2, false, 0.80, -0.01), arm(0.9f, 8, false, 0.90, 0.05),
          arm(0.9f, 32, false, 0.85, 0.00), arm(0.9f, 2, true, 0.92, 0.08),
          arm(0.9f, 8, true, 0.91, 0.07),   arm(0.9f, 32, true, 0.70, -0.10),
          arm(0.7f, 2, false, 0.60, -0.02), arm(0.7f, 8, false, 0.65, 0.01)};
}

TEST(QualityFloor, NothingMeasuredAdmitsEverything) {
  const QualityFloor floor;
  EXPECT_FALSE(floor.is_known());
  EXPECT_TRUE(floor.admits(0.5f, 3, true));
  EXPECT_EQ(floor.accuracy(0.5f, 3, true), -1.0);
  EXPECT_TRUE(QualityFloor({}, 0.99).admits(0.5f, 3, false));
}

TEST(QualityFloor, NotMeasurablyBelowBlockDecoding) {
  const QualityFloor floor(measured(), std::nullopt);
  EXPECT_TRUE(floor.is_known());
  EXPECT_FALSE(floor.admits(0.9f, 2, false));
  EXPECT_TRUE(floor.admits(0.9f, 8, false));
  EXPECT_TRUE(floor.admits(0.9f, 32, false)) << "an upper bound of 0 is not below";
  EXPECT_TRUE(floor.admits(0.9f, 2, true));
  EXPECT_TRUE(floor.admits(0.9f, 8, true));
  EXPECT_FALSE(floor.admits(0.9f, 32, true));
}

TEST(QualityFloor, AbsoluteFloorReadsAccuracies) {
  const QualityFloor floor(measured(), 0.9);
  EXPECT_FALSE(floor.admits(0.9f, 2, false));
  EXPECT_TRUE(floor.admits(0.9f, 8, false)) << "exactly the floor";
  EXPECT_FALSE(floor.admits(0.9f, 32, false));
  EXPECT_TRUE(floor.admits(0.9f, 2, true));
  EXPECT_TRUE(QualityFloor(measured(), 0.0).admits(0.9f, 32, true));
  EXPECT_FALSE(QualityFloor(measured(), 1.0).admits(0.9f, 2, true));
}

TEST(QualityFloor, BetweenLengthsTheLongerOneCounts) {
  const QualityFloor floor(measured(), std::nullopt);
  for (int chunk_length = 1; chunk_length <= 2; ++chunk_length) {
    EXPECT_EQ(floor.accuracy(0.9f, chunk_length, false), 0.80);
  }
  for (int chunk_length = 3; chunk_length <= 8; ++chunk_length) {
    EXPECT_EQ(floor.accuracy(0.9f, chunk_length, false), 0.90);
    EXPECT_TRUE(floor.admits(0.9f, chunk_length, false));
  }
  for (int chunk_length = 9; chunk_length <= 32; ++chunk_length) {
    EXPECT_EQ(floor.accuracy(0.9f, chunk_length, false), 0.85);
    EXPECT_FALSE(floor.admits(0.9f, chunk_length, true));
  }
  EXPECT_EQ(floor.accuracy(0.9f, 64, false), 0.85) << "beyond all: the longest";
}

TEST(QualityFloor, BetweenThresholdsTheLowerOneCounts) {
  const QualityFloor floor(measured(), std::nullopt);
  EXPECT_EQ(floor.accuracy(0.95f, 8, false), 0.90);
  EXPECT_EQ(floor.accuracy(0.9f, 8, false), 0.90);
  EXPECT_EQ(floor.accuracy(0.90005f, 8, false), 0.90) << "as good as the same";
  EXPECT_EQ(floor.accuracy(0.89f, 8, false), 0.65);
  EXPECT_EQ(floor.accuracy(0.7f, 8, false), 0.65);
  EXPECT_EQ(floor.accuracy(0.3f, 8, false), 0.65) << "below all: the lowest";
  EXPECT_EQ(floor.accuracy(0.8f, 8, true), 0.91) << "refresh was measured at 0.9 only";
}

TEST(QualityFloor, ATreatmentThatWasNeverMeasuredIsNotAdmitted) {
  const QualityFloor floor({arm(0.9f, 8, false, 0.9, 0.1)}, std::nullopt);
  EXPECT_TRUE(floor.admits(0.9f, 8, false));
  EXPECT_FALSE(floor.admits(0.9f, 8, true));
  EXPECT_EQ(floor.accuracy(0.9f, 8, true), -1.0);
}

TEST(QualityFloor, OrderOfTheMeasurementsDoesNotMatter) {
  const QualityFloor expected(measured(), std::nullopt);
  for (unsigned seed = 1; seed <= 30; ++seed) {
    Rng rng(seed);
    std::vector<MeasuredArm> arms = measured();
    std::shuffle(arms.begin(), arms.end(), rng);
    const QualityFloor floor(arms, std::nullopt);
    for (float threshold : {0.3f, 0.7f, 0.8f, 0.9f, 0.95f}) {
      for (int chunk_length = 1; chunk_length <= 33; ++chunk_length) {
        for (bool refresh : {false, true}) {
          ASSERT_EQ(floor.accuracy(threshold, chunk_length, refresh),
                    expected.accuracy(threshold, chunk_length, refresh))
              << "seed " << seed << ", threshold " << threshold << ", chunk " << chunk_length;
        }
      }
    }
  }
}

TEST(QualityFloor, BadValuesThrow) {
  expect_invalid([] { QualityFloor({arm(0.9f, 0, false, 0.9, 0)}, std::nullopt); },
                 "chunk_length must be at least 1, got 0");
  expect_invalid([] { QualityFloor({arm(0.9f, 2, false, 1.2, 0)}, std::nullopt); },
                 "accuracy must be between 0 and 1, got 1.2");
  expect_invalid([] { QualityFloor({}, 1.5); }, "the floor must be between 0 and 1, got 1.5");
  expect_invalid([] { QualityFloor({}, std::nan("")); }, "the floor must be between 0 and 1");
}

}  // namespace
}  // namespace optimus
