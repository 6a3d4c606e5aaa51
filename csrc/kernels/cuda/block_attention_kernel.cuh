// The attention kernel: one persistent CTA per share, one producer warp, eight consumer warps.
//
// The producer streams the share's tiles, K and V of kTileKeys keys each, through a ring of slots in
// shared memory: with bulk tensor copies on sm_90, with 16-byte asynchronous copies before. It runs
// ahead across piece boundaries, so loads never stop while consumers start or finish a piece.
//
// Slot layout, K and V alike: [head_dim / 64][kTileKeys][64] bf16, rows of 128 bytes whose 16-byte
// chunk c of row r sits at c ^ (r % 8) (the copy engine's 128-byte swizzle): ldmatrix reads it
// without bank conflicts.
//
// A consumer warp holds 16 packed rows. An item with fewer rows than 16 per warp is held by several
// warps (copies): `key_split` of them share a tile's keys, and with more copies left, teams of
// copies take tiles in turn. Every copy runs its own online softmax; at the end of a piece the
// copies' sums are merged through shared memory in fixed order.
#pragma once

#include "kernels/cuda/block_attention.h"
#include "kernels/cuda/block_attention_ptx.cuh"
#include "kernels/cuda/launch.cuh"

namespace optimus::cuda::attention {

constexpr int kConsumerWarps = 8;
constexpr int kThreads = (kConsumerWarps + 4) * 32;  // whole warpgroups; one producer warp works
constexpr int kMaxSlots = 10;
constexpr int kConsumerBarrier = 1;

struct AttentionArgs {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k_pages;
  const __nv_bfloat16* v_pages;
  const int32_t* kv_limits;
  const int32_t* page_table;
  __nv_bfloat16* out;
  int num_q_heads, num_kv_heads, group;
  int page_shift;  // log2 of the page size
  int page_table_stride, num_slots;
  float scale_log2;  // softmax scale * log2 e
  Workspace ws;
};

template <int kHeadDim>
constexpr int kTileBytes = kTileKeys * kHeadDim * 2;  // of K or of V

// Shared memory: slots (K then V each), the copies' sums, (max, sum) of each copy's rows, barriers.
template <int kHeadDim>
struct SharedLayout {
  static constexpr int kSums = kConsumerWarps * 16 * kHeadDim * 4;
  static constexpr int kMaxSum = kConsumerWarps * 16 * 8;
  static constexpr int kBarriers = 3 * kMaxSlots * 8;
  static constexpr int kAlignment = 1024;  // of the swizzle pattern

  static int bytes(int num_slots) {
    return kAlignment + num_slots * 2 * kTileBytes<kHeadDim> + kSums + kMaxSum + kBarriers;
  }
};

// Position in the ring. The producer waits for a slot's release, consumers for its data.
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
  __device__ uint32_t k_full(int slot) const { return barriers + slot * 8; }
  __device__ uint32_t v_full(int slot) const { return barriers + (kMaxSlots + slot) * 8; }
  __device__ uint32_t released(int slot) const { return barriers + (2 * kMaxSlots + slot) * 8; }
};

// The pieces of one share, in order.
struct Piece {
  Item item;
  int item_idx, head;
  int first_tile, end_tile;  // of the (item, head)
  int left;                  // tiles of the share, from this piece on

  __device__ explicit Piece(const Share& share)
      : item(share.item),
        item_idx(share.item_idx),
        head(share.head),
        first_tile(share.first_tile),
        left(share.num_tiles) {
    end_tile = min(item.num_tiles, first_tile + left);
  }
  __device__ bool valid() const { return left > 0; }
  __device__ bool whole() const { return first_tile == 0 && end_tile == item.num_tiles; }
  __device__ void next(const AttentionArgs& args) {
    left -= end_tile - first_tile;
    first_tile = 0;
    if (++head == args.num_kv_heads) {
      head = 0;
      ++item_idx;
      if (left > 0) item = args.ws.items[item_idx];
    }
    end_tile = min(item.num_tiles, left);
  }
};

// ---------------------------------------------------------------------------------------- producer

template <int kHeadDim>
struct Producer {
  const AttentionArgs& args;
  const CUtensorMap *k_map, *v_map;
  Ring ring;
  int lane;

  __device__ void run(const Share& share) const {
    RingPosition at;
    for (Piece piece(share); piece.valid(); piece.next(args)) stream(piece, at);
  }

