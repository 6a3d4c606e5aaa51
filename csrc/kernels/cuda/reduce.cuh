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
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
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

// Over a CTA of whole warps; every thread gets the result. `shared` holds a value per warp, and is
// free for other use after the next __syncthreads().
template <class T, class Op>
__device__ __forceinline__ T reduce_block(T value, T* shared, Op op) {
  const int num_warps = (blockDim.x + kWarp - 1) / kWarp;
  value = reduce_lanes(value, op);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = shared[0];
  for (int warp = 1; warp < num_warps; ++warp) total = op(total, shared[warp]);
  return total;
}

}  // namespace optimus::cuda
