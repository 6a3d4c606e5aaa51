// The workspace the two kernels of block attention share, and the words they use.
//
//   block_attention_schedule   reads cu_seqlens_q, kv_limits and positions on the device and cuts the
//                              step's work into equal shares, one per CTA. Once per step, for all layers.
//   block_attention            walks the shares; what was cut across shares is merged at the end by the
//                              CTAs that had a part of it.
//
// The unit of work is a *tile*: kTileKeys keys of one KV head against one *item*, and an item is up
// to kMaxPackedRows packed rows (row x GQA group) of one sequence. Tiles lie on a line of costs, item
// by item, within an item KV head by KV head, within a head by key; share c is the tiles that begin
// in the c-th equal interval of the line. A *piece* is the part of one (item, head) that lies in one
// share: a share holds at most one piece that began in an earlier share (partial slot 0) and one that
// goes on into a later share (partial slot 1); all pieces in between are whole and go straight to
// the output, those of up to 64 packed rows two heads at a time where they lie side by side. What
// cuts cost is mostly code that merges, fetched anew in every layer: so where dealing whole pairs to
// the shares, from the longest to the shortest, leaves them about equal, pairs are not cut. That is
// most steps of requests of similar length, and prompts, whose rows see few keys or many.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace optimus::cuda::attention {

constexpr int kTileKeys = 64;
constexpr int kMaxPackedRows = 128;

// What code runs an item: 0 to 3, for one, two, four and eight warps side by side to hold its rows.
inline __host__ __device__ int kind_of(int packed) {
  return packed <= 16 ? 0 : packed <= 32 ? 1 : packed <= 64 ? 2 : 3;
}

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

// The tiles from `begin` to before `end`. From its first pair to the next it is steps[0] pairs,
// from that one on steps[1], and so on in turn: 1, or more where pairs are dealt.
struct Share {
  Item item;  // a copy of begin's, to start without another dependent load
  Position begin, end;
  int steps[2];
  Merge earlier, later;  // of the piece that began in an earlier share, of one that ends in a later
};

// Pointers into the caller's workspace.
struct Workspace {
  Share* shares;        // [num_shares]
  uint32_t* arrivals;   // [num_shares] by first share of a merge: parts written since the schedule
  uint32_t* left_rows;  // [num_shares * 2] by partial slot: not 0 while its rows wait to be merged
  Item* items;          // [max_items]
  int* cost_offsets;    // [max_items] where on the line the item begins
  float2*
      partial_ml;  // [num_shares * 2, partial_rows] running max (of scores * scale * log2 e), sum
  float* partial_out;  // [num_shares * 2, partial_rows, head_dim] unnormalised sums
  int num_shares, max_items, partial_rows;
  size_t bytes;
};

}  // namespace optimus::cuda::attention
