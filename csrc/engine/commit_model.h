// P(commit | rank of the mask among the evaluated masks of its block), learned from what happened.
// Ranks that chunks have not reached yet follow the others: the prior is scaled by how often the
// observed ranks commit compared with it. Otherwise a controller that starts with small chunks on a
// model more confident than the prior would never try a large one.
#pragma once

#include <vector>

namespace optimus {

class CommitModel {
 public:
  // Prior: first mask 1 (a step commits at least one), then decaying like the demo model's profile.
  explicit CommitModel(int block_length);

  // `rank` in [0, block_length): 0 is the first evaluated mask.
  void observe(int rank, bool committed);
  double probability(int rank) const;
  // Expected commits of a step that evaluates the first `chunk_length` masks, at least 1 when > 0.
  // Never falls as chunk_length grows; beyond block_length there are no more masks.
  double expected_commits(int chunk_length) const;

 private:
  void check_rank(int rank, const char* what) const;

  double prior_scale() const;
  double probability(int rank, double scale) const;

  std::vector<double> committed_, evaluated_;  // decayed counts
  std::vector<double> prior_, prior_weight_;   // and the observations the prior is still worth
};

}  // namespace optimus