  // Lane i holds page first_page + i of the sequence: a refill every 32 pages, always at the first
  // page of a tile.
  __device__ void stream(const Piece& piece, RingPosition& at) const {
    const int32_t* pages = args.page_table + piece.item.seq * args.page_table_stride;
    int last_page = (piece.item.last_limit - 1) >> args.page_shift;
    int first_page = -32, page = 0;
    for (int tile = piece.first_tile; tile < piece.end_tile; ++tile) {
      int key = tile * kTileKeys;
      int tile_page = key >> args.page_shift;
      if (tile_page >= first_page + 32) {
        first_page = tile_page;
        page = pages[min(first_page + lane, last_page)];
      }
      ptx::barrier_wait(ring.released(at.slot), at.phase ^ 1);
      int keys = min(kTileKeys, piece.item.last_limit - key);
      copy_tile(args.k_pages, k_map, ring.k_full(at.slot), slot_address(at.slot, 0), piece.head,
                key, keys, first_page, page);
      copy_tile(args.v_pages, v_map, ring.v_full(at.slot), slot_address(at.slot, 1), piece.head,
                key, keys, first_page, page);
      at.advance(args.num_slots);
    }
  }

  __device__ uint32_t slot_address(int slot, int is_v) const {
    return ring.data + (2 * slot + is_v) * kTileBytes<kHeadDim>;
  }

#if defined(OPTIMUS_SM90)
  // One box of 64 dimensions per lane; pages past the last key are not read.
  __device__ void copy_tile(const __nv_bfloat16*, const CUtensorMap* map, uint32_t barrier,
                            uint32_t to, int head, int key, int keys, int first_page,
                            int page) const {
    constexpr int kColumns = kHeadDim / 64;
    int part_keys = min(kTileKeys, 1 << args.page_shift);
    int part = lane / kColumns, column = lane % kColumns;
    int parts = (keys + part_keys - 1) / part_keys;
    int part_key = key + part * part_keys;
    int source = (part_key >> args.page_shift) - first_page;
    int part_page = __shfl_sync(~0u, page, source & 31);
    if (lane == 0) ptx::barrier_expect_bytes(barrier, parts * part_keys * kHeadDim * 2);
    __syncwarp();
    if (part < parts) {
      int row = ((part_page * args.num_kv_heads + head) << args.page_shift) +
                (part_key & ((1 << args.page_shift) - 1));
      ptx::tensor_copy(to + column * (kTileKeys * 128) + part * part_keys * 128, map, column * 64,
                       row, barrier);
    }
  }
#else
  // 16 bytes per lane and copy; keys past the last one become zeros.
  __device__ void copy_tile(const __nv_bfloat16* pages, const CUtensorMap*, uint32_t barrier,
                            uint32_t to, int head, int key, int keys, int first_page,
                            int page) const {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes per key
    constexpr int kKeysPerCopy = 32 / kChunks;
    int chunk = lane % kChunks;
    for (int first = 0; first < kTileKeys; first += kKeysPerCopy) {
      int row = first + lane / kChunks;
      int from_key = key + min(row, keys - 1);
      int from_page = __shfl_sync(~0u, page, ((from_key >> args.page_shift) - first_page) & 31);
      int entry = from_key & ((1 << args.page_shift) - 1);
      size_t from =
          ((static_cast<size_t>(from_page) * args.num_kv_heads + head) << args.page_shift) + entry;
      uint32_t address =
          to + chunk / 8 * (kTileKeys * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
      ptx::copy_16(address, pages + from * kHeadDim + chunk * 8, row < keys);
    }
    ptx::copies_arrive(barrier);
  }
#endif
};

// --------------------------------------------------------------------------------------- consumers

// How the eight warps are laid over an item.
struct WarpLayout {
  int row_warps;  // warps side by side over the packed rows, 16 each
  int key_split;  // warps side by side over a tile's keys
  __device__ int team_warps() const { return row_warps * key_split; }
  __device__ int num_teams() const { return kConsumerWarps / team_warps(); }
};

// One warp's 16 packed rows of a piece: the thread has rows lane / 4 and lane / 4 + 8, and of each
// 8-wide group of columns the two at 2 * (lane % 4) (the mma fragment layout).
template <int kHeadDim>
struct WarpState {
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  float max[2], sum[2];  // max of raw scores; sum is this thread's part
  int limits[2];

