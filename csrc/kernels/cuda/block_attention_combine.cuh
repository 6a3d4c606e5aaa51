// Merges the partial results of every (item, head) that was cut across shares.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/block_attention.h"
#include "kernels/ops.h"

namespace optimus::cuda::attention {

void launch_combine(const BlockAttentionParams&, const Workspace&, cudaStream_t);

}  // namespace optimus::cuda::attention
