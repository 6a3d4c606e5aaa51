#include "core/stream_copy.h"

#include <algorithm>

#include "core/check.h"
#include "core/launch.cuh"

namespace optimus {
namespace {

constexpr int kThreads = 256;
constexpr int kMostCtas = 64;
constexpr int kUnit = 16;  // bytes a thread copies at once

struct Copies {
  StreamCopy copies[StreamCopy::kMost];
  int count;
};

int64_t __host__ __device__ units_of_piece(const StreamCopy& copy) {
  return (int64_t(copy.bytes) + kUnit - 1) / kUnit;
}

// Past the caches: the host has written since they last saw it.
__device__ __forceinline__ uint4 load(const char* from) {
  uint4 value;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Copies params) {
  cuda::wait_for_previous_kernel();
  for (int k = 0; k < params.count; ++k) {
    const StreamCopy& copy = params.copies[k];
    const int64_t units = units_of_piece(copy);
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < units * int64_t(copy.count);
         i += gridDim.x * kThreads) {
      const int64_t at = i % units * kUnit, offset = i / units * int64_t(copy.stride) + at;
      char* to = static_cast<char*>(copy.to) + offset;
      const char* from = static_cast<const char*>(copy.from) + offset;
      if (at + kUnit <= int64_t(copy.bytes)) {
        *reinterpret_cast<uint4*>(to) = load(from);
      } else {
        for (int64_t byte = 0; byte < int64_t(copy.bytes) - at; ++byte) {
          to[byte] = *reinterpret_cast<const volatile char*>(from + byte);
        }
      }
    }
  }
}

}  // namespace

void launch_copies(const StreamCopy* copies, int count, cudaStream_t stream) {
  OPTIMUS_INVARIANT(count <= StreamCopy::kMost, count, " copies at once");
  Copies params{{}, count};
  int64_t most_units = 0;
  for (int k = 0; k < count; ++k) {
    const StreamCopy& copy = params.copies[k] = copies[k];
    OPTIMUS_INVARIANT((reinterpret_cast<uintptr_t>(copy.to) |
                       reinterpret_cast<uintptr_t>(copy.from) | copy.stride) %
                              kUnit ==
                          0,
                      "a copy that is not aligned to ", kUnit, " bytes");
    most_units = std::max(most_units, units_of_piece(copy) * int64_t(copy.count));
  }
  if (most_units == 0) return;
  const int64_t ctas = std::min<int64_t>(kMostCtas, cuda::ceil_div(most_units, kThreads));
  cuda::launch(copy_kernel, {dim3(static_cast<unsigned>(ctas)), dim3(kThreads)}, stream, params);
}

}  // namespace optimus