  __device__ void start(const AttentionArgs& args, const Piece& piece, int first_packed, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int packed = first_packed + lane / 4 + half * 8;
      bool valid = packed < piece.item.packed_count;
      packed = piece.item.packed_begin + (valid ? packed : 0);
      int row = piece.item.row_begin + packed / args.group;
      limits[half] = valid ? args.kv_limits[row] : piece.item.last_limit;
      size_t q_head = static_cast<size_t>(row) * args.num_q_heads + piece.head * args.group +
                      packed % args.group;
      const uint32_t* from =
          reinterpret_cast<const uint32_t*>(args.q + q_head * kHeadDim) + lane % 4;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        q[i][half] = valid ? from[i * 8] : 0;
        q[i][half + 2] = valid ? from[i * 8 + 4] : 0;
      }
      max[half] = -INFINITY;
      sum[half] = 0;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
    }
  }
};

// scores[16 x kKeys] = q k^T for the keys [first_row, first_row + kKeys) of the tile at `k`.
template <int kHeadDim, int kKeys>
__device__ __forceinline__ void score(const WarpState<kHeadDim>& state,
                                      float (&scores)[kKeys / 8][4], uint32_t k, int first_row,
                                      int lane) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = 0;
  }
  int row = first_row + lane % 8 + lane / 16 * 8;
  uint32_t base = k + row * 128;
  int chunk_bit = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    int chunk = step % 4 * 2 + chunk_bit;
    uint32_t address = base + step / 4 * (kTileKeys * 128) + (chunk ^ (row % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      uint32_t b[4];
      ptx::load_matrix_x4(b, address + i * 16 * 128);
      ptx::mma_16x8x16(scores[2 * i], state.q[step], b[0], b[1]);
      ptx::mma_16x8x16(scores[2 * i + 1], state.q[step], b[2], b[3]);
    }
  }
}

template <int kHeadDim, int kKeys>
__device__ __forceinline__ void mask(const WarpState<kHeadDim>& state,
                                     float (&scores)[kKeys / 8][4], int first_key, int lane) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int key = first_key + i * 8 + lane % 4 * 2 + j % 2;
      if (key >= state.limits[j / 2]) scores[i][j] = -INFINITY;
    }
  }
}

// Scores become probabilities relative to the new running max; sums follow.
template <int kHeadDim, int kKeys>
__device__ __forceinline__ void update_softmax(WarpState<kHeadDim>& state,
                                               float (&scores)[kKeys / 8][4], float scale_log2) {
  float old_max[2] = {state.max[0], state.max[1]};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = state.max[half];
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      largest = fmaxf(largest, fmaxf(scores[i][2 * half], scores[i][2 * half + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    state.max[half] = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  }
  bool moved = state.max[0] != old_max[0] || state.max[1] != old_max[1];
  if (__any_sync(~0u, moved)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float base = state.max[half] == -INFINITY ? 0.0f : state.max[half];
      float factor = ptx::exp2_approx((old_max[half] - base) * scale_log2);
      state.sum[half] *= factor;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        state.out[i][2 * half] *= factor;
        state.out[i][2 * half + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float base = state.max[half] == -INFINITY ? 0.0f : state.max[half] * scale_log2;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int j = 2 * half; j < 2 * half + 2; ++j) {
        scores[i][j] = ptx::exp2_approx(scores[i][j] * scale_log2 - base);
        state.sum[half] += scores[i][j];
      }
    }
  }
}

// out += p v. `keys_left`, counted from first_row: rows of V from there on may hold anything, even
// NaN, which a zero probability would not cancel; they are replaced by zeros.
template <int kHeadDim, int kKeys, bool kMasked>
__device__ __forceinline__ void accumulate(WarpState<kHeadDim>& state,
                                           const float (&p)[kKeys / 8][4], uint32_t v,
                                           int first_row, int keys_left, int lane) {
  int row = first_row + lane % 8 + lane / 8 % 2 * 8;
  uint32_t base = v + row * 128;
  int chunk_bit = lane / 16;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t a[4] = {ptx::pack_bf16(p[2 * step][0], p[2 * step][1]),
                     ptx::pack_bf16(p[2 * step][2], p[2 * step][3]),
                     ptx::pack_bf16(p[2 * step + 1][0], p[2 * step + 1][1]),
                     ptx::pack_bf16(p[2 * step + 1][2], p[2 * step + 1][3])};
    uint32_t keep[2] = {~0u, ~0u};
    if (kMasked) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int key = step * 16 + half * 8 + lane % 4 * 2;
        keep[half] = (key < keys_left ? 0xffffu : 0) | (key + 1 < keys_left ? 0xffff0000u : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      int chunk = i % 4 * 2 + chunk_bit;
      uint32_t b[4];
      ptx::load_matrix_transposed_x4(
          b, base + step * 16 * 128 + i / 4 * (kTileKeys * 128) + (chunk ^ (row % 8)) * 16);
      if (kMasked) {
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] &= keep[j % 2];
      }
      ptx::mma_16x8x16(state.out[2 * i], a, b[0], b[1]);
      ptx::mma_16x8x16(state.out[2 * i + 1], a, b[2], b[3]);
    }
  }
}

