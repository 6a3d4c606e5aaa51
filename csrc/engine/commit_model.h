// How many of the masks a step evaluates will commit, learned from what happened.
//
// Two estimates, both probabilities per mask, kept per *context* (unmasking strategy, threshold and
// quota: what decides a commit):
//   by rank      P(commit | place among the evaluated masks): what a chunk length yields on average
//   by history   P(commit | rank, what the request's last step said): the mask's last confidence, or,
//                for a mask that was not a row yet, how well its request's last step went
// Confidences are bimodal and easy stretches come in runs, so history tells requests apart that
// rank cannot.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace optimus {

// What the last step of a request said about the masks that are left in its block, in order.
struct MaskHistory {
  static constexpr float kUnseen = -1.0f;
  std::vector<float> confidence;  // of the masks that were evaluated and did not commit
  int num_evaluated = 0;          // masks of the last step, 0 = first step of the block
  int num_committed = 0;

  float confidence_of(int rank) const {
    return rank < static_cast<int>(confidence.size()) ? confidence[rank] : kUnseen;
  }
};

class CommitModel {
 public:
  // Prior: the demo model's profile, stretched to block_length.
  explicit CommitModel(int block_length);

  // Index of the statistics for masks that are committed under the same rule.
  int context(UnmaskingStrategy strategy, float threshold, int quota);
  int num_contexts() const { return static_cast<int>(contexts_.size()); }

  // `rank` in [0, block_length): 0 is the first evaluated mask.
  void observe(int context, int rank, const MaskHistory& history, bool committed);

  // P(commit | rank).
  double probability(int context, int rank) const;
  // Expected commits of a step that evaluates the first n masks, for n = 0..block_length, at least 1
  // from n = 1 on and never falling.
  void expected_commits(int context, std::vector<double>& commits_of) const;
  // P(commit | rank, history).
  double probability(int context, int rank, const MaskHistory& history) const;

  // The same for every (rank bin, kind), to look many masks up: [kRankBins * kKinds].
  void history_table(int context, std::vector<float>& table) const;
  static float lookup(const std::vector<float>& table, int rank, const MaskHistory& history) {
    return table[rank_bin(rank) * kKinds + kind(rank, history)];
  }
  // First rank behind those that share a rank bin with `rank`.
  static int rank_bin_end(int rank);

  // Calibration of the history estimate: of all masks predicted in [i/10, (i+1)/10), the sum of
  // predictions, the commits, and how many there were; and the same by rank.
  struct Reliability {
    double predicted = 0, committed = 0, count = 0;
  };
  static constexpr int kReliabilityBins = 10;
  const std::array<Reliability, kReliabilityBins>& reliability() const { return reliability_; }
  const std::vector<Reliability>& reliability_by_rank() const { return reliability_by_rank_; }

 private:
  // Beta counts that fade with the number of newer observations.
  struct Counts {
    float committed = 0, evaluated = 0;
  };
  static constexpr int kRankBins = 9, kKinds = 13;
  struct Context {
    UnmaskingStrategy strategy;
    float threshold;
    int quota;
    std::vector<Counts> by_rank;
    std::vector<double> prior, prior_weight;  // [rank] and the observations it is still worth
    std::array<Counts, kRankBins * kKinds> by_history{};
    double committed = 0, expected = 0;  // sums over ranks above 0; expected by the prior
  };
  static int rank_bin(int rank);
  static int kind(int rank, const MaskHistory& history);
  double prior_scale(const Context& context) const;
  double rank_probability(const Context& context, int rank) const;
  double cell_probability(const Context& context, int bin, int kind) const;
  void check(int context, int rank, const char* what) const;

  int block_length_;
  std::vector<double> prior_;
  std::vector<Context> contexts_;
  std::array<Reliability, kReliabilityBins> reliability_{};
  std::vector<Reliability> reliability_by_rank_;
};

}  // namespace optimus
