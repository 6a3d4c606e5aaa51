// Reductions over lanes and over the threads of a CTA, in a fixed order.
#pragma once

#include <cuda_runtime.h>

namespace optimus::cuda {

constexpr int kWarp = 32;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Over groups of kLanes neighbouring lanes; every lane gets the result.
template <int kLanes = kWarp, class T, class Op>
__device__ __forceinline__ T reduce_lanes(T value, Op op) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Sum over a CTA of whole warps; every thread gets it. `shared` holds a value per warp, and is free for
// other use after the next __syncthreads().
template <class T>
__device__ __forceinline__ T sum_block(T value, T* shared) {
  const int lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  value = reduce_lanes(value, Sum());
  if (lane == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  return reduce_lanes(lane < num_warps ? shared[lane] : T(0), Sum());
}

}  // namespace optimus::cuda
