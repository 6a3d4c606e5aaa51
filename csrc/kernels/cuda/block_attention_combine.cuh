// Merges the partial results of every (item, head) that was cut across shares.
#pragma once

#include "kernels/cuda/block_attention.h"

namespace optimus::cuda::attention {

void launch_combine(const BlockAttentionParams&, const Workspace&, void* stream);

}  // namespace optimus::cuda::attention
