// What the masks of a simulated request would say: replays answers recorded from a real model.
//
// A recording holds, for every position of an answer, the forward that committed it (its *level*)
// and its confidence in every forward that evaluated it. The model's confidence in a mask depends on
// what stands to its left, so in the simulator a mask behaves as it did when as many levels to its
// left were still missing: with d distinct lower levels among the masks before it in the block, it
// shows the confidence it had d forwards before its commit. Whether it commits is then decided by the
// engine's own unmasking code, whatever the threshold. Confidences also depend on how many masks are
// in sight, so an answer is recorded at several chunk lengths, and a step uses the nearest.
#pragma once

#include <cstdint>
#include <vector>

namespace optimus {

struct CommitRecording {
  int chunk_length = 0;                   // masks evaluated in a forward
  std::vector<int32_t> levels;            // [positions]
  std::vector<int32_t> confidence_begin;  // [positions + 1]
  std::vector<float> confidences;         // of a position: oldest first, the last one committed it
};

struct CommitTrace {
  int prompt_len = 0;  // its remainder by the block length aligns the answer with the block grid
  int num_tokens = 0;  // of the answer; positions behind it, up to the end of its block, may follow
  std::vector<CommitRecording> recordings;  // ascending chunk lengths, at least one

  void validate() const;  // throws std::invalid_argument
  const CommitRecording& nearest(int chunk_length) const;
};

// Confidence of masks of one request in one step. Feed its masks of the block in ascending order.
class BlockConfidence {
 public:
  // The answer repeats when the request wants more tokens than the trace has.
  BlockConfidence(const CommitTrace& trace, int chunk_length, bool repeats)
      : recording_(trace.nearest(chunk_length)), num_tokens_(trace.num_tokens), repeats_(repeats) {}
  float next(int output_idx);

 private:
  const CommitRecording& recording_;
  int num_tokens_;
  bool repeats_;
  std::vector<int64_t> levels_;  // distinct, ascending, of the masks so far
};

}  // namespace optimus
