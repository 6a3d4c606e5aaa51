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
  uint32_t kv_heads_inverse;  // for divide()
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
  int least_cost, largest_cost;     // of a pair
  int largest_dealt[kDealingWays];  // cost of a share
  int dealt_cost;                   // of a pair of each item
  HeadLoad load;
  PairCost costs[4];    // by kind, on the line
  PairCost dealing[4];  // where pairs are dealt
  uint32_t kinds;       // of all sequences, a bit each
  uint32_t rereads;     // whether a sequence has more rows than an item: those read the same keys
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

__device__ Item make_item(const ScheduleArgs& args, const Scratch& scratch, int item_rows,
                          int seq_in_chunk, int seq, int item_in_seq) {
  Item item = {};
  item.seq = seq;
  item.row_begin = scratch.row_begin[seq_in_chunk];
  item.packed_begin = item_in_seq * item_rows;
  item.packed_count = min(item_rows, scratch.packed_rows[seq_in_chunk] - item.packed_begin);
  int last = item.packed_begin + item.packed_count - 1;
  item.first_limit = args.kv_limits[item.row_begin + item.packed_begin / args.group];
  item.last_limit = args.kv_limits[item.row_begin + last / args.group];
  item.num_tiles = tiles_of(item.last_limit);
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

// Writes all items, of up to item_rows packed rows, their cost offsets, and what the line comes to.
// `by_kind`: sequences of a kind one behind another.
__device__ void list_items(const ScheduleArgs& args, Scratch& scratch, int item_rows, bool by_kind,
                           Line& line) {
  int tid = threadIdx.x, length = 0, num_items = 0;
  for (int first_seq = 0; first_seq < args.num_seqs; first_seq += kThreads) {
    const auto rows_of = [&](int seq, int& begin) {
      begin = seq < args.num_seqs ? args.cu_seqlens_q[seq] : 0;
      return seq < args.num_seqs ? (args.cu_seqlens_q[seq + 1] - begin) * args.group : 0;
    };
    int seq = first_seq + tid, begin, packed = rows_of(seq, begin);
    if (by_kind) {
      sort_by_kind(scratch, seq, kind_of(packed));
      seq = scratch.seqs[tid];
      packed = rows_of(seq, begin);
    }
    int chunk_items;
    int offset =
        exclusive_scan((packed + item_rows - 1) / item_rows, scratch.warp_sums, chunk_items);
    scratch.item_offsets[tid] = offset;
    scratch.row_begin[tid] = begin;
    scratch.packed_rows[tid] = packed;
    __syncthreads();
    for (int first = 0; first < chunk_items; first += kThreads) {
      int index = first + tid, cost = 0;
      Item item;
      if (index < chunk_items) {
        int seq_in_chunk = last_not_above(scratch.item_offsets, kThreads, index);
        item = make_item(args, scratch, item_rows, seq_in_chunk,
                         by_kind ? scratch.seqs[seq_in_chunk] : first_seq + seq_in_chunk,
                         index - scratch.item_offsets[seq_in_chunk]);
        cost = pair_cost(scratch.costs, item) * args.num_kv_heads;
        atomicMin(&scratch.least_cost, pair_cost(scratch.costs, item));
        atomicMax(&scratch.largest_cost, pair_cost(scratch.costs, item));
        const int seq_rows = scratch.packed_rows[seq_in_chunk];
        if (item.packed_begin + item.packed_count == seq_rows) {
          atomicOr(&scratch.kinds, 1u << kind_of(seq_rows));
          if (seq_rows > kMaxPackedRows) atomicOr(&scratch.rereads, 1u);
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
  line.num_items = num_items;
  line.length = length;
}

// The items by falling cost: scratch.seqs has their places on the line. Returns their costs; ends with a
// barrier.
__device__ const int* sort_by_cost(Scratch& scratch, int num_items) {
  int *costs_on_line = scratch.row_begin, *sorted = scratch.packed_rows;
  const int tid = threadIdx.x;
  if (tid < num_items) {
    costs_on_line[tid] = pair_cost(scratch.dealing, scratch.items[tid]);
    atomicAdd(&scratch.dealt_cost, costs_on_line[tid]);
  }
  __syncthreads();
  if (tid < num_items) {
    const int cost = costs_on_line[tid];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < num_items; ++i) {
      rank += costs_on_line[i] > cost || (costs_on_line[i] == cost && i < tid);
    }
    sorted[rank] = cost;
    scratch.seqs[rank] = tid;
  }
  __syncthreads();
  return sorted;
}

constexpr int kMaxDealtShares = kThreads / kDealingWays;

// A dealer, which is a warp, deals every kDealers-th pair from `first` on. `costs`: of items. `orders`,
// of all shares, become the last pairs that they have.
__device__ void deal_pairs(const ScheduleArgs& args, uint32_t* orders, int dealer, int first,
                           const int* costs, int num_pairs, int* next_pairs, int* largest) {
  // A lane has two of the shares, `below` and `above`.
  const int below = threadIdx.x % 32 * kDealers + dealer, above = below + 32 * kDealers;
  uint32_t order_below = orders[below], order_above = orders[above];
  int last_below = num_pairs, last_above = num_pairs;
  int* next_pair = next_pairs + first + dealer;
#pragma unroll 1
  for (int pair = first + dealer; pair < num_pairs; pair += kDealers, next_pair += kDealers) {
    const uint32_t more = dealing_order(costs[divide(pair, args.kv_heads_inverse)], 0);
    const uint32_t least = __reduce_min_sync(~0u, min(order_below, order_above));
    const bool is_below = order_below == least, is_above = order_above == least;
    if (is_below || is_above) *next_pair = is_below ? last_below : last_above;
    last_below = is_below ? pair : last_below;
    last_above = is_above ? pair : last_above;
    order_below += is_below ? more : 0;
    order_above += is_above ? more : 0;
  }
  int load = below < args.ws.num_shares ? load_of(order_below) : 0;
  if (above < args.ws.num_shares) load = max(load, load_of(order_above));
  atomicMax(largest, load);
  orders[below] = last_below;
  orders[above] = last_above;
}

// Whether pairs can be dealt so that no share is much longer than the others, or claimed. Then shares
// and items are written. Where some pairs are too long, several ways to cut them are tried at once.
__device__ bool deal(const ScheduleArgs& args, Scratch& scratch, int num_items) {
  const int num_shares = args.ws.num_shares, num_heads = args.num_kv_heads;
  const int tid = threadIdx.x, num_pairs = num_items * num_heads;
  if (num_items == 0 || num_shares < kDealers || num_shares > kMaxDealtShares) return false;
  if (tid < 4) scratch.dealing[tid] = dealt_cost(tid, scratch.load, args.head_dim);
  __syncthreads();
  const int* costs = sort_by_cost(scratch, num_items);
  const int part = scratch.dealt_cost * num_heads / num_shares;
  if (part + costs[0] >= kMaxDealtLoad / 2) return false;
  const auto item_of = [&](int rank) -> const Item& { return scratch.items[scratch.seqs[rank]]; };
  if (scratch.kinds == 1 && costs[0] <= part &&
      claims_pay(0, num_pairs, kLeastUnequalToClaim, num_shares)) {
    if (tid < num_items) args.ws.items[tid] = item_of(tid);
    if (tid < num_shares) {
      args.ws.shares[tid] = claiming_share(item_of(tid / num_heads), tid, num_pairs, num_shares);
      args.ws.next_pairs[second_held_pair(tid, num_shares)] = num_pairs;
    }
    return true;
  }
  // A thread for each share in each way.
  const int way = tid / kMaxDealtShares, c = tid % kMaxDealtShares;
  const CutPairs cut = cut_long_pairs(c, item_of, num_items, scratch.dealing,
                                      longest_pair(way, part), num_heads, num_shares);
  uint32_t* orders = reinterpret_cast<uint32_t*>(scratch.item_offsets);
  orders[tid] = c < num_shares ? dealing_order(cut.part.cost, c) : UINT32_MAX;
  __syncthreads();
  const bool some_long = costs[0] >= longest_pair(kDealingWays - 1, part);
  const int dealer = c / 32, num_ways = some_long ? kDealingWays : 1;
  if (dealer < kDealers && way < num_ways) {
    if (cut.fit) {
      deal_pairs(args, orders + way * kMaxDealtShares, dealer, cut.first_whole, costs, num_pairs,
                 args.ws.next_pairs + static_cast<size_t>(way) * num_pairs,
                 &scratch.largest_dealt[way]);
    } else if (c == 0) {
      scratch.largest_dealt[way] = INT_MAX;
    }
  }
  __syncthreads();
  int best = 0;
  for (int other = 1; other < num_ways; ++other) {
    if (scratch.largest_dealt[other] < scratch.largest_dealt[best]) best = other;
  }
  if (scratch.largest_dealt[best] > longest_dealt(part, scratch.kinds, num_pairs, num_shares)) {
    return false;
  }
  if (tid < num_items) args.ws.items[tid] = item_of(tid);
  const int* next_pairs = args.ws.next_pairs + static_cast<size_t>(best) * num_pairs;
  if (way != best) return true;
  if (c < num_shares) {
    const int last_pair = orders[tid], pair = cut.part.parts > 0 ? cut.part.pair : last_pair;
    const Item& item = item_of(min(pair / num_heads, num_items - 1));
    args.ws.shares[c] = dealt_share(cut.part, last_pair, next_pairs, item, num_pairs, c);
  }
  for (int i = cut.first_whole + c; best > 0 && i < num_pairs; i += kMaxDealtShares) {
    args.ws.next_pairs[i] = next_pairs[i];
  }
  return true;
}

// Whether all items, few and in shared memory, are of two halves that cost the same. Ends with a
// barrier.
__device__ bool have_equal_halves(const ScheduleArgs& args, const Scratch& scratch, int num_items) {
  const int tid = threadIdx.x;
  bool equal = true;
  if (tid < num_items) {
    const Item& item = scratch.items[tid];
    const int last_of_half = item.packed_begin + kHalfPackedRows - 1;
    equal = item.packed_count == kMaxPackedRows &&
            tiles_of(args.kv_limits[item.row_begin + last_of_half / args.group]) == item.num_tiles;
  }
  return __syncthreads_and(equal);
}

// Keys and values leave the L2 cache first: a step reads them once, and as ordinary lines they displace
// the code of its kernels, which every layer fetches anew. Where prompts read theirs again, all stay
// ordinary lines: of two kinds of lines neither is read as fast.
__device__ uint64_t kv_policy(const Scratch& scratch) {
  return scratch.rereads != 0 ? ptx::evict_normal() : ptx::evict_first();
}

// Ends with a barrier.
__device__ void clear(Scratch& scratch) {
  if (threadIdx.x == 0) {
    scratch.least_cost = INT_MAX;
    scratch.largest_cost = scratch.dealt_cost = 0;
    scratch.load.unique_tiles = scratch.load.arithmetic = 0;
    scratch.kinds = scratch.rereads = 0;
  }
  if (threadIdx.x < 4) scratch.costs[threadIdx.x] = plain_cost(threadIdx.x);
  if (threadIdx.x < kDealingWays) scratch.largest_dealt[threadIdx.x] = 0;
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) schedule_kernel(ScheduleArgs args) {
  __shared__ Scratch scratch;
  wait_until_previous_is_done();
  clear(scratch);
  const int num_shares = args.ws.num_shares;
  Line line = {scratch.items, scratch.cost_offsets, scratch.costs, 0, args.num_kv_heads, 0};
  Even even;
  bool dealt = false, by_kind = false;
  int item_rows = kMaxPackedRows;
#pragma unroll 1
  for (;;) {
    list_items(args, scratch, item_rows, by_kind, line);
    if (by_kind) break;
    const bool several = __popc(scratch.kinds) > 1;
    if (!several && scratch.least_cost == scratch.largest_cost) even = cut_evenly(line, num_shares);
    // Halves of different cost could not be cut evenly.
    if (halving_pays(line, even, num_shares) && have_equal_halves(args, scratch, line.num_items)) {
      item_rows = kHalfPackedRows;
      even = Even();
      clear(scratch);
      continue;
    }
    dealt = !even.used() && line.num_items <= kCachedItems && deal(args, scratch, line.num_items);
    if (even.used() || dealt || !several) break;
    // Code is slow to fetch: where pairs are cut, a share should meet few kinds of items, so once more.
    by_kind = true;
    if (threadIdx.x < 4) {
      scratch.costs[threadIdx.x] =
          fitted_cost(threadIdx.x, scratch.load, args.num_kv_heads, args.head_dim, num_shares);
    }
    __syncthreads();
  }
  if (line.num_items > kCachedItems) {
    line.items = args.ws.items;
    line.offsets = args.ws.cost_offsets;
  }
  const Cut cut = cut_line(line.length, num_shares);
  for (int c = threadIdx.x; c < num_shares; c += kThreads) {
    if (!dealt) {
      args.ws.shares[c] =
          even.used() ? even_share(line, even, c, num_shares) : cut_share(line, cut, c);
    }
    args.ws.arrivals[c] = args.ws.left_rows[2 * c] = args.ws.left_rows[2 * c + 1] = 0;
  }
  if (threadIdx.x == 0) {
    *args.ws.kv_policy = kv_policy(scratch);
    *args.ws.claims = 0;
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
                       inverse_of(params.num_kv_heads),
                       ws};
  launch(schedule_kernel, {dim3(1), dim3(kThreads)}, stream, args);
}

}  // namespace optimus::cuda::attention
