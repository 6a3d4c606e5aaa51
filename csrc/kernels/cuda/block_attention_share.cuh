// What producers and consumers of an attention CTA agree on: the arguments, the ring of slots in shared
// memory, and the order of the share's pieces.
//
// Slot layout, K and V alike: [head_dim / 64][kTileKeys][64] bf16, rows of 128 bytes whose 16-byte
// chunk c of row r sits at c ^ (r % 8) (the copy engine's 128-byte swizzle): ldmatrix reads it
// without bank conflicts, and wgmma takes it as it is.
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/block_attention.h"
#include "kernels/cuda/ptx.cuh"

namespace optimus::cuda::attention {

constexpr int kConsumerWarps = 8;
constexpr int kTeamWarps = 4;                        // of items of up to 64 packed rows
constexpr int kProducerWarps = 2;                    // one for K, one for V
constexpr int kThreads = (kConsumerWarps + 4) * 32;  // whole warpgroups
constexpr int kMaxSlots = 10;
constexpr int kCutPiecesBytes = 64;
// Claims of a CTA that are made and not yet read by all: pieces in the ring have a tile at least.
constexpr int kClaims = 16;
static_assert(kClaims > kMaxSlots + 1);
constexpr int kNoPair = -1;  // claimed where all pairs are taken
constexpr int kConsumerBarrier = 1;
constexpr int kWarpgroupBarrier = 2;  // and 3: one per consumer warpgroup
constexpr int kProducerBarrier = 4;

struct AttentionArgs {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k_pages;
  const __nv_bfloat16* v_pages;
  const int32_t* kv_limits;
  const int32_t* page_table;
  __nv_bfloat16* out;
  int num_q_heads, num_kv_heads, group;
  uint32_t group_inverse, kv_heads_inverse;  // of group and of num_kv_heads, for divide()
  int page_shift;                            // log2 of the page size
  int page_table_stride, num_slots;
  float scale_log2;  // softmax scale * log2 e
  int64_t merge_wait_cycles;
  Workspace ws;
};

template <int kHeadDim>
constexpr int kTileBytes = kTileKeys * kHeadDim * 2;  // of K or of V

// Whether a warp has a place for the next piece's Q beside that for its sums. Before sm_90 shared
// memory is too small.
#if defined(OPTIMUS_SM90)
constexpr bool kQueriesApart = true;
#else
constexpr bool kQueriesApart = false;
#endif

// Shared memory: slots (K then V each), the copies' sums (or finished rows), Q of the next piece if
// apart, (max, sum) of each copy's rows, barriers, the cut pieces.
template <int kHeadDim>
struct SharedLayout {
  static constexpr int kSums = kConsumerWarps * 16 * kHeadDim * 4;
  static constexpr int kQueries = kConsumerWarps * 16 * kHeadDim * 2;
  static constexpr int kMaxSum = kConsumerWarps * 16 * 8;
  static constexpr int kBarriers = 4 * kMaxSlots * 8 + kClaims * (8 + 4);
  static constexpr int kAlignment = 1024;  // of the swizzle pattern

  static int bytes(int num_slots, bool queries_apart) {
    return kAlignment + num_slots * 2 * kTileBytes<kHeadDim> + kSums +
           (queries_apart ? kQueries : 0) + kMaxSum + kBarriers + kCutPiecesBytes;
  }
};

// Position in the ring. K and V of a slot are filled and released each by itself: a producer waits for
// the release of its half, consumers for the data of either.
struct RingPosition {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance(int num_slots) {
    if (++slot == num_slots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

struct Ring {
  uint32_t data, barriers;  // shared addresses
  __device__ uint32_t k(int slot, int tile_bytes) const { return data + 2 * slot * tile_bytes; }
  __device__ uint32_t v(int slot, int tile_bytes) const { return k(slot, tile_bytes) + tile_bytes; }
  __device__ uint32_t k_full(int slot) const { return barriers + slot * 8; }
  __device__ uint32_t v_full(int slot) const { return barriers + (kMaxSlots + slot) * 8; }
  __device__ uint32_t k_released(int slot) const { return barriers + (2 * kMaxSlots + slot) * 8; }
  __device__ uint32_t v_released(int slot) const { return barriers + (3 * kMaxSlots + slot) * 8; }
  // Of the CTA's i-th claim: that it has been made, and the pair.
  __device__ uint32_t claim_made(int i) const {
    return barriers + (4 * kMaxSlots + i % kClaims) * 8;
  }
  __device__ uint32_t claimed_pair(int i) const {
    return barriers + (4 * kMaxSlots + kClaims) * 8 + i % kClaims * 4;
  }
};

// By a team, which is a warpgroup. Two barriers by name: the race checker does not follow one whose
// number is computed.
__device__ __forceinline__ void meet_team(bool is_first) {
  if (is_first) {
    ptx::named_barrier(kWarpgroupBarrier, kTeamWarps * 32);
  } else {
    ptx::named_barrier(kWarpgroupBarrier + 1, kTeamWarps * 32);
  }
}

// Shares, items and limits are read past the L1, which may hold those of another step.
template <class T>
__device__ __forceinline__ T load_past_l1(const T* from) {
  static_assert(sizeof(T) % sizeof(int2) == 0);
  T value;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(int2)); ++i) {
    reinterpret_cast<int2*>(&value)[i] = __ldcg(reinterpret_cast<const int2*>(from) + i);
  }
  return value;
}

__device__ __forceinline__ int row_of(const AttentionArgs& args, int packed) {
  return divide(packed, args.group_inverse);
}

// First row of the partial slot of a share's part: the part that goes on into the next share is apart
// from the one that began earlier.
__device__ __forceinline__ size_t partial_row(const AttentionArgs& args, int share,
                                              bool begun_here) {
  return static_cast<size_t>(share * 2 + (begun_here ? 1 : 0)) * args.ws.partial_rows;
}

// The pieces of one share, in order, and what its CTA claims behind them.
struct Piece {
  Item item;
  Item following;  // of the next piece, loaded ahead where that is another
  Position at;     // at.tile: the first of the piece
  int head, end_tile;
  bool two_heads;             // of two pairs at once, whole ones of this head and the next
  Position end;               // of the share, or of the claimed pair
  int next_pair, pair_after;  // behind the piece; behind that, loaded ahead
  bool chained;               // pairs as in Workspace::next_pairs, or in order
  bool claims;                // behind the share's own
  int num_claims = 0;         // taken so far

