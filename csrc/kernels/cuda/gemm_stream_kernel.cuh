// The streaming gemm for few rows: out[rows, n] = x[rows, k] weight[n, k]^T at the speed at which the
// weight can be read.
//
// A tile is kTileN rows of the weight by all rows of x (padded to kTileRows). The weight is the M
// operand of wgmma, so few rows of x waste nothing. A CTA has a warpgroup for every 64 rows of its tile
// and two producer threads, which copy stages of the weight and of x to two rings in shared memory.
// Either the CTAs take whole tiles in turn, or the CTAs of a cluster share the k of one tile and add up
// their sums through distributed shared memory, in fixed order: results do not depend on timing.
//
// The weight does not depend on the kernel before this one. It is on its way before the wait for that
// kernel, as much as the ring holds: while a product ends and small kernels run, the weights of the
// next are being read. That takes most of an SM's shared memory; what is left is for the small kernels,
// which must be resident beside it. Memory that is kept too busy answers the small kernels late, so
// the ring fills with few copies at a time until it is this kernel's turn, and weights leave the L2
// cache first, not what is small and read again.
//
// Code that runs once is slow to fetch: what is behind the products is short loops.
#pragma once

#include "core/launch.cuh"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace optimus::cuda::stream {

struct Args {
  void* out;  // [rows, n] bf16, or fp32; with silu [rows, n / 2] bf16
  int rows, n;
  int splits;  // CTAs of a cluster, which share a tile; 1: the CTAs take tiles in turn
  // The stages that cover k, by the CTAs of a cluster, and the tiles that cover n, by the clusters: each
  // takes so many, the first `more` one more. The kernel divides nothing: that is much code.
  int chunks_each, more_chunks, tiles_each, more_tiles;
  // Groups of 8 rows, which the CTAs of a cluster add up: `rank`, rank + splits, ...
  int groups, groups_each, more_groups;
  int num_slots;         // stages of the weight in shared memory
  int num_x_slots;       // stages of x; at most num_slots
  int num_early_copies;  // of the weight under way at a time, before the kernel's turn
  int num_copies;        // and after
  bool out_is_float;
  bool silu;  // rows of the weight are 8 gates, 8 ups, ...: out [rows, n / 2] is the activation

  // Sums go through shared memory; then a CTA has one tile.
  __host__ __device__ bool adds_up() const { return splits > 1 || out_is_float; }
  __host__ __device__ int owned_groups(int rank) const {
    return groups_each + (rank < more_groups);
  }
};

template <int kTileN, int kTileRows>
struct Tile {
  static constexpr int kStageColumns = kTileN == 64 ? 128 : 64;  // of k
  static constexpr int kBoxes = kStageColumns / 64;
  static constexpr int kWeightBoxBytes = kTileN * 128, kXBoxBytes = kTileRows * 128;
  static constexpr int kWeightBytes = kBoxes * kWeightBoxBytes, kXBytes = kBoxes * kXBoxBytes;
  static constexpr int kConsumers = kTileN * 2, kThreads = kConsumers + 64;
  // A bound on registers: up to 128 rows of x it leaves some for the small kernels that share the SM.
  static constexpr int kBound =
      kTileN == 192 && kTileRows > 64 && kTileRows <= 128 ? 544 : kThreads;
  static constexpr int kGroups = kTileRows / 8;  // a thread's sums are in groups of 8 rows of x
  static constexpr int kGroupBytes = kConsumers * 16;   // a group's sums in fp32
  static constexpr int kOutRowBytes = kTileN * 2 + 16;  // on the way out; padded against conflicts
  // Over the rings at the end: the sums of the row groups a CTA owns, of all splits if there are sums
  // to add up, and its rows on the way out.
  static constexpr int end_bytes(int splits, int groups_each) {
    return groups_each * (splits * kGroupBytes + 8 * kOutRowBytes);
  }
};

