// The attention kernel: one persistent CTA per share, two producer warps, eight consumer warps.
//
// A consumer warp holds 16 packed rows. Fewer rows than 16 per warp are held by several warps
// (copies): some of them share a tile's keys, and with more copies left, two teams of copies take tiles
// in turn. Where a share has whole pieces of two heads, both at once come in turn, each team has a head
// to itself, and one ends a piece while the other goes on. Every copy runs its own online softmax; at
// the end of a piece the copies' sums are merged through shared memory in fixed order. Items of more
// than 32 packed rows use wgmma where it exists: then a team is one warpgroup, or both side by side.
#pragma once

#include "core/launch.cuh"
#include "kernels/cuda/block_attention_output.cuh"
#include "kernels/cuda/block_attention_producer.cuh"
#include "kernels/cuda/block_attention_warp.cuh"
#include "kernels/cuda/block_attention_wgmma.cuh"

namespace optimus::cuda::attention {

template <int kHeadDim, bool kMayClaim>
struct Consumer {
  using State = WarpState<kHeadDim>;

  const AttentionArgs& args;
  Ring ring;
  Output<kHeadDim> output;
  int warp, lane;

  __device__ void run(const Share& share) {
    RingPosition at;
    int turn = 0;
    Piece piece(args, share, kMayClaim);
    Queries queries = find(piece);
    // Without work, an SM is the next kernel's at once; but this one must not be done before all that
    // came before it is.
    if (piece.valid() || blockIdx.x == 0) wait_until_previous_is_done();
    if (!piece.valid()) return;
    copy_queries<kHeadDim>(args, queries, output.staging(), lane);
    CutPieces& pieces = output.cut_pieces();
    do {
      // What follows from the lane is worked out anew for each piece: registers are short.
      asm volatile("" : "+r"(lane));
      __builtin_assume(lane >= 0 && lane < 32);
      int packed = piece.item.packed_count;
      const bool whole = piece.whole(), begun_here = piece.at.tile == 0;
      if (!whole && threadIdx.x == 0) pieces.note(args, piece);
      if (packed <= 16) {
        run_piece<1, 16>(piece, queries, at, turn);
      } else if (packed <= 32) {
        run_piece<2, 32>(piece, queries, at, turn);
      } else if (packed <= 64) {
        run_tall_piece<4>(piece, queries, at, turn);
      } else {
        run_tall_piece<8>(piece, queries, at, turn);
      }
      // The race checker loses sight of how the zeros that a tall piece wrote behind V's last key are
      // ordered before what fills the slot next, where that is read with fewer warps meeting between.
      if (packed > 32 && piece.valid() && piece.item.packed_count <= 32) meet();
      if (!whole) arrive(args, pieces.cut[begun_here]);
    } while (piece.valid());
  }

  __device__ __forceinline__ Queries find(const Piece& piece) {
    const int row_warps = 1 << kind_of(piece.item.packed_count);
    const int head = piece.head + (piece.two_heads ? warp / kTeamWarps : 0);
    return find_queries(args, piece.item, head, (warp & (row_warps - 1)) * 16, lane);
  }

  // kRowWarps warps side by side hold the packed rows; each takes kKeys of a tile's keys.
  template <int kRowWarps, int kKeys>
  __device__ __forceinline__ void run_piece(Piece& piece, Queries& queries, RingPosition& at,
                                            int& turn) {
    constexpr int kWarps = kRowWarps * (kTileKeys / kKeys), kTeams = kConsumerWarps / kWarps;
    static_assert(kTeams == 1 || kWarps == kTeamWarps);
    const Queries rows = queries;
    const PieceOutput done(args, piece);
    const Item item = piece.item;
    // Whoever claims a pair, its tiles are taken alike.
    if (kRowWarps == 1 && piece.is_claimed()) turn = 0;
    const int first_tile = piece.at.tile, tile_shift = begin_turns(piece, turn);
    const int count = (piece.end_tile - first_tile) << tile_shift;
    State state;
    begin_piece<kRowWarps>(state, piece, queries);
    int first_row = warp / kRowWarps % (kTileKeys / kKeys) * kKeys;
    for (int i = 0; i < count; ++i) {
      if (turn++ % kTeams == warp / kWarps) {
        run_tile<kKeys>(state, item, (first_tile + (i >> tile_shift)) * kTileKeys, first_row, at);
      } else {
        skip_tile(at);
      }
      release(at.slot);
      at.advance(args.num_slots);
    }
    end_piece<kRowWarps>(state, done, rows, piece, queries);
  }

