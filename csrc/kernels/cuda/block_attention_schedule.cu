#include "kernels/cuda/block_attention_schedule.cuh"

#include <cuda_runtime.h>

#include <climits>

#include "core/launch.cuh"
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

struct PairCost {
  int tile, piece;
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
  int unique_tiles;              // of a KV head: what all items of a sequence share, once
  int arithmetic;                // of a KV head: the cost of all items, memory aside
  PairCost costs[4];             // by kind
  uint32_t kinds;                // of all sequences, a bit each
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
  item.num_old_keys = args.positions == nullptr ? 0 : args.positions[item.row_begin];
  return item;
}

// What items cost, by kind_of(): a tile, a piece beside its tiles (loading Q, merging and writing
// its rows), and the ends of a share, where pairs are cut (writing sums, waiting, merging). In
// units of about 60 cycles, fitted to the times of CTAs in steps of many kinds. An int holds the
// line as long as pairs times tiles stay below 45 million: 2,048 pairs of 1.4 million keys.
// `cutting` is what all that adds to a layer of a whole step, where kernels in between have
// displaced the code that merges: fitted to the times of such steps, cut and dealt.
struct Cost {
  int tile, piece, ends, cutting;
};
__device__ Cost cost_of(int kind, bool memory_bound) {
  switch (kind) {
    case 0:
      return {memory_bound ? 24 : 15, memory_bound ? 35 : 55, 50, 100};
    case 1:
      return {memory_bound ? 25 : 15, memory_bound ? 45 : 65, 60, 250};
    case 2:
      return {memory_bound ? 31 : 18, memory_bound ? 40 : 72, 140, 390};
    default:
      return {memory_bound ? 28 : 25, memory_bound ? 80 : 62, 280, 360};
  }
}
// A tile of head_dim 128 at the bandwidth of the memory, when every SM reads.
constexpr int kMemoryTileCost = 27;
// Shares are at least this long: about a small item's piece of three tiles. No share that a pair runs
// through may be without a tile of it, for the merge takes a part from each: so not below any
// tile's cost.
constexpr int kMinShareCost = 103;

__device__ int tile_cost(const Scratch& scratch, const Item& item) {
  return scratch.costs[kind_of(item.packed_count)].tile;
}
__device__ int pair_cost(const Scratch& scratch, const Item& item) {
  const PairCost& cost = scratch.costs[kind_of(item.packed_count)];
  return cost.piece + cost.tile * item.num_tiles;
}

