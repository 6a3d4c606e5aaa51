// Elastic chunk length: argmax of expected commits per predicted millisecond.
//
// The step time has steps and dips (graph sizes, experts touched), so the objective has several
// maxima: every arm is evaluated, and there is no search that could stop at a local one. An arm is
// judged in its own steady state, where each commit of a step is a fresh row of the next (and, if
// blocks are refreshed, its share of a refresh): judged by the fresh rows present now, all arms
// would pay for the last arm's commits and none for its own.
#include "engine/chunk_policy.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kFreeRefresh = 1.02;  // relative step time that still counts as free

}  // namespace

ChunkPolicy::ChunkPolicy(ChunkPolicyConfig config) : config_(std::move(config)) {
  check();
  arms_.reserve(2 * config_.chunk_lengths.size());
}

void ChunkPolicy::check() const {
  const ChunkPolicyConfig& c = config_;
  int previous = 0;
  for (int arm : c.chunk_lengths) {
    OPTIMUS_CHECK(arm > previous && arm <= c.block_length,
                  "[chunk_policy] chunk lengths must ascend from 1 to ", c.block_length, ", got ",
                  arm, " after ", previous);
    previous = arm;
  }
  previous = 0;
  for (const auto& [most, chunk_length] : c.schedule) {
    OPTIMUS_CHECK(most > previous, "[chunk_policy] schedule entries must ascend from 1, got ", most,
                  " after ", previous);
    OPTIMUS_CHECK(chunk_length >= 1 && chunk_length <= c.block_length,
                  "[chunk_policy] scheduled chunk lengths must be between 1 and ", c.block_length,
                  ", got ", chunk_length);
    previous = most;
  }
  OPTIMUS_CHECK(
      c.kind == ChunkPolicyKind::schedule ? !c.schedule.empty() : !c.chunk_lengths.empty(),
      "[chunk_policy] no chunk length to choose");
  OPTIMUS_CHECK(c.kind != ChunkPolicyKind::fixed || c.chunk_lengths.size() == 1,
                "[chunk_policy] fixed takes one chunk length, got ", c.chunk_lengths.size());
  OPTIMUS_CHECK(c.min_gain >= 0, "[chunk_policy] min_gain must not be negative, got ", c.min_gain);
  OPTIMUS_CHECK(std::isfinite(c.target_tpot_ms) && c.target_tpot_ms >= 0,
                "[chunk_policy] target_tpot_ms must not be negative, got ", c.target_tpot_ms);
}

ChunkDecision ChunkPolicy::choose(const std::vector<RequestLoad>& loads, const StepLoad& other,
                                  const LatencyModel& latency, const CommitModel& commits) {
  arms_.clear();
  const bool refresh = config_.kv_policy == KvPolicy::refresh;
  if (config_.kind == ChunkPolicyKind::fixed) {
    choose_fixed(config_.chunk_lengths[0], loads);
    return {config_.chunk_lengths[0], refresh, 0, 0, true, "fixed"};
  }
  if (config_.kind == ChunkPolicyKind::schedule) {
    auto entry = config_.schedule.begin();
    while (std::next(entry) != config_.schedule.end() &&
           entry->first < static_cast<int>(loads.size())) {
      ++entry;
    }
    choose_fixed(entry->second, loads);
    return {entry->second, refresh, 0, 0, true, "schedule"};
  }
  if (!latency.has_profile()) {
    choose_fixed(config_.block_length, loads);
    return {config_.block_length, refresh, 0, 0, true, "no latency profile: the trained block"};
  }
  group(loads, commits);
  estimate_arms(other, latency);
  ChunkDecision decision;
  int best = best_arm(decision.meets_target);
  decision.reason = decision.meets_target ? "best" : "target_tpot_ms cannot be met: fastest";
  // A gain within the noise of the models is not worth changing the batch's shape for.
  if (current_ >= 0 && current_ != best && decision.meets_target) {
    const ArmEstimate& now = arms_[current_];
    const bool feasible = config_.target_tpot_ms <= 0 || now.tpot_ms <= config_.target_tpot_ms;
    if (feasible && arms_[best].rate() <= now.rate() * (1 + config_.min_gain)) {
      best = current_;
      decision.reason = "kept: gain below min_gain";
    }
  }
  current_ = best;
  for (ArmEstimate& arm : arms_) arm.verdict = &arm == &arms_[best] ? "chosen" : "slower";
  decision.refresh = arms_[best].refresh;
  decision.expected_commits = arms_[best].commits;
  decision.predicted_ms = arms_[best].ms;
  if (config_.kind == ChunkPolicyKind::elastic_per_request) {
    allocate(best, loads, other, latency, commits, decision);
  } else {
    assign(best, loads);
  }
  for (int length : lengths_) decision.chunk_length = std::max(decision.chunk_length, length);
  return decision;
}