// In shared memory, from a multiple of 1024: stages of the weight, stages of x, barriers.
struct RingShape {
  int weight_bytes, x_bytes, num_slots, num_x_slots;

  __host__ __device__ int data_bytes() const {
    return num_slots * weight_bytes + num_x_slots * x_bytes;
  }
  __host__ __device__ int num_barriers() const { return 2 * num_slots + num_x_slots + 2; }
  __host__ __device__ int bytes() const { return data_bytes() + num_barriers() * 8; }
};

#if defined(OPTIMUS_WGMMA)

struct Ring : RingShape {
  uint32_t data;

  __device__ uint32_t weight(int slot) const { return data + slot * weight_bytes; }
  __device__ uint32_t x(int slot) const { return weight(num_slots) + slot * x_bytes; }
  __device__ uint32_t barrier(int i) const { return data + data_bytes() + i * 8; }
  __device__ uint32_t weight_full(int slot) const { return barrier(slot); }
  // By the weight's slot, also for the stage of x that went with it.
  __device__ uint32_t released(int slot) const { return barrier(num_slots + slot); }
  __device__ uint32_t x_full(int slot) const { return barrier(2 * num_slots + slot); }
  __device__ uint32_t received() const { return barrier(2 * num_slots + num_x_slots); }
  __device__ uint32_t turn() const { return barrier(2 * num_slots + num_x_slots + 1); }
};

// Where in a ring of `slots` one is.
struct Position {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

// What a CTA works on: chunks [first_chunk, first_chunk + chunks) of each of its tiles. Grid: (splits,
// clusters).
struct Share {
  int rank, first_tile, tile_step, tiles, first_chunk, chunks;

  __device__ explicit Share(const Args& args) {
    rank = blockIdx.x;
    first_tile = blockIdx.y;
    tile_step = gridDim.y;
    tiles = args.tiles_each + (first_tile < args.more_tiles);
    first_chunk = rank * args.chunks_each + min(rank, args.more_chunks);
    chunks = args.chunks_each + (rank < args.more_chunks);
  }
};

// ---------------------------------------------------------------------------------------- producers

// Two threads of different warps: one copies the weight, one x.
template <int kTileN, int kTileRows>
struct Producer {
  using Shape = Tile<kTileN, kTileRows>;

  const Args& args;
  const CUtensorMap* map;
  const Ring& ring;
  const Share& share;

  struct Stage {
    int tile, chunk;
    Position at;
  };
  __device__ __forceinline__ Stage first() const {
    return {share.first_tile, share.first_chunk, Position()};
  }
  __device__ __forceinline__ void next(Stage& stage, int slots) const {
    if (++stage.chunk == share.first_chunk + share.chunks) {
      stage.chunk = share.first_chunk, stage.tile += share.tile_step;
    }
    stage.at.advance(slots);
  }

  __device__ void copy_weight() const {
    const uint64_t policy = ptx::evict_first();
    const int stages = share.tiles * share.chunks;
    Stage stage = first();
    Position landed;
    int num_landed = 0;
    bool is_turn = false;
    for (int i = 0; i < stages; ++i, next(stage, ring.num_slots)) {
      is_turn = is_turn || ptx::barrier_test(ring.turn(), 0);
      const int copies = is_turn ? args.num_copies : args.num_early_copies;
      for (; i - num_landed >= copies; ++num_landed) {
        ptx::barrier_wait(ring.weight_full(landed.slot), landed.phase);
        landed.advance(ring.num_slots);
      }
      if (i >= ring.num_slots) {
        ptx::barrier_wait(ring.released(stage.at.slot), stage.at.phase ^ 1);
      }
      const uint32_t full = ring.weight_full(stage.at.slot), to = ring.weight(stage.at.slot);
      ptx::barrier_expect_bytes(full, Shape::kWeightBytes);
#pragma unroll
      for (int box = 0; box < Shape::kBoxes; ++box) {
        ptx::tensor_copy(to + box * Shape::kWeightBoxBytes, map,
                         stage.chunk * Shape::kStageColumns + box * 64, stage.tile * kTileN, full,
                         policy);
      }
    }
  }

