// One warp per packed row: takes the parts' sums in the order of their keys, so the result does not
// depend on which CTA finished when. Loads come in batches, for there is little else to wait for.
#include "kernels/cuda/block_attention_combine.cuh"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace optimus::cuda::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kCtasPerSm = 8;  // a warp for every row in most steps
constexpr int kBatch = 4;      // parts loaded together

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

// A lane's share of a row.
template <int kCount>
struct alignas(kCount * 4) Columns {
  float values[kCount];
};

template <int kHeadDim>
__device__ void combine_row(const CombineArgs& args, const Merge& merge, int packed, int lane) {
  constexpr int kPerLane = kHeadDim / 32;
  using Part = Columns<kPerLane>;
  const Part* parts = reinterpret_cast<const Part*>(args.ws.partial_out) + lane;
  Part total = {};
  float max = -INFINITY, sum = 0;
  for (int first = 0; first < merge.num_parts; first += kBatch) {
    float2 ml[kBatch];
    Part part[kBatch];
    float old_max = max;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      ml[j] = {-INFINITY, 0};
      part[j] = {};
      if (first + j < merge.num_parts) {
        size_t row = part_row(args.ws, merge, first + j, packed);
        ml[j] = args.ws.partial_ml[row];
        part[j] = parts[row * 32];
      }
      max = fmaxf(max, ml[j].x);
    }
    float base = max == -INFINITY ? 0.0f : max;  // so far all keys lie past the row's limit
    float factor = ptx::exp2_approx(old_max - base);
    sum *= factor;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) total.values[k] *= factor;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      factor = ptx::exp2_approx(ml[j].x - base);
      sum += factor * ml[j].y;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) total.values[k] += factor * part[j].values[k];
    }
  }
  packed += merge.packed_begin;
  size_t head = static_cast<size_t>(merge.row_begin + packed / args.group) * args.num_q_heads +
                merge.head * args.group + packed % args.group;
  uint32_t* to = reinterpret_cast<uint32_t*>(args.out + head * kHeadDim + lane * kPerLane);
  float factor = 1.0f / sum;
#pragma unroll
  for (int j = 0; j < kPerLane / 2; ++j) {
    to[j] = ptx::pack_bf16(total.values[2 * j] * factor, total.values[2 * j + 1] * factor);
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
    if (packed < merge.packed_count) combine_row<kHeadDim>(args, merge, packed, lane);
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