void ChunkPolicy::choose_fixed(int chunk_length, const std::vector<RequestLoad>& loads) {
  lengths_.assign(loads.size(), chunk_length);
  needs_refresh_.assign(loads.size(), config_.kv_policy == KvPolicy::refresh);
}

// The nearest arm, not longer if there is one, that is good enough at this threshold with this
// treatment of finished blocks; under `auto` with the other treatment when none is. If nothing is
// good enough, the most accurate.
ChunkPolicy::Choice ChunkPolicy::admitted(float threshold, int arm, bool refresh) const {
  const int num_arms = static_cast<int>(config_.chunk_lengths.size());
  const bool both = config_.kv_policy == KvPolicy::auto_;
  for (bool mode : {refresh, !refresh}) {
    if (mode != refresh && !both) break;
    for (int i = 0; i < num_arms; ++i) {
      const int at = i <= arm ? arm - i : i;
      const int chunk_length = config_.chunk_lengths[at];
      if (config_.quality.admits(threshold, chunk_length, mode)) return {chunk_length, mode};
    }
  }
  Choice best{config_.chunk_lengths[0], refresh};
  double best_accuracy = -2;
  for (bool mode : {refresh, !refresh}) {
    if (mode != refresh && !both) break;
    for (int chunk_length : config_.chunk_lengths) {
      const double accuracy = config_.quality.accuracy(threshold, chunk_length, mode);
      if (accuracy > best_accuracy) {
        best_accuracy = accuracy;
        best = {chunk_length, mode};
      }
    }
  }
  return best;
}

// Requests by what decides their estimates: commit context and masks left.
void ChunkPolicy::group(const std::vector<RequestLoad>& loads, const CommitModel& commits) {
  groups_.resize(commits.num_contexts());
  for (Group& group : groups_) {
    group.num_requests = 0;
    group.with_masks.assign(config_.block_length + 1, 0);
  }
  without_masks_rows_ = 0;
  kv_tokens_ = 0;
  for (const RequestLoad& load : loads) {
    kv_tokens_ += load.context_len;
    if (load.num_masked <= 0) {
      without_masks_rows_ += load.num_fresh;
      continue;
    }
    Group& group = groups_[load.commit_context];
    if (group.choices.empty()) {
      for (size_t arm = 0; arm < config_.chunk_lengths.size(); ++arm) {
        for (bool refresh : {false, true}) {
          group.choices.push_back(admitted(load.threshold, static_cast<int>(arm), refresh));
        }
      }
    }
    group.num_requests += 1;
    group.with_masks[std::min(load.num_masked, config_.block_length)] += 1;
  }
  for (size_t context = 0; context < groups_.size(); ++context) {
    if (groups_[context].num_requests == 0) continue;
    commits.expected_commits(static_cast<int>(context), groups_[context].commits_of);
  }
}

