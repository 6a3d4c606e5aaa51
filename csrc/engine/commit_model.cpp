// Decayed sums.
//
// Old observations fade with the number of newer ones, so the model follows a change of workload; what
// is known of a chunk length that is not in use fades with time. What is left then is the prior,
// scaled by how much more the model commits than the prior says wherever it was observed: otherwise a
// controller that starts with small chunks on a model more confident than the prior would never try a
// large one.
#include "engine/commit_model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kYieldHalfLife = 2048;  // steps of requests with one chunk length
constexpr double kIdleHalfLife = 600;    // steps of many requests without one
constexpr double kYieldWeight = 8;       // steps the prior is worth
constexpr double kMaxScale = 4;          // of the prior's odds, either way
constexpr double kScaleWeight = 128;     // masks it takes to believe half of what was seen
constexpr double kHalfLife = 1024;       // observations of a rank or a history cell
constexpr int kMaxContexts = 16;
constexpr float kSameThreshold = 0.0025f;
constexpr int kFirstRank[] = {0, 1, 2, 3, 4, 6, 9, 14, 20};  // of each rank bin
constexpr int kTypicalRank[] = {0, 1, 2, 3, 4, 7, 11, 16, 24};

// Measured on the demo model (B = 32, threshold 0.99), at chunk lengths 1, 2, 4, 8, 16 and 32.
constexpr CommitModel::Yield kPriorYield[] = {{1.0, 1.0},  {1.92, 1.99}, {3.3, 3.87},
                                              {4.5, 7.08}, {5.0, 12.0},  {5.2, 15.96}};
constexpr double kPriorChunk[] = {1, 2, 4, 8, 16, 32};

// P(commit | rank) in block mode, of the same prompts; constant behind the last.
constexpr double kPriorProbability[] = {1.0,  0.98, 0.81, 0.58, 0.55, 0.29,
                                        0.24, 0.20, 0.16, 0.15, 0.15};

// Between the measured chunk lengths: linear in the logarithm. Masks are bounded by the block.
CommitModel::Yield prior_yield(int chunk_length, int block_length) {
  const double c = std::min(chunk_length, 32);
  int right = 1;
  while (kPriorChunk[right] < c) ++right;
  const double fraction = std::log2(c / kPriorChunk[right - 1]);
  const auto& a = kPriorYield[right - 1];
  const auto& b = kPriorYield[right];
  const double most = std::min(chunk_length, block_length);
  return {std::min(a.commits + fraction * (b.commits - a.commits), most),
          std::min(a.masks + fraction * (b.masks - a.masks), most), 0};
}

}  // namespace

CommitModel::CommitModel(int block_length) : block_length_(block_length) {
  OPTIMUS_CHECK(block_length > 0, "[commit_model] block_length must be positive, got ",
                block_length);
  reliability_by_rank_.resize(block_length);
  for (int c = 1; c <= block_length; ++c) priors_.push_back(prior_yield(c, block_length));
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
  Context fresh{strategy, threshold, quota, {}, 0, 0, 0, 0, {}, {}, {}, {}};
  fresh.by_rank.assign(block_length_, {});
  contexts_.push_back(std::move(fresh));
  return num_contexts() - 1;
}

void CommitModel::check(int context, int rank, const char* what) const {
  OPTIMUS_CHECK(context >= 0 && context < num_contexts(), "[commit_model] ", what, ": context ",
                context, " is not in [0, ", num_contexts(), ")");
  OPTIMUS_CHECK(rank >= 0 && rank < block_length_, "[commit_model] ", what, ": rank ", rank,
                " is not in [0, ", block_length_, ")");
}

int CommitModel::lane_of(int chunk_length) {
  constexpr int kFirst[kLanes] = {1, 2, 3, 6, 12, 23};
  int lane = kLanes - 1;
  while (lane > 0 && chunk_length < kFirst[lane]) --lane;
  return lane;
}

int CommitModel::rank_bin_end(int rank) {
  const int bin = rank_bin(rank);
  return bin == kRankBins - 1 ? kMaxBlockLength : kFirstRank[bin + 1];
}