  __device__ Piece(const AttentionArgs& args, const Share& share, bool may_claim)
      : item(share.item),
        at(share.begin),
        end(share.end),
        next_pair(share.next_pair),
        chained(share.chained != 0),
        claims(may_claim && share.first_claimed < share.num_pairs) {
    enter(args);
    end_tile = share.end_tile;
  }
  __device__ bool valid() const { return is_before_end(at); }
  __device__ bool whole() const { return at.tile == 0 && end_tile == item.num_tiles; }
  __device__ bool next_is_claimed() const { return claims && !is_before_end({next_pair, 0}); }
  __device__ bool is_claimed() const { return num_claims > 0; }
  // Without kMayClaim only where no pairs are claimed: it is a third less code.
  template <bool kMayClaim>
  __device__ void next(const AttentionArgs& args, const Ring& ring) {
    const int item_idx = item_of(args, at.pair);
    if (is_before_end({next_pair, 0})) {
      if (item_of(args, next_pair) != item_idx) item = following;
      at = {next_pair, 0};
      next_pair = pair_after;
    } else {
      int pair = kNoPair;
      if (!kMayClaim || !claims || !take_claim(ring, pair)) {
        at = end;
        return;
      }
      if (item_of(args, pair) != item_idx) {
        item = load_past_l1(&args.ws.items[item_of(args, pair)]);
      }
      at = {pair, 0};
      next_pair = pair + 1;
      end = {next_pair, 0};
    }
    enter(args);
  }

 private:
  // False where there are no more. Only the lane that releases tiles reads: what orders it before the
  // next claim in that place is plain to see then, to the race checker too.
  __device__ bool take_claim(const Ring& ring, int& pair) {
    ptx::barrier_wait(ring.claim_made(num_claims), num_claims / kClaims & 1);
    if (threadIdx.x % 32 == 0) ptx::load_shared(pair, ring.claimed_pair(num_claims));
    ++num_claims;
    pair = __shfl_sync(~0u, pair, 0);
    return pair != kNoPair;
  }
  __device__ static int item_of(const AttentionArgs& args, int pair) {
    return divide(pair, args.kv_heads_inverse);
  }
  __device__ bool is_before_end(Position position) const {
    return position.pair < end.pair || (position.pair == end.pair && position.tile < end.tile);
  }
  // The pair behind next_pair, if that is one of the share. In order it is known at once: two heads ask
  // for it before anything of theirs is on its way.
  __device__ void look_ahead(const AttentionArgs& args) {
    if (!is_before_end({next_pair, 0})) return;
    pair_after = chained ? __ldcg(args.ws.next_pairs + next_pair) : next_pair + 1;
  }
  __device__ void enter(const AttentionArgs& args) {
    const int item_idx = item_of(args, at.pair);
    head = at.pair - item_idx * args.num_kv_heads;
    end_tile = at.pair == end.pair ? end.tile : item.num_tiles;
    look_ahead(args);
    // Who claims has two pieces before the first claim, so that it is there in time.
    two_heads = !claims && kind_of(item.packed_count) < 3 && at.tile == 0 &&
                next_pair == at.pair + 1 && next_pair < end.pair && head + 1 < args.num_kv_heads;
    if (two_heads) {
      next_pair = pair_after;
      look_ahead(args);
    }
    if (is_before_end({next_pair, 0}) && item_of(args, next_pair) != item_idx) {
      following = load_past_l1(&args.ws.items[item_of(args, next_pair)]);
    }
  }
};

}  // namespace optimus::cuda::attention
