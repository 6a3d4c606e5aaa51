// Piecewise linear latency with a multiplicative correction per measured point.
//
// The start-up profile misses what serving adds (long contexts, host work, clocks); a correction
// per point follows that where steps are really run and leaves the rest of the curve as measured. A
// step that was slow by accident must not steer the policy: ratios are clipped and the gain is
// small.
#include "engine/latency_model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kGain = 0.05;           // share of the error (in log time) one step corrects
constexpr double kMaxRatio = 1.5;        // measured / predicted, clipped to [1 / this, this]
constexpr double kMaxCorrection = 64.0;  // in all: keeps predictions positive and finite

}  // namespace

void LatencyModel::set_profile(std::vector<Point> points) {
  for (size_t i = 0; i < points.size(); ++i) {
    OPTIMUS_CHECK(std::isfinite(points[i].ms) && points[i].ms > 0, "[latency_model] time of ",
                  points[i].rows, " rows must be > 0, got ", points[i].ms, " ms");
    OPTIMUS_CHECK(i == 0 || points[i - 1].rows < points[i].rows,
                  "[latency_model] rows must ascend, got ", points[i].rows, " after ",
                  i == 0 ? 0 : points[i - 1].rows);
  }
  points_ = std::move(points);
  corrections_.assign(points_.size(), 1.0);
}

LatencyModel::Place LatencyModel::locate(int rows) const {
  const int last = static_cast<int>(points_.size()) - 1;
  if (last == 0 || rows <= points_.front().rows) return {0, 0, 0.0};
  const auto above =
      std::lower_bound(points_.begin(), points_.end(), rows,
                       [](const Point& point, int value) { return point.rows < value; });
  const int right = std::min(last, static_cast<int>(above - points_.begin()));
  const int left = right - 1;
  const double span = static_cast<double>(points_[right].rows) - points_[left].rows;
  return {left, right, (static_cast<double>(rows) - points_[left].rows) / span};
}

double LatencyModel::predict(int rows) const {
  OPTIMUS_INVARIANT(has_profile(), "[latency_model] predict without a profile");
  const Place place = locate(rows);
  const double left = corrected_ms(place.left), right = corrected_ms(place.right);
  if (place.fraction > 1.0) return right + std::max(0.0, right - left) * (place.fraction - 1.0);
  return left + (right - left) * place.fraction;
}

void LatencyModel::observe(int rows, double ms) {
  if (!has_profile() || !std::isfinite(ms) || ms <= 0) return;
  const double ratio = std::clamp(ms / predict(rows), 1 / kMaxRatio, kMaxRatio);
  const auto correct = [&](int point, double weight) {
    corrections_[point] = std::clamp(corrections_[point] * std::pow(ratio, kGain * weight),
                                     1 / kMaxCorrection, kMaxCorrection);
  };
  const Place place = locate(rows);
  if (place.fraction > 1.0) {
    // Moving the last point alone would turn the line; both together scale it.
    correct(place.left, 1.0);
    correct(place.right, 1.0);
  } else {
    correct(place.left, 1.0 - place.fraction);
    correct(place.right, place.fraction);
  }
}

}  // namespace optimus