CommitModel::Cells::Cells(const MaskHistory& history)
    : confidence_(history.confidence.data()),
      num_seen_(static_cast<int>(history.confidence.size())),
      unseen_kind_(unseen_kind(history)),
      last_(pace_bin(history.pace) * kAhead + ahead_bin(history.num_known_ahead)) {
  static_assert(kCells <= UINT16_MAX, "Observation::cell");
}

// Seen masks by their last confidence; others by how the request's last step went, and by whether
// the mask enters right behind a row that did not commit.
int CommitModel::unseen_kind(const MaskHistory& history) {
  constexpr int kNumSeen = 7;
  if (history.num_evaluated == 0) return kNumSeen;
  const bool all_committed = history.num_committed == history.num_evaluated;
  if (all_committed) return kNumSeen + (history.num_evaluated >= 4 ? 2 : 1);
  const float share = static_cast<float>(history.num_committed) / history.num_evaluated;
  return kNumSeen + (share < 0.25f ? 3 : share < 0.6f ? 4 : 5);
}

double CommitModel::idle_fade(const Lane& lane) const {
  const double idle = age_ - lane.seen_at;
  return idle > 1 ? std::exp2(-idle / kIdleHalfLife) : 1.0;
}

// The prior's share of evaluated masks that commit, corrected by what was seen of it at whichever
// chunk length. In odds: nearly all masks of a small chunk commit, also where few of a large one do.
double CommitModel::expected_share(const Context& context, double prior_share) const {
  const auto odds = [](double share) {
    const double inside = std::clamp(share, 0.01, 0.99);
    return inside / (1 - inside);
  };
  if (context.masks <= 0) return prior_share;
  const double trust = context.masks / (context.masks + kScaleWeight);
  const double ratio =
      odds(context.commits / context.masks) / odds(context.prior_commits / context.prior_masks);
  const double scaled =
      odds(prior_share) * std::clamp(std::pow(ratio, trust), 1 / kMaxScale, kMaxScale);
  return scaled / (1 + scaled);
}

CommitModel::Yield CommitModel::yield(int context, int chunk_length) const {
  check(context, 0, "yield");
  const Context& c = contexts_[context];
  const Lane& lane = c.lanes[lane_of(chunk_length)];
  const Yield prior = priors_[std::clamp(chunk_length, 1, block_length_) - 1];
  const double most = std::min(chunk_length, block_length_);
  const double fade = idle_fade(lane), weight = fade * lane.steps + kYieldWeight;
  const double expected = prior.masks * expected_share(c, prior.commits / prior.masks);
  const double commits = (fade * lane.commits + kYieldWeight * expected) / weight;
  const double masks = (fade * lane.masks + kYieldWeight * prior.masks) / weight;
  // Every step commits its most confident mask whatever the threshold.
  return {std::clamp(commits, 1.0, most), std::clamp(masks, 1.0, most), fade * lane.steps};
}

void CommitModel::observe_step(int context, int chunk_length, int num_masks, int num_commits) {
  check(context, 0, "observe_step");
  static const double kDecay = std::exp2(-1.0 / kYieldHalfLife);
  Context& c = contexts_[context];
  Lane& lane = c.lanes[lane_of(chunk_length)];
  const double decay = kDecay * (lane.seen_at != age_ ? idle_fade(lane) : 1.0);
  lane.commits = lane.commits * decay + num_commits;
  lane.masks = lane.masks * decay + num_masks;
  lane.steps = lane.steps * decay + 1;
  lane.seen_at = age_;
  c.commits = c.commits * kDecay + num_commits;
  c.masks = c.masks * kDecay + num_masks;
  const Yield prior = priors_[std::clamp(chunk_length, 1, block_length_) - 1];
  c.prior_commits = c.prior_commits * kDecay + prior.commits;
  c.prior_masks = c.prior_masks * kDecay + prior.masks;
}

