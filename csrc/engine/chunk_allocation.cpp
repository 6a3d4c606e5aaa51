// elastic_per_request: which request gets which rows.
//
// Two steps. The batch-wide estimate of the chosen arm gives the price of time: lambda, the commits
// per millisecond that decoding yields on average at this load. A step is then worth
// commits - lambda * time, and rows are added in the order of their expected commits as long as that
// grows. (Maximising commits per time of the single step instead would starve the steps of a request
// that finds itself in a hard stretch: a ratio does not price what the time would buy elsewhere.)
// Masks of a request must be taken in order, so its rows form segments whose mean gain falls (pool
// adjacent violators); then the greedy order over all requests is optimal for each number of rows.
// Time is a step function of the graph sizes, or a line between measured points; within a level of
// gain the best number of rows is then at one of them or at an end, so these are tried.
#include <algorithm>
#include <cmath>

#include "engine/chunk_policy.h"

namespace optimus {
namespace {

constexpr double kTrust = 16.0;     // commits the estimate of the price of time is worth
constexpr double kMostShare = 0.9;  // of what a commit is worth, that its fresh row may cost

// A step commits every mask that its rule accepts, and the most confident one when it accepts none:
// 1 * P(none) + the sum of the probabilities, if masks are independent. So `rows` more masks of
// `probability` add their sum less what they take from P(none), which is brought up to date.
float add_masks(float probability, int rows, float& none) {
  const float before = none;
  float factor = 1 - probability;
  for (int left = rows; left > 0; left /= 2, factor *= factor) {
    none *= left % 2 != 0 ? factor : 1.0f;
  }
  return probability * rows - (before - none);
}

}  // namespace

// Appends the segments of masks [first, last) of a request, in order of falling mean gain, and adds
// them to the levels. Segments of one request are contiguous in segments_; there is room.
void ChunkPolicy::open_segments(const Group& group, const CommitModel::Cells& cells, int first,
                                int last, float none, Levels& levels) {
  Segment* const begin = segments_.data() + num_segments_;
  Segment* end = begin;
  const auto add = [&](float probability, int rows) {
    float commits = add_masks(probability, rows, none);
    for (; end != begin && end[-1].commits * rows <= commits * end[-1].rows; --end) {
      commits += end[-1].commits;
      rows += end[-1].rows;
    }
    *end++ = {commits, rows, 0};
  };
  int rank = first;
  const int num_seen = std::min(last, cells.num_seen());
  for (; rank < num_seen; ++rank) add(group.table[cells[rank]], 1);
  while (rank < last) {
    const int end = std::min(last, CommitModel::rank_bin_end(rank));
    add(group.table[cells[rank]], end - rank);
    rank = end;
  }
  for (Segment* segment = begin; segment != end; ++segment) {
    const float gain = segment->commits / segment->rows;
    segment->level = std::clamp(static_cast<int>(gain * kLevels), 0, kLevels - 1);
    levels.rows[segment->level] += segment->rows;
    levels.gains[segment->level] += segment->commits;
  }
  num_segments_ = static_cast<int>(end - segments_.data());
}

void ChunkPolicy::allocate(int arm, const std::vector<RequestLoad>& loads, const StepLoad& other,
                           const LatencyModel& latency, const CommitModel& commits,
                           ChunkDecision& decision) {
  const bool refresh = arms_[arm].refresh;
  for (size_t context = 0; context < groups_.size(); ++context) {
    Group& group = groups_[context];
    if (group.num_requests == 0) continue;
    commits.history_table(static_cast<int>(context), group.table);
    set_range(group, refresh);
  }
  Levels levels;
  levels.rows_taken = other.rows;
  open_requests(loads, arm, levels);
  if (levels.num_requests == 0) return;
  // The estimate is of one chunk length for all; what allocation makes of it is known by now.
  constexpr double kMaxCorrection = 2.0;
  const double correction =
      std::clamp((kTrust + realised_) / (kTrust + expected_), 1 / kMaxCorrection, kMaxCorrection);
  const Stop best = best_stop(arm, levels, price_ * correction, other, latency);
  hand_out(best.level, best.rows);
  decision.expected_commits = best.commits;
  decision.predicted_ms = best.ms;
  decision.meets_target = best.meets_target;
  decision.reason =
      best.meets_target ? "rows by marginal gain" : "target_tpot_ms cannot be met: fastest";
}

// Every request gets the shortest length that is good enough; the rest is up for allocation.
void ChunkPolicy::open_requests(const std::vector<RequestLoad>& loads, int arm, Levels& levels) {
  static const MaskHistory kNothing;
  const size_t count = loads.size();
  lengths_.assign(count, config_.chunk_lengths[0]);
  needs_refresh_.assign(count, arms_[arm].refresh);
  segment_ends_.resize(count);
  segments_.resize(count * config_.block_length);
  num_segments_ = 0;
  levels.rows_taken += without_masks_rows_;
  for (size_t i = 0; i < count; ++i) {
    const RequestLoad& load = loads[i];
    if (load.num_masked > 0) {
      const Group& group = groups_[load.commit_context];
      const MaskHistory& history = load.history != nullptr ? *load.history : kNothing;
      const int first = std::min(group.shortest, load.num_masked);
      const int last = std::min(group.longest, load.num_masked);
      float none = 1;
      const CommitModel::Cells cells(history);
      levels.commits_taken += 1;
      for (int rank = 0; rank < first; ++rank) {
        levels.commits_taken += add_masks(group.table[cells[rank]], 1, none);
      }
      levels.num_requests += 1;
      levels.rows_taken += first;
      levels.fresh_rows += load.num_fresh;
      if (group.refresh) levels.refresh_rows += refresh_share(group.yields[arm].commits);
      open_segments(group, cells, first, last, none, levels);
      lengths_[i] = first;
      needs_refresh_[i] = group.refresh;
    }
    segment_ends_[i] = num_segments_;
  }
}

// What a row more takes in a step of about as many rows as `arm` has in the long run.
double ChunkPolicy::row_ms(const ArmEstimate& arm, const StepLoad& other,
                           const LatencyModel& latency) const {
  constexpr double kLess = 0.75, kMore = 1.25;
  const auto ms = [&](double rows) {
    return latency.predict_about(
        {static_cast<int>(std::lround(rows)), other.prefill_rows, other.kv_tokens + kv_tokens_});
  };
  const double span = (kMore - kLess) * arm.rows;
  return std::max(0.0, (ms(kMore * arm.rows) - ms(kLess * arm.rows)) / span);
}

// Walks down the levels and tries each number of rows that can be the best. Its commits are fresh
// rows of the next step. On a line they may be counted as rows of this one. Where sizes are padded
// that would fill up a size with rows that are not there yet: then a step costs the rows it has, with
// the fresh ones of now, and what its commits will cost is a price for each.
ChunkPolicy::Stop ChunkPolicy::best_stop(int arm, const Levels& levels, double lambda,
                                         const StepLoad& other, const LatencyModel& latency) const {
  const bool is_padded = latency.profile().is_padded;
  const double per_commit = 1 + levels.refresh_rows / levels.num_requests;  // rows it brings
  double commit_ms = 0;
  if (is_padded) {
    commit_ms = std::min(per_commit * row_ms(arms_[arm], other, latency), kMostShare / lambda);
  }
  const double fixed_rows = is_padded ? levels.fresh_rows : 0;
  const double rows_per_commit = is_padded ? 0 : per_commit;
  double rows = levels.rows_taken, commits = levels.commits_taken;
  Stop best;
  double best_value = 0, best_tpot = 0;
  bool have_best = false;
  const auto try_stop = [&](int level, double x, double mask_rows, double expected) {
    const double total = mask_rows + fixed_rows + expected * rows_per_commit;
    const double ms = latency.predict(
        {static_cast<int>(std::lround(total)), other.prefill_rows, other.kv_tokens + kv_tokens_});
    const double value = expected - lambda * (ms + commit_ms * expected);
    const double tpot = ms * levels.num_requests / expected;
    const bool meets = config_.target_tpot_ms <= 0 || tpot <= config_.target_tpot_ms;
    const bool better = !have_best || (meets != best.meets_target ? meets
                                       : meets                    ? value > best_value
                                                                  : tpot < best_tpot);
    if (!better) return;
    best = {level, static_cast<int>(x), expected, ms, meets};
    best_value = value;
    best_tpot = tpot;
    have_best = true;
  };
  try_stop(kLevels, 0, rows, commits);
  const std::vector<LatencyProfile::Point>& corners = latency.profile().decode;
  auto corner = corners.begin();
  for (int level = kLevels - 1; level >= 0; --level) {
    if (levels.rows[level] == 0) continue;
    const double gain = levels.gains[level] / levels.rows[level];
    const double growth = 1 + gain * rows_per_commit;
    const double before = rows + fixed_rows + commits * rows_per_commit;
    const double after = before + levels.rows[level] * growth;
    for (; corner != corners.end() && corner->rows < after; ++corner) {
      const double x = std::floor((corner->rows - before) / growth);
      if (x > 0) try_stop(level, x, rows + x, commits + x * gain);
    }
    rows += levels.rows[level];
    commits += levels.gains[level];
    try_stop(level, levels.rows[level], rows, commits);
  }
  return best;
}

// Whole levels above `level`, and `left` rows of its own.
void ChunkPolicy::hand_out(int level, int left) {
  const Segment* segment = segments_.data();
  for (size_t i = 0; i < lengths_.size(); ++i) {
    const Segment* const end = segments_.data() + segment_ends_[i];
    // Levels fall: what is below is behind.
    for (; segment != end && segment->level > level; ++segment) lengths_[i] += segment->rows;
    for (; segment != end && segment->level == level && left > 0; ++segment) {
      const int take = std::min(segment->rows, left);
      lengths_[i] += take;
      left -= take;
    }
    segment = end;
  }
}

// Lengths open to a group: from the shortest that is good enough (a length between two arms counts
// as the longer one) to the longest.
void ChunkPolicy::set_range(Group& group, bool refresh) const {
  const int last = static_cast<int>(config_.chunk_lengths.size()) - 1;
  const Choice longest = group.choices[2 * last + refresh];
  group.longest = longest.chunk_length;
  group.refresh = longest.refresh;
  group.shortest = longest.chunk_length;
  for (int arm = last; arm >= 0; --arm) {
    const Choice choice = group.choices[2 * arm + refresh];
    if (choice.refresh != longest.refresh || choice.chunk_length != config_.chunk_lengths[arm]) {
      if (config_.chunk_lengths[arm] < longest.chunk_length) break;
      continue;
    }
    group.shortest = arm == 0 ? choice.chunk_length : config_.chunk_lengths[arm - 1] + 1;
  }
}

}  // namespace optimus