  // The i-th tile that comes of a piece is its tile i >> result: of two heads each tile comes twice, to
  // the first team first.
  __device__ __forceinline__ static int begin_turns(const Piece& piece, int& turn) {
    if (piece.two_heads) turn = 0;
    return piece.two_heads;
  }

  // Takes Q. Where there is room, the next piece's Q is on its way from then on, else from the end.
  template <int kRowWarps>
  __device__ __forceinline__ void begin_piece(State& state, Piece& piece, Queries& queries) {
    state.take(queries, output.staging(), lane);
    if (kQueriesApart) move_on<kMayClaim && kRowWarps == 1>(piece, queries);
  }
  template <int kRowWarps>
  __device__ __forceinline__ void end_piece(State& state, const PieceOutput& done,
                                            const Queries& rows, Piece& piece, Queries& queries) {
    output.template finish<kRowWarps>(args, state, done, rows, warp, lane);
    if (!kQueriesApart) move_on<kMayClaim && kRowWarps == 1>(piece, queries);
  }
  template <bool kClaims>
  __device__ __forceinline__ void move_on(Piece& piece, Queries& queries) {
    piece.next<kClaims>(args, ring);
    if (!piece.valid()) return;
    queries = find(piece);
    copy_queries<kHeadDim>(args, queries, output.staging(), lane);
  }

  template <int kKeys>
  __device__ __forceinline__ void run_tile(State& state, const Item& item, int tile_key,
                                           int first_row, RingPosition at) {
    uint32_t k = ring.k(at.slot, kTileBytes<kHeadDim>), v = ring.v(at.slot, kTileBytes<kHeadDim>);
    float scores[kKeys / 8][4], factors[2];
    ptx::barrier_wait(ring.k_full(at.slot), at.phase);
    score<kHeadDim, kKeys>(state, scores, k, first_row, lane);
    if (tile_key + kTileKeys > item.first_limit) {
      mask<kHeadDim, kKeys>(state, scores, tile_key + first_row, lane);
    }
    if (advance_softmax(state, scores, args.scale_log2, factors)) rescale(state, factors);
    ptx::barrier_wait(ring.v_full(at.slot), at.phase);
    int keys_left = item.last_limit - tile_key - first_row;
    if (keys_left < kKeys) {
      accumulate<kHeadDim, kKeys, true>(state, scores, v, first_row, keys_left, lane);
    } else {
      accumulate<kHeadDim, kKeys, false>(state, scores, v, first_row, keys_left, lane);
    }
  }

  // Following every phase keeps a warp from taking a slot's next fill for this one.
  __device__ __forceinline__ void skip_tile(RingPosition at) {
    ptx::barrier_wait(ring.k_full(at.slot), at.phase);
    ptx::barrier_wait(ring.v_full(at.slot), at.phase);
  }

