// CUDA twins of the ops in kernels/ops.h: the same names, params and results up to rounding. All
// pointers are to memory the GPU can read (index arrays and pointer tables too), and nothing is
// allocated, synchronised or read back, so that every op can be captured in a CUDA graph. What the
// CPU twin checks in the data (ids, slots, limits) is the caller's duty here; shapes are checked.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/ops.h"

namespace optimus::cuda {

void embedding(const EmbeddingParams&, cudaStream_t);

}  // namespace optimus::cuda
