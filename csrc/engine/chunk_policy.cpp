// Elastic chunk length: argmax of expected commits per predicted millisecond.
//
// The step time has steps and dips (graph sizes, experts touched), so the objective has several
// maxima: every arm is evaluated, and there is no search that could stop at a local one. An arm is
// judged in its own steady state, where each commit of a step is a fresh row of the next: judged by
// the fresh rows present now, all arms would pay for the last arm's commits and none for its own.
#include "engine/chunk_policy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kFreeRefresh = 1.02;  // relative step time that still counts as free

struct Estimate {
  double commits = 0;
  double ms = 0;
  double rate() const { return commits / ms; }
};

// `commits_of[n]`: expected commits of a request that evaluates n masks, n up to chunk_length.
Estimate estimate(int chunk_length, const std::vector<RequestLoad>& loads, int other_rows,
                  const LatencyModel& latency, const std::vector<double>& commits_of) {
  Estimate result;
  double rows = other_rows;
  for (const RequestLoad& load : loads) {
    if (load.num_masked <= 0) {
      rows += load.num_fresh;
      continue;
    }
    const int num_evaluated = std::min(chunk_length, load.num_masked);
    rows += num_evaluated + commits_of[num_evaluated];
    result.commits += commits_of[num_evaluated];
  }
  result.ms = latency.predict(static_cast<int>(std::lround(rows)));
  return result;
}

}  // namespace

ChunkPolicy::ChunkPolicy(std::vector<int> arms, int block_length, double min_gain)
    : arms_(std::move(arms)), block_length_(block_length), min_gain_(min_gain) {
  OPTIMUS_CHECK(!arms_.empty(), "[chunk_policy] no chunk length to choose");
  OPTIMUS_CHECK(min_gain >= 0, "[chunk_policy] min_gain must not be negative, got ", min_gain);
  int previous = 0;
  for (int arm : arms_) {
    OPTIMUS_CHECK(arm > previous && arm <= block_length,
                  "[chunk_policy] chunk lengths must ascend from 1 to ", block_length, ", got ",
                  arm, " after ", previous);
    previous = arm;
  }
}

ChunkPolicy ChunkPolicy::fixed(int chunk_length) {
  return ChunkPolicy({chunk_length}, chunk_length, 0.0);
}

ChunkPolicy ChunkPolicy::elastic(std::vector<int> arms, int block_length, double min_gain) {
  return ChunkPolicy(std::move(arms), block_length, min_gain);
}

ChunkDecision ChunkPolicy::choose(const std::vector<RequestLoad>& loads, int other_rows,
                                  const LatencyModel& latency, const CommitModel& commits) {
  if (is_fixed()) return {arms_[0], 0, 0, "fixed"};
  if (!latency.has_profile()) {
    return {block_length_, 0, 0, "no latency profile: the trained block"};
  }
  const bool has_masks = std::any_of(loads.begin(), loads.end(),
                                     [](const RequestLoad& load) { return load.num_masked > 0; });
  if (!has_masks) return {current_ > 0 ? current_ : arms_[0], 0, 0, "nothing to decode"};

  std::vector<double> commits_of(arms_.back() + 1);
  for (int n = 1; n <= arms_.back(); ++n) commits_of[n] = commits.expected_commits(n);

  int best_arm = 0;
  Estimate best, current;
  for (int arm : arms_) {
    const Estimate candidate = estimate(arm, loads, other_rows, latency, commits_of);
    if (best_arm == 0 || candidate.rate() > best.rate()) {
      best_arm = arm;
      best = candidate;
    }
    if (arm == current_) current = candidate;
  }
  // A gain within the noise of the models is not worth changing the batch's shape for.
  if (current_ > 0 && best.rate() <= current.rate() * (1 + min_gain_)) {
    const char* reason = best_arm == current_ ? "best" : "kept: gain below min_gain";
    return {current_, current.commits, current.ms, reason};
  }
  current_ = best_arm;
  return {best_arm, best.commits, best.ms, "best"};
}

bool refresh_is_free(const LatencyModel& latency, int rows, int refresh_rows) {
  if (!latency.has_profile()) return false;
  return latency.predict(rows + refresh_rows) <= kFreeRefresh * latency.predict(rows);
}

}  // namespace optimus