  __device__ void copy_x() const {
    const int stages = share.tiles * share.chunks;
    Stage stage = first();
    Position released;
    for (int i = 0; i < stages; ++i, next(stage, ring.num_x_slots)) {
      if (i >= ring.num_x_slots) {
        ptx::barrier_wait(ring.released(released.slot), released.phase);
        released.advance(ring.num_slots);
      }
      const uint32_t full = ring.x_full(stage.at.slot), to = ring.x(stage.at.slot);
      ptx::barrier_expect_bytes(full, Shape::kXBytes);
#pragma unroll
      for (int box = 0; box < Shape::kBoxes; ++box) {
        ptx::tensor_copy(to + box * Shape::kXBoxBytes, map,
                         stage.chunk * Shape::kStageColumns + box * 64, 0, full);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------- consumer

template <int kTileN, int kTileRows>
struct Consumer {
  using Shape = Tile<kTileN, kTileRows>;
  static constexpr int kGroups = Shape::kGroups;
  using Sums = float[kGroups][4];

  const Args& args;
  const Ring& ring;
  const Share& share;
  int warp, lane;

  __device__ void run() const {
    Position at, x_at;
    for (int i = 0, tile = share.first_tile; i < share.tiles; ++i, tile += share.tile_step) {
      Sums sums;
      multiply(sums, at, x_at);
      if (args.adds_up()) {
        add_up(sums, tile);
      } else if (i + 1 < share.tiles) {
        store(sums, tile);
      } else {
        const uint32_t staged = ptx::keep(ring.data);
        meet();  // the rings are free
#pragma unroll
        for (int group = 0; group < kGroups; ++group) stage(staged, group, sums[group]);
        store_staged(staged, tile, args.groups, 0, 1);
      }
    }
  }

  // The products of one tile.
  __device__ __forceinline__ void multiply(Sums& sums, Position& at, Position& x_at) const {
    const int warpgroup = warp / 4;
    int held = 0;
    for (int chunk = 0; chunk < share.chunks; ++chunk) {
      ptx::barrier_wait(ring.weight_full(at.slot), at.phase);
      ptx::barrier_wait(ring.x_full(x_at.slot), x_at.phase);
      const uint32_t weight = ring.weight(at.slot) + warpgroup * (64 * 128), x = ring.x(x_at.slot);
      const uint64_t a = operand(weight, 16, 1024), b = operand(x, 16, 1024);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Shape::kStageColumns / 16; ++step) {
        const int box = step / 4, within = step % 4 * 32;
        wgmma(sums, ahead(a, box * Shape::kWeightBoxBytes + within),
              ahead(b, box * Shape::kXBoxBytes + within), chunk > 0 || step > 0);
      }
      wgmma_commit();
      if (chunk > 0) {
        wgmma_wait<1>();
        release(held);
      }
      held = at.slot;
      at.advance(ring.num_slots);
      x_at.advance(ring.num_x_slots);
    }
    wgmma_wait<0>();
    pin(sums);
    release(held);
  }

  __device__ __forceinline__ void release(int slot) const {
    if (lane == 0) ptx::barrier_arrive(ring.released(slot));
  }

  // All consumers of the CTA.
  __device__ __forceinline__ void meet() const { ptx::named_barrier(1, Shape::kConsumers); }

  // Straight to memory while the rings fill for the next tile. Registers have no index, so the sums
  // move down to where the loop takes them: unrolled, this would be most of the kernel's code.
  __device__ __forceinline__ void store(Sums& sums, int tile) const {
#pragma unroll 1
    for (int group = 0; group < args.groups; ++group) {
      store(tile, group, sums[0]);
#pragma unroll
      for (int i = 1; i < kGroups; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i - 1][j] = sums[i][j];
      }
    }
  }
  // 16 columns of out for the rows of a group, or 8 activations.
  __device__ __forceinline__ void store(int tile, int group, const float (&sums)[4]) const {
    // Transposed in registers, so that a thread has neighbours along n.
    const uint32_t low = ptx::transpose(ptx::pack_bf16(sums[0], sums[1]));
    const uint32_t high = ptx::transpose(ptx::pack_bf16(sums[2], sums[3]));
    const int row = group * 8 + lane / 4, column = tile * kTileN + warp * 16 + lane % 4 * 2;
    if (row >= args.rows || column >= args.n) return;
    if (args.silu) {
      store(row, args.n / 2, (tile * kTileN + warp * 16) / 2 + lane % 4 * 2, activate(low, high));
      return;
    }
    store(row, args.n, column, low);
    if (column + 8 < args.n) store(row, args.n, column + 8, high);
  }
  template <class T>
  __device__ __forceinline__ void store(int row, int columns, int column, const T& values) const {
    *reinterpret_cast<T*>(static_cast<__nv_bfloat16*>(args.out) +
                          static_cast<size_t>(row) * columns + column) = values;
  }
  __device__ __forceinline__ void store_float(int tile, int group, const float (&sums)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = group * 8 + lane % 4 * 2 + i % 2;
      const int column = tile * kTileN + warp * 16 + lane / 4 + i / 2 * 8;
      if (row < args.rows && column < args.n) {
        static_cast<float*>(args.out)[static_cast<size_t>(row) * args.n + column] = sums[i];
      }
    }
  }

  // In two steps: to shared memory, [row][kTileN], then in rows of the tile's width. Of the groups in
  // shared memory, group i is group first + i * step of out. Gates and ups are rounded on the way, as
  // they are without the activation in the product, and are activated in the loop of the second step:
  // in the first, which is unrolled, they would be most of its code.
  __device__ __forceinline__ void stage(uint32_t to, int group, const float (&sums)[4]) const {
    ptx::store_transposed_x2(
        to + (group * 8 + lane % 8) * Shape::kOutRowBytes + (warp * 16 + lane / 8 % 2 * 8) * 2,
        ptx::pack_bf16(sums[0], sums[1]), ptx::pack_bf16(sums[2], sums[3]));
  }
  // A thread takes two chunks of 16 bytes of a row: gates and their ups, or what is in either half of
  // the tile, so that neighbours store neighbours.
  __device__ __forceinline__ void store_staged(uint32_t from, int tile, int groups, int first,
                                               int step) const {
    constexpr int kPairs = kTileN / 16, kRows = Shape::kConsumers / kPairs;
    const int thread = warp * 32 + lane, pair = thread % kPairs;
    const uint32_t low_at = from + pair * (args.silu ? 32 : 16);
    const uint32_t to_high = args.silu ? 16 : kTileN;
    const int columns = args.silu ? args.n / 2 : args.n;
    const int column = tile * (args.silu ? kTileN / 2 : kTileN) + pair * 8;
    meet();
#pragma unroll 1
    for (int row = thread / kPairs; row < groups * 8; row += kRows) {
      const int out_row = (first + row / 8 * step) * 8 + row % 8;
      if (out_row >= args.rows || column >= columns) break;
      uint4 low, high;
      ptx::load_shared(low, low_at + row * Shape::kOutRowBytes);
      ptx::load_shared(high, low_at + row * Shape::kOutRowBytes + to_high);
      if (args.silu) {
        low = {activate(low.x, high.x), activate(low.y, high.y), activate(low.z, high.z),
               activate(low.w, high.w)};
      } else if (column + kTileN / 2 < columns) {
        store(out_row, columns, column + kTileN / 2, high);
      }
      store(out_row, columns, column, low);
    }
  }

  // Adds the cluster's sums: a CTA gets the sums of its row groups from all, over its rings, as
  // [rank of the sender][own group][thread]: a thread adds up what its twins sent.
  __device__ __forceinline__ void add_up(const Sums& sums, int tile) const {
    const int splits = args.splits, rank = share.rank, owned = args.owned_groups(rank);
    const int most_owned = args.owned_groups(0);
    const uint32_t mine = (warp * 32 + lane) * 16;
    ptx::cluster_arrive();
    ptx::cluster_wait();  // all rings are free
    int owner = 0, place = rank * most_owned;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group < args.groups) {
        const uint32_t at = mine + place * Shape::kGroupBytes;
        if (owner == rank) {
          ptx::store_shared(ring.data + at, sums[group]);
        } else {
          const uint32_t there = ptx::cluster_address(ring.data, owner);
          ptx::cluster_store(there + at, sums[group], there + (ring.received() - ring.data));
        }
      }
      if (++owner == splits) owner = 0, ++place;
    }
    if (owned == 0) return;
    ptx::cluster_barrier_wait(ring.received(), 0);
    const uint32_t staged = ring.data + splits * most_owned * Shape::kGroupBytes;
#pragma unroll 1
    for (int group = 0; group < owned; ++group) {
      float total[4] = {};
#pragma unroll 1
      for (int sender = 0; sender < splits; ++sender) {
        float part[4];
        ptx::load_shared(part,
                         ring.data + mine + (sender * most_owned + group) * Shape::kGroupBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += part[i];
      }
      if (args.out_is_float) {
        store_float(tile, rank + group * splits, total);
      } else {
        stage(staged, group, total);
      }
    }
    if (!args.out_is_float) store_staged(staged, tile, owned, rank, splits);
  }
};

#endif

// ------------------------------------------------------------------------------------------ kernel

template <int kTileN, int kTileRows>
__global__ void __launch_bounds__(Tile<kTileN, kTileRows>::kBound, 1)
    stream_kernel(Args args, const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap x_map) {
#if defined(OPTIMUS_WGMMA)
  using Shape = Tile<kTileN, kTileRows>;
  extern __shared__ unsigned char raw[];
  const Ring ring = {{Shape::kWeightBytes, Shape::kXBytes, args.num_slots, args.num_x_slots},
                     ptx::of_warp((ptx::shared_address(raw) + 1023) & ~1023u)};
  const Share share(args);
  const int warp = ptx::of_warp(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  constexpr int kWeightWarp = Shape::kConsumers / 32;

  if (warp == kWeightWarp && lane == 0) {
    ptx::tensor_map_prefetch(&weight_map);
    ptx::tensor_map_prefetch(&x_map);
#pragma unroll 1
    for (int i = 0; i < ring.num_barriers(); ++i) {
      const bool is_released = i >= ring.num_slots && i < 2 * ring.num_slots;
      ptx::barrier_init(ring.barrier(i), is_released ? kWeightWarp : 1);
    }
    ptx::barrier_fence_init();
    ptx::barrier_expect_bytes(
        ring.received(), (args.splits - 1) * args.owned_groups(share.rank) * Shape::kGroupBytes);
  }
  __syncthreads();
  if (warp >= kWeightWarp) {
    if (lane == 0) {
      if (warp == kWeightWarp) {
        Producer<kTileN, kTileRows>{args, &weight_map, ring, share}.copy_weight();
        cudaTriggerProgrammaticLaunchCompletion();
      } else {
        cudaGridDependencySynchronize();
        ptx::barrier_arrive(ring.turn());
        Producer<kTileN, kTileRows>{args, &x_map, ring, share}.copy_x();
      }
    }
    __syncwarp();
    if (args.adds_up()) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  } else {
    cudaGridDependencySynchronize();
    Consumer<kTileN, kTileRows>{args, ring, share, warp, lane}.run();
  }
#endif
}

}  // namespace optimus::cuda::stream
