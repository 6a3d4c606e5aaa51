// The producer warps of an attention CTA, one for K and one for V: each streams its half of the share's
// tiles through the ring, with bulk tensor copies on sm_90, with 16-byte asynchronous copies before.
// They run ahead across piece boundaries, so loads never stop while consumers start or finish a piece,
// and apart from each other, for K is done with long before V.
#pragma once

#include "core/launch.cuh"
#include "kernels/cuda/block_attention_share.cuh"

namespace optimus::cuda::attention {

template <int kHeadDim, bool kMayClaim>
struct Producer {
  const AttentionArgs& args;
  const CUtensorMap *k_map, *v_map;
  Ring ring;
  int lane;
  bool is_v;
  uint64_t policy;

  // Lane i holds page first + i of a sequence.
  struct Pages {
    int first, page;
  };

  __device__ void run(const Share& share) const {
    RingPosition at;
    Piece piece(args, share, kMayClaim);
    if (!piece.valid()) return;
    Pages pages = load_pages(piece, piece.at.tile);
    bool has_waited = false;
    if (piece.claims) init_claims();
    while (true) {
      if (!is_v && piece.next_is_claimed()) claim(share, piece.num_claims, has_waited);
      stream(piece, pages, at, has_waited);
      piece.next<kMayClaim>(args, ring);
      if (!piece.valid()) break;
      pages = load_pages(piece, piece.at.tile);
    }
    // The next kernel reads weights before its turn: not while there are keys to be asked for.
    if (is_v) let_next_kernel_start();
  }

  // Consumers see it with K's first tile, before the first claim.
  __device__ void init_claims() const {
    if (!is_v && lane == 0) {
#pragma unroll 1
      for (int i = 0; i < kClaims; ++i) ptx::barrier_init(ring.claim_made(i), 1);
    }
    ptx::named_barrier(kProducerBarrier, kProducerWarps * 32);
  }

  // By the K producer, before it streams the piece in front: the CTA's i-th claim. Every CTA claims until
  // it gets none. Who makes the layer's last claim clears the count for the next layer, which does not
  // claim before this kernel is done.
  __device__ void claim(const Share& share, int i, bool& has_waited) const {
    if (!has_waited) wait_until_previous_is_done();
    has_waited = true;
    if (lane == 0) {
      const uint32_t left = share.num_pairs - share.first_claimed;
      const uint32_t before = atomicAdd(args.ws.claims, 1u);
      if (before + 1 == left + gridDim.x) *args.ws.claims = 0;
      const int pair = before < left ? share.first_claimed + static_cast<int>(before) : kNoPair;
      ptx::store_shared(ring.claimed_pair(i), static_cast<uint32_t>(pair));
      ptx::barrier_arrive(ring.claim_made(i));
    }
    __syncwarp();
  }

  __device__ Pages load_pages(const Piece& piece, int tile) const {
    const int32_t* pages = args.page_table + piece.item.seq * args.page_table_stride;
    int last_page = (piece.item.last_limit - 1) >> args.page_shift;
    int first = tile * kTileKeys >> args.page_shift;
    return {first, __ldcg(pages + min(first + lane, last_page))};
  }

  // New pages every 32, always at the first page of a tile. Keys that this step writes are there when
  // the kernel before this one is done.
  __device__ void stream(const Piece& piece, Pages& pages, RingPosition& at,
                         bool& has_waited) const {
    for (int tile = piece.at.tile; tile < piece.end_tile; ++tile) {
      int key = tile * kTileKeys;
      if (!has_waited && key + kTileKeys > piece.item.num_old_keys) {
        wait_until_previous_is_done();
        has_waited = true;
      }
      if (key >> args.page_shift >= pages.first + 32) pages = load_pages(piece, tile);
      int keys = min(kTileKeys, piece.item.last_limit - key);
#pragma unroll 1
      for (int head = piece.head; head <= piece.head + piece.two_heads; ++head) {
        copy_tile(head, key, keys, pages, at);
        at.advance(args.num_slots);
      }
    }
  }

  __device__ __forceinline__ void copy_tile(int head, int key, int keys, const Pages& pages,
                                            RingPosition at) const {
    if (is_v) {
      ptx::barrier_wait(ring.v_released(at.slot), at.phase ^ 1);
      copy_tile(args.v_pages, v_map, ring.v_full(at.slot), ring.v(at.slot, kTileBytes<kHeadDim>),
                head, key, keys, pages.first, pages.page);
    } else {
      ptx::barrier_wait(ring.k_released(at.slot), at.phase ^ 1);
      copy_tile(args.k_pages, k_map, ring.k_full(at.slot), ring.k(at.slot, kTileBytes<kHeadDim>),
                head, key, keys, pages.first, pages.page);
    }
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
                       row, barrier, policy);
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

}  // namespace optimus::cuda::attention
