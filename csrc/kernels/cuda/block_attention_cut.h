// How a step's pairs are cut into shares: what they cost, and three ways to cut. The schedule's
// kernel runs this with a thread for each share. It is compiled for the host as well, where a test
// that needs no GPU checks that the shares hold every tile once and agree about their merges.
#pragma once

#include <climits>

#include "kernels/cuda/block_attention.h"
#include "kernels/cuda/equal_parts.h"

namespace optimus::cuda::attention {

inline __host__ __device__ int smaller(int a, int b) { return a < b ? a : b; }
inline __host__ __device__ int larger(int a, int b) { return a > b ? a : b; }

inline __host__ __device__ int tiles_of(int kv_limit) {
  return (kv_limit + kTileKeys - 1) / kTileKeys;
}

// ------------------------------------------------------------------------------------------- costs

// What items cost, by kind_of(): a tile, a piece beside its tiles (loading Q, merging the warps that
// hold copies and writing its rows), merging its parts if it is one, and both ends of a share where
// all pairs are cut (writing sums, waiting, merging). In units of about 60 cycles, fitted to the times
// of CTAs in steps of many kinds. An int holds the line as long as pairs times tiles stay below 45
// million: 2,048 pairs of 1.4 million keys.
// `cutting` is what all that adds to a layer of a whole step, where kernels in between have
// displaced the code that merges: fitted to the times of such steps, cut and dealt.
struct Cost {
  int tile, piece, merging, ends, cutting;
};
inline __host__ __device__ Cost cost_of(int kind, bool memory_bound) {
  switch (kind) {
    case 0:
      return {memory_bound ? 23 : 15, memory_bound ? 35 : 55, 40, 50, 100};
    case 1:
      return {memory_bound ? 25 : 15, memory_bound ? 45 : 65, 50, 60, 250};
    case 2:
      return {memory_bound ? 35 : 18, memory_bound ? 40 : 72, 100, 140, 390};
    default:
      return {memory_bound ? 28 : 25, memory_bound ? 80 : 62, 220, 280, 360};
  }
}
// A tile of head_dim 128 at the bandwidth of the memory, when every SM reads.
constexpr int kMemoryTileCost = 27;
// Shares are at least this long: about a small item's piece of three tiles. No share that a pair
// runs through may be without a tile of it, for the merge takes a part from each: so not below any
// tile's cost.
constexpr int kMinShareCost = 103;

// As the line counts it.
struct PairCost {
  int tile, piece;
};
inline __host__ __device__ PairCost plain_cost(int kind) {
  const Cost cost = cost_of(kind, true);
  return {cost.tile, cost.piece};
}

// What a KV head's items have to read and to work out, in units of cost.
struct HeadLoad {
  int unique_tiles;  // what all items of a sequence share, once
  int arithmetic;    // of all items, memory aside
};

inline __host__ __device__ int memory_cost(HeadLoad load, int head_dim) {
  return load.unique_tiles * (kMemoryTileCost * head_dim / 128);
}
inline __host__ __device__ bool is_memory_bound(HeadLoad load, int head_dim) {
  return memory_cost(load, head_dim) > load.arithmetic;
}

// For a step of several kinds. When the memory is the limit, tiles of all kinds take about as long,
// for SMs read equally fast; and the more a kind loses at the ends of a share, the shorter its
// shares.
inline __host__ __device__ PairCost fitted_cost(int kind, HeadLoad load, int num_kv_heads,
                                                int head_dim, int num_shares) {
  const Cost cost = cost_of(kind, is_memory_bound(load, head_dim));
  const int all = larger(memory_cost(load, head_dim), load.arithmetic) * num_kv_heads;
  const int share = larger(all / num_shares, 3 * cost.ends);
  const float factor = static_cast<float>(share) / (share - cost.ends);
  return {static_cast<int>(cost.tile * factor + 0.5f),
          static_cast<int>(cost.piece * factor + 0.5f)};
}

inline __host__ __device__ int tile_cost(const PairCost* costs, const Item& item) {
  return costs[kind_of(item.packed_count)].tile;
}
inline __host__ __device__ int pair_cost(const PairCost* costs, const Item& item) {
  const PairCost& cost = costs[kind_of(item.packed_count)];
  return cost.piece + cost.tile * item.num_tiles;
}

// --------------------------------------------------------------------------------- the line, cut

struct Line {
  const Item* items;
  const int* offsets;     // where items begin
  const PairCost* costs;  // [4] by kind
  int num_items, num_kv_heads, length;
  __host__ __device__ int num_pairs() const { return num_items * num_kv_heads; }
};

// Interval c of the line is share c's.
using Cut = EqualParts<int>;
inline __host__ __device__ Cut cut_line(int length, int num_shares) {
  return Cut(length, larger(1, smaller(num_shares, length / kMinShareCost)));
}

// Index of the last of `count` ascending offsets that is <= value; offsets[0] <= value.
inline __host__ __device__ int last_not_above(const int* offsets, int count, int value) {
  int low = 0, high = count;  // offsets[low] <= value < offsets[high]
  while (high - low > 1) {
    int middle = (low + high) / 2;
    (offsets[middle] <= value ? low : high) = middle;
  }
  return low;
}

// The first tile at or behind `place`, and the item it belongs to.
inline __host__ __device__ Position locate(const Line& line, int place, Item& item) {
  const int item_idx = last_not_above(line.offsets, line.num_items, place);
  item = line.items[item_idx];
  const int pair = pair_cost(line.costs, item), tile = tile_cost(line.costs, item);
  const int rest = place - line.offsets[item_idx], head = rest / pair;
  const Position at = {item_idx * line.num_kv_heads + head, (rest - head * pair + tile - 1) / tile};
  if (at.tile < item.num_tiles) return at;
  if (head + 1 == line.num_kv_heads && item_idx + 1 < line.num_items) {
    item = line.items[item_idx + 1];
  }
  return {at.pair + 1, 0};
}

// The shares that have a part of the pair at `at`.
inline __host__ __device__ Merge merge_of(const Line& line, Cut cut, const Item& item,
                                          Position at) {
  int pair_begin = line.offsets[at.pair / line.num_kv_heads] +
                   at.pair % line.num_kv_heads * pair_cost(line.costs, item);
  int first = cut.owner(pair_begin);
  int last = cut.owner(pair_begin + tile_cost(line.costs, item) * (item.num_tiles - 1));
  return {first, last - first + 1};
}

inline __host__ __device__ Share cut_share(const Line& line, Cut cut, int c) {
  int begin = cut.begin(c), end = smaller(cut.begin(c + 1), line.length);
  Share share = {};
  if (end > begin) {
    Item last;
    share.begin = locate(line, begin, share.item);
    share.end = {line.num_pairs(), 0};
    if (end < line.length) share.end = locate(line, end, last);
    share.end_tile = share.begin.pair == share.end.pair ? share.end.tile : share.item.num_tiles;
    share.next_pair = share.begin.pair + 1;
    if (share.begin.tile > 0) share.earlier = merge_of(line, cut, share.item, share.begin);
    if (share.end.tile > 0) share.later = merge_of(line, cut, last, share.end);
  }
  return share;
}

// ---------------------------------------------------------------------------------------- claims

// Whether pairs are claimed. Measured: pairs of more rows wait for arithmetic as well as for the memory,
// and claims cost them more than they bring, as where pairs are few.
inline __host__ __device__ bool claims_pay(int kind, int num_pairs, int least, int num_shares) {
  return kind == 0 && num_pairs >= least * num_shares;
}
constexpr int kLeastEqualToClaim = 3, kLeastUnequalToClaim = 6;  // pairs per share

// Whether pairs may be claimed in a step of up to so many: for the host, which knows no more of it.
inline bool may_claim(int most_pairs, int num_shares) {
  return claims_pay(0, most_pairs, smaller(kLeastEqualToClaim, kLeastUnequalToClaim), num_shares);
}

// What a share holds then: while it reads the first pair its CTA claims one for behind the second.
constexpr int kHeldPairs = 2;

// Of pairs by falling cost: one of the longest, and one of the next. The second is the chain's end.
inline __host__ __device__ int second_held_pair(int c, int num_shares) {
  return kHeldPairs * num_shares - 1 - c;
}
inline __host__ __device__ Share claiming_share(const Item& item, int c, int num_pairs,
                                                int num_shares) {
  Share share = {};
  share.item = item;
  share.begin = {c, 0};
  share.end = {num_pairs, 0};
  share.end_tile = item.num_tiles;
  share.next_pair = second_held_pair(c, num_shares);
  share.chained = 1;
  share.first_claimed = kHeldPairs * num_shares;
  share.num_pairs = num_pairs;
  return share;
}

// ------------------------------------------------------------------------------ pairs of one cost

// When all pairs cost the same (one request, or requests of the same length), shares of whole
// pairs, or pairs in equal parts, need fewer pieces; taken when that occupies nearly as many SMs, or
// where the others are claimed.
struct Even {
  int pairs = 0;  // per share; all others are claimed, if there are any; or
  int parts = 0;  // per pair
  __host__ __device__ bool used() const { return pairs > 0 || parts > 0; }
};

// How many parts, by the times of whole steps, where every layer fetches the code anew: the more
// SMs do, the longer each waits.
inline __host__ __device__ int choose_parts(const Item& item, int num_pairs, int num_shares) {
  const int kind = kind_of(item.packed_count), tiles = item.num_tiles;
  const int most = num_shares / num_pairs;
  int parts = most;
  if (kind < 2 && most > 3) {
    // Three quarters of the SMs; and merging loads four parts at once.
    const int some = num_shares * 3 / 4 / num_pairs, fours = some > 4 ? some / 4 * 4 : some;
    if (tiles <= 8 * fours) parts = fours;
  }
  // Few tiles: whole pairs are read nearly as fast, with nothing to merge. What few are was measured:
  // 5 and 8 requests of 8 rows gain by parts from 12 tiles on, 8 of one row or of 16 do not.
  const bool are_few = kind == 1 ? tiles < 12 : num_pairs * tiles <= 8 * num_shares;
  const bool is_short = tiles < 8 || (most <= 3 && are_few);
  // A part of one tile costs more to merge than it saves, as does one that makes none shorter.
  parts = smaller(parts, tiles / 2);
  if (parts <= 1 || (kind < 3 && is_short)) return 1;
  const int longest = (tiles + parts - 1) / parts;
  return (tiles + longest - 1) / longest;
}

inline __host__ __device__ Even cut_evenly(const Line& line, int num_shares) {
  Even even;
  const int num_pairs = line.num_pairs();
  if (num_pairs == 0) return even;
  if (num_pairs > num_shares) {
    const int kind = kind_of(line.items[0].packed_count);
    int pairs = (num_pairs + num_shares - 1) / num_shares;
    if (claims_pay(kind, num_pairs, kLeastEqualToClaim, num_shares)) {
      even.pairs = kHeldPairs;
    } else if (num_pairs * 10 >= pairs * num_shares * 9) {
      even.pairs = pairs;
    }
  } else if (num_shares / num_pairs * num_pairs * 10 >= num_shares * 9) {
    even.parts = choose_parts(line.items[0], num_pairs, num_shares);
  }
  return even;
}

// Whether items of half the rows would keep twice the SMs busy, as pairs of either half would be in as
// many parts. Keys are read twice then, but by few.
inline __host__ __device__ bool halving_pays(const Line& line, Even even, int num_shares) {
  if (even.parts == 0 || line.items[0].packed_count != kMaxPackedRows) return false;
  const int num_pairs = 2 * line.num_pairs();
  if (num_shares / larger(num_pairs, 1) * num_pairs * 10 < num_shares * 9) return false;
  Item half = line.items[0];
  half.packed_count = kHalfPackedRows;
  return choose_parts(half, num_pairs, num_shares) == even.parts;
}

inline __host__ __device__ Share even_share(const Line& line, Even even, int c, int num_shares) {
  int num_pairs = line.num_pairs();
  int parts = larger(even.parts, 1), pairs = larger(even.pairs, 1);
  int pair = c / parts * pairs, part = c % parts;
  Share share = {};
  if (pair < num_pairs) {
    share.item = line.items[pair / line.num_kv_heads];
    int tiles = share.item.num_tiles;
    share.begin = {pair, part * tiles / parts};
    share.end = {smaller(pair + pairs, num_pairs), 0};
    share.end_tile = (part + 1) * tiles / parts;
    share.next_pair = pair + 1;
    share.earlier = share.later = {c - part, parts};
    share.first_claimed = smaller(num_shares * pairs, num_pairs);
    share.num_pairs = num_pairs;
  }
  return share;
}

// ------------------------------------------------------------------------------------ pairs, dealt

// Whole pairs, from the longest to the shortest, go to the share that has least so far, which leaves
// the shares about equal (R. Graham, Bounds on multiprocessing timing anomalies, 1969). A few dealers
// do so by turns, each with shares of its own: share c is dealer c % kDealers's. Pairs that are too
// long for that are cut: with each of their parts a share begins. How long is too long is tried in
// kDealingWays.
constexpr int kDealers = 4;

// How long the longest share may be where pairs are dealt, `part` being the mean: then cutting all of
// them would cost as much. `kinds`: a bit each.
inline __host__ __device__ int longest_dealt(int part, uint32_t kinds, int num_pairs,
                                             int num_shares) {
  // Of several kinds, the one whose cuts cost most.
  const int kind = kinds >= 8 ? 3 : kinds >= 4 ? 2 : kinds >= 2 ? 1 : 0;
  // Fewer pairs than SMs: those that read have more of the memory's bandwidth.
  constexpr int kFaster = 80;
  return part + cost_of(kind, true).cutting + (num_pairs <= num_shares ? kFaster : 0);
}

// What whole pairs cost there.
inline __host__ __device__ PairCost dealt_cost(int kind, HeadLoad load, int head_dim) {
  const Cost cost = cost_of(kind, is_memory_bound(load, head_dim));
  return {cost.tile, cost.piece};
}

// Pairs longer than this are cut: none, or those beyond 10, 9 or 8 eighths of `part`, the mean share.
inline __host__ __device__ int longest_pair(int way, int part) {
  return way == 0 ? INT_MAX : part / 8 * (7 + kDealingWays - way) + part % 8 + 1;
}

// How many parts the item's pairs are in, none longer than `longest` if tiles are enough.
inline __host__ __device__ int parts_of(const PairCost* costs, const Item& item, int longest) {
  const int parts = (pair_cost(costs, item) - 1) / longest + 1;
  return larger(1, smaller(parts, item.num_tiles / 2));
}
// Of the longest.
inline __host__ __device__ int part_cost(const PairCost* costs, const Item& item, int parts) {
  const int kind = kind_of(item.packed_count), tiles = (item.num_tiles + parts - 1) / parts;
  return costs[kind].piece + costs[kind].tile * tiles + cost_of(kind, true).merging;
}

// What a share begins with: a part of a pair that is cut, or nothing.
struct CutPart {
  int pair = 0, part = 0, parts = 0, cost = 0;
};
struct CutPairs {
  CutPart part;     // of the share
  int first_whole;  // of all pairs, counted by falling cost
  bool fit;         // the parts of those before
};
// `item_of(rank)`: the items by falling cost.
template <class ItemOf>
inline __host__ __device__ CutPairs cut_long_pairs(int c, const ItemOf& item_of, int num_items,
                                                   const PairCost* costs, int longest,
                                                   int num_kv_heads, int num_shares) {
  CutPairs cut = {};
  int rank = 0, num_parts = 0;
  for (cut.fit = true; rank < num_items; ++rank) {
    const Item& item = item_of(rank);
    const int parts = parts_of(costs, item, longest), place = c - num_parts;
    if (parts == 1) break;
    num_parts += parts * num_kv_heads;
    // Where pairs are few, SMs would be left without work.
    cut.fit = num_parts <= num_shares && 2 * num_items * num_kv_heads > num_shares;
    if (!cut.fit) break;
    if (place >= 0 && c < num_parts) {
      cut.part = {rank * num_kv_heads + place / parts, place % parts, parts,
                  part_cost(costs, item, parts)};
    }
  }
  cut.first_whole = rank * num_kv_heads;
  return cut;
}

// The share whose number is least has least so far. Loads are multiples of 4 here.
constexpr int kMaxDealtLoad = 1 << 24;
inline __host__ __device__ uint32_t dealing_order(int load, int share) {
  return static_cast<uint32_t>(load) / 4 << 10 | static_cast<uint32_t>(share);
}
inline __host__ __device__ int load_of(uint32_t order) { return order >> 10 << 2; }

// A share that was dealt pairs: they are chained from `last_pair`, the last and shortest, to the first.
// `end`: the number of pairs, where chains end.
inline __host__ __device__ Share dealt_share(const CutPart& part, int last_pair,
                                             const int* next_pairs, const Item& item, int end,
                                             int c) {
  Share share = {};
  if (part.parts > 0) {
    share.begin = {part.pair, part.part * item.num_tiles / part.parts};
    share.end_tile = (part.part + 1) * item.num_tiles / part.parts;
    share.next_pair = last_pair;
    share.earlier = share.later = {c - part.part, part.parts};
  } else if (last_pair < end) {
    share.begin = {last_pair, 0};
    share.end_tile = item.num_tiles;
    share.next_pair = next_pairs[last_pair];
  } else {
    return share;
  }
  share.item = item;
  share.end = {end, 0};
  share.chained = 1;
  return share;
}

}  // namespace optimus::cuda::attention