  // Every warp releases K and V of every tile of the share, whether it works on the tile or not.
  __device__ __forceinline__ void release_k(int slot) {
    __syncwarp();
    ptx::barrier_arrive_if(lane == 0, ring.k_released(slot));
  }
  __device__ __forceinline__ void release_v(int slot) {
    __syncwarp();
    ptx::barrier_arrive_if(lane == 0, ring.v_released(slot));
  }
  __device__ __forceinline__ void release(int slot) {
    release_k(slot);
    release_v(slot);
  }

#if defined(OPTIMUS_WGMMA)
  // A team is a warpgroup (four row warps), or both are one (eight). While a tile's softmax runs,
  // the tensor cores work on the product of the tile before with V.
  template <int kRowWarps>
  __device__ __forceinline__ void run_tall_piece(Piece& piece, Queries& queries, RingPosition& at,
                                                 int& turn) {
    constexpr int kTeams = kConsumerWarps / kRowWarps;
    const Queries rows = queries;
    const PieceOutput done(args, piece);
    const int first_limit = piece.item.first_limit, last_limit = piece.item.last_limit;
    const int team = kTeams > 1 ? warp / kRowWarps : 0, end_tile = piece.end_tile;
    const int tile_shift = kTeams > 1 ? begin_turns(piece, turn) : 0;
    // Tiles are counted from the item's first, each as often as it comes.
    const int end = end_tile << tile_shift;
    int i = piece.at.tile << tile_shift;
    State state;
    begin_piece<kRowWarps>(state, piece, queries);
    bool k_is_there = false;  // of the tile at hand
    RingPosition held;        // the tile whose probabilities are in p
    int held_tile = -1;
    uint32_t p[kTileKeys / 16][4];
    while (i < end && turn % kTeams != team) pass_tile(at, i, turn);
    if (i < end) {
      run_tall_tile<false>(state, p, first_limit, i >> tile_shift, at, held, k_is_there);
      held = at, held_tile = i >> tile_shift;
      advance(at, i, turn);
    }
    while (i < end) {
      if (turn % kTeams != team) {
        k_is_there = false;
        pass_tile(at, i, turn);
        continue;
      }
      run_tall_tile<true>(state, p, first_limit, i >> tile_shift, at, held, k_is_there);
      held = at, held_tile = i >> tile_shift;
      advance(at, i, turn);
    }
    if (held_tile >= 0) finish_tall_tile(state, p, last_limit - held_tile * kTileKeys, held);
    // The team that has not the partial tile passes as many barriers as the one that has: the race
    // checker takes a warpgroup that passed fewer for one that has not met the other since.
    if (kTeams > 1 && held_tile + 1 != end_tile && last_limit < end_tile * kTileKeys) {
      meet_team(threadIdx.x < kTeamWarps * 32);
    }
    end_piece<kRowWarps>(state, done, rows, piece, queries);
  }

  // The product of the last tile with V, of which rows from `keys_left` on may hold anything.
  __device__ __forceinline__ void finish_tall_tile(State& state, uint32_t (&p)[kTileKeys / 16][4],
                                                   int keys_left, RingPosition held) {
    uint32_t v = ring.v(held.slot, kTileBytes<kHeadDim>);
    if (keys_left < kTileKeys) clear_values<kHeadDim>(v, keys_left);
    pin(state.out);
    pin(p);
    wgmma_fence();
    issue_values<kHeadDim>(state, p, v);
    wgmma_wait<0>();
    pin(state.out);
    pin(p);
    release_v(held.slot);
  }

  __device__ __forceinline__ void advance(RingPosition& at, int& i, int& turn) {
    at.advance(args.num_slots);
    ++i;
    ++turn;
  }
  __device__ __forceinline__ void pass_tile(RingPosition& at, int& i, int& turn) {
    skip_tile(at);
    release(at.slot);
    advance(at, i, turn);
  }

  // The tile's probabilities to p. With kHeld, those of tile `held`, which p has until then, are
  // multiplied with its V, which is released. K is released as soon as the scores are there.
  // A wait takes a while even where there is nothing to wait for: whether V and the next K are
  // there is asked well before they are needed.
  template <bool kHeld>
  __device__ __forceinline__ void run_tall_tile(State& state, uint32_t (&p)[kTileKeys / 16][4],
                                                int first_limit, int tile, RingPosition at,
                                                RingPosition held, bool& k_is_there) {
    float scores[kTileKeys / 8][4], factors[2];
    if (!k_is_there) ptx::barrier_wait(ring.k_full(at.slot), at.phase);
    wgmma_fence();
    issue_scores<kHeadDim>(state, scores, ring.k(at.slot, kTileBytes<kHeadDim>));
    if (kHeld) {
      wgmma_fence();
      issue_values<kHeadDim>(state, p, ring.v(held.slot, kTileBytes<kHeadDim>));
    }
    const bool v_is_there = ptx::barrier_test(ring.v_full(at.slot), at.phase);
    wgmma_wait<kHeld ? 1 : 0>();
    pin(scores);
    release_k(at.slot);
    if ((tile + 1) * kTileKeys > first_limit) {
      mask<kHeadDim, kTileKeys>(state, scores, tile * kTileKeys, lane);
    }
    bool rescales = advance_softmax(state, scores, args.scale_log2, factors);
    if (!v_is_there) ptx::barrier_wait(ring.v_full(at.slot), at.phase);
    RingPosition following = at;
    following.advance(args.num_slots);
    k_is_there = ptx::barrier_test(ring.k_full(following.slot), following.phase);
    if (kHeld) {
      wgmma_wait<0>();
      pin(p);
      release_v(held.slot);
    }
    pin(state.out);
    if (rescales) rescale(state, factors);
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step) {
      pack_step(p[step], scores[2 * step], scores[2 * step + 1]);
    }
  }
#else
  template <int kRowWarps>
  __device__ __forceinline__ void run_tall_piece(Piece& piece, Queries& queries, RingPosition& at,
                                                 int& turn) {
    run_piece<kRowWarps, kTileKeys>(piece, queries, at, turn);
  }
#endif
};

