// Owned device memory and page-locked host memory. Only in CUDA builds. Like Buffer, everything a
// step touches is allocated before serving; contents are undefined until written.
#pragma once

#include <cstdint>
#include <utility>

#include "core/cuda_check.h"

namespace optimus {

// What both kinds share: a pointer from Memory::allocate, given back by Memory::release.
template <class T, class Memory>
class CudaBuffer {
 public:
  CudaBuffer() = default;
  explicit CudaBuffer(size_t count) : count_(count) {
    if (count > 0) data_ = static_cast<T*>(Memory::allocate(count * sizeof(T)));
  }
  CudaBuffer(CudaBuffer&& other) noexcept { swap(other); }
  CudaBuffer& operator=(CudaBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;
  ~CudaBuffer() {
    if (data_ != nullptr) Memory::release(data_);
  }

  void swap(CudaBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

  // All bytes of the buffer, in stream order.
  void fill_bytes(int value, cudaStream_t stream = nullptr) {
    if (count_ > 0) OPTIMUS_CUDA_CHECK(cudaMemsetAsync(data_, value, bytes(), stream));
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

struct DeviceMemory {
  static void* allocate(size_t bytes) {
    void* data = nullptr;
    OPTIMUS_CUDA_CHECK(cudaMalloc(&data, bytes));
    return data;
  }
  // Errors are ignored: at exit the driver may be gone before the last buffer.
  static void release(void* data) { static_cast<void>(cudaFree(data)); }
};

// Page-locked and mapped: kernels may read and write it through the same pointer.
struct PinnedMemory {
  static void* allocate(size_t bytes) {
    void* data = nullptr;
    OPTIMUS_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    return data;
  }
  static void release(void* data) { static_cast<void>(cudaFreeHost(data)); }
};

template <class T>
using DeviceBuffer = CudaBuffer<T, DeviceMemory>;

template <class T>
class PinnedBuffer : public CudaBuffer<T, PinnedMemory> {
 public:
  using CudaBuffer<T, PinnedMemory>::CudaBuffer;
  T& operator[](size_t i) { return this->data()[i]; }
  const T& operator[](size_t i) const { return this->data()[i]; }
};

// Stream-ordered copies; `host` must stay alive until the stream gets there.
template <class T>
void copy_to_device(T* device, const T* host, size_t count, cudaStream_t stream) {
  OPTIMUS_CUDA_CHECK(
      cudaMemcpyAsync(device, host, count * sizeof(T), cudaMemcpyHostToDevice, stream));
}
template <class T>
void copy_to_host(T* host, const T* device, size_t count, cudaStream_t stream) {
  OPTIMUS_CUDA_CHECK(
      cudaMemcpyAsync(host, device, count * sizeof(T), cudaMemcpyDeviceToHost, stream));
}

}  // namespace optimus
