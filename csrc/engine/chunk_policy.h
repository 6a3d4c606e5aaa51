// Chooses how many masks each request evaluates in the next step. Plain arithmetic, no CUDA, no
// torch.
//
//   fixed                one chunk length
//   schedule             a table from the number of decoding requests to a chunk length
//   elastic              one chunk length for the batch: most expected commits per predicted time
//   elastic_per_request  rows go to the masks with the largest expected commits over all requests,
//                        until the next rows do not pay for their time
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "engine/commit_model.h"
#include "engine/latency_model.h"
#include "engine/quality.h"

namespace optimus {

enum class ChunkPolicyKind : uint8_t { fixed, schedule, elastic, elastic_per_request };
enum class KvPolicy : uint8_t { freeze, refresh, auto_ };

struct ChunkPolicyConfig {
  ChunkPolicyKind kind = ChunkPolicyKind::fixed;
  int block_length = 32;
  std::vector<int> chunk_lengths;  // to choose among, ascending; fixed: exactly one
  std::vector<std::pair<int, int>>
      schedule;  // (at most this many requests, chunk length), ascending
  KvPolicy kv_policy = KvPolicy::freeze;
  QualityFloor quality;
  double target_tpot_ms = 0;  // per request and output token; 0 = none
  double min_gain = 0.01;     // a switch must gain more than this share
};

// What the policy sees of one decoding request.
struct RequestLoad {
  int num_masked = 0;      // masks left in its block
  int num_fresh = 0;       // rows it must feed anyway, a refresh included
  int context_len = 0;     // keys it reads
  int commit_context = 0;  // CommitModel::context
  float threshold = 0;
  const MaskHistory* history = nullptr;  // elastic_per_request; null = nothing known
};

// One chunk length as the policy judged it, in its steady state, for the whole batch.
struct ArmEstimate {
  int chunk_length = 0;
  bool refresh = false;
  double commits = 0, rows = 0;  // of a step
  double ms = 0;                 // of a step, prompts included
  double tpot_ms = 0;            // per request and token
  double alone_ms = 0;           // of a step without prompts
  double optimism = 0;           // share of the commits granted because little is known of it
  double score = 0;              // commits - price of time * time added to the prompts' step
  const char* verdict = "";      // static text: chosen, or why not
  double rate() const { return commits / ms; }
};

struct ChunkDecision {
  int chunk_length = 0;                           // batch-wide; elastic_per_request: the longest
  bool refresh = false;                           // finished blocks are refreshed
  double expected_commits = 0, predicted_ms = 0;  // 0 when not estimated
  bool meets_target = true;                       // of target_tpot_ms
  const char* reason = "";                        // static text
};

class ChunkPolicy {
 public:
  static constexpr const char* kChosen = "chosen";  // ArmEstimate::verdict

  explicit ChunkPolicy(ChunkPolicyConfig config);

  // `other`: prefill that will share the step. Elastic kinds: without a profile the trained block;
  // with nothing to decode the length in use. Never 0 for a request with masks.
  ChunkDecision choose(const std::vector<RequestLoad>& loads, const StepLoad& other,
                       const LatencyModel& latency, const CommitModel& commits);

  // What came of the last decision: commits of the whole step, and its time.
  void observe(int commits, double ms);

  // Of the last choose(): masks each request evaluates, and whether a block decoded so must be
  // refreshed when it is done (measured quality asks for it).
  const std::vector<int>& chunk_lengths() const { return lengths_; }
  const std::vector<uint8_t>& needs_refresh() const { return needs_refresh_; }
  // What elastic kinds compared; empty for the others.
  const std::vector<ArmEstimate>& arms() const { return arms_; }

