// Which ways of decoding are good enough: accuracies measured by a calibration run, and a floor.
#pragma once

#include <optional>
#include <vector>

namespace optimus {

// One line of a calibration: chunk decoding with these settings, on paired prompts.
struct MeasuredArm {
  float threshold = 0;
  int chunk_length = 0;
  bool refresh = false;
  double accuracy = 0;          // share of right answers, 0..1
  double difference_upper = 0;  // upper 95% bound of accuracy minus block decode's, same threshold
};

class QualityFloor {
 public:
  QualityFloor() = default;  // nothing was measured: everything is admitted
  // floor: accuracy an arm must have been measured at; none = block decode's at the same threshold,
  // that is, arms measurably below it (difference_upper < 0) are refused.
  QualityFloor(std::vector<MeasuredArm> arms, std::optional<double> floor);

  bool is_known() const { return !arms_.empty(); }
  // Between measured points the stricter neighbour counts: the next larger chunk length, the next
  // lower threshold.
  bool admits(float threshold, int chunk_length, bool refresh) const;
  // Measured accuracy by the same rule; -1 = unknown.
  double accuracy(float threshold, int chunk_length, bool refresh) const;

 private:
  const MeasuredArm* find(float threshold, int chunk_length, bool refresh) const;

  std::vector<MeasuredArm> arms_;
  std::optional<double> floor_;
};

}  // namespace optimus
