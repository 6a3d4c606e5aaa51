// What the masks of a simulated request would say: confidences recorded from a real model.
//
// A model's confidence in a mask depends above all on how much of what stands before it is known.
// So a trace of an answer holds, for every position j of it, the confidences of j and of all masks
// behind it in its block when everything before j is known: one row per j. In the simulator a mask
// shows what it showed when the first mask of its block stood where it stands now. Whether it commits
// is then decided by the engine's own unmasking code, whatever the threshold and the chunk length.
// On the demo model this reproduces the tokens per forward of every chunk length within a few per
// cent (tests/python/test_traces.py).
#pragma once

#include <cstdint>
#include <vector>

namespace optimus {

struct CommitTrace {
  int prompt_len = 0;  // its remainder by the block length aligns the answer with the block grid
  std::vector<int32_t> row_begin;  // [num_tokens + 1] into confidences
  std::vector<float> confidences;  // row j: of positions j, j + 1, ... to the end of j's block

  int num_tokens() const { return static_cast<int>(row_begin.size()) - 1; }
  void validate() const;  // throws std::invalid_argument

  // Confidence in the mask at output position `idx` while the first mask of its block is at
  // `first_mask`, both >= 0. Behind the answer's end the answer starts anew; where a row is too short
  // (another alignment with the block grid) the longest row of the trace stands in.
  float confidence(int first_mask, int idx) const;
};

}  // namespace optimus
