// How many of the masks a step evaluates will commit, learned from what happened.
//
// Two estimates, kept per *context* (unmasking strategy, threshold and quota: what decides a commit):
//   yield        commits and evaluated masks of a request and step, in the steady state of decoding
//                with a chunk length. Measured for each chunk length by itself: large chunks swallow
//                easy stretches in one step and meet what is left of a block more often, so what one
//                chunk length sees does not tell what another would see.
//   probability  P(accepted by the rule | rank of the mask, what the request's last steps said): the
//                mask's last confidence, or, for a mask that was not a row yet, how well that step
//                went; how much behind the first mask is known; and the request's pace. Confidences are bimodal, easy stretches come in runs
//                and easy requests stay easy: this tells requests apart. The one commit that a step
//                makes when its rule accepts nothing does not count.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace optimus {

// What the last step of a request said about the masks that are left in its block, in order.
struct MaskHistory {
  static constexpr float kUnseen = -1.0f;
  std::vector<float> confidence;  // of the masks that were evaluated and did not commit
  int num_evaluated = 0;          // masks of the last step, 0 = none yet
  int num_committed = 0;
  int num_known_ahead = 0;  // positions of the block that are known though a mask precedes them
  float pace = 2.0f;        // commits of a step, the request's recent ones: easy answers stay easy

  // After a step. Where all masks committed, more might have: that does not lower the pace.
  void advance_pace() {
    const float seen = static_cast<float>(num_committed);
    const bool is_bound = num_committed < num_evaluated;
    pace += 0.3f * ((is_bound ? seen : std::max(pace, seen + 1)) - pace);
  }

  float confidence_of(int rank) const {
    return rank < static_cast<int>(confidence.size()) ? confidence[rank] : kUnseen;
  }
};

class CommitModel {
 public:
  // Priors: measured on the demo model.
  explicit CommitModel(int block_length);

  // Index of the statistics for masks that are committed under the same rule.
  int context(UnmaskingStrategy strategy, float threshold, int quota);
  int num_contexts() const { return static_cast<int>(contexts_.size()); }

  // Per request and step; commits that nobody wanted do not count.
  struct Yield {
    double commits = 1, masks = 1;
    double steps = 0;  // that this was learned from, as far as they still count
  };
  // Expected of decoding with `chunk_length`; commits >= 1, masks <= chunk_length.
  Yield yield(int context, int chunk_length) const;
  // One request's step, the step before having had the same chunk length.
  void observe_step(int context, int chunk_length, int num_masks, int num_commits);
  // A request has ended: of its commits, `num_wasted` lay behind its last token.
  void observe_waste(int context, int chunk_length, int num_wasted);
  // Once per step: what was learned of chunk lengths that are not in use grows old, and slowly where
  // it is few requests that would have to learn it again.
  void advance(int num_requests) { age_ += std::min(1.0, num_requests / kManyRequests); }

  // P(commit | rank, history); `rank` in [0, block_length): 0 is the first evaluated mask.
  double probability(int context, int rank, const MaskHistory& history) const;
  void observe(int context, int rank, const MaskHistory& history, bool committed);
  // Where observations of a request's masks are counted: an index for each rank.
  class Cells {
   public:
    explicit Cells(const MaskHistory& history);
    int num_seen() const { return num_seen_; }
    int operator[](int rank) const {
      const float confidence = rank < num_seen_ ? confidence_[rank] : MaskHistory::kUnseen;
      const int kind = confidence >= 0 ? seen_kind(confidence) : unseen_kind_;
      return (rank_bin(rank) * kKinds + kind) * kPaces * kAhead + last_;
    }

   private:
    const float* confidence_;
    int num_seen_, unseen_kind_, last_;
  };
  // A mask of a step: its cell before, and what became of it.
  struct Observation {
    uint16_t cell;
    bool committed;
  };
  // Of a request's first `count` masks, in order.
  void observe(int context, const Observation* masks, int count);
  // For a policy that looks many masks up: the same for every cell, with the benefit of the doubt
  // where little was seen (what is not run is not learned): up to kDoubt more.
  static constexpr float kDoubt = 0.03f;
  void history_table(int context, std::vector<float>& table) const;
  static float lookup(const std::vector<float>& table, int rank, const MaskHistory& history) {
    return table[Cells(history)[rank]];
  }
  // First rank behind those that share a rank bin with `rank`.
  static int rank_bin_end(int rank);

  // Calibration of probability(): of all masks predicted in [i/10, (i+1)/10), the sum of
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
  // What is known of fewer things is the prior of what is known of more.
  static float blend(const Counts& counts, float prior) {
    return (counts.committed + kPriorWeight * prior) / (counts.evaluated + kPriorWeight);
  }
  static constexpr float kPriorWeight = 24;  // observations
  // Decayed sums over the steps of requests that decoded with (about) one chunk length.
  struct Lane {
    double commits = 0, masks = 0, steps = 0;
    double seen_at = 0;  // age_ then
  };
  // A cell is a (rank bin, kind, pace bin, bin of the known ahead).
  static constexpr int kRankBins = 9, kKinds = 13, kPaces = 7, kAhead = 4, kLanes = 6;
  static constexpr int kSeen = kRankBins * kKinds, kPaced = kSeen * kPaces,
                       kCells = kPaced * kAhead;
  struct Context {
    UnmaskingStrategy strategy;
    float threshold;
    int quota;
    std::array<Lane, kLanes> lanes;
    // Decayed sums over all lanes: how good the prior is.
    double commits = 0, masks = 0, prior_commits = 0, prior_masks = 0;
    std::vector<Counts> by_rank;
    std::array<Counts, kSeen> by_kind{};
    std::array<Counts, kPaced> by_pace{};
    std::array<Counts, kCells> by_cell{};
  };
  static int lane_of(int chunk_length);
  static int rank_bin(int rank) {
    constexpr int8_t kBins[20] = {0, 1, 2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7};
    return rank < 20 ? kBins[rank] : kRankBins - 1;
  }
  // Without branches: which bin it is, nobody can predict.
  static int seen_kind(float confidence) {
    return (confidence >= 0.2f) + (confidence >= 0.4f) + (confidence >= 0.6f) +
           (confidence >= 0.8f) + (confidence >= 0.9f) + (confidence >= 0.97f);
  }
  static int unseen_kind(const MaskHistory& history);
  static int pace_bin(float pace);
  static int ahead_bin(int num_known_ahead);
  double idle_fade(const Lane& lane) const;
  double expected_share(const Context& context, double prior_share) const;
  double rank_probability(const Context& context, int rank) const;
  float kind_probability(const Context& context, int seen) const;
  double cell_probability(const Context& context, int cell) const;
  void observe(Context& context, int rank, const Observation& mask);
  void check(int context, int rank, const char* what) const;

  int block_length_;
  static constexpr double kManyRequests = 8;
  double age_ = 0;             // steps with many requests
  std::vector<Yield> priors_;  // by chunk length, 1..block_length
  std::vector<Context> contexts_;
  std::array<Reliability, kReliabilityBins> reliability_{};
  std::vector<Reliability> reliability_by_rank_;
};

}  // namespace optimus
