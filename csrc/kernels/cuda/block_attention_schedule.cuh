// Cuts a step's attention into equal shares, on the device: one CTA, two prefix sums (items per
// sequence, cost per item), then one thread per share that finds where its interval begins.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_attention.h"
#include "kernels/ops.h"

namespace optimus::cuda::attention {

void launch_schedule(const BlockAttentionParams&, const Workspace&, cudaStream_t);

}  // namespace optimus::cuda::attention
