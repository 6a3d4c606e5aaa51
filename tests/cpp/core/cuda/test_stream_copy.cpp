// Stream::copy on the GPU: exactly the bytes that were asked for, both ways, in the order of the stream.
#include "core/device.h"
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

class CudaStreamCopy : public GpuTest {};

struct PageLocked {
  explicit PageLocked(size_t bytes)
      : data(static_cast<char*>(allocate_host_memory(bytes, Device::cuda))), bytes(bytes) {}
  ~PageLocked() { release_host_memory(data, Device::cuda); }
  std::vector<char> values() const { return {data, data + bytes}; }
  char* data;
  size_t bytes;
};

TEST_F(CudaStreamCopy, CopiesEveryByteAndNoOther) {
  constexpr size_t kBytes = 1 << 20;
  Rng rng(3);
  PageLocked from(kBytes), to(kBytes);
  void* middle = allocate_memory(kBytes, Device::cuda);
  Stream stream(Device::cuda);
  for (int trial = 0; trial < 60; ++trial) {
    const size_t stride = 16 * random_int(rng, 1, 2000);
    const size_t count = random_int(rng, 0, 8),
                 bytes = random_int(rng, 0, static_cast<int>(stride));
    const size_t single = random_int(rng, 0, trial % 2 ? 300000 : 40), at = kBytes / 2;
    for (size_t i = 0; i < kBytes; ++i) from.data[i] = static_cast<char>(rng());
    std::memset(to.data, 0x55, kBytes);
    stream.copy({{middle, from.data, kBytes}});
    stream.copy({{to.data, middle, bytes, stride, count},
                 {to.data + at, static_cast<char*>(middle) + at, single}});
    stream.synchronize();
    std::vector<char> expected(kBytes, 0x55);
    for (size_t i = 0; i < count; ++i) {
      std::copy_n(from.data + i * stride, bytes, expected.begin() + i * stride);
    }
    std::copy_n(from.data + at, single, expected.begin() + at);
    ASSERT_TRUE(to.values() == expected) << "trial " << trial;
  }
  release_memory(middle, Device::cuda);
}

// A large copy on one stream, read by another that waits for it.
TEST_F(CudaStreamCopy, AStreamWaitsForAnothersEvent) {
  constexpr size_t kBytes = size_t(64) << 20, kEnd = 4096;
  PageLocked from(kBytes), to(kEnd);
  char* middle = static_cast<char*>(allocate_memory(kBytes, Device::cuda));
  Stream first(Device::cuda), second(Device::cuda);
  StreamEvent written(Device::cuda), read(Device::cuda);
  second.wait(written);  // was never recorded: nothing to wait for
  for (int trial = 1; trial < 20; ++trial) {
    std::memset(from.data, trial, kBytes);
    first.wait(read);
    first.copy({{middle, from.data, kBytes}});
    written.record(first);
    second.wait(written);
    second.copy({{to.data, middle + kBytes - kEnd, kEnd}});
    read.record(second);
    read.synchronize();
    ASSERT_TRUE(to.values() == std::vector<char>(kEnd, static_cast<char>(trial))) << trial;
  }
  release_memory(middle, Device::cuda);
}

}  // namespace
}  // namespace optimus
