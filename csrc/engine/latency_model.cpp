// Measured curves with two corrections in log time: one of the whole curve, fast, and one per point,
// slow.
//
// Serving differs from the profile in two ways. Everything may be slower (clocks, a neighbour that
// takes the device): the median residual of the last steps moves the whole curve, so that the
// lengths the policy compares move together and not only the one it runs. And the shape may be off
// where steps are really run: a small gain per point follows that. Single slow steps move neither:
// medians ignore them, and for the shape they hardly count.
#include "engine/latency_model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace optimus {
namespace {

constexpr double kScaleGain = 0.2;   // share of the median residual one step corrects
constexpr double kJump = 0.10;       // a full window of residuals beyond this moves at once
constexpr double kShapeGain = 0.05;  // share of a step's residual its points take
constexpr double kShapeClip = 0.25;  // of that residual; what is beyond counts less and less
constexpr double kMaxLog = 4.0;      // of either correction: predictions stay positive and finite
constexpr double kErrorGain = 0.05;
constexpr double kErrorClip = 0.5;
constexpr double kBeyondError = 0.10;  // relative error added per doubling beyond the last point

using Points = std::vector<LatencyProfile::Point>;

void validate_points(const char* what, const Points& points) {
  for (size_t i = 0; i < points.size(); ++i) {
    OPTIMUS_CHECK(std::isfinite(points[i].ms) && points[i].ms > 0, "[latency_model] ", what,
                  " time of ", points[i].rows, " rows must be > 0, got ", points[i].ms, " ms");
    OPTIMUS_CHECK(points[i].rows > (i == 0 ? 0 : points[i - 1].rows), "[latency_model] ", what,
                  " rows must ascend from 1, got ", points[i].rows, " after ",
                  i == 0 ? 0 : points[i - 1].rows);
  }
}

// Index of the first point that holds `rows`; the last one beyond all.
int first_at_least(const Points& points, int rows) {
  const auto above = std::lower_bound(
      points.begin(), points.end(), rows,
      [](const LatencyProfile::Point& point, int value) { return point.rows < value; });
  return std::min(static_cast<int>(above - points.begin()), static_cast<int>(points.size()) - 1);
}

double curve_ms(const Points& points, int rows, bool is_padded) {
  const int last = static_cast<int>(points.size()) - 1;
  const int right = first_at_least(points, rows);
  if (right == 0 || (is_padded && rows <= points[right].rows)) {
    if (last == 0 || rows <= points[right].rows) return points[right].ms;
  }
  const auto& a = points[right - 1];
  const auto& b = points[right];
  const double fraction = (static_cast<double>(rows) - a.rows) / (double(b.rows) - a.rows);
  if (fraction > 1.0) return b.ms + std::max(0.0, b.ms - a.ms) * (fraction - 1.0);
  return a.ms + (b.ms - a.ms) * fraction;
}

double kv_ms(const std::vector<LatencyProfile::KvPoint>& points, int64_t kv_tokens) {
  if (points.empty()) return 0.0;
  LatencyProfile::KvPoint a{0, 0.0}, b = points[0];
  for (size_t i = 1; i < points.size() && b.kv_tokens < kv_tokens; ++i) {
    a = b;
    b = points[i];
  }
  const double slope = (b.extra_ms - a.extra_ms) / (double(b.kv_tokens) - double(a.kv_tokens));
  const double beyond = static_cast<double>(kv_tokens - b.kv_tokens);
  return b.extra_ms + (beyond > 0 ? std::max(0.0, slope) : slope) * beyond;
}

}  // namespace

void LatencyProfile::validate() const {
  validate_points("decode", decode);
  validate_points("prefill", prefill);
  OPTIMUS_CHECK(!decode.empty() || (prefill.empty() && kv.empty()),
                "[latency_model] a profile needs decode points");
  for (size_t i = 0; i < kv.size(); ++i) {
    OPTIMUS_CHECK(kv[i].kv_tokens > (i == 0 ? 0 : kv[i - 1].kv_tokens),
                  "[latency_model] kv_tokens must ascend from 1, got ", kv[i].kv_tokens, " after ",
                  i == 0 ? 0 : kv[i - 1].kv_tokens);
    OPTIMUS_CHECK(std::isfinite(kv[i].extra_ms) && kv[i].extra_ms >= 0,
                  "[latency_model] extra time of ", kv[i].kv_tokens, " keys must be >= 0, got ",
                  kv[i].extra_ms, " ms");
  }
}

