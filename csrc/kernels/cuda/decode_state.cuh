// What the kernels on the decode state share.
#pragma once

#include "kernels/ops.h"

namespace optimus::cuda {

__device__ __forceinline__ bool is_masked(uint8_t status) {
  return status == kAbsent || status == kPresent;
}

}  // namespace optimus::cuda
