#include "kernels/cuda/block_attention_schedule.cuh"

#include <cuda_runtime.h>

#include <climits>

#include "core/launch.cuh"
#include "kernels/cuda/block_attention_cut.h"
#include "kernels/cuda/ptx.cuh"

namespace optimus::cuda::attention {
namespace {

constexpr int kThreads = 1024;
constexpr int kCachedItems = 768;  // kept in shared memory for the searches; else in the workspace

struct ScheduleArgs {
  const int32_t* cu_seqlens_q;
  const int32_t* kv_limits;
  const int32_t* positions;
  int num_seqs, group, num_kv_heads, head_dim;
  Workspace ws;
};

struct Scratch {
  int warp_sums[32];
  int item_offsets[kThreads];  // of the current chunk of sequences
  int row_begin[kThreads];
  int packed_rows[kThreads];
  int seqs[kThreads];  // of the chunk, by kind; or, where pairs are dealt, items by falling cost
  int cost_offsets[kCachedItems];
  Item items[kCachedItems];
  int least_cost, largest_cost;  // of a pair
  int largest_dealt;             // cost of a share
  HeadLoad load;
  PairCost costs[4];  // by kind
  uint32_t kinds;     // of all sequences, a bit each
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
  item.num_old_keys = args.positions == nullptr ? 0 : args.positions[item.row_begin];
  return item;
}

// The chunk's sequences by kind, in order otherwise. Ends with a barrier.
__device__ void sort_by_kind(Scratch& scratch, int seq, int kind) {
  // Two counts in an int: neither exceeds kThreads.
  int low_total, high_total;
  const int low = exclusive_scan(kind < 2 ? 1 << 16 * kind : 0, scratch.warp_sums, low_total);
  const int high =
      exclusive_scan(kind >= 2 ? 1 << 16 * (kind - 2) : 0, scratch.warp_sums, high_total);
  const int of_0 = low_total & 0xffff, of_1 = low_total >> 16, of_2 = high_total & 0xffff;
  const int begin = kind == 0 ? 0 : kind == 1 ? of_0 : kind == 2 ? of_0 + of_1 : of_0 + of_1 + of_2;
  scratch.seqs[begin + ((kind < 2 ? low : high) >> 16 * (kind % 2) & 0xffff)] = seq;
  __syncthreads();
}

struct Listed {
  int num_items, length;  // of the line
};

// Writes all items and their cost offsets. `sorted`: sequences of a kind one behind another.
__device__ Listed list_items(const ScheduleArgs& args, Scratch& scratch, bool sorted) {
  int tid = threadIdx.x, length = 0, num_items = 0;
  for (int first_seq = 0; first_seq < args.num_seqs; first_seq += kThreads) {
    const auto rows_of = [&](int seq, int& begin) {
      begin = seq < args.num_seqs ? args.cu_seqlens_q[seq] : 0;
      return seq < args.num_seqs ? (args.cu_seqlens_q[seq + 1] - begin) * args.group : 0;
    };
    int seq = first_seq + tid, begin, packed = rows_of(seq, begin);
    if (sorted) {
      sort_by_kind(scratch, seq, kind_of(packed));
      seq = scratch.seqs[tid];
      packed = rows_of(seq, begin);
    }
    int chunk_items;
    int offset = exclusive_scan((packed + kMaxPackedRows - 1) / kMaxPackedRows, scratch.warp_sums,
                                chunk_items);
    scratch.item_offsets[tid] = offset;
    scratch.row_begin[tid] = begin;
    scratch.packed_rows[tid] = packed;
    __syncthreads();
    for (int first = 0; first < chunk_items; first += kThreads) {
      int index = first + tid, cost = 0;
      Item item;
      if (index < chunk_items) {
        int seq_in_chunk = last_not_above(scratch.item_offsets, kThreads, index);
        item = make_item(args, scratch, seq_in_chunk,
                         sorted ? scratch.seqs[seq_in_chunk] : first_seq + seq_in_chunk,
                         index - scratch.item_offsets[seq_in_chunk]);
        cost = pair_cost(scratch.costs, item) * args.num_kv_heads;
        atomicMin(&scratch.least_cost, pair_cost(scratch.costs, item));
        atomicMax(&scratch.largest_cost, pair_cost(scratch.costs, item));
        const int seq_rows = scratch.packed_rows[seq_in_chunk];
        if (item.packed_begin + item.packed_count == seq_rows) {
          atomicOr(&scratch.kinds, 1u << kind_of(seq_rows));
          atomicAdd(&scratch.load.unique_tiles, item.num_tiles);
        }
        const Cost arithmetic = cost_of(kind_of(item.packed_count), false);
        atomicAdd(&scratch.load.arithmetic, arithmetic.piece + arithmetic.tile * item.num_tiles);
      }
      int total;
      int offset = length + exclusive_scan(cost, scratch.warp_sums, total);
      if (index < chunk_items) {
        args.ws.items[num_items + index] = item;
        args.ws.cost_offsets[num_items + index] = offset;
        if (num_items + index < kCachedItems) {
          scratch.items[num_items + index] = item;
          scratch.cost_offsets[num_items + index] = offset;
        }
      }
      length += total;
    }
    num_items += chunk_items;
    __syncthreads();
  }
  return {num_items, length};
}

// Whether dealing whole pairs leaves no share so far above `part`, the line in equal parts, that
// cutting would be worth its cost. Then the items in the workspace are sorted, and scratch.seqs has
// their places on the line.
__device__ bool deal(const ScheduleArgs& args, Scratch& scratch, int num_items, int part) {
  int *costs_on_line = scratch.row_begin, *sorted = scratch.packed_rows;
  const int tid = threadIdx.x, num_pairs = num_items * args.num_kv_heads;
  if (tid < num_items) costs_on_line[tid] = pair_cost(scratch.costs, scratch.items[tid]);
  __syncthreads();
  if (tid < num_items) {
    const int cost = costs_on_line[tid];
    int rank = 0;
#pragma unroll 8
    for (int i = 0; i < num_items; ++i) {
      rank += costs_on_line[i] > cost || (costs_on_line[i] == cost && i < tid);
    }
    sorted[rank] = cost;
    scratch.seqs[rank] = tid;
  }
  __syncthreads();
  if (tid < args.ws.num_shares) {
    int total = 0;
    for (int round = 0; round * args.ws.num_shares < num_pairs; ++round) {
      const int pair = dealt_pair(round, tid, args.ws.num_shares);
      if (pair < num_pairs) total += sorted[pair / args.num_kv_heads];
    }
    atomicMax(&scratch.largest_dealt, total);
  }
  __syncthreads();
  const int worth = worth_of_cutting(scratch.kinds, num_pairs, args.ws.num_shares);
  if (scratch.largest_dealt > part + worth) return false;
  if (tid < num_items) args.ws.items[tid] = scratch.items[scratch.seqs[tid]];
  return true;
}

// Ends with a barrier.
__device__ void clear(Scratch& scratch) {
  if (threadIdx.x == 0) {
    scratch.least_cost = INT_MAX;
    scratch.largest_cost = scratch.largest_dealt = 0;
    scratch.load.unique_tiles = scratch.load.arithmetic = 0;
    scratch.kinds = 0;
  }
  if (threadIdx.x < 4) scratch.costs[threadIdx.x] = plain_cost(threadIdx.x);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) schedule_kernel(ScheduleArgs args) {
  __shared__ Scratch scratch;
  wait_until_previous_is_done();
  clear(scratch);
  // Code is slow to fetch: a share should meet few kinds of items. So where there are several, once
  // more; steps of one kind are common, and short.
  Listed listed;
  bool sorted = false;
#pragma unroll 1
  while (true) {
    listed = list_items(args, scratch, sorted);
    if (sorted || __popc(scratch.kinds) <= 1) break;
    if (threadIdx.x < 4) {
      scratch.costs[threadIdx.x] = fitted_cost(threadIdx.x, scratch.load, args.num_kv_heads,
                                               args.head_dim, args.ws.num_shares);
    }
    sorted = true;
    __syncthreads();
  }
  Line line = {scratch.items,    scratch.cost_offsets, scratch.costs,
               listed.num_items, args.num_kv_heads,    listed.length};
  if (line.num_items > kCachedItems) {
    line.items = args.ws.items;
    line.offsets = args.ws.cost_offsets;
  }
  const int num_shares = args.ws.num_shares;
  const bool equal = !sorted && scratch.least_cost == scratch.largest_cost;
  const Even even = equal ? cut_evenly(line, num_shares) : Even{};
  const Cut cut = cut_line(line.length, num_shares);
  const bool dealt = !even.used() && line.num_items <= kCachedItems &&
                     deal(args, scratch, line.num_items, cut.least);
  for (int c = threadIdx.x; c < num_shares; c += kThreads) {
    if (even.used()) {
      args.ws.shares[c] = even_share(line, even, c);
    } else if (!dealt) {
      args.ws.shares[c] = cut_share(line, cut, c);
    } else if (c < line.num_pairs()) {
      const Item& first = scratch.items[scratch.seqs[c / args.num_kv_heads]];
      args.ws.shares[c] = dealt_share(first, line.num_pairs(), num_shares, c);
    } else {
      args.ws.shares[c] = {};
    }
    args.ws.arrivals[c] = args.ws.left_rows[2 * c] = args.ws.left_rows[2 * c + 1] = 0;
  }
  // No kernel behind this one starts before its shares are there: they read them before they wait.
  __threadfence();
  __syncthreads();
  let_next_kernel_start();
}

}  // namespace

void launch_schedule(const BlockAttentionParams& params, const Workspace& ws, cudaStream_t stream) {
  ScheduleArgs args = {params.cu_seqlens_q,
                       params.kv_limits,
                       params.positions,
                       params.num_seqs,
                       params.num_q_heads / params.num_kv_heads,
                       params.num_kv_heads,
                       params.head_dim,
                       ws};
  launch(schedule_kernel, {dim3(1), dim3(kThreads)}, stream, args);
}

}  // namespace optimus::cuda::attention
