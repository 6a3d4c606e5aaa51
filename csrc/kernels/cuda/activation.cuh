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

// Of two gates and their ups, bf16 in pairs.
__device__ __forceinline__ uint32_t activate(uint32_t gates, uint32_t ups) {
  const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
  const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
  return ptx::pack_bf16(silu(low(gates)) * low(ups), silu(high(gates)) * high(ups));
}

}  // namespace optimus::cuda
