// RecentMedian and RobustMean: against sorting, and what outliers must not do.
#include "core/robust.h"

#include <cmath>
#include <deque>
#include <limits>

#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

// The upper one of the two middles when the count is even.
double sorted_median(std::deque<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

TEST(RecentMedian, EqualsSortingTheLastValues) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Rng rng(seed);
    RecentMedian<double, 7> median;
    std::deque<double> last;
    EXPECT_EQ(median.median(), 0.0) << "of nothing";
    for (int i = 0; i < 100; ++i) {
      const double value = random_int(rng, -50, 50);
      median.push(value);
      last.push_back(value);
      if (last.size() > 7) last.pop_front();
      ASSERT_EQ(median.count(), static_cast<int>(last.size()));
      ASSERT_EQ(median.is_full(), last.size() == 7);
      ASSERT_EQ(median.median(), sorted_median(last)) << "value " << i;
    }
  }
}

TEST(RecentMedian, ShiftMovesWhatIsRemembered) {
  RecentMedian<double, 5> median;
  for (double value : {1.0, 2.0, 3.0}) median.push(value);
  median.shift(10);
  EXPECT_EQ(median.median(), 12.0);
  for (double value : {1.0, 1.0, 1.0}) median.push(value);  // the first of the shifted is gone
  EXPECT_EQ(median.median(), 1.0);
  median.clear();
  EXPECT_EQ(median.count(), 0);
  EXPECT_EQ(median.median(), 0.0);
}

TEST(RecentMedian, FewerThanHalfDoNotMoveIt) {
  RecentMedian<double, 9> median;
  for (int i = 0; i < 5; ++i) median.push(1.0);
  for (int i = 0; i < 4; ++i) median.push(1e9);
  EXPECT_EQ(median.median(), 1.0);
  median.push(1e9);  // in place of a 1: five of nine
  EXPECT_EQ(median.median(), 1e9);
}

TEST(RobustMean, StartsAtTheFirstValueAndConverges) {
  RobustMean mean(0.1);
  EXPECT_EQ(mean.value(), 0.0);
  mean.push(5.0);
  EXPECT_EQ(mean.value(), 5.0);
  for (int i = 0; i < 100; ++i) mean.push(2.0);
  EXPECT_NEAR(mean.value(), 2.0, 0.001);
}

TEST(RobustMean, AveragesWhatVaries) {
  RobustMean mean(0.05);
  Rng rng(3);
  for (int i = 0; i < 2000; ++i) mean.push(10.0 + 0.01 * random_int(rng, -100, 100));
  EXPECT_NEAR(mean.value(), 10.0, 0.3);
}

TEST(RobustMean, SingleOutliersDoNotMoveIt) {
  RobustMean mean(0.1);
  for (int i = 0; i < 20; ++i) mean.push(1.0);
  for (int i = 0; i < 200; ++i) mean.push(i % 5 == 0 ? 1e6 : 1.0);
  EXPECT_EQ(mean.value(), 1.0);
}

TEST(RobustMean, AnOutlierAtTheStartIsForgotten) {
  RobustMean mean(0.1);
  mean.push(1e6);
  for (int i = 0; i < 4; ++i) mean.push(1.0);
  EXPECT_EQ(mean.value(), 1.0);
}

TEST(RobustMean, WhatIsNoNumberIsIgnored) {
  RobustMean mean(0.1);
  for (int i = 0; i < 5; ++i) mean.push(3.0);
  for (int i = 0; i < 50; ++i) {
    mean.push(std::nan(""));
    mean.push(std::numeric_limits<double>::infinity());
    mean.push(-std::numeric_limits<double>::infinity());
  }
  EXPECT_EQ(mean.value(), 3.0);
}

}  // namespace
}  // namespace optimus
