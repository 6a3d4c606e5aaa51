#include "engine/commit_process.h"

#include <algorithm>

#include "core/check.h"

namespace optimus {

void CommitTrace::validate() const {
  OPTIMUS_CHECK(row_begin.size() >= 2, "[commit_trace] needs at least one row");
  OPTIMUS_CHECK(
      row_begin.front() == 0 && static_cast<size_t>(row_begin.back()) == confidences.size(),
      "[commit_trace] row_begin must run from 0 to ", confidences.size(), ", got ",
      row_begin.front(), " to ", row_begin.back());
  for (int j = 0; j < num_tokens(); ++j) {
    OPTIMUS_CHECK(row_begin[j] < row_begin[j + 1], "[commit_trace] row ", j, " is empty");
  }
  for (float confidence : confidences) {
    OPTIMUS_CHECK(confidence >= 0 && confidence <= 1,
                  "[commit_trace] confidences must be between 0 and 1, got ", confidence);
  }
}

float CommitTrace::confidence(int first_mask, int idx) const {
  const auto length = [this](int row) { return row_begin[row + 1] - row_begin[row]; };
  int row = first_mask % num_tokens();
  const int distance = idx - first_mask;
  if (distance >= length(row)) {
    for (int j = 0; j < num_tokens(); ++j) {
      if (length(j) > length(row)) row = j;
    }
  }
  return confidences[row_begin[row] + std::min(distance, length(row) - 1)];
}

}  // namespace optimus
