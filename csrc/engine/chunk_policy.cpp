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
// An arm that was hardly tried gets the benefit of the doubt, until it was: what is not run is not
// learned.
constexpr double kOptimism = 0.06;
constexpr double kTrialSteps = 256;  // steps of single requests that halve it

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
  expected_rate_ = 0;
  const bool refresh = config_.kv_policy == KvPolicy::refresh;
  if (config_.kind == ChunkPolicyKind::fixed) {
    choose_fixed(config_.chunk_lengths[0], loads, refresh);
    return {config_.chunk_lengths[0], refresh, 0, 0, true, "fixed"};
  }
  if (config_.kind == ChunkPolicyKind::schedule) {
    auto entry = config_.schedule.begin();
    while (std::next(entry) != config_.schedule.end() &&
           entry->first < static_cast<int>(loads.size())) {
      ++entry;
    }
    choose_fixed(entry->second, loads, refresh);
    return {entry->second, refresh, 0, 0, true, "schedule"};
  }
  if (!latency.has_profile()) {
    // The trained block, as the reference treats it where that is open.
    const bool refresh_block = config_.kv_policy != KvPolicy::freeze;
    choose_fixed(config_.block_length, loads, refresh_block);
    return {
        config_.block_length, refresh_block, 0, 0, true, "no latency profile: the trained block"};
  }
  group(loads, commits);
  estimate_arms(other, latency);
  ChunkDecision decision;
  int best = best_arm(decision.meets_target);
  decision.reason = decision.meets_target ? "best" : "target_tpot_ms cannot be met: fastest";
  best = keep_if_close(best, decision);
  current_ = best;
  for (ArmEstimate& arm : arms_) arm.verdict = verdict_of(arm, arms_[best]);
  decision.refresh = arms_[best].refresh;
  decision.expected_commits = arms_[best].commits;
  decision.predicted_ms = arms_[best].ms;
  expected_rate_ = arms_[best].rate();
  if (config_.kind == ChunkPolicyKind::elastic_per_request) {
    allocate(best, loads, other, latency, commits, decision);
  } else {
    assign(best, loads);
  }
  predicted_ms_ = decision.predicted_ms;
  if (loads.empty()) decision.chunk_length = arms_[best].chunk_length;
  for (int length : lengths_) decision.chunk_length = std::max(decision.chunk_length, length);
  return decision;
}

const char* ChunkPolicy::verdict_of(const ArmEstimate& arm, const ArmEstimate& best) const {
  if (&arm == &best) return kChosen;
  if (!is_open(arm)) return "other KV";
  if (!meets_target(arm)) return "above target";
  return arm.score <= best.score ? "lower score" : "too close";
}

// A gain within the noise of the models is not worth changing the batch's shape for.
int ChunkPolicy::keep_if_close(int best, ChunkDecision& decision) const {
  if (current_ < 0 || current_ == best || !decision.meets_target) return best;
  const ArmEstimate& now = arms_[current_];
  if (!meets_target(now) || arms_[best].score - now.score > config_.min_gain * now.commits) {
    return best;
  }
  decision.reason = "kept: gain below min_gain";
  return current_;
}

