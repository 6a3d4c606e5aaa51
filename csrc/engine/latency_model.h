// Predicted time of a step from its load: curves measured at start-up, corrected online. No shape is
// assumed: dense, mixture-of-experts and long-context curves all come out of measurement.
#pragma once

#include <cstdint>
#include <vector>

#include "core/robust.h"

namespace optimus {

// What a step does, as far as its time depends on it.
struct StepLoad {
  int rows = 0;           // all rows, before padding
  int prefill_rows = 0;   // of those, without logits
  int64_t kv_tokens = 0;  // sum over sequences of the keys they read
};

// Measured curves. Time of a step = rows curve + KV curve.
struct LatencyProfile {
  struct Point {
    int rows;
    double ms;
  };
  struct KvPoint {
    int64_t kv_tokens;
    double extra_ms;
  };
  std::vector<Point> decode;   // every row a mask row; strictly ascending rows, times > 0
  std::vector<Point> prefill;  // no row a mask row; empty = as decode
  std::vector<KvPoint> kv;     // time above `decode` when this many keys are read; empty = 0
  // The runner rounds rows up to one of decode[].rows (graph sizes): a step costs what the next
  // size costs. Otherwise linear between the points.
  bool is_padded = false;

  // Throws std::invalid_argument naming what does not ascend or is not positive.
  void validate() const;
  // The measured time, without any correction. Below the first point: the first. Beyond the last:
  // along the last two, never falling, as nothing was measured there.
  double ms(const StepLoad& load) const { return ms(load, is_padded); }
  double ms(const StepLoad& load, bool padded) const;
};

class LatencyModel {
 public:
  void set_profile(LatencyProfile profile);
  bool has_profile() const { return !profile_.decode.empty(); }
  const LatencyProfile& profile() const { return profile_; }

  // ms from one step to the next, > 0; requires a profile.
  double predict(const StepLoad& load) const;
  // The same for a step of about so many rows: between two padded sizes, between their times.
  double predict_about(const StepLoad& load) const;
  // Relative error to expect of predict() for this many rows: what was seen lately, and more beyond
  // the measured range.
  double relative_error(int rows) const;
  // Rows the runner really executes for `rows`; with a padded profile the next size.
  int padded_rows(int rows) const;

  // A measured forward. Values that are not positive and finite are ignored (clocks do jump).
  void observe(const StepLoad& load, double forward_ms);
  // Time between two forwards that the forward itself does not explain (host work).
  void observe_overhead(double ms);
  double overhead_ms() const { return overhead_.value(); }

 private:
  struct Place {
    int left, right;
    double fraction;
  };
  static Place locate(const std::vector<LatencyProfile::Point>& points, int rows);
  double shape_correction(int rows, bool padded) const;
  double forward_ms(const StepLoad& load, bool padded) const;

  LatencyProfile profile_;
  double log_scale_ = 0;               // of the whole curve: clocks, a neighbour on the device
  std::vector<double> log_shape_;      // [decode points] what remains, where steps are really run
  RecentMedian<double, 9> residuals_;  // log(measured / predicted) of the last steps
  double mean_abs_residual_ = 0.05;
  RobustMean overhead_{0.1};
};

}  // namespace optimus