template <int kHeadDim>
struct Consumer {
  const AttentionArgs& args;
  Ring ring;
  float* sums;      // [warp][16][head_dim], 8-float group g of row r at g ^ (r % 8)
  float2* max_sum;  // [warp][16]
  int warp, lane;

  __device__ void run(const Share& share) {
    RingPosition at;
    int turn = 0;
    for (Piece piece(share); piece.valid(); piece.next(args)) {
      int packed = piece.item.packed_count;
      if (packed <= 16) {
        run_piece<16>(piece, {1, 4}, at, turn);
      } else if (packed <= 32) {
        run_piece<32>(piece, {2, 2}, at, turn);
      } else {
        run_piece<64>(piece, {packed <= 64 ? 4 : 8, 1}, at, turn);
      }
    }
  }

  // kKeys = kTileKeys / layout.key_split.
  template <int kKeys>
  __device__ __forceinline__ void run_piece(const Piece& piece, WarpLayout layout, RingPosition& at,
                                            int& turn) {
    WarpState<kHeadDim> state;
    int row_warp = warp % layout.row_warps;
    state.start(args, piece, row_warp * 16, lane);
    int team = warp / layout.team_warps(), num_teams = layout.num_teams();
    int first_row = warp / layout.row_warps % layout.key_split * kKeys;
    for (int tile = piece.first_tile; tile < piece.end_tile; ++tile) {
      if (turn++ % num_teams == team) {
        run_tile<kKeys>(state, piece, tile * kTileKeys, first_row, at);
      } else {
        // Following every phase keeps a warp from taking a slot's next fill for this one.
        ptx::barrier_wait(ring.k_full(at.slot), at.phase);
        ptx::barrier_wait(ring.v_full(at.slot), at.phase);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ring.released(at.slot));
      at.advance(args.num_slots);
    }
    finish_piece(state, piece, layout.row_warps);
  }

  template <int kKeys>
  __device__ __forceinline__ void run_tile(WarpState<kHeadDim>& state, const Piece& piece,
                                           int tile_key, int first_row, RingPosition at) {
    uint32_t k = ring.data + 2 * at.slot * kTileBytes<kHeadDim>;
    uint32_t v = k + kTileBytes<kHeadDim>;
    float scores[kKeys / 8][4];
    ptx::barrier_wait(ring.k_full(at.slot), at.phase);
    score<kHeadDim, kKeys>(state, scores, k, first_row, lane);
    if (tile_key + kTileKeys > piece.item.first_limit) {
      mask<kHeadDim, kKeys>(state, scores, tile_key + first_row, lane);
    }
    update_softmax<kHeadDim, kKeys>(state, scores, args.scale_log2);
    ptx::barrier_wait(ring.v_full(at.slot), at.phase);
    int keys_left = piece.item.last_limit - tile_key - first_row;
    if (keys_left < kKeys) {
      accumulate<kHeadDim, kKeys, true>(state, scores, v, first_row, keys_left, lane);
    } else {
      accumulate<kHeadDim, kKeys, false>(state, scores, v, first_row, keys_left, lane);
    }
  }

  // Merges the copies and writes the piece's rows: to the output when it is whole, else to its
  // partial slot. The copies of a row divide the rows of its 16-row group among them.
  __device__ void finish_piece(WarpState<kHeadDim>& state, const Piece& piece, int row_warps) {
    int copies = kConsumerWarps / row_warps;
    if (copies > 1) ptx::named_barrier(kConsumerBarrier, kConsumerWarps * 32);
    store_sums(state);
    if (copies > 1) {
      ptx::named_barrier(kConsumerBarrier, kConsumerWarps * 32);
    } else {
      __syncwarp();
    }
    constexpr int kLanesPerRow = kHeadDim / 4;
    constexpr int kRowsPerPass = 32 / kLanesPerRow;
    int row_warp = warp % row_warps, copy = warp / row_warps;
    int column = lane % kLanesPerRow * 4;
    for (int row = copy * kRowsPerPass + lane / kLanesPerRow; row < 16;
         row += copies * kRowsPerPass) {
      int packed = row_warp * 16 + row;
      if (packed < piece.item.packed_count) {
        merge_row(piece, packed, row, row_warp, row_warps, copies, column);
      }
    }
    if (copies == 1) __syncwarp();
  }

