// A cold L2 cache, for timing kernels as a layer finds its weights.
#pragma once

#include "core/device_buffer.h"

namespace optimus::cuda {

class L2Evictor {
 public:
  explicit L2Evictor(cudaStream_t);
  // Fills the cache with lines of its own, unmodified: whoever evicts them has nothing to write back.
  void evict(cudaStream_t);

 private:
  DeviceBuffer<char> lines_;
  DeviceBuffer<uint32_t> sink_;
};

}  // namespace optimus::cuda
