// CommitModel by history: what the request's last step said tells easy masks from hard ones; and the
// calibration record that says whether to believe it.
#include <numeric>

#include "engine/commit_model.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

int add_context(CommitModel& model) { return model.context(kLowConfidenceDynamic, 0.9f, 1); }

MaskHistory seen(std::vector<float> confidence, int num_committed = 1) {
  MaskHistory history;
  history.num_evaluated = static_cast<int>(confidence.size()) + num_committed;
  history.num_committed = num_committed;
  history.confidence = std::move(confidence);
  return history;
}

MaskHistory unseen(int num_evaluated, int num_committed) {
  MaskHistory history;
  history.num_evaluated = num_evaluated;
  history.num_committed = num_committed;
  return history;
}

TEST(CommitHistory, ConfidenceOfMasksThatWereNotEvaluatedIsUnseen) {
  const MaskHistory history = seen({0.3f, 0.7f});
  EXPECT_EQ(history.confidence_of(0), 0.3f);
  EXPECT_EQ(history.confidence_of(1), 0.7f);
  EXPECT_EQ(history.confidence_of(2), MaskHistory::kUnseen);
  EXPECT_EQ(MaskHistory().confidence_of(0), MaskHistory::kUnseen);
}

TEST(CommitHistory, PaceFollowsTheLastSteps) {
  MaskHistory easy = unseen(16, 8), hard = unseen(16, 1), limited = unseen(4, 4);
  limited.pace = 6;
  for (int step = 0; step < 20; ++step) {
    easy.advance_pace();
    hard.advance_pace();
    limited.advance_pace();
  }
  EXPECT_NEAR(easy.pace, 8, 0.1);
  EXPECT_NEAR(hard.pace, 1, 0.1);
  EXPECT_EQ(limited.pace, 6) << "a small chunk that commits whole says nothing of the pace";
}

TEST(CommitHistory, ATableDoubtsWhatWasHardlySeen) {
  CommitModel model(32);
  const int context = add_context(model);
  std::vector<float> table;
  model.history_table(context, table);
  const MaskHistory history = unseen(8, 1);
  EXPECT_GT(CommitModel::lookup(table, 9, history), model.probability(context, 9, history) + 0.02);
  for (int i = 0; i < 4000; ++i) model.observe(context, 9, history, false);
  model.history_table(context, table);
  EXPECT_LT(CommitModel::lookup(table, 9, history), 0.002);
}

// Two kinds of requests whose last steps look alike: only their pace, or what is known behind the
// first mask, tells them apart.
TEST(CommitHistory, TellsRequestsApartByPaceAndByWhatIsKnownAhead) {
  for (bool by_pace : {true, false}) {
    CommitModel model(32);
    const int context = add_context(model);
    Rng rng(5);
    std::uniform_real_distribution<double> uniform;
    MaskHistory easy = unseen(8, 4), hard = easy;
    if (by_pace) {
      easy.pace = 7;
    } else {
      easy.num_known_ahead = 4;
    }
    for (int i = 0; i < 4000; ++i) {
      model.observe(context, 3, easy, uniform(rng) < 0.9);
      model.observe(context, 3, hard, uniform(rng) < 0.2);
    }
    std::vector<float> table;
    model.history_table(context, table);
    for (const auto& [history, expected] : {std::pair(easy, 0.9), std::pair(hard, 0.2)}) {
      EXPECT_NEAR(model.probability(context, 3, history), expected, 0.05);
      EXPECT_NEAR(CommitModel::lookup(table, 3, history), model.probability(context, 3, history),
                  0.001);
    }
  }
}

// A mask commits with a probability that is a step function of its last confidence: the steps of
// the truth are those of the bins, and every bin is met with several confidences.
double truth(float confidence) {
  if (confidence < 0.2f) return 0.02;
  if (confidence < 0.4f) return 0.1;
  if (confidence < 0.6f) return 0.25;
  if (confidence < 0.8f) return 0.5;
  if (confidence < 0.9f) return 0.7;
  if (confidence < 0.97f) return 0.9;
  return 0.97;
}

TEST(CommitHistory, LearnsWhatTheLastConfidenceMeans) {
  for (unsigned seed : {1u, 2u, 3u}) {
    CommitModel model(32);
    const int context = add_context(model);
    Rng rng(seed);
    std::uniform_real_distribution<float> uniform;
    for (int i = 0; i < 20000; ++i) {
      std::vector<float> confidence(8);
      for (float& c : confidence) c = uniform(rng);
      const MaskHistory history = seen(confidence);
      for (int rank = 0; rank < 8; ++rank) {
        model.observe(context, rank, history, uniform(rng) < truth(confidence[rank]));
      }
    }
    for (float confidence : {0.05f, 0.3f, 0.5f, 0.7f, 0.85f, 0.95f, 0.99f}) {
      const MaskHistory history = seen(std::vector<float>(8, confidence));
      for (int rank = 0; rank < 8; ++rank) {
        EXPECT_NEAR(model.probability(context, rank, history), truth(confidence), 0.05)
            << "seed " << seed << ", rank " << rank << ", confidence " << confidence;
      }
    }
  }
}

