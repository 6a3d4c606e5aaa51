#include "engine/quality.h"

#include <utility>

#include "core/check.h"

namespace optimus {

QualityFloor::QualityFloor(std::vector<MeasuredArm> arms, std::optional<double> floor)
    : arms_(std::move(arms)), floor_(floor) {
  for (const MeasuredArm& arm : arms_) {
    OPTIMUS_CHECK(arm.chunk_length >= 1, "[quality] chunk_length must be at least 1, got ",
                  arm.chunk_length);
    OPTIMUS_CHECK(arm.accuracy >= 0 && arm.accuracy <= 1,
                  "[quality] accuracy must be between 0 and 1, got ", arm.accuracy);
  }
  OPTIMUS_CHECK(!floor_ || (*floor_ >= 0 && *floor_ <= 1),
                "[quality] the floor must be between 0 and 1, got ", floor_.value_or(0));
}

const MeasuredArm* QualityFloor::find(float threshold, int chunk_length, bool refresh) const {
  constexpr float kSame = 1e-4f;
  // Lower threshold first (the largest not above), then the nearest above; then chunk length.
  const MeasuredArm* best = nullptr;
  const auto better = [&](const MeasuredArm& a, const MeasuredArm& b) {
    const bool a_below = a.threshold <= threshold + kSame,
               b_below = b.threshold <= threshold + kSame;
    if (a_below != b_below) return a_below;
    if (a.threshold != b.threshold) return a_below == (a.threshold > b.threshold);
    const bool a_holds = a.chunk_length >= chunk_length, b_holds = b.chunk_length >= chunk_length;
    if (a_holds != b_holds) return a_holds;
    return a_holds == (a.chunk_length < b.chunk_length);
  };
  for (const MeasuredArm& arm : arms_) {
    if (arm.refresh == refresh && (best == nullptr || better(arm, *best))) best = &arm;
  }
  return best;
}

bool QualityFloor::admits(float threshold, int chunk_length, bool refresh) const {
  if (!is_known()) return true;
  const MeasuredArm* arm = find(threshold, chunk_length, refresh);
  if (arm == nullptr) return false;
  return floor_ ? arm->accuracy >= *floor_ : arm->difference_upper >= 0;
}

double QualityFloor::accuracy(float threshold, int chunk_length, bool refresh) const {
  const MeasuredArm* arm = find(threshold, chunk_length, refresh);
  return arm == nullptr ? -1.0 : arm->accuracy;
}

}  // namespace optimus
