// Decayed Beta counts.
//
// Old observations fade with the number of newer ones at the same place, so the model follows a
// change of workload, and a rank that small chunks no longer evaluate keeps what was last known of
// it. Ranks that chunks have not reached yet follow the others: the prior is scaled by how often the
// observed ranks commit compared with it. Otherwise a controller that starts with small chunks on a
// model more confident than the prior would never try a large one. A history cell backs off to its
// rank the same way.
#include "engine/commit_model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kHalfLife = 512;          // observations of a rank
constexpr double kHistoryHalfLife = 1024;  // observations of a history cell
constexpr double kPriorWeight = 16;        // observations
constexpr double kMaxScale = 4;            // of the prior, either way
constexpr int kMaxContexts = 16;
constexpr float kSameThreshold = 0.0025f;
constexpr int kFirstRank[] = {0, 1, 2, 3, 4, 6, 9, 14, 20};  // of each rank bin
constexpr int kTypicalRank[] = {0, 1, 2, 3, 4, 7, 11, 16, 24};

// Measured on the demo model in block mode (bench/commit_profile.py: B = 32, threshold 0.99, 300
// prompts) and made non-increasing: P(commit | offset) at offsets 0, 1, 2, 3, 4, 5, 6, 8, 12, 16.
constexpr struct {
  double offset, probability;
} kPrior[] = {{0, 1.0},  {1, 0.95}, {2, 0.79}, {3, 0.61},   {4, 0.56},
              {5, 0.29}, {6, 0.26}, {8, 0.18}, {12, 0.155}, {16, 0.15}};

double prior_probability(double offset) {
  const auto* right = std::begin(kPrior);
  while (right != std::end(kPrior) && right->offset < offset) ++right;
  if (right == std::end(kPrior)) return std::prev(right)->probability;
  if (right->offset == offset || right == std::begin(kPrior)) return right->probability;
  const auto* left = std::prev(right);
  const double fraction = (offset - left->offset) / (right->offset - left->offset);
  return left->probability + fraction * (right->probability - left->probability);
}

}  // namespace

CommitModel::CommitModel(int block_length) : block_length_(block_length) {
  OPTIMUS_CHECK(block_length > 0, "[commit_model] block_length must be positive, got ",
                block_length);
  for (int rank = 0; rank < block_length; ++rank) prior_.push_back(prior_probability(rank));
  reliability_by_rank_.resize(block_length);
}

int CommitModel::context(UnmaskingStrategy strategy, float threshold, int quota) {
  const bool uses_threshold = strategy == kLowConfidenceDynamic;
  int nearest = -1;
  for (int i = 0; i < num_contexts(); ++i) {
    const Context& known = contexts_[i];
    if (known.strategy != strategy) continue;
    const float distance = uses_threshold ? std::abs(known.threshold - threshold) : 0.0f;
    if (distance <= kSameThreshold && known.quota == quota) return i;
    if (nearest < 0 || distance < std::abs(contexts_[nearest].threshold - threshold)) nearest = i;
  }
  if (num_contexts() >= kMaxContexts) return nearest >= 0 ? nearest : 0;
  Context fresh{strategy, threshold, quota, {}, prior_, {}, {}};
  fresh.by_rank.assign(block_length_, {});
  fresh.prior_weight.assign(block_length_, kPriorWeight);
  contexts_.push_back(std::move(fresh));
  return num_contexts() - 1;
}

void CommitModel::check(int context, int rank, const char* what) const {
  OPTIMUS_CHECK(context >= 0 && context < num_contexts(), "[commit_model] ", what, ": context ",
                context, " is not in [0, ", num_contexts(), ")");
  OPTIMUS_CHECK(rank >= 0 && rank < block_length_, "[commit_model] ", what, ": rank ", rank,
                " is not in [0, ", block_length_, ")");
}

int CommitModel::rank_bin(int rank) {
  static constexpr int8_t kBins[20] = {0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7};
  return rank < 20 ? kBins[rank] : kRankBins - 1;
}

int CommitModel::rank_bin_end(int rank) {
  const int bin = rank_bin(rank);
  return bin == kRankBins - 1 ? kMaxBlockLength : kFirstRank[bin + 1];
}

