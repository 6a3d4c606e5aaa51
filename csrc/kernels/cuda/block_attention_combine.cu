// One warp per packed row: weights from all parts' (max, sum) first, then the parts' sums in the order
// of their keys, so the result does not depend on which CTA finished when.
#include "kernels/cuda/block_attention_combine.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/block_attention_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace optimus::cuda::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;

struct CombineArgs {
  __nv_bfloat16* out;
  int num_q_heads, group;
  Workspace ws;
};

// Where part i of the merge keeps row `packed`: the first part ends its share, the others begin it.
__device__ __forceinline__ size_t part_row(const Workspace& ws, const Merge& merge, int i,
                                           int packed) {
  int slot = (merge.first_share + i) * 2 + (i == 0 ? 1 : 0);
  return static_cast<size_t>(slot) * ws.partial_rows + packed;
}

template <int kHeadDim>
__device__ void combine_row(const CombineArgs& args, const Merge& merge, int packed, int lane) {
  constexpr int kPerLane = kHeadDim / 32;
  const Workspace& ws = args.ws;
  float max = -INFINITY;
  for (int i = lane; i < merge.num_parts; i += 32) {
    max = fmaxf(max, ws.partial_ml[part_row(ws, merge, i, packed)].x);
  }
  for (int delta = 16; delta > 0; delta /= 2) {
    max = fmaxf(max, __shfl_xor_sync(~0u, max, delta));
  }
  float total[kPerLane] = {}, sum = 0;
#pragma unroll 4
  for (int i = 0; i < merge.num_parts; ++i) {
    size_t row = part_row(ws, merge, i, packed);
    float2 ml = ws.partial_ml[row];
    float factor = ptx::exp2_approx(ml.x - max);
    const float* part = ws.partial_out + row * kHeadDim + lane * kPerLane;
    sum += factor * ml.y;
    if constexpr (kPerLane == 4) {
      float4 values = *reinterpret_cast<const float4*>(part);
      total[0] += factor * values.x;
      total[1] += factor * values.y;
      total[2] += factor * values.z;
      total[3] += factor * values.w;
    } else {
      float2 values = *reinterpret_cast<const float2*>(part);
      total[0] += factor * values.x;
      total[1] += factor * values.y;
    }
  }
  const Item& item = ws.items[merge.item_idx];
  packed += item.packed_begin;
  size_t head = static_cast<size_t>(item.row_begin + packed / args.group) * args.num_q_heads +
                merge.head * args.group + packed % args.group;
  uint32_t* to = reinterpret_cast<uint32_t*>(args.out + head * kHeadDim + lane * kPerLane);
#pragma unroll
  for (int j = 0; j < kPerLane / 2; ++j) {
    to[j] = ptx::pack_bf16(total[2 * j] / sum, total[2 * j + 1] / sum);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs args) {
  wait_for_previous_kernel();
  const Header header = *args.ws.header;
  int num_warps = gridDim.x * (kThreads / 32), lane = threadIdx.x % 32;
  int warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  for (int i = warp; i < header.num_merges * header.merge_rows; i += num_warps) {
    const Merge merge = args.ws.merges[i / header.merge_rows];
    int packed = i % header.merge_rows;
    if (packed < args.ws.items[merge.item_idx].packed_count) {
      combine_row<kHeadDim>(args, merge, packed, lane);
    }
  }
}

}  // namespace

void launch_combine(const BlockAttentionParams& params, const Workspace& ws, cudaStream_t stream) {
  CombineArgs args = {static_cast<__nv_bfloat16*>(params.out), params.num_q_heads,
                      params.num_q_heads / params.num_kv_heads, ws};
  auto* kernel = params.head_dim == 128 ? combine_kernel<128> : combine_kernel<64>;
  launch(kernel, {dim3(ws.num_shares * kCtasPerSm), dim3(kThreads)}, stream, args);
}

}  // namespace optimus::cuda::attention