// For a step of several kinds. When the memory is the limit, tiles of all kinds take about as long,
// for SMs read equally fast; and the more a kind loses at the ends of a share, the shorter its
// shares. By one thread for each kind.
__device__ void fit_costs(const ScheduleArgs& args, Scratch& scratch, int kind) {
  const int memory = scratch.unique_tiles * (kMemoryTileCost * args.head_dim / 128);
  const Cost cost = cost_of(kind, memory > scratch.arithmetic);
  const int all = max(memory, scratch.arithmetic) * args.num_kv_heads;
  const int share = max(all / args.ws.num_shares, 3 * cost.ends);
  const float factor = static_cast<float>(share) / (share - cost.ends);
  scratch.costs[kind] = {static_cast<int>(cost.tile * factor + 0.5f),
                         static_cast<int>(cost.piece * factor + 0.5f)};
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
        cost = pair_cost(scratch, item) * args.num_kv_heads;
        atomicMin(&scratch.least_cost, pair_cost(scratch, item));
        atomicMax(&scratch.largest_cost, pair_cost(scratch, item));
        const int seq_rows = scratch.packed_rows[seq_in_chunk];
        if (item.packed_begin + item.packed_count == seq_rows) {
          atomicOr(&scratch.kinds, 1u << kind_of(seq_rows));
          atomicAdd(&scratch.unique_tiles, item.num_tiles);
        }
        const Cost arithmetic = cost_of(kind_of(item.packed_count), false);
        atomicAdd(&scratch.arithmetic, arithmetic.piece + arithmetic.tile * item.num_tiles);
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

struct Line {
  const Item* items;
  const int* offsets;
  int num_items, length;
};

// Interval c is [begin(c), begin(c + 1)): the line in equal parts, the first few longer by one.
struct Cut {
  int least, longer;  // length of an interval; how many are longer by one
  __device__ int begin(int share) const { return share * least + min(share, longer); }
  __device__ int owner(int place) const {
    int in_longer = longer * (least + 1);
    return place < in_longer ? place / (least + 1) : longer + (place - in_longer) / least;
  }
};

// The first tile at or behind `place`, and the item it belongs to.
__device__ Position locate(const Scratch& scratch, const Line& line, int num_kv_heads, int place,
                           Item& item) {
  const int item_idx = last_not_above(line.offsets, line.num_items, place);
  item = line.items[item_idx];
  const int pair = pair_cost(scratch, item), tile = tile_cost(scratch, item);
  const int rest = place - line.offsets[item_idx], head = rest / pair;
  const Position at = {item_idx * num_kv_heads + head, (rest - head * pair + tile - 1) / tile};
  if (at.tile < item.num_tiles) return at;
  if (head + 1 == num_kv_heads && item_idx + 1 < line.num_items) item = line.items[item_idx + 1];
  return {at.pair + 1, 0};
}

// The shares that have a part of the pair at `at`.
__device__ Merge merge_of(const Scratch& scratch, const Line& line, int num_kv_heads, Cut cut,
                          const Item& item, Position at) {
  int pair_begin =
      line.offsets[at.pair / num_kv_heads] + at.pair % num_kv_heads * pair_cost(scratch, item);
  int first = cut.owner(pair_begin);
  int last = cut.owner(pair_begin + tile_cost(scratch, item) * (item.num_tiles - 1));
  return {first, last - first + 1};
}

__device__ void write_share(const ScheduleArgs& args, const Scratch& scratch, const Line& line,
                            Cut cut, int c) {
  int begin = cut.begin(c), end = min(cut.begin(c + 1), line.length);
  Share share = {};
  if (end > begin) {
    Item last;
    share.begin = locate(scratch, line, args.num_kv_heads, begin, share.item);
    share.end = {line.num_items * args.num_kv_heads, 0};
    share.steps[0] = share.steps[1] = 1;
    if (end < line.length) share.end = locate(scratch, line, args.num_kv_heads, end, last);
    if (share.begin.tile > 0) {
      share.earlier = merge_of(scratch, line, args.num_kv_heads, cut, share.item, share.begin);
    }
    if (share.end.tile > 0) {
      share.later = merge_of(scratch, line, args.num_kv_heads, cut, last, share.end);
    }
  }
  args.ws.shares[c] = share;
}

// When all pairs cost the same (one request, or requests of the same length), shares of whole pairs,
// or pairs in equal parts, need fewer pieces; taken when that occupies nearly as many SMs.
struct Even {
  int pairs = 0;  // per share; or
  int parts = 0;  // per pair
  __device__ bool used() const { return pairs > 0 || parts > 0; }
};

// How many parts, by the times of whole steps, where every layer fetches the code anew: the more
// SMs do, the longer each waits.
__device__ int choose_parts(const Item& item, int num_pairs, int num_shares) {
  const int kind = kind_of(item.packed_count), tiles = item.num_tiles;
  const int most = num_shares / num_pairs;
  int parts = most;
  if (kind < 2 && most > 3) {
    // Three quarters of the SMs; and merging loads four parts at once.
    const int some = num_shares * 3 / 4 / num_pairs, fours = some > 4 ? some / 4 * 4 : some;
    if (tiles <= 8 * fours) parts = fours;
  }
  // Few tiles: whole pairs are read nearly as fast, with nothing to merge.
  const bool is_short = tiles < 8 || (most <= 3 && num_pairs * tiles <= 8 * num_shares);
  // A part of one tile costs more to merge than it saves, as does one that makes none shorter.
  parts = min(parts, tiles / 2);
  if (parts <= 1 || (kind < 3 && is_short)) return 1;
  const int longest = (tiles + parts - 1) / parts;
  return (tiles + longest - 1) / longest;
}

__device__ Even cut_evenly(const Line& line, int num_kv_heads, int num_shares) {
  Even even;
  int num_pairs = line.num_items * num_kv_heads;
  if (num_pairs == 0) return even;
  if (num_pairs > num_shares) {
    int pairs = (num_pairs + num_shares - 1) / num_shares;
    if (num_pairs * 10 >= pairs * num_shares * 9) even.pairs = pairs;
  } else if (num_shares / num_pairs * num_pairs * 10 >= num_shares * 9) {
    even.parts = choose_parts(line.items[0], num_pairs, num_shares);
  }
  return even;
}

__device__ void write_even_share(const ScheduleArgs& args, const Line& line, Even even, int c) {
  int num_pairs = line.num_items * args.num_kv_heads;
  int parts = max(even.parts, 1), pairs = max(even.pairs, 1);
  int pair = c / parts * pairs, part = c % parts;
  Share share = {};
  if (pair < num_pairs) {
    share.item = line.items[pair / args.num_kv_heads];
    int tiles = share.item.num_tiles;
    share.begin = {pair, part * tiles / parts};
    share.end = {min(pair + pairs, num_pairs), 0};
    if (part + 1 < parts) share.end = {pair, (part + 1) * tiles / parts};
    share.steps[0] = share.steps[1] = 1;
    share.earlier = share.later = {c - part, parts};
  }
  args.ws.shares[c] = share;
}

// The pairs sorted by falling cost and dealt to the shares, there and back: share c's pair of a
// round.
__device__ int dealt_pair(int round, int c, int num_shares) {
  return round * num_shares + (round % 2 == 0 ? c : num_shares - 1 - c);
}

// Whether dealing whole pairs leaves no share so far above `part`, the line in equal parts, that
// cutting would be worth its cost. Then the items in the workspace are sorted, and scratch.seqs has
// their places on the line.
__device__ bool deal(const ScheduleArgs& args, Scratch& scratch, int num_items, int part) {
  int *costs_on_line = scratch.row_begin, *sorted = scratch.packed_rows;
  const int tid = threadIdx.x, num_pairs = num_items * args.num_kv_heads;
  if (tid < num_items) costs_on_line[tid] = pair_cost(scratch, scratch.items[tid]);
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
  // Of several kinds, the one whose cuts cost most. Fewer pairs than SMs: those that read have more
  // of the memory's bandwidth.
  constexpr int kFaster = 80;
  const int cutting = cost_of(31 - __clz(scratch.kinds), true).cutting;
  const int worth = num_pairs <= args.ws.num_shares ? cutting + kFaster : cutting;
  if (scratch.largest_dealt > part + worth) return false;
  if (tid < num_items) args.ws.items[tid] = scratch.items[scratch.seqs[tid]];
  return true;
}

__device__ void write_dealt_share(const ScheduleArgs& args, const Scratch& scratch, int num_items,
                                  int c) {
  const int num_pairs = num_items * args.num_kv_heads, last = args.ws.num_shares - 1;
  Share share = {};
  if (c < num_pairs) {
    share.item = scratch.items[scratch.seqs[c / args.num_kv_heads]];
    share.begin = {c, 0};
    share.end = {num_pairs, 0};
    share.steps[0] = 2 * (last - c) + 1;
    share.steps[1] = 2 * c + 1;
  }
  args.ws.shares[c] = share;
}

// Ends with a barrier.
__device__ void clear(Scratch& scratch) {
  if (threadIdx.x == 0) {
    scratch.least_cost = INT_MAX;
    scratch.largest_cost = scratch.largest_dealt = 0;
    scratch.unique_tiles = scratch.arithmetic = 0;
    scratch.kinds = 0;
  }
  if (threadIdx.x < 4) {
    const Cost cost = cost_of(threadIdx.x, true);
    scratch.costs[threadIdx.x] = {cost.tile, cost.piece};
  }
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
    if (threadIdx.x < 4) fit_costs(args, scratch, threadIdx.x);
    sorted = true;
    __syncthreads();
  }
  Line line = {scratch.items, scratch.cost_offsets, listed.num_items, listed.length};
  if (line.num_items > kCachedItems) {
    line.items = args.ws.items;
    line.offsets = args.ws.cost_offsets;
  }
  const bool equal = !sorted && scratch.least_cost == scratch.largest_cost;
  const Even even = equal ? cut_evenly(line, args.num_kv_heads, args.ws.num_shares) : Even{};
  int used = max(1, min(args.ws.num_shares, line.length / kMinShareCost));
  Cut cut = {line.length / used, line.length % used};
  const bool dealt = !even.used() && line.num_items <= kCachedItems &&
                     deal(args, scratch, line.num_items, cut.least);
  for (int c = threadIdx.x; c < args.ws.num_shares; c += kThreads) {
    if (even.used()) {
      write_even_share(args, line, even, c);
    } else if (dealt) {
      write_dealt_share(args, scratch, line.num_items, c);
    } else {
      write_share(args, scratch, line, cut, c);
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
