// Decayed Beta counts per rank.
//
// Old observations fade with the number of newer ones at the same rank, so the model follows a
// change of workload, and a rank that small chunks no longer evaluate keeps what was last known of
// it. The prior is a handful of pseudo-observations that fade in the same way.
#include "engine/commit_model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kHalfLife = 256;    // observations of a rank
constexpr double kPriorWeight = 16;  // observations
constexpr double kMaxScale = 4;      // of the prior, either way

// Measured on a prototype of the demo model (B = 32, threshold 0.9): 1.0 for the 1st mask, about 0.65 for the 2nd,
// 0.4 for the 4th, 0.25 for the 8th, 0.12 for the 16th, 0.05 for the 32nd. A power law with an
// exponential tail is within 0.015 of all of them.
double prior_probability(int rank) { return std::pow(rank + 1.0, -0.6) * std::exp(-rank / 36.0); }

}  // namespace

CommitModel::CommitModel(int block_length) {
  OPTIMUS_CHECK(block_length > 0, "[commit_model] block_length must be positive, got ",
                block_length);
  committed_.assign(block_length, 0.0);
  evaluated_.assign(block_length, 0.0);
  prior_weight_.assign(block_length, kPriorWeight);
  for (int rank = 0; rank < block_length; ++rank) prior_.push_back(prior_probability(rank));
}

void CommitModel::check_rank(int rank, const char* what) const {
  OPTIMUS_CHECK(rank >= 0 && rank < static_cast<int>(evaluated_.size()), "[commit_model] ", what,
                ": rank ", rank, " is not in [0, ", evaluated_.size(), ")");
}

void CommitModel::observe(int rank, bool committed) {
  check_rank(rank, "observe");
  static const double kDecay = std::exp2(-1.0 / kHalfLife);
  evaluated_[rank] = evaluated_[rank] * kDecay + 1.0;
  committed_[rank] = committed_[rank] * kDecay + (committed ? 1.0 : 0.0);
  prior_weight_[rank] *= kDecay;
}

// Rank 0 says little about the others: a step commits one mask whatever the threshold.
double CommitModel::prior_scale() const {
  double committed = kPriorWeight, expected = kPriorWeight;
  for (size_t rank = 1; rank < evaluated_.size(); ++rank) {
    committed += committed_[rank];
    expected += evaluated_[rank] * prior_[rank];
  }
  return std::clamp(committed / expected, 1 / kMaxScale, kMaxScale);
}

double CommitModel::probability(int rank, double scale) const {
  double prior = rank == 0 ? prior_[0] : std::min(1.0, prior_[rank] * scale);
  double weight = prior_weight_[rank];
  return (committed_[rank] + weight * prior) / (evaluated_[rank] + weight);
}

double CommitModel::probability(int rank) const {
  check_rank(rank, "probability");
  return probability(rank, prior_scale());
}

double CommitModel::expected_commits(int chunk_length) const {
  if (chunk_length <= 0) return 0.0;
  const int num_masks = std::min(chunk_length, static_cast<int>(evaluated_.size()));
  double sum = 0.0, scale = prior_scale();
  for (int rank = 0; rank < num_masks; ++rank) sum += probability(rank, scale);
  // Every step commits its most confident mask whatever the threshold, at whichever rank.
  return std::max(1.0, sum);
}

}  // namespace optimus