void ChunkPolicy::choose_fixed(int chunk_length, const std::vector<RequestLoad>& loads,
                               bool refresh) {
  lengths_.assign(loads.size(), chunk_length);
  needs_refresh_.assign(loads.size(), refresh);
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

// Requests by what decides their estimates, the commit context.
void ChunkPolicy::group(const std::vector<RequestLoad>& loads, const CommitModel& commits) {
  groups_.resize(commits.num_contexts());
  for (Group& group : groups_) group.num_requests = 0;
  without_masks_rows_ = 0;
  kv_tokens_ = 0;
  for (const RequestLoad& load : loads) {
    kv_tokens_ += load.context_len;
    if (load.num_masked <= 0) {
      without_masks_rows_ += load.num_fresh;
      continue;
    }
    Group& group = groups_[load.commit_context];
    // Contexts may be shared when there are many: then the lowest threshold decides, the strictest.
    if (group.choices.empty() || load.threshold < group.threshold) {
      group.threshold = load.threshold;
      group.choices.clear();
      for (size_t arm = 0; arm < config_.chunk_lengths.size(); ++arm) {
        for (bool refresh : {false, true}) {
          group.choices.push_back(admitted(load.threshold, static_cast<int>(arm), refresh));
        }
      }
      group.yields.resize(group.choices.size());
    }
    group.num_requests += 1;
  }
  for (size_t context = 0; context < groups_.size(); ++context) {
    Group& group = groups_[context];
    if (group.num_requests == 0) continue;
    for (size_t i = 0; i < group.choices.size(); ++i) {
      CommitModel::Yield& yield = group.yields[i];
      yield = commits.yield(static_cast<int>(context), group.choices[i].chunk_length);
      // Whatever few observations say: looking at more masks never commits less.
      if (i >= 2) yield.commits = std::max(yield.commits, group.yields[i - 2].commits);
    }
  }
}

ArmEstimate ChunkPolicy::estimate(int arm, bool refresh, const StepLoad& other,
                                  const LatencyModel& latency) const {
  ArmEstimate result;
  result.chunk_length = config_.chunk_lengths[arm];
  result.refresh = refresh;
  int num_requests = 0, longest = 0;
  double rows = other.rows + without_masks_rows_, optimism = 0;
  for (const Group& group : groups_) {
    if (group.num_requests == 0) continue;
    num_requests += group.num_requests;
    longest = std::max(longest, group.choices[2 * arm + refresh].chunk_length);
    const CommitModel::Yield yield = group.yields[2 * arm + refresh];
    const double extra =
        group.choices[2 * arm + refresh].refresh ? refresh_share(yield.commits) : 0.0;
    result.commits += group.num_requests * yield.commits;
    optimism += group.num_requests * kOptimism * kTrialSteps / (kTrialSteps + yield.steps);
    rows += group.num_requests * (yield.masks + yield.commits * (1 + extra));
  }
  if (longest > 0) result.chunk_length = longest;  // what the quality floor makes of it
  result.rows = rows;
  result.optimism = optimism / std::max(num_requests, 1);
  const int whole_rows = static_cast<int>(std::lround(std::min(rows, 1e9)));
  result.ms = latency.predict({whole_rows, other.prefill_rows, other.kv_tokens + kv_tokens_});
  result.alone_ms =
      other.rows > 0 ? latency.predict({whole_rows - other.rows, 0, kv_tokens_}) : result.ms;
  result.tpot_ms = result.ms * num_requests / std::max(result.commits, 1e-9);
  return result;
}

// Rows a refresh adds per committed token: all positions of the block but those fresh anyway.
double ChunkPolicy::refresh_share(double commits) const {
  return std::max(0.0, 1.0 - commits / config_.block_length);
}

void ChunkPolicy::observe(int commits, double ms) {
  constexpr double kDecay = 0.98;
  constexpr double kMostSurprise = 2.0;  // of the predicted time: single slow steps say nothing
  if (expected_rate_ <= 0 || !std::isfinite(ms) || ms <= 0) return;
  ms = std::min(ms, kMostSurprise * predicted_ms_);
  realised_ = realised_ * kDecay + commits;
  expected_ = expected_ * kDecay + expected_rate_ * ms;
}

// The price of time is what the best arm makes of it in steps of its own. Prompts in the step are
// work that is there anyway: only the time that decode rows add to it counts. (Commits per time of
// the whole step would favour long chunks as if they paid for the prompts.)
void ChunkPolicy::estimate_arms(const StepLoad& other, const LatencyModel& latency) {
  double promised_price = 0;
  price_ = 0;
  for (size_t arm = 0; arm < config_.chunk_lengths.size(); ++arm) {
    for (bool refresh : {false, true}) {
      arms_.push_back(estimate(static_cast<int>(arm), refresh, other, latency));
      if (!is_open(arms_.back())) continue;
      const double rate = arms_.back().commits / arms_.back().alone_ms;
      price_ = std::max(price_, rate);
      promised_price = std::max(promised_price, rate * (1 + arms_.back().optimism));
    }
  }
  const double other_ms = other.rows > 0 ? latency.predict(other) : 0.0;
  for (ArmEstimate& arm : arms_) {
    arm.score = arm.commits * (1 + arm.optimism) - promised_price * (arm.ms - other_ms);
  }
}

bool ChunkPolicy::is_open(const ArmEstimate& arm) const {
  return config_.kv_policy == KvPolicy::auto_ ||
         arm.refresh == (config_.kv_policy == KvPolicy::refresh);
}

bool ChunkPolicy::meets_target(const ArmEstimate& arm) const {
  return config_.target_tpot_ms <= 0 || arm.tpot_ms <= config_.target_tpot_ms;
}

// Index into arms_. Under `auto`, refreshing wins where it is free: its KV is the better one.
int ChunkPolicy::best_arm(bool& meets) const {
  int best = -1, fastest = -1, refreshed = -1;
  const int count = static_cast<int>(arms_.size());
  for (int i = 0; i < count; ++i) {
    if (!is_open(arms_[i])) continue;
    if (fastest < 0 || arms_[i].tpot_ms < arms_[fastest].tpot_ms) fastest = i;
    if (!meets_target(arms_[i])) continue;
    if (best < 0 || arms_[i].score > arms_[best].score) best = i;
    if (arms_[i].refresh && (refreshed < 0 || arms_[i].score > arms_[refreshed].score)) {
      refreshed = i;
    }
  }
  meets = best >= 0;
  if (best < 0) return fastest;
  if (refreshed < 0) return best;
  const double lost = arms_[best].score - arms_[refreshed].score;
  return lost <= (kFreeRefresh - 1) * arms_[best].commits ? refreshed : best;
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
