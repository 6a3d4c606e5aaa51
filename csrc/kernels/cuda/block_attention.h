// The workspace the two kernels of block attention share, and the words they use.
//
//   block_attention_schedule   reads cu_seqlens_q, kv_limits and positions on the device and cuts the
//                              step's work into shares, one per CTA. Once per step, for all layers.
//   block_attention            walks the shares; what was cut across shares is merged at the end by the
//                              CTAs that had a part of it.
//
// The unit of work is a *tile*: kTileKeys keys of one KV head against one *item*, and an item is up
// to kMaxPackedRows packed rows (row x GQA group) of one sequence. A *pair* is an item and a KV head,
// a *piece* the part of a pair that lies in one share. Shares are made in one of three ways:
//
//   even   Pairs of one cost: as many whole ones for each share, or each in as many equal parts.
//   dealt  Pairs of several costs: whole, from the longest to the shortest, each to the share that has
//          least so far. Only those longer than a share are cut, and their parts come first.
//   cut    Few pairs, where dealing would leave SMs without work: tiles lie on a line of costs, item
//          by item, within an item KV head by KV head, within a head by key, and share c is the tiles
//          that begin in the c-th equal interval of the line.
//
// Those are equal shares, but SMs do not read equally fast: some get a fifth more of the memory's
// bandwidth. Where pairs of up to 16 packed rows are many, of one cost or several, shares hold but two of
// them each, and whichever CTA is ready first *claims* the next of the others, from the longest on.
//
// What cuts cost is mostly code that merges, fetched anew in every layer. A share holds at most one
// piece that began in an earlier share (partial slot 0) and one that goes on into a later share
// (partial slot 1); all others are whole and go straight to the output, those of up to 64 packed rows
// two heads at a time where they lie side by side and none are claimed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace optimus::cuda::attention {

constexpr int kTileKeys = 64;
constexpr int kMaxPackedRows = 128;
constexpr int kHalfPackedRows = kMaxPackedRows / 2;  // where SMs would be left without work
constexpr int kDealingWays = 4;  // that the schedule tries where it deals pairs to the shares

// What code runs an item: 0 to 3, for one, two, four and eight warps side by side to hold its rows.
inline __host__ __device__ int kind_of(int packed) {
  return packed <= 16 ? 0 : packed <= 32 ? 1 : packed <= 64 ? 2 : 3;
}

// number / d, for number < 2^32 / d and the inverse of d: a division is twenty instructions.
inline uint32_t inverse_of(int d) {
  return d == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d);
}
#ifdef __CUDACC__
__device__ __forceinline__ int divide(int number, uint32_t inverse) {
  return inverse == 0 ? number : __umulhi(number, inverse);
}
#endif

// A sequence's packed rows [packed_begin, packed_begin + packed_count).
struct Item {
  int seq, row_begin;  // row_begin: the sequence's first row in q
  int packed_begin, packed_count;
  int num_tiles;                // key tiles of one head, up to the largest limit
  int first_limit, last_limit;  // smallest and largest kv_limit of its rows
  int num_old_keys;             // of the sequence, complete before the step's first layer
};

// A tile's place on the line. A pair is an (item, head): item * num_kv_heads + head.
struct Position {
  int pair, tile;
};

// One pair cut across the shares [first_share, first_share + num_parts).
struct Merge {
  int first_share, num_parts;
};

// A first piece, and pairs behind it, all before `end`: only the pair that `end` lies in is not whole.
struct Share {
  Item item;  // a copy of begin's, to start without another dependent load
  Position begin, end;
  int end_tile;          // of the first piece
  int next_pair;         // behind it
  int chained;           // whether pairs follow as Workspace::next_pairs has them, or in order
  Merge earlier, later;  // of the piece that began in an earlier share, of one that ends in a later
  int first_claimed, num_pairs;  // pairs from the first on are claimed, whole; if there are any
  int unused;                    // Shares are loaded in pieces of 8 bytes.
};

// Pointers into the caller's workspace.
struct Workspace {
  Share* shares;        // [num_shares]
  uint32_t* claims;     // [1] made in a layer so far
  uint64_t* kv_policy;  // [1] with which the step's keys and values are read: createpolicy's word
  uint32_t* arrivals;   // [num_shares] by first share of a merge: parts written since the schedule
  uint32_t* left_rows;  // [num_shares * 2] by partial slot: not 0 while its rows wait to be merged
  Item* items;          // [max_items]
  int* cost_offsets;    // [max_items] where on the line the item begins
  // [max_items * num_kv_heads] by pair: which comes behind it in its share. As many ints again for
  // each further way that the schedule tries.
  int* next_pairs;
  float2*
      partial_ml;  // [num_shares * 2, partial_rows] running max (of scores * scale * log2 e), sum
  float* partial_out;  // [num_shares * 2, partial_rows, head_dim] unnormalised sums
  int num_shares, max_items, partial_rows;
  size_t bytes;
};

}  // namespace optimus::cuda::attention
