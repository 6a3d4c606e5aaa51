// The activation of the MLP, for the kernels that apply it.
#pragma once

#include "kernels/cuda/ptx.cuh"

namespace optimus::cuda {

// A gate so negative that exp overflows gives -0, as it should. What exp2_approx flushes to zero is
// nothing beside 1.
__device__ __forceinline__ float silu(float gate) {
  constexpr float kLog2E = 1.4426950408889634f;
  return __fdividef(gate, 1.0f + ptx::exp2_approx(-kLog2E * gate));
}

}  // namespace optimus::cuda
