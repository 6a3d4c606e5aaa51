// CommitModel by chunk length: contexts, the prior and its stretch, learning, forgetting, and what
// yield() guarantees. What masks tell one by one is in test_commit_history.cpp.
#include "engine/commit_model.h"

#include <stdexcept>

#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

const std::vector<int> kLengths = {1, 2, 4, 8, 16, 32};

int add_context(CommitModel& model, float threshold = 0.9f) {
  return model.context(kLowConfidenceDynamic, threshold, 1);
}

double commits(const CommitModel& model, int context, int chunk_length) {
  return model.yield(context, chunk_length).commits;
}

TEST(CommitModel, OneContextPerRule) {
  CommitModel model(32);
  EXPECT_EQ(model.num_contexts(), 0);
  const int dynamic = model.context(kLowConfidenceDynamic, 0.9f, 1);
  EXPECT_EQ(model.context(kLowConfidenceDynamic, 0.9f, 1), dynamic);
  EXPECT_EQ(model.context(kLowConfidenceDynamic, 0.901f, 1), dynamic) << "as good as the same";
  std::vector<int> contexts = {dynamic};
  const auto expect_new = [&](int context) {
    EXPECT_EQ(std::count(contexts.begin(), contexts.end(), context), 0);
    contexts.push_back(context);
  };
  expect_new(model.context(kLowConfidenceDynamic, 0.95f, 1));
  expect_new(model.context(kLowConfidenceDynamic, 0.9f, 4));
  expect_new(model.context(kLowConfidenceStatic, 0.9f, 1));
  expect_new(model.context(kLowConfidenceStatic, 0.9f, 2));
  expect_new(model.context(kEntropyBounded, 0.9f, 1));
  EXPECT_EQ(model.context(kLowConfidenceStatic, 0.3f, 1), contexts[3])
      << "this rule does not read the threshold";
  EXPECT_EQ(model.num_contexts(), static_cast<int>(contexts.size()));
}

TEST(CommitModel, BeyondSixteenContextsTheNearestOneServes) {
  CommitModel model(32);
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(model.context(kLowConfidenceDynamic, 0.05f * i, 1), i);
  }
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(model.context(kLowConfidenceDynamic, 0.05f * i + 0.02f, 1), i);
    EXPECT_EQ(model.context(kLowConfidenceDynamic, 0.05f * i, 7), i);
  }
  EXPECT_EQ(model.context(kLowConfidenceDynamic, 1.0f, 1), 15);
  const int other = model.context(kSequential, 0.5f, 1);
  EXPECT_TRUE(other >= 0 && other < 16) << "no rule like it: any of them";
  EXPECT_EQ(model.num_contexts(), 16);
}

TEST(CommitModel, ContextsLearnApart) {
  CommitModel model(8);
  const int strict = add_context(model, 0.99f), loose = add_context(model, 0.5f);
  const double untouched = commits(model, strict, 4);
  const double untouched_mask = model.probability(strict, 3, {});
  for (int i = 0; i < 1000; ++i) {
    model.observe_step(loose, 4, 4, 4);
    model.observe(loose, 3, {}, true);
  }
  EXPECT_EQ(commits(model, strict, 4), untouched);
  EXPECT_EQ(model.probability(strict, 3, {}), untouched_mask);
  EXPECT_GT(commits(model, loose, 4), 3.9);
  EXPECT_GT(model.probability(loose, 3, {}), 0.95);
}

TEST(CommitModel, PriorFollowsTheMeasuredProfile) {
  CommitModel model(32);
  const int context = add_context(model);
  EXPECT_DOUBLE_EQ(commits(model, context, 1), 1.0);
  EXPECT_NEAR(commits(model, context, 2), 1.95, 0.05);
  EXPECT_NEAR(commits(model, context, 4), 3.4, 0.2);
  EXPECT_NEAR(commits(model, context, 8), 4.6, 0.3);
  EXPECT_NEAR(commits(model, context, 32), 5.5, 0.5);
  for (int c = 2; c <= 32; ++c) {
    const CommitModel::Yield now = model.yield(context, c), before = model.yield(context, c - 1);
    EXPECT_GE(now.commits, before.commits);
    EXPECT_GE(now.masks, before.masks);
    EXPECT_LE(now.commits, now.masks);
  }
  CommitModel small(4);
  EXPECT_LE(commits(small, add_context(small), 32), 4.0) << "a block has no more masks";
}

TEST(CommitModel, RejectsPlacesThatAreNot) {
  EXPECT_THROW(CommitModel(0), std::invalid_argument);
  CommitModel model(4);
  EXPECT_THROW(model.yield(0, 2), std::invalid_argument) << "no context yet";
  const int context = add_context(model);
  EXPECT_THROW(model.yield(context + 1, 2), std::invalid_argument);
  EXPECT_THROW(model.observe_step(-1, 2, 2, 1), std::invalid_argument);
  EXPECT_THROW(model.observe(context, 4, {}, true), std::invalid_argument);
  EXPECT_THROW(model.observe(context, -1, {}, true), std::invalid_argument);
  EXPECT_THROW(model.observe(context + 1, 0, {}, true), std::invalid_argument);
  EXPECT_THROW(model.probability(context, 4, {}), std::invalid_argument);
  std::vector<float> table;
  EXPECT_THROW(model.history_table(1, table), std::invalid_argument);
}

