// Helpers of the CUDA kernel tests: a fixture that skips without a GPU, arrays that exist on both
// sides, and comparisons with the CPU twin. Arrays on the device are poisoned until uploaded to.
#pragma once

#include <vector>

#include "core/device_buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cuda/kernels.h"
#include "testing.h"

namespace optimus::testing {

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      static_cast<void>(cudaGetLastError());
      GTEST_SKIP() << "no GPU";
    }
  }
  // Reports errors of the kernels a test launched, even those whose results it never read.
  void TearDown() override {
    if (IsSkipped()) return;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  ThreadPool pool{1};
};

// A device copy of `host`, and back.
template <class T>
DeviceBuffer<T> upload(const std::vector<T>& host) {
  DeviceBuffer<T> device(host.size());
  if (!host.empty()) copy_to_device(device.data(), host.data(), host.size(), nullptr);
  OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  return device;
}
template <class T>
std::vector<T> download(const DeviceBuffer<T>& device) {
  std::vector<T> host(device.size());
  if (!host.empty()) copy_to_host(host.data(), device.data(), host.size(), nullptr);
  OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  return host;
}

// The device side of a Tensor, 16-byte aligned, with the same guards around it.
class DeviceTensor {
 public:
  explicit DeviceTensor(const Tensor& host)
      : host_(host), bytes_(host.size() * dtype_size(host.dtype()) + 2 * kGuard) {
    bytes_.fill_bytes(kGuardByte);
    if (size() > 0) copy_to_device(data(), static_cast<const char*>(host_.data()), size(), nullptr);
    OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  }
  char* data() { return bytes_.data() + kGuard; }

  // The tensor as it is on the device now; checks that nothing was written around it.
  Tensor read() {
    std::vector<char> all = download(bytes_);
    auto is_guard = [](char byte) { return byte == kGuardByte; };
    EXPECT_TRUE(std::all_of(all.begin(), all.begin() + kGuard, is_guard)) << "written in front";
    EXPECT_TRUE(std::all_of(all.end() - kGuard, all.end(), is_guard)) << "written behind";
    std::memcpy(host_.data(), all.data() + kGuard, size());
    return host_;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr char kGuardByte = char(0x5a);
  size_t size() const { return host_.size() * dtype_size(host_.dtype()); }

  Tensor host_;
  DeviceBuffer<char> bytes_;
};

// 1e-3 in fp32 and 1e-2 in bf16, relative to the element plus the typical element. NaN (poison)
// must be at the same places.
inline void expect_near_twin(const Tensor& actual, const Tensor& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  double squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isnan(expected.get(i))) squares += double(expected.get(i)) * expected.get(i);
  }
  double typical = std::sqrt(squares / std::max<size_t>(1, expected.size()));
  double tolerance = actual.dtype() == DType::float32 ? 1e-3 : 1e-2;
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(std::isnan(actual.get(i)), std::isnan(expected.get(i))) << "element " << i;
    if (std::isnan(expected.get(i))) continue;
    double allowed = tolerance * (std::abs(expected.get(i)) + typical);
    ASSERT_LE(std::abs(actual.get(i) - expected.get(i)), allowed)
        << "element " << i << ": got " << actual.get(i) << ", expected " << expected.get(i);
  }
}

inline void expect_same_as_twin(const Tensor& actual, const Tensor& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  expect_same_bits(actual, 0, expected, 0, expected.size());
}

// Runs body(dtype) for both dtypes.
template <class Body>
void for_each_dtype(const Body& body) {
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    SCOPED_TRACE(dtype_name(dtype));
    body(dtype);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace optimus::testing