double LatencyProfile::ms(const StepLoad& load, bool padded) const {
  double result = curve_ms(decode, load.rows, padded);
  if (load.prefill_rows > 0 && !prefill.empty()) {
    const double share = static_cast<double>(load.prefill_rows) / std::max(load.rows, 1);
    result += share * (curve_ms(prefill, load.rows, padded) - result);
  }
  return result + kv_ms(kv, load.kv_tokens);
}

void LatencyModel::set_profile(LatencyProfile profile) {
  profile.validate();
  profile_ = std::move(profile);
  log_shape_.assign(profile_.decode.size(), 0.0);
  log_scale_ = 0;
  // The profile was measured just now: its word against that of a first slow step.
  residuals_.clear();
  while (!residuals_.is_full()) residuals_.push(0.0);
}

int LatencyModel::padded_rows(int rows) const {
  if (!profile_.is_padded || profile_.decode.empty()) return rows;
  return std::max(rows, profile_.decode[first_at_least(profile_.decode, rows)].rows);
}

LatencyModel::Place LatencyModel::locate(const Points& points, int rows) {
  const int right = first_at_least(points, rows);
  if (right == 0 || rows >= points[right].rows) return {right, right, 0.0};
  const int left = right - 1;
  return {left, right,
          (static_cast<double>(rows) - points[left].rows) /
              (static_cast<double>(points[right].rows) - points[left].rows)};
}

double LatencyModel::shape_correction(int rows, bool padded) const {
  const Place place = locate(profile_.decode, rows);
  const double right = log_shape_[place.right];
  if (padded) return right;
  return log_shape_[place.left] + (right - log_shape_[place.left]) * place.fraction;
}

double LatencyModel::forward_ms(const StepLoad& load, bool padded) const {
  OPTIMUS_INVARIANT(has_profile(), "[latency_model] predict without a profile");
  return profile_.ms(load, padded) * std::exp(log_scale_ + shape_correction(load.rows, padded));
}

double LatencyModel::predict(const StepLoad& load) const {
  return forward_ms(load, profile_.is_padded) + std::max(0.0, overhead_.value());
}

double LatencyModel::predict_about(const StepLoad& load) const {
  return forward_ms(load, false) + std::max(0.0, overhead_.value());
}

double LatencyModel::relative_error(int rows) const {
  constexpr double kMeanAbsToDeviation = 1.25;  // of a normal distribution
  double error = kMeanAbsToDeviation * mean_abs_residual_;
  if (has_profile() && rows > profile_.decode.back().rows) {
    error += kBeyondError * std::log2(double(rows) / profile_.decode.back().rows);
  }
  return error;
}

void LatencyModel::observe(const StepLoad& load, double forward_ms) {
  if (!has_profile() || !std::isfinite(forward_ms) || forward_ms <= 0) return;
  const double residual = std::log(forward_ms / this->forward_ms(load, profile_.is_padded));
  mean_abs_residual_ +=
      kErrorGain * (std::min(std::abs(residual), kErrorClip) - mean_abs_residual_);

  residuals_.push(residual);
  const double median = residuals_.median();
  const bool jump = residuals_.is_full() && std::abs(median) > kJump;
  const double wanted = log_scale_ + (jump ? 1.0 : kScaleGain) * median;
  const double moved = std::clamp(wanted, -kMaxLog, kMaxLog) - log_scale_;
  log_scale_ += moved;
  residuals_.shift(-moved);

  // The further off, the less it says about the shape: an outlier, or the start of a change.
  const double apart = residual - median;
  const double trust = std::abs(apart) <= kShapeClip ? 1.0 : std::pow(kShapeClip / apart, 2);
  const double own = kShapeGain * trust * apart;
  const Place place = locate(profile_.decode, load.rows);
  const auto correct = [&](int point, double weight) {
    log_shape_[point] = std::clamp(log_shape_[point] + own * weight, -kMaxLog, kMaxLog);
  };
  if (profile_.is_padded || place.left == place.right) {
    correct(place.right, 1.0);
  } else {
    correct(place.left, 1.0 - place.fraction);
    correct(place.right, place.fraction);
  }
}

void LatencyModel::observe_overhead(double ms) {
  if (std::isfinite(ms) && ms >= 0) overhead_.push(ms);
}

}  // namespace optimus