TEST(CommitModel, LearnsEachChunkLengthByItself) {
  CommitModel model(32);
  const int context = add_context(model);
  Rng rng(1);
  const auto truth = [](int c) { return 1 + 0.3 * (c - 1); };  // mean, within +-1
  for (int i = 0; i < 4000; ++i) {
    for (int c : kLengths) {
      const double mean = truth(c);
      const int low = static_cast<int>(mean);
      const int committed = low + (random_int(rng, 0, 999) < 1000 * (mean - low));
      model.observe_step(context, c, c == 1 ? 1 : c - i % 2, committed);
    }
    model.advance(64);
  }
  for (int c : kLengths) {
    const CommitModel::Yield yield = model.yield(context, c);
    EXPECT_NEAR(yield.commits, truth(c), 0.05 * truth(c)) << "chunk " << c;
    EXPECT_NEAR(yield.masks, c == 1 ? 1 : c - 0.5, 0.1) << "chunk " << c;
    EXPECT_GT(yield.steps, 1000);
  }
}

TEST(CommitModel, LengthsOutOfReachFollowTheOthers) {
  // A controller that only ran chunks of 4 must still learn that the model is more, or less,
  // confident than the prior says, or it would never try a larger one.
  for (int committed : {1, 4}) {
    CommitModel model(32);
    const int context = add_context(model);
    std::vector<double> before;
    for (int c : kLengths) before.push_back(commits(model, context, c));
    for (int i = 0; i < 2000; ++i) model.observe_step(context, 4, 4, committed);
    EXPECT_NEAR(commits(model, context, 4), committed, 0.05);
    // By one factor, in odds of a mask to commit.
    const auto odds = [](double share) { return share / (1 - share); };
    double factor = 0;
    for (size_t i : {3, 4, 5}) {
      const CommitModel::Yield yield = model.yield(context, kLengths[i]);
      EXPECT_LT(yield.steps, 1) << "not tried";
      EXPECT_EQ(yield.commits > before[i], committed == 4) << "chunk " << kLengths[i];
      EXPECT_LE(yield.commits, yield.masks);
      const double moved = odds(yield.commits / yield.masks) / odds(before[i] / yield.masks);
      if (factor == 0) factor = moved;
      EXPECT_NEAR(moved / factor, 1, 0.1) << "chunk " << kLengths[i];
    }
    EXPECT_EQ(commits(model, context, 1), 1.0);
    EXPECT_LE(commits(model, context, 2), 2.0);
  }
}

TEST(CommitModel, WhatFewRequestsLearnedGrowsOldSlowly) {
  CommitModel one(32), many(32);
  const int context = add_context(one);
  add_context(many);
  for (int i = 0; i < 1000; ++i) {
    one.observe_step(context, 16, 16, 1);
    many.observe_step(context, 16, 16, 1);
  }
  for (int i = 0; i < 1200; ++i) {
    one.advance(1);
    many.advance(100);
  }
  EXPECT_NEAR(many.yield(context, 16).steps, one.yield(context, 16).steps / std::exp2(1.75), 1);
}

TEST(CommitModel, WhatIsNotUsedGrowsOld) {
  CommitModel model(32);
  const int context = add_context(model);
  for (int i = 0; i < 1000; ++i) model.observe_step(context, 16, 16, 1);
  const double learned = commits(model, context, 16);
  EXPECT_LT(learned, 1.2);
  // The model is used with small chunks, that yield what the prior says.
  double last = learned;
  for (int i = 0; i < 40000; ++i) {
    model.advance(64);
    model.observe_step(context, 2, 2, 2);
    last = commits(model, context, 16);
  }
  EXPECT_GT(last, learned + 1) << "worth another try";
  EXPECT_LE(last, model.yield(context, 16).masks);
}

TEST(CommitModel, FollowsAChangeOfWorkload) {
  CommitModel model(32);
  const int context = add_context(model);
  for (int i = 0; i < 20000; ++i) model.observe_step(context, 8, 8, 8);
  EXPECT_GT(commits(model, context, 8), 7.9);
  int until_half = 0;
  while (commits(model, context, 8) > 4.5) {
    model.observe_step(context, 8, 8, 1);
    ASSERT_LT(++until_half, 10000);
  }
  EXPECT_GE(until_half, 500);
  EXPECT_LE(until_half, 4000);
}

TEST(CommitModel, PriorGivesWayButNotToOneStep) {
  CommitModel model(32);
  const int context = add_context(model);
  const double before = commits(model, context, 32);
  model.observe_step(context, 32, 32, 32);
  EXPECT_LT(commits(model, context, 32), 4 * before);
  for (int i = 0; i < 40; ++i) model.observe_step(context, 32, 16, 6);
  EXPECT_LT(commits(model, context, 32), 1.3 * before) << "as the prior says, after all";
  for (int i = 0; i < 200; ++i) model.observe_step(context, 32, 32, 32);
  EXPECT_GT(commits(model, context, 32), 24);
}

TEST(CommitModel, YieldKeepsItsBoundsWhateverIsObserved) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    Rng rng(seed);
    const int block_length = 1 << random_int(rng, 0, 6);
    CommitModel model(block_length);
    const int context = add_context(model);
    const int ease = random_int(rng, 0, 32);
    for (int i = 0; i < 1000; ++i) {
      const int c = random_int(rng, 1, block_length), masks = random_int(rng, 1, c);
      model.observe_step(context, c, masks, random_int(rng, 0, std::min(masks, ease)));
      if (random_int(rng, 0, 3) == 0) model.advance(64);
    }
    for (int c = 1; c <= block_length; ++c) {
      const CommitModel::Yield yield = model.yield(context, c);
      ASSERT_GE(yield.commits, 1.0) << "seed " << seed << ", chunk " << c;
      ASSERT_LE(yield.commits, c) << "seed " << seed;
      ASSERT_GE(yield.masks, 1.0) << "seed " << seed;
      ASSERT_LE(yield.masks, c) << "seed " << seed;
      ASSERT_GE(yield.steps, 0.0) << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace optimus
