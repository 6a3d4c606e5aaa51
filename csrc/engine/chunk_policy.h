// Chooses how many masks each request evaluates in the next step. Plain arithmetic, no CUDA, no
// torch.
#pragma once

#include <vector>

#include "engine/commit_model.h"
#include "engine/latency_model.h"

namespace optimus {

// What the policy sees of one decoding request.
struct RequestLoad {
  int num_masked;  // masks left in its block
  int num_fresh;   // rows it must feed anyway
};

struct ChunkDecision {
  int chunk_length;             // for every request of the batch
  double expected_commits = 0;  // of the whole batch; 0 when not estimated
  double predicted_ms = 0;      // 0 when not estimated
  const char* reason = "";      // static text
};

class ChunkPolicy {
 public:
  static ChunkPolicy fixed(int chunk_length);
  // Arms: chunk lengths to choose among, strictly ascending, at most block_length. Switches only
  // for a relative gain above min_gain.
  static ChunkPolicy elastic(std::vector<int> arms, int block_length, double min_gain = 0.02);

  bool is_fixed() const { return arms_.size() == 1; }

  // `other_rows`: prefill rows that will share the step. Elastic: the arm with the largest expected
  // commits per predicted millisecond, in the steady state where every commit is fed once more (so
  // the present num_fresh, which the last arm left behind, does not count; a request without masks
  // feeds its fresh rows only). Without a profile the trained block; with nothing to decode the
  // arm in use. Never 0.
  ChunkDecision choose(const std::vector<RequestLoad>& loads, int other_rows,
                       const LatencyModel& latency, const CommitModel& commits);

 private:
  ChunkPolicy(std::vector<int> arms, int block_length, double min_gain);

  std::vector<int> arms_;
  int block_length_ = 0;
  double min_gain_ = 0;
  int current_ = 0;  // last choice, 0 = none
};

// `auto` KV policy: are `refresh_rows` more rows free (below the knee: at most 2% more time) in a
// step of `rows`? False without a profile.
bool refresh_is_free(const LatencyModel& latency, int rows, int refresh_rows);

}  // namespace optimus
