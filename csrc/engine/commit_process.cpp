#include "engine/commit_process.h"

#include <algorithm>

#include "core/check.h"

namespace optimus {

void CommitTrace::validate() const {
  const size_t positions = levels.size();
  OPTIMUS_CHECK(num_tokens >= 1 && static_cast<size_t>(num_tokens) <= positions,
                "[commit_trace] num_tokens must be between 1 and ", positions, ", got ",
                num_tokens);
  OPTIMUS_CHECK(confidence_begin.size() == positions + 1 && confidence_begin[0] == 0 &&
                    static_cast<size_t>(confidence_begin[positions]) == confidences.size(),
                "[commit_trace] confidence_begin must run from 0 to ", confidences.size(), " in ",
                positions + 1, " entries");
  for (size_t i = 0; i < positions; ++i) {
    OPTIMUS_CHECK(confidence_begin[i] < confidence_begin[i + 1], "[commit_trace] position ", i,
                  " has no confidence");
    OPTIMUS_CHECK(levels[i] >= 0, "[commit_trace] levels must not be negative, got ", levels[i]);
  }
}

float BlockConfidence::next(int output_idx) {
  const int positions = static_cast<int>(trace_.levels.size());
  int at = output_idx, round = 0;
  if (repeats_ || output_idx >= positions) {
    round = output_idx / trace_.num_tokens;
    at = output_idx % trace_.num_tokens;
  }
  constexpr int64_t kRound = int64_t(1) << 32;  // above every level of a trace
  const int64_t level = round * kRound + trace_.levels[at];
  const auto place = std::lower_bound(levels_.begin(), levels_.end(), level);
  const int missing = static_cast<int>(place - levels_.begin());
  if (place == levels_.end() || *place != level) levels_.insert(place, level);
  const int first = trace_.confidence_begin[at], last = trace_.confidence_begin[at + 1] - 1;
  return trace_.confidences[std::max(first, last - missing)];
}

}  // namespace optimus