  __device__ void store_sums(WarpState<kHeadDim>& state) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      int row = lane / 4 + half * 8;
      if (lane % 4 == 0) max_sum[warp * 16 + row] = {state.max[half] * args.scale_log2, sum};
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        float2* to = reinterpret_cast<float2*>(sums + (warp * 16 + row) * kHeadDim +
                                               (i ^ (row % 8)) * 8 + lane % 4 * 2);
        *to = {state.out[i][2 * half], state.out[i][2 * half + 1]};
      }
    }
  }

  __device__ __forceinline__ void merge_row(const Piece& piece, int packed, int row, int row_warp,
                                            int row_warps, int copies, int column) {
    float max = -INFINITY;
    for (int c = 0; c < copies; ++c) {
      max = fmaxf(max, max_sum[(c * row_warps + row_warp) * 16 + row].x);
    }
    float base = max == -INFINITY ? 0.0f : max, sum = 0;
    float4 total = {0, 0, 0, 0};
    for (int c = 0; c < copies; ++c) {
      int at = (c * row_warps + row_warp) * 16 + row;
      float2 ms = max_sum[at];
      float factor = ptx::exp2_approx(ms.x - base);
      float4 part = *reinterpret_cast<const float4*>(sums + at * kHeadDim +
                                                     ((column / 8) ^ (row % 8)) * 8 + column % 8);
      sum += factor * ms.y;
      total.x += factor * part.x;
      total.y += factor * part.y;
      total.z += factor * part.z;
      total.w += factor * part.w;
    }
    if (piece.whole()) {
      store_out(piece, packed, column, total, 1.0f / sum);
    } else {
      int slot = blockIdx.x * 2 + (piece.first_tile == 0 ? 1 : 0);
      size_t to = static_cast<size_t>(slot) * args.ws.partial_rows + packed;
      if (column == 0) args.ws.partial_ml[to] = {max, sum};
      *reinterpret_cast<float4*>(args.ws.partial_out + to * kHeadDim + column) = total;
    }
  }

  __device__ __forceinline__ void store_out(const Piece& piece, int packed, int column,
                                            float4 total, float factor) {
    packed += piece.item.packed_begin;
    size_t head =
        static_cast<size_t>(piece.item.row_begin + packed / args.group) * args.num_q_heads +
        piece.head * args.group + packed % args.group;
    *reinterpret_cast<uint2*>(args.out + head * kHeadDim + column) = {
        ptx::pack_bf16(total.x * factor, total.y * factor),
        ptx::pack_bf16(total.z * factor, total.w * factor)};
  }
};

// ------------------------------------------------------------------------------------------ kernel

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(AttentionArgs args, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map) {
  using Layout = SharedLayout<kHeadDim>;
  extern __shared__ unsigned char raw[];
  uint32_t raw_address = ptx::shared_address(raw);
  uint32_t padding = -raw_address % Layout::kAlignment;
  unsigned char* after_slots = raw + padding + args.num_slots * 2 * kTileBytes<kHeadDim>;
  float* sums = reinterpret_cast<float*>(after_slots);
  float2* max_sum = reinterpret_cast<float2*>(after_slots + Layout::kSums);
  Ring ring = {raw_address + padding,
               ptx::shared_address(after_slots + Layout::kSums + Layout::kMaxSum)};
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
#if defined(OPTIMUS_SM90)
    constexpr int kFills = 1;  // the thread that announces the bytes
    ptx::tensor_map_prefetch(&k_map);
    ptx::tensor_map_prefetch(&v_map);
#else
    constexpr int kFills = 32;  // every lane of the producer
#endif
    for (int slot = 0; slot < args.num_slots; ++slot) {
      ptx::barrier_init(ring.k_full(slot), kFills);
      ptx::barrier_init(ring.v_full(slot), kFills);
      ptx::barrier_init(ring.released(slot), kConsumerWarps);
    }
    ptx::barrier_fence_init();
  }
  __syncthreads();
  wait_for_previous_kernel();

  if (warp >= kConsumerWarps) {
    ptx::lower_registers<24>();
    if (warp == kConsumerWarps) {
      const Share share = args.ws.shares[blockIdx.x];
      Producer<kHeadDim>{args, &k_map, &v_map, ring, lane}.run(share);
    }
  } else {
    ptx::raise_registers<240>();
    const Share share = args.ws.shares[blockIdx.x];
    Consumer<kHeadDim>{args, ring, sums, max_sum, warp, lane}.run(share);
  }
}

}  // namespace optimus::cuda::attention
