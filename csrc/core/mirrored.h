// Arrays that cross between host and device together, in one copy. They lie one behind another in
// device memory, with a twin in host memory; on the CPU the two are the same memory, and crossing is
// nothing. What a step has not used can stay behind: its copies may stand between two steps' kernels.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "core/check.h"
#include "core/device.h"

namespace optimus {

template <class T>
struct Mirrored {
  T* host = nullptr;
  T* device = nullptr;
};

class MirroredArrays {
 public:
  explicit MirroredArrays(Device device) : device_(device) {}
  ~MirroredArrays() {
    if (on_device_ != nullptr && device_ != Device::cpu) release_memory(on_device_, device_);
    if (on_host_ != nullptr) release_host_memory(on_host_, device_);
  }
  MirroredArrays(const MirroredArrays&) = delete;
  MirroredArrays& operator=(const MirroredArrays&) = delete;

  // Reserves `count` elements; `array` has its pointers after allocate().
  template <class T>
  void add(size_t count, Mirrored<T>& array) {
    const size_t offset = bytes_;
    bytes_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    placements_.push_back([offset, &array](char* host, char* device) {
      array = {reinterpret_cast<T*>(host + offset), reinterpret_cast<T*>(device + offset)};
    });
  }

  // Once, after the last add; all zero.
  void allocate() {
    const size_t bytes = std::max<size_t>(bytes_, 1);
    on_host_ = static_cast<char*>(allocate_host_memory(bytes, device_));
    std::memset(on_host_, 0, bytes);
    on_device_ =
        device_ == Device::cpu ? on_host_ : static_cast<char*>(allocate_memory(bytes, device_));
    for (const auto& place : placements_) place(on_host_, on_device_);
    placements_.clear();
  }

  // What lies before `end`, a place in host memory.
  void upload(Stream& stream, const void* end) {
    const size_t bytes = static_cast<const char*>(end) - on_host_;
    OPTIMUS_INVARIANT(bytes <= bytes_, "upload of ", bytes, " bytes of ", bytes_);
    stream.copy({{on_device_, on_host_, bytes}});
  }
  StreamCopy downloaded() const { return {on_host_, on_device_, bytes_}; }
  // The first `bytes` of each of `count` parts of equal size.
  StreamCopy downloaded_parts(size_t bytes, size_t count) const {
    return {on_host_, on_device_, bytes, bytes_ / count, count};
  }
  Device device() const { return device_; }
  size_t bytes() const { return bytes_; }
  const void* host_end() const { return on_host_ + bytes_; }

 private:
  static constexpr size_t kAlignment = 64;

  Device device_;
  size_t bytes_ = 0;
  char* on_host_ = nullptr;
  char* on_device_ = nullptr;
  std::vector<std::function<void(char* host, char* device)>> placements_;
};

// Arrays of one length, of which the first elements cross.
class MirroredRows {
 public:
  MirroredRows(Device device, size_t length) : arrays_(device), length_(length) {}

  template <class T>
  void add(Mirrored<T>& array) {
    static_assert(kElement % sizeof(T) == 0);
    arrays_.add(length_ * (kElement / sizeof(T)), array);  // all of the same size
    ++count_;
  }
  void allocate() { arrays_.allocate(); }
  StreamCopy downloaded(size_t length) const {
    return arrays_.downloaded_parts(length * kElement, count_);
  }
  Device device() const { return arrays_.device(); }
  size_t bytes() const { return arrays_.bytes(); }

 private:
  static constexpr size_t kElement = 4;  // the largest

  MirroredArrays arrays_;
  size_t length_, count_ = 0;
};

}  // namespace optimus