TEST(CommitHistory, TellsEasyRequestsFromHardOnes) {
  // Easy requests commit what they evaluate, hard ones one mask a step. By rank they look alike.
  CommitModel model(32);
  const int context = add_context(model);
  const MaskHistory easy = unseen(8, 8), hard = unseen(8, 1);
  for (int i = 0; i < 3000; ++i) {
    for (int rank = 0; rank < 8; ++rank) {
      model.observe(context, rank, easy, true);
      model.observe(context, rank, hard, rank == 0);
    }
  }
  for (int rank = 1; rank < 8; ++rank) {
    EXPECT_GT(model.probability(context, rank, easy), 0.95) << "rank " << rank;
    EXPECT_LT(model.probability(context, rank, hard), 0.05) << "rank " << rank;
    EXPECT_NEAR(model.probability(context, rank, MaskHistory()), 0.5, 0.05) << "rank " << rank;
  }
}

TEST(CommitHistory, AnUntrainedCellSaysWhatTheRankSays) {
  CommitModel model(32);
  const int context = add_context(model);
  // The prior, measured on the demo model in block mode.
  EXPECT_DOUBLE_EQ(model.probability(context, 0, {}), 1.0);
  EXPECT_NEAR(model.probability(context, 1, {}), 0.98, 0.02);
  EXPECT_NEAR(model.probability(context, 3, {}), 0.58, 0.03);
  EXPECT_NEAR(model.probability(context, 31, {}), 0.15, 0.02);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_DOUBLE_EQ(model.probability(context, rank, unseen(8, 3)),
                     model.probability(context, rank, {}));
  }
  for (int i = 0; i < 2000; ++i) model.observe(context, 2, unseen(8, 8), i % 10 < 3);
  EXPECT_NEAR(model.probability(context, 2, unseen(8, 1)), 0.3, 0.05);
  EXPECT_NEAR(model.probability(context, 3, unseen(8, 1)), 0.58, 0.03) << "another rank";
}

TEST(CommitHistory, TableIsTheProbabilitiesAndSomeDoubt) {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    Rng rng(seed);
    CommitModel model(32);
    const int context = add_context(model);
    const auto random_history = [&] {
      std::vector<float> confidence(random_int(rng, 0, 12));
      for (float& c : confidence) c = 0.01f * random_int(rng, 0, 100);
      return seen(confidence, random_int(rng, 0, 8));
    };
    for (int i = 0; i < 500; ++i) {
      model.observe(context, random_int(rng, 0, 31), random_history(), random_int(rng, 0, 1));
    }
    std::vector<float> table;
    model.history_table(context, table);
    for (int i = 0; i < 100; ++i) {
      const MaskHistory history = random_history();
      const int rank = random_int(rng, 0, 31);
      const double p = model.probability(context, rank, history);
      ASSERT_TRUE(p >= 0 && p <= 1);
      const double looked_up = CommitModel::lookup(table, rank, history);
      ASSERT_GE(looked_up, p - 1e-6) << "seed " << seed;
      ASSERT_LE(looked_up, std::min(1.0, p + CommitModel::kDoubt) + 1e-6) << "seed " << seed;
      const int end = CommitModel::rank_bin_end(rank);
      ASSERT_GT(end, rank);
      const MaskHistory none;
      for (int same = rank; same < std::min(end, 32); ++same) {
        ASSERT_EQ(CommitModel::lookup(table, same, none), CommitModel::lookup(table, rank, none));
      }
    }
  }
}

TEST(CommitHistory, CalibrationAddsUp) {
  CommitModel model(16);
  const int context = add_context(model);
  Rng rng(5);
  std::uniform_real_distribution<float> uniform;
  double predicted = 0, committed = 0;
  constexpr int kObservations = 20000;
  auto untrained = model.reliability();
  for (int i = 0; i < kObservations; ++i) {
    if (i == kObservations / 2) untrained = model.reliability();
    std::vector<float> confidence(8);
    for (float& c : confidence) c = uniform(rng);
    const MaskHistory history = seen(confidence);
    const int rank = random_int(rng, 0, 15);
    const bool commits = uniform(rng) < (rank < 8 ? truth(confidence[rank]) : 0.1);
    predicted += model.probability(context, rank, history);
    committed += commits;
    model.observe(context, rank, history, commits);
  }
  const auto expect_sums = [&](const auto& bins) {
    CommitModel::Reliability sum;
    for (const CommitModel::Reliability& bin : bins) {
      sum.predicted += bin.predicted;
      sum.committed += bin.committed;
      sum.count += bin.count;
    }
    EXPECT_NEAR(sum.predicted, predicted, 1e-6 * predicted);
    EXPECT_EQ(sum.committed, committed);
    EXPECT_EQ(sum.count, kObservations);
  };
  expect_sums(model.reliability());
  expect_sums(model.reliability_by_rank());
  for (int i = 0; i < CommitModel::kReliabilityBins; ++i) {
    const CommitModel::Reliability& bin = model.reliability()[i];
    if (bin.count == 0) continue;
    EXPECT_GE(bin.predicted / bin.count, 0.1 * i - 1e-9);
    EXPECT_LE(bin.predicted / bin.count, 0.1 * (i + 1) + 1e-9);
    // Once trained, what was predicted is what happens.
    const double count = bin.count - untrained[i].count;
    if (count < 300) continue;
    EXPECT_NEAR((bin.predicted - untrained[i].predicted) / count,
                (bin.committed - untrained[i].committed) / count, 0.1)
        << "bin " << i;
  }
  for (int rank = 0; rank < 16; ++rank) EXPECT_GT(model.reliability_by_rank()[rank].count, 1000);
}

}  // namespace
}  // namespace optimus