// Seen masks by their last confidence; others by how the request's last step went, and by whether
// the mask enters right behind a row that did not commit.
int CommitModel::kind(int rank, const MaskHistory& history) {
  constexpr float kConfidence[] = {0.2f, 0.4f, 0.6f, 0.8f, 0.9f, 0.97f};
  constexpr int kNumSeen = 7;
  const float confidence = history.confidence_of(rank);
  if (confidence >= 0) {
    int bin = 0;
    while (bin < kNumSeen - 1 && confidence >= kConfidence[bin]) ++bin;
    return bin;
  }
  if (history.num_evaluated == 0) return kNumSeen;
  const bool all_committed = history.num_committed == history.num_evaluated;
  if (all_committed) return kNumSeen + (history.num_evaluated >= 4 ? 2 : 1);
  const float share = static_cast<float>(history.num_committed) / history.num_evaluated;
  return kNumSeen + (share < 0.25f ? 3 : share < 0.6f ? 4 : 5);
}

// Rank 0 says little about the others: a step commits one mask whatever the threshold.
double CommitModel::prior_scale(const Context& context) const {
  return std::clamp((kPriorWeight + context.committed) / (kPriorWeight + context.expected),
                    1 / kMaxScale, kMaxScale);
}

double CommitModel::rank_probability(const Context& context, int rank) const {
  const double prior =
      rank == 0 ? context.prior[0] : std::min(1.0, context.prior[rank] * prior_scale(context));
  const double weight = context.prior_weight[rank];
  const Counts& counts = context.by_rank[rank];
  return (counts.committed + weight * prior) / (counts.evaluated + weight);
}

double CommitModel::probability(int context, int rank) const {
  check(context, rank, "probability");
  return rank_probability(contexts_[context], rank);
}

void CommitModel::expected_commits(int context, std::vector<double>& commits_of) const {
  check(context, 0, "expected_commits");
  commits_of.resize(block_length_ + 1);
  commits_of[0] = 0;
  double sum = 0;
  for (int rank = 0; rank < block_length_; ++rank) {
    sum += rank_probability(contexts_[context], rank);
    // Every step commits its most confident mask whatever the threshold, at whichever rank.
    commits_of[rank + 1] = std::max(1.0, sum);
  }
}

double CommitModel::cell_probability(const Context& context, int bin, int kind) const {
  const int typical = std::min(block_length_ - 1, kTypicalRank[bin]);
  const Counts& counts = context.by_history[bin * kKinds + kind];
  return (counts.committed + kPriorWeight * rank_probability(context, typical)) /
         (counts.evaluated + kPriorWeight);
}

double CommitModel::probability(int context, int rank, const MaskHistory& history) const {
  check(context, rank, "probability");
  return cell_probability(contexts_[context], rank_bin(rank), kind(rank, history));
}

void CommitModel::history_table(int context, std::vector<float>& table) const {
  check(context, 0, "history_table");
  table.resize(kRankBins * kKinds);
  for (int bin = 0; bin < kRankBins; ++bin) {
    for (int kind = 0; kind < kKinds; ++kind) {
      table[bin * kKinds + kind] =
          static_cast<float>(cell_probability(contexts_[context], bin, kind));
    }
  }
}

void CommitModel::observe(int context, int rank, const MaskHistory& history, bool committed) {
  static const float kDecay = static_cast<float>(std::exp2(-1.0 / kHalfLife));
  static const float kHistoryDecay = static_cast<float>(std::exp2(-1.0 / kHistoryHalfLife));
  const double predicted = probability(context, rank, history);
  const int bin = std::min(static_cast<int>(predicted * kReliabilityBins), kReliabilityBins - 1);
  for (Reliability* r : {&reliability_[bin], &reliability_by_rank_[rank]}) {
    r->predicted += predicted;
    r->committed += committed;
    r->count += 1;
  }
  Context& c = contexts_[context];
  const auto add = [committed](Counts& counts, float decay) {
    counts.evaluated = counts.evaluated * decay + 1.0f;
    counts.committed = counts.committed * decay + (committed ? 1.0f : 0.0f);
  };
  Counts& counts = c.by_rank[rank];
  const Counts before = counts;
  add(counts, kDecay);
  if (rank > 0) {
    c.committed += counts.committed - before.committed;
    c.expected += (counts.evaluated - before.evaluated) * c.prior[rank];
  }
  add(c.by_history[rank_bin(rank) * kKinds + kind(rank, history)], kHistoryDecay);
  c.prior_weight[rank] *= kDecay;
}

}  // namespace optimus