ArmEstimate ChunkPolicy::estimate(int arm, bool refresh, const StepLoad& other,
                                  const LatencyModel& latency) const {
  ArmEstimate result;
  result.chunk_length = config_.chunk_lengths[arm];
  result.refresh = refresh;
  int num_requests = 0;
  double rows = other.rows + without_masks_rows_;
  for (const Group& group : groups_) {
    if (group.num_requests == 0) continue;
    num_requests += group.num_requests;
    const Choice choice = group.choices[2 * arm + refresh];
    double commits = 0;
    for (int masks = 1; masks <= config_.block_length; ++masks) {
      if (group.with_masks[masks] == 0) continue;
      const int evaluated = std::min(choice.chunk_length, masks);
      commits += group.with_masks[masks] * group.commits_of[evaluated];
      rows += double(group.with_masks[masks]) * evaluated;
    }
    result.commits += commits;
    rows += commits * (1 + (choice.refresh ? refresh_share(group, choice.chunk_length) : 0.0));
  }
  result.rows = rows;
  const int whole_rows = static_cast<int>(std::lround(std::min(rows, 1e9)));
  result.ms = latency.predict({whole_rows, other.prefill_rows, other.kv_tokens + kv_tokens_});
  result.tpot_ms = result.ms * num_requests / std::max(result.commits, 1e-9);
  return result;
}

// Rows a refresh adds per committed token: all positions of the block but those fresh anyway.
double ChunkPolicy::refresh_share(const Group& group, int chunk_length) const {
  return std::max(0.0, 1.0 - group.commits_of[chunk_length] / config_.block_length);
}

void ChunkPolicy::estimate_arms(const StepLoad& other, const LatencyModel& latency) {
  for (size_t arm = 0; arm < config_.chunk_lengths.size(); ++arm) {
    for (bool refresh : {false, true}) {
      arms_.push_back(estimate(static_cast<int>(arm), refresh, other, latency));
    }
  }
}

// Index into arms_. Under `auto`, refreshing wins where it is free: its KV is the better one.
int ChunkPolicy::best_arm(bool& meets_target) const {
  const double target = config_.target_tpot_ms;
  const auto is_open = [&](int i) {
    return config_.kv_policy == KvPolicy::auto_ ||
           arms_[i].refresh == (config_.kv_policy == KvPolicy::refresh);
  };
  int best = -1, fastest = -1;
  const int count = static_cast<int>(arms_.size());
  for (int i = 0; i < count; ++i) {
    if (!is_open(i)) continue;
    if (fastest < 0 || arms_[i].tpot_ms < arms_[fastest].tpot_ms) fastest = i;
    if (target > 0 && arms_[i].tpot_ms > target) continue;
    if (best < 0 || arms_[i].rate() > arms_[best].rate()) best = i;
  }
  meets_target = best >= 0;
  if (best < 0) return fastest;
  const double enough = arms_[best].rate() / kFreeRefresh;
  int refreshed = -1;
  for (int i = 0; i < count; ++i) {
    if (!is_open(i) || !arms_[i].refresh || (target > 0 && arms_[i].tpot_ms > target)) continue;
    if (arms_[i].rate() < enough) continue;
    if (refreshed < 0 || arms_[i].rate() > arms_[refreshed].rate()) refreshed = i;
  }
  return refreshed >= 0 ? refreshed : best;
}

void ChunkPolicy::assign(int arm, const std::vector<RequestLoad>& loads) {
  lengths_.clear();
  needs_refresh_.clear();
  for (const RequestLoad& load : loads) {
    const bool known = load.num_masked > 0;
    const Choice choice = known ? groups_[load.commit_context].choices[arm]
                                : Choice{arms_[arm].chunk_length, arms_[arm].refresh};
    lengths_.push_back(choice.chunk_length);
    needs_refresh_.push_back(choice.refresh);
  }
}

bool refresh_is_free(const LatencyModel& latency, const StepLoad& load, int refresh_rows) {
  if (!latency.has_profile()) return false;
  StepLoad more = load;
  more.rows += refresh_rows;
  return latency.predict(more) <= kFreeRefresh * latency.predict(load);
}

}  // namespace optimus