 private:
  // A chunk length that is good enough, and how its finished blocks must be treated.
  struct Choice {
    int chunk_length = 0;
    bool refresh = false;
  };
  struct Group {  // requests of one commit context
    int num_requests = 0;
    float threshold = 0;                     // that choices are for
    std::vector<Choice> choices;             // [2 * arms]: freeze, refresh of each
    std::vector<CommitModel::Yield> yields;  // [2 * arms]
    std::vector<float> table;                // CommitModel::history_table
    int shortest = 0, longest = 0;           // lengths to allocate between
    bool refresh = false;
  };
  struct Segment {
    float commits;  // expected
    int rows, level;
  };
  static constexpr int kLevels = 64;  // of gain in [0, 1]
  struct Levels {
    double rows[kLevels] = {}, gains[kLevels] = {};  // up for allocation
    double rows_taken = 0, commits_taken = 0;        // without them
    double refresh_rows = 0, fresh_rows = 0;
    int num_requests = 0;  // with masks
  };
  // Where to stop on the way down the levels: `rows` of `level` are taken, all of those above.
  struct Stop {
    int level = kLevels, rows = 0;
    double commits = 0, ms = 0;  // expected
    bool meets_target = false;
  };

  void check() const;
  void choose_fixed(int chunk_length, const std::vector<RequestLoad>& loads, bool refresh);
  Choice admitted(float threshold, int arm, bool refresh) const;
  void group(const std::vector<RequestLoad>& loads, const CommitModel& commits);
  double refresh_share(double commits) const;
  ArmEstimate estimate(int arm, bool refresh, const StepLoad& other,
                       const LatencyModel& latency) const;
  void estimate_arms(const StepLoad& other, const LatencyModel& latency);
  bool is_open(const ArmEstimate& arm) const;
  bool meets_target(const ArmEstimate& arm) const;
  const char* verdict_of(const ArmEstimate& arm, const ArmEstimate& best) const;
  int best_arm(bool& meets) const;
  int keep_if_close(int best, ChunkDecision& decision) const;
  void assign(int arm, const std::vector<RequestLoad>& loads);
  void allocate(int arm, const std::vector<RequestLoad>& loads, const StepLoad& other,
                const LatencyModel& latency, const CommitModel& commits, ChunkDecision& decision);
  void set_range(Group& group, bool refresh) const;
  void open_requests(const std::vector<RequestLoad>& loads, int arm, Levels& levels);
  // `none`: probability that no mask before `first` is accepted.
  void open_segments(const Group& group, const CommitModel::Cells& cells, int first, int last,
                     float none, Levels& levels);
  double row_ms(const ArmEstimate& arm, const StepLoad& other, const LatencyModel& latency) const;
  Stop best_stop(int arm, const Levels& levels, double lambda, const StepLoad& other,
                 const LatencyModel& latency) const;
  void hand_out(int level, int left);

  ChunkPolicyConfig config_;
  int current_ = -1;  // index into arms_, -1 = none
  // elastic_per_request: decayed sums of commits, and of what the best single chunk length was
  // expected to yield in the same time; their quotient corrects the price of time.
  double realised_ = 0, expected_ = 0;
  double predicted_ms_ = 0;   // of the last decision
  double expected_rate_ = 0;  // of the last decision's best arm, commits per ms; 0 = no decision
  double price_ = 0;  // commits a ms is worth: what the best arm makes of it without prompts
  // Working memory of a decision.
  std::vector<int> lengths_;
  std::vector<uint8_t> needs_refresh_;
  std::vector<ArmEstimate> arms_;
  std::vector<Group> groups_;
  int without_masks_rows_ = 0;
  int64_t kv_tokens_ = 0;
  std::vector<Segment> segments_;  // of all requests: num_segments_, and room for more
  int num_segments_ = 0;
  std::vector<int> segment_ends_;  // per request
};

// `auto` KV policy: are `refresh_rows` more rows free (below the knee: at most 2% more time) in this
// step? False without a profile.
bool refresh_is_free(const LatencyModel& latency, const StepLoad& load, int refresh_rows);

}  // namespace optimus
