// Copies between the device and page-locked host memory, by a kernel. What crosses between two steps is
// small, and a copy engine costs the stream more for taking its turn than for the bytes.
#pragma once

#include <cuda_runtime.h>

#include "core/device.h"

namespace optimus {

// All of them in one launch; at most StreamCopy::kMost.
void launch_copies(const StreamCopy* copies, int count, cudaStream_t stream);

}  // namespace optimus
