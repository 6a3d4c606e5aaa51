#include "engine/commit_process.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

void validate_recording(const CommitRecording& r, int num_tokens) {
  const size_t positions = r.levels.size();
  OPTIMUS_CHECK(num_tokens >= 1 && static_cast<size_t>(num_tokens) <= positions,
                "[commit_trace] num_tokens must be between 1 and ", positions, ", got ",
                num_tokens);
  OPTIMUS_CHECK(r.confidence_begin.size() == positions + 1 && r.confidence_begin[0] == 0 &&
                    static_cast<size_t>(r.confidence_begin[positions]) == r.confidences.size(),
                "[commit_trace] confidence_begin must run from 0 to ", r.confidences.size(), " in ",
                positions + 1, " entries");
  for (size_t i = 0; i < positions; ++i) {
    OPTIMUS_CHECK(r.confidence_begin[i] < r.confidence_begin[i + 1], "[commit_trace] position ", i,
                  " has no confidence");
    OPTIMUS_CHECK(r.levels[i] >= 0, "[commit_trace] levels must not be negative, got ",
                  r.levels[i]);
  }
}

}  // namespace

void CommitTrace::validate() const {
  OPTIMUS_CHECK(!recordings.empty(), "[commit_trace] needs at least one recording");
  int previous = 0;
  for (const CommitRecording& recording : recordings) {
    OPTIMUS_CHECK(recording.chunk_length > previous,
                  "[commit_trace] chunk lengths must ascend from 1, got ", recording.chunk_length,
                  " after ", previous);
    previous = recording.chunk_length;
    validate_recording(recording, num_tokens);
  }
}

const CommitRecording& CommitTrace::nearest(int chunk_length) const {
  const CommitRecording* best = &recordings[0];
  const auto distance = [&](const CommitRecording& r) {
    return std::abs(std::log(double(r.chunk_length) / std::max(chunk_length, 1)));
  };
  for (const CommitRecording& recording : recordings) {
    if (distance(recording) < distance(*best)) best = &recording;
  }
  return *best;
}

float BlockConfidence::next(int output_idx) {
  const int positions = static_cast<int>(recording_.levels.size());
  int at = output_idx, round = 0;
  if (repeats_ || output_idx >= positions) {
    round = output_idx / num_tokens_;
    at = output_idx % num_tokens_;
  }
  constexpr int64_t kRound = int64_t(1) << 32;  // above every level of a recording
  const int64_t level = round * kRound + recording_.levels[at];
  const auto place = std::lower_bound(levels_.begin(), levels_.end(), level);
  const int missing = static_cast<int>(place - levels_.begin());
  if (place == levels_.end() || *place != level) levels_.insert(place, level);
  const int first = recording_.confidence_begin[at];
  const int last = recording_.confidence_begin[at + 1] - 1;
  return recording_.confidences[std::max(first, last - missing)];
}

}  // namespace optimus