// ------------------------------------------------------------------------------------------ kernel

// kMayClaim: the schedule may leave pairs to be claimed. Without, code is shorter, and a launch that is
// mostly the fetching of code is faster.
template <int kHeadDim, bool kMayClaim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(AttentionArgs args, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map) {
  using Layout = SharedLayout<kHeadDim>;
  extern __shared__ unsigned char raw[];
  uint32_t raw_address = ptx::shared_address(raw);
  uint32_t padding = -raw_address % Layout::kAlignment;
  unsigned char* after_slots = raw + padding + args.num_slots * 2 * kTileBytes<kHeadDim>;
  float2* max_sum = reinterpret_cast<float2*>(after_slots + Layout::kSums +
                                              (kQueriesApart ? Layout::kQueries : 0));
  Ring ring = {raw_address + padding, ptx::shared_address(max_sum) + Layout::kMaxSum};
  int warp = ptx::of_warp(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
  __builtin_assume(warp >= 0 && warp < kThreads / 32);

  if (threadIdx.x == 0) {
#if defined(OPTIMUS_SM90)
    constexpr int kFills = 1;  // the thread that announces the bytes
    ptx::tensor_map_prefetch(&k_map);
    ptx::tensor_map_prefetch(&v_map);
#else
    constexpr int kFills = 32;  // every lane of the producer of K or V
#endif
#pragma unroll 1
    for (int slot = 0; slot < args.num_slots; ++slot) {
      ptx::barrier_init(ring.k_full(slot), kFills);
      ptx::barrier_init(ring.v_full(slot), kFills);
      ptx::barrier_init(ring.k_released(slot), kConsumerWarps);
      ptx::barrier_init(ring.v_released(slot), kConsumerWarps);
    }
    ptx::barrier_fence_init();
  }
  __syncthreads();

  // The schedule, and what it was made of, lay there before any kernel behind it started: a share, the
  // rows of its first piece and its pages are found while the kernel before this one runs.
  if (warp >= kConsumerWarps) {
    ptx::lower_registers<24>();
    if (warp < kConsumerWarps + kProducerWarps) {
      const Share share = load_past_l1(&args.ws.shares[blockIdx.x]);
      const bool is_v = warp > kConsumerWarps;
      const uint64_t policy = __ldcg(args.ws.kv_policy);
      Producer<kHeadDim, kMayClaim>{args, &k_map, &v_map, ring, lane, is_v, policy}.run(share);
    }
  } else {
    ptx::raise_registers<240>();
    const Share share = load_past_l1(&args.ws.shares[blockIdx.x]);
    const Output<kHeadDim> output = {reinterpret_cast<float*>(after_slots), max_sum, warp};
    if (threadIdx.x == 0) output.cut_pieces() = {{{share.earlier}, {share.later}}};
    Consumer<kHeadDim, kMayClaim>{args, ring, output, warp, lane}.run(share);
    merge_cut_pieces<kHeadDim>(args, output.cut_pieces());
  }
}

}  // namespace optimus::cuda::attention
