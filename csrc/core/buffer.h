// Owned memory of one device. Everything a step touches is a Buffer allocated before serving.
#pragma once

#include <cstdint>
#include <utility>

#include "core/check.h"
#include "core/device.h"

namespace optimus {

// 64-byte aligned. Elements of Device::cuda are not for the host to touch: copy_in, or a Stream.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count, Device device = Device::cpu) : count_(count), device_(device) {
    if (count > 0) data_ = static_cast<T*>(allocate_memory(count * sizeof(T), device));
  }
  Buffer(size_t count, T value) : Buffer(count) { fill(value); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) release_memory(data_, device_);
  }

  void fill(T value) {
    for (size_t i = 0; i < count_; ++i) data_[i] = value;
  }
  // `count` elements of host memory to the elements from `begin` on; done on return.
  void copy_in(size_t begin, const T* from, size_t count) {
    OPTIMUS_INVARIANT(begin + count <= count_, "copy_in of ", begin, " + ", count, " in ", count_);
    copy_memory(data_ + begin, from, count * sizeof(T), device_);
  }
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(device_, other.device_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  Device device() const { return device_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
  Device device_ = Device::cpu;
};

}  // namespace optimus