void CommitModel::observe_waste(int context, int chunk_length, int num_wasted) {
  check(context, 0, "observe_waste");
  Context& c = contexts_[context];
  Lane& lane = c.lanes[lane_of(chunk_length)];
  lane.commits = std::max(0.0, lane.commits - num_wasted);
  c.commits = std::max(0.0, c.commits - num_wasted);
}

double CommitModel::rank_probability(const Context& context, int rank) const {
  constexpr int kLast = static_cast<int>(std::size(kPriorProbability)) - 1;
  const Counts& counts = context.by_rank[rank];
  return (counts.committed + kPriorWeight * kPriorProbability[std::min(rank, kLast)]) /
         (counts.evaluated + kPriorWeight);
}

float CommitModel::kind_probability(const Context& context, int seen) const {
  const int typical = std::min(block_length_ - 1, kTypicalRank[seen / kKinds]);
  return blend(context.by_kind[seen], static_cast<float>(rank_probability(context, typical)));
}

int CommitModel::pace_bin(float pace) {
  static_assert(kPaces == 7, "one bin more than bounds");
  return (pace >= 1.5f) + (pace >= 2.0f) + (pace >= 3.0f) + (pace >= 4.0f) + (pace >= 6.0f) +
         (pace >= 9.0f);
}

int CommitModel::ahead_bin(int num_known_ahead) {
  return (num_known_ahead > 0) + (num_known_ahead > 2) + (num_known_ahead > 5);
}

double CommitModel::probability(int context, int rank, const MaskHistory& history) const {
  check(context, rank, "probability");
  return cell_probability(contexts_[context], Cells(history)[rank]);
}

double CommitModel::cell_probability(const Context& c, int cell) const {
  const int paced = cell / kAhead, seen = paced / kPaces;
  return blend(c.by_cell[cell], blend(c.by_pace[paced], kind_probability(c, seen)));
}

void CommitModel::history_table(int context, std::vector<float>& table) const {
  check(context, 0, "history_table");
  table.resize(kCells);
  const Context& c = contexts_[context];
  constexpr int kOfKind = kPaces * kAhead;
  for (int seen = 0; seen < kSeen; ++seen) {
    const float by_kind = kind_probability(c, seen);
    float prior[kOfKind];
    for (int pace = 0; pace < kPaces; ++pace) {
      std::fill_n(prior + pace * kAhead, kAhead,
                  blend(c.by_pace[seen * kPaces + pace], by_kind) + kDoubt);
    }
    float* to = table.data() + seen * kOfKind;
    const Counts* counts = c.by_cell.data() + seen * kOfKind;
    for (int i = 0; i < kOfKind; ++i) to[i] = std::min(1.0f, blend(counts[i], prior[i]));
  }
}

void CommitModel::observe(int context, int rank, const MaskHistory& history, bool committed) {
  check(context, rank, "observe");
  observe(contexts_[context], rank, {static_cast<uint16_t>(Cells(history)[rank]), committed});
}

void CommitModel::observe(int context, const Observation* masks, int count) {
  if (count == 0) return;
  check(context, count - 1, "observe");
  for (int rank = 0; rank < count; ++rank) observe(contexts_[context], rank, masks[rank]);
}

void CommitModel::observe(Context& c, int rank, const Observation& mask) {
  static const float kDecay = static_cast<float>(std::exp2(-1.0 / kHalfLife));
  const int at = mask.cell;
  const double predicted = cell_probability(c, at);
  const int bin = std::min(static_cast<int>(predicted * kReliabilityBins), kReliabilityBins - 1);
  for (Reliability* r : {&reliability_[bin], &reliability_by_rank_[rank]}) {
    r->predicted += predicted;
    r->committed += mask.committed;
    r->count += 1;
  }
  for (Counts* counts : {&c.by_rank[rank], &c.by_kind[at / kAhead / kPaces],
                         &c.by_pace[at / kAhead], &c.by_cell[at]}) {
    counts->evaluated = counts->evaluated * kDecay + 1.0f;
    counts->committed = counts->committed * kDecay + (mask.committed ? 1.0f : 0.0f);
  }
}

}  // namespace optimus
