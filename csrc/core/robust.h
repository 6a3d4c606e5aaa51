// Small estimators that a single outlier (a preempted process, a page fault) does not move.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

namespace optimus {

// Median of the last N values; of fewer while there are fewer. 0 without any.
template <class T, int N>
class RecentMedian {
 public:
  void push(T value) {
    values_[next_] = value;
    next_ = (next_ + 1) % N;
    count_ = std::min(count_ + 1, N);
  }
  // Adds `delta` to every remembered value: what they are relative to has moved.
  void shift(T delta) {
    for (int i = 0; i < count_; ++i) values_[i] += delta;
  }
  void clear() { count_ = next_ = 0; }
  int count() const { return count_; }
  bool is_full() const { return count_ == N; }
  T median() const {
    if (count_ == 0) return T(0);
    std::array<T, N> sorted = values_;
    auto middle = sorted.begin() + count_ / 2;
    std::nth_element(sorted.begin(), middle, sorted.begin() + count_);
    return *middle;
  }

 private:
  std::array<T, N> values_{};
  int count_ = 0, next_ = 0;
};

// Exponential mean of medians of five; before there are five, their median.
class RobustMean {
 public:
  explicit RobustMean(double gain) : gain_(gain) {}
  void push(double value) {
    if (!std::isfinite(value)) return;
    recent_.push(value);
    const double target = recent_.median();
    mean_ = was_full_ ? mean_ + gain_ * (target - mean_) : target;
    was_full_ = recent_.is_full();
  }
  double value() const { return mean_; }

 private:
  RecentMedian<double, 5> recent_;
  double gain_, mean_ = 0;
  bool was_full_ = false;
};

}  // namespace optimus
