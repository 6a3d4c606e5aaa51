// CommitModel: the prior, learning, forgetting, and what expected_commits guarantees.
#include "engine/commit_model.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <vector>

namespace optimus {
namespace {

TEST(CommitModel, PriorFollowsTheMeasuredProfile) {
  const CommitModel model(32);
  EXPECT_DOUBLE_EQ(model.probability(0), 1.0);
  EXPECT_NEAR(model.probability(1), 0.65, 0.02);
  EXPECT_NEAR(model.probability(3), 0.40, 0.02);
  EXPECT_NEAR(model.probability(7), 0.25, 0.02);
  EXPECT_NEAR(model.probability(15), 0.12, 0.02);
  EXPECT_NEAR(model.probability(31), 0.05, 0.02);
  for (int rank = 1; rank < 32; ++rank) {
    EXPECT_LT(model.probability(rank), model.probability(rank - 1));
  }
}

TEST(CommitModel, ExpectedCommitsSumTheRanks) {
  const CommitModel model(8);
  EXPECT_EQ(model.expected_commits(0), 0.0);
  EXPECT_EQ(model.expected_commits(-1), 0.0);
  double sum = 0;
  for (int n = 1; n <= 8; ++n) {
    sum += model.probability(n - 1);
    EXPECT_DOUBLE_EQ(model.expected_commits(n), sum);
  }
  EXPECT_DOUBLE_EQ(model.expected_commits(100), sum) << "a block has no more masks";
}

TEST(CommitModel, RejectsRanksOutsideTheBlock) {
  EXPECT_THROW(CommitModel(0), std::invalid_argument);
  CommitModel model(4);
  EXPECT_THROW(model.observe(4, true), std::invalid_argument);
  EXPECT_THROW(model.observe(-1, true), std::invalid_argument);
  EXPECT_THROW(model.probability(4), std::invalid_argument);
}

TEST(CommitModel, LearnsEachRankByItself) {
  const std::vector<double> truth = {0.9, 0.2, 0.7, 0.05};
  CommitModel model(5);
  const double untouched = model.probability(4);
  const double prior_sum = model.probability(1) + model.probability(2) + model.probability(3);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < 4000; ++i) {
    for (int rank = 0; rank < 4; ++rank) model.observe(rank, uniform(random) < truth[rank]);
  }
  // A window of some 370 observations: a standard deviation of at most 0.02.
  for (int rank = 0; rank < 4; ++rank) EXPECT_NEAR(model.probability(rank), truth[rank], 0.07);
  // A rank that was never evaluated follows the others, ranks 1 to 3 of `truth` against the prior.
  EXPECT_NEAR(model.probability(4), untouched * 0.95 / prior_sum, 0.05);
}

TEST(CommitModel, HalfOfTheMemoryIsAFewHundredObservations) {
  CommitModel model(1);
  for (int i = 0; i < 10000; ++i) model.observe(0, true);
  EXPECT_GT(model.probability(0), 0.999);
  int until_half = 0;
  while (model.probability(0) > 0.5) {
    model.observe(0, false);
    ASSERT_LT(++until_half, 1000);
  }
  EXPECT_GE(until_half, 200);
  EXPECT_LE(until_half, 400);
}

TEST(CommitModel, PriorGivesWayButNotToOneObservation) {
  CommitModel model(32);
  model.observe(31, true);
  EXPECT_LT(model.probability(31), 0.15);
  for (int i = 0; i < 100; ++i) model.observe(31, true);
  EXPECT_GT(model.probability(31), 0.8);
}

TEST(CommitModel, ExpectedCommitsIsMonotoneAndAtLeastOne) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 50; ++trial) {
    CommitModel model(16);
    // From "nothing ever commits" to "everything does", and ranks in disorder.
    for (int i = 0; i < 3000; ++i) {
      model.observe(static_cast<int>(random() % 16),
                    static_cast<int>(random() % 49) < trial - (i % 2));
    }
    double previous = 1.0;
    for (int n = 1; n <= 20; ++n) {
      const double expected = model.expected_commits(n);
      ASSERT_GE(expected, previous);
      ASSERT_LE(expected, n);
      previous = expected;
    }
    for (int rank = 0; rank < 16; ++rank) {
      ASSERT_GE(model.probability(rank), 0.0);
      ASSERT_LE(model.probability(rank), 1.0);
    }
  }
}

TEST(CommitModel, AStepCommitsOneEvenWhereNoRankDoes) {
  CommitModel model(4);
  for (int i = 0; i < 10000; ++i) model.observe(0, false);
  EXPECT_LT(model.probability(0), 0.01);
  EXPECT_DOUBLE_EQ(model.expected_commits(1), 1.0);
}

}  // namespace
}  // namespace optimus
