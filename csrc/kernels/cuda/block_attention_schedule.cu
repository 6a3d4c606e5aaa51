#include "kernels/cuda/block_attention_schedule.cuh"

#include <cuda_runtime.h>

#include "kernels/cuda/block_attention_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace optimus::cuda::attention {
namespace {

constexpr int kThreads = 1024;
constexpr int kCachedOffsets = 4096;  // tile offsets kept in shared memory for the searches

struct ScheduleArgs {
  const int32_t* cu_seqlens_q;
  const int32_t* kv_limits;
  int num_seqs, group, num_kv_heads;
  Workspace ws;
};

struct Scratch {
  int warp_sums[32];
  int item_offsets[kThreads];  // of the current chunk of sequences
  int row_begin[kThreads];
  int packed_rows[kThreads];
  int tile_offsets[kCachedOffsets];
  int num_merges, merge_rows;
};

// Exclusive prefix sum over the CTA; `total` gets the sum. Two barriers.
__device__ int exclusive_scan(int value, int* warp_sums, int& total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int delta = 1; delta < 32; delta *= 2) {
    int below = __shfl_up_sync(~0u, inclusive, delta);
    if (lane >= delta) inclusive += below;
  }
  __syncthreads();  // the previous scan's readers are done
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int sum = warp_sums[lane];
  for (int delta = 1; delta < 32; delta *= 2) {
    int below = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += below;
  }
  total = __shfl_sync(~0u, sum, 31);
  int before = __shfl_sync(~0u, sum, (warp + 31) % 32);
  return inclusive - value + (warp == 0 ? 0 : before);
}

// Index of the last of `count` ascending offsets that is <= value; offsets[0] <= value.
__device__ int last_not_above(const int* offsets, int count, int value) {
  int low = 0, high = count;  // offsets[low] <= value < offsets[high]
  while (high - low > 1) {
    int middle = (low + high) / 2;
    (offsets[middle] <= value ? low : high) = middle;
  }
  return low;
}

__device__ Item make_item(const ScheduleArgs& args, const Scratch& scratch, int seq_in_chunk,
                          int seq, int tile_in_seq) {
  Item item = {};
  item.seq = seq;
  item.row_begin = scratch.row_begin[seq_in_chunk];
  item.packed_begin = tile_in_seq * kMaxPackedRows;
  item.packed_count = min(kMaxPackedRows, scratch.packed_rows[seq_in_chunk] - item.packed_begin);
  int last = item.packed_begin + item.packed_count - 1;
  item.first_limit = args.kv_limits[item.row_begin + item.packed_begin / args.group];
  item.last_limit = args.kv_limits[item.row_begin + last / args.group];
  item.num_tiles = (item.last_limit + kTileKeys - 1) / kTileKeys;
  return item;
}

// Writes all items and their tile offsets; returns the number of tiles, `num_items` by reference.
__device__ int list_items(const ScheduleArgs& args, Scratch& scratch, int& num_items) {
  int tid = threadIdx.x, num_tiles = 0;
  num_items = 0;
  for (int first_seq = 0; first_seq < args.num_seqs; first_seq += kThreads) {
    int seq = first_seq + tid, begin = 0, packed = 0;
    if (seq < args.num_seqs) {
      begin = args.cu_seqlens_q[seq];
      packed = (args.cu_seqlens_q[seq + 1] - begin) * args.group;
    }
    int chunk_items;
    int offset = exclusive_scan((packed + kMaxPackedRows - 1) / kMaxPackedRows, scratch.warp_sums,
                                chunk_items);
    scratch.item_offsets[tid] = offset;
    scratch.row_begin[tid] = begin;
    scratch.packed_rows[tid] = packed;
    __syncthreads();
    for (int first = 0; first < chunk_items; first += kThreads) {
      int index = first + tid, tiles = 0;
      Item item;
      if (index < chunk_items) {
        int seq_in_chunk = last_not_above(scratch.item_offsets, kThreads, index);
        item = make_item(args, scratch, seq_in_chunk, first_seq + seq_in_chunk,
                         index - scratch.item_offsets[seq_in_chunk]);
        tiles = item.num_tiles * args.num_kv_heads;
        atomicMax(&scratch.merge_rows, item.packed_count);
      }
      int total;
      int tile_offset = num_tiles + exclusive_scan(tiles, scratch.warp_sums, total);
      if (index < chunk_items) {
        args.ws.items[num_items + index] = item;
        args.ws.tile_offsets[num_items + index] = tile_offset;
        if (num_items + index < kCachedOffsets) {
          scratch.tile_offsets[num_items + index] = tile_offset;
        }
      }
      num_tiles += total;
    }
    num_items += chunk_items;
    __syncthreads();
  }
  return num_tiles;
}

// Interval c is [begin(c), begin(c + 1)): num_tiles / num_shares tiles, one more for the first few.
struct Cut {
  int least, longer;  // tiles of a share; how many shares have one more
  __device__ int begin(int share) const { return share * least + min(share, longer); }
  __device__ int owner(int tile) const {
    int in_longer = longer * (least + 1);
    return tile < in_longer ? tile / (least + 1) : longer + (tile - in_longer) / least;
  }
};

__device__ void write_share(const ScheduleArgs& args, Scratch& scratch, const int* offsets,
                            int num_items, Cut cut, int c) {
  int begin = cut.begin(c), end = cut.begin(c + 1);
  Share share = {};
  if (end > begin) {
    int idx = last_not_above(offsets, num_items, begin);
    share.item = args.ws.items[idx];
    share.item_idx = idx;
    share.head = (begin - offsets[idx]) / share.item.num_tiles;
    share.first_tile = begin - offsets[idx] - share.head * share.item.num_tiles;
    share.num_tiles = end - begin;

    // The last (item, head) of the share: does it begin here and go on in the next share?
    idx = last_not_above(offsets, num_items, end - 1);
    int tiles = args.ws.items[idx].num_tiles;
    int head = (end - 1 - offsets[idx]) / tiles;
    int piece_begin = offsets[idx] + head * tiles;
    if (piece_begin >= begin && piece_begin + tiles > end) {
      args.ws.merges[atomicAdd(&scratch.num_merges, 1)] = {
          c, cut.owner(piece_begin + tiles - 1) - c + 1, idx, head};
    }
  }
  args.ws.shares[c] = share;
}

__global__ void __launch_bounds__(kThreads, 1) schedule_kernel(ScheduleArgs args) {
  __shared__ Scratch scratch;
  wait_for_previous_kernel();
  if (threadIdx.x == 0) scratch.num_merges = scratch.merge_rows = 0;
  __syncthreads();
  int num_items;
  int num_tiles = list_items(args, scratch, num_items);
  const int* offsets = num_items <= kCachedOffsets ? scratch.tile_offsets : args.ws.tile_offsets;
  Cut cut = {num_tiles / args.ws.num_shares, num_tiles % args.ws.num_shares};
  for (int c = threadIdx.x; c < args.ws.num_shares; c += kThreads) {
    write_share(args, scratch, offsets, num_items, cut, c);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *args.ws.header = {scratch.num_merges, scratch.merge_rows, {0, 0}};
  }
}

}  // namespace

void launch_schedule(const BlockAttentionParams& params, const Workspace& ws, cudaStream_t stream) {
  ScheduleArgs args = {params.cu_seqlens_q, params.kv_limits,
                       params.num_seqs,     params.num_q_heads / params.num_kv_heads,
                       params.num_kv_heads, ws};
  launch(schedule_kernel, {dim3(1), dim3(kThreads)}, stream, args);
}

}  // namespace optimus::cuda::attention
