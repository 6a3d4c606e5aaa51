// The last steps, for whoever wants to know why: a ring of StepRecords.
#pragma once

#include <utility>
#include <vector>

#include "engine/batch.h"

namespace optimus {

class StepLog {
 public:
  explicit StepLog(int capacity) : capacity_(capacity) {}

  void push(const StepRecord& record) {
    if (capacity_ == 0) return;
    if (static_cast<int>(records_.size()) < capacity_) {
      records_.push_back(record);
    } else {
      records_[next_] = record;
    }
    next_ = (next_ + 1) % capacity_;
  }
  void clear() {
    records_.clear();
    next_ = 0;
  }
  // Oldest first.
  std::vector<StepRecord> records() const {
    std::vector<StepRecord> ordered;
    const size_t count = records_.size();
    const size_t first = static_cast<int>(count) < capacity_ ? 0 : next_;
    for (size_t i = 0; i < count; ++i) ordered.push_back(records_[(first + i) % count]);
    return ordered;
  }

 private:
  int capacity_;
  std::vector<StepRecord> records_;
  size_t next_ = 0;
};

}  // namespace optimus
