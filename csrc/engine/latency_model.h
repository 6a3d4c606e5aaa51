// Predicted time of a step from its rows: a table measured at start-up, corrected online.
#pragma once

#include <vector>

namespace optimus {

class LatencyModel {
 public:
  struct Point {
    int rows;
    double ms;
  };
  // Points in strictly ascending rows, times > 0; none = no profile. Between points: linear, also
  // where a larger step is the faster one (measured is measured). Below the first: the first.
  // Beyond the last: along the last two, but never falling, as nothing was measured there.
  void set_profile(std::vector<Point> points);
  bool has_profile() const { return !points_.empty(); }
  const std::vector<Point>& profile() const { return points_; }  // as measured at start-up

  double predict(int rows) const;  // ms, > 0; requires a profile
  // A measured step corrects the points around it, a little; ignored without a profile.
  void observe(int rows, double ms);

 private:
  // The two points whose line (or the one point whose time) `rows` is predicted from. `fraction` is
  // 0 at `left`, 1 at `right`, above 1 beyond the last point.
  struct Place {
    int left, right;
    double fraction;
  };
  Place locate(int rows) const;
  double corrected_ms(int point) const { return points_[point].ms * corrections_[point]; }

  std::vector<Point> points_;
  std::vector<double> corrections_;  // per point, multiplicative
};

}  // namespace optimus
