// First kernel of unmask: reads the logits once. A warp reduces one tile of one row after the other,
// each held in registers: the maximum first, then the sums relative to it, so nothing is rescaled.
// Its next tiles are on their way to shared memory meanwhile. Warps do not wait for each other.
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {
namespace {

// One CTA per SM, so that all SMs have equal shares wherever the CTAs go. More warps would be short of
// registers.
constexpr int kScanThreads = kScanWarps * kWarp;

// Two packed bf16.
__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) {
  return *reinterpret_cast<__nv_bfloat162*>(&bits);
}
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  __nv_bfloat162 result = __hmax2(as_pair(a), as_pair(b));
  return *reinterpret_cast<uint32_t*>(&result);
}
__device__ __forceinline__ uint32_t lowest_pair() {
  __nv_bfloat162 pair = __float2bfloat162_rn(kLowest);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ void fill_lowest(RawChunk<__nv_bfloat16>& raw) {
  raw.bits.x = raw.bits.y = raw.bits.z = raw.bits.w = lowest_pair();
}
__device__ __forceinline__ void fill_lowest(RawChunk<float>& raw) {
  raw.low = raw.high = make_float4(kLowest, kLowest, kLowest, kLowest);
}

// Raises small values to kLowest in place; returns the largest. Pairs are compared as pairs: to the end,
// since the tile is long.
__device__ __forceinline__ float raise_and_max(Tile<__nv_bfloat16>& tile) {
  const uint32_t lowest = lowest_pair();
  uint32_t largest = lowest;
#pragma unroll
  for (int i = 0; i < kTileChunkRows; ++i) {
    uint4& bits = tile.raw[i].bits;
    bits.x = max_pair(bits.x, lowest);
    bits.y = max_pair(bits.y, lowest);
    bits.z = max_pair(bits.z, lowest);
    bits.w = max_pair(bits.w, lowest);
    largest = max_pair(largest, max_pair(bits.x, bits.y));
    largest = max_pair(largest, max_pair(bits.z, bits.w));
  }
  float low, high;
  widen(largest, low, high);
  return fmaxf(low, high);
}
__device__ __forceinline__ float raise_and_max(Tile<float>& tile) {
  float largest = kLowest;
#pragma unroll
  for (int i = 0; i < kTileChunkRows; ++i) {
    float values[kChunk];
    unpack(tile.raw[i], values);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      values[j] = fmaxf(values[j], kLowest);
      largest = fmaxf(largest, values[j]);
    }
    pack(values, tile.raw[i]);
  }
  return largest;
}

// A place among all tiles, counted row by row.
struct Place {
  int row, index;

  // Whether that leaves the row.
  __device__ __forceinline__ bool advance(int num_tiles) {
    index += kScanWarps;
    const bool leaves = index >= num_tiles;
    for (; index >= num_tiles; index -= num_tiles) ++row;
    return leaves;
  }
};

// The tiles of a warp that are on their way to shared memory, each lane's own chunks: nobody else waits
// for them. It spares instructions, which the scan is short of: addresses grow from tile to tile, and
// only a row's last tile asks where the row ends.
template <class T>
struct Feed {
  static constexpr int kVectors = sizeof(RawChunk<T>) / sizeof(uint4);  // per chunk
  static constexpr int kTileVectors = kVectors * kTileChunks;
  static constexpr int kStageBytes = kTileVectors * sizeof(uint4);
  static constexpr int kBytes = 4096;  // of a warp: more would come later, and no faster
  static constexpr int kStages = kBytes / kStageBytes;

  const uint4* from;  // the lane's first chunk of the next tile to come
  int index;          // of that tile
  uint32_t ring, offset = 0;
  uint64_t policy = ptx::evict_first();  // read again only where sampling looks one up

  // `shared`: kBytes of the warp.
  __device__ __forceinline__ Feed(const LogitsRow<T, true>& row, int first, void* shared)
      : from(reinterpret_cast<const uint4*>(row.data) + Tile<T>::chunk(first, 0) * kVectors),
        index(first),
        ring(ptx::shared_address(shared) + threadIdx.x % kWarp * sizeof(uint4)) {}

  // Waits for the oldest tile.
  __device__ __forceinline__ void take(Tile<T>& tile) const {
    ptx::copies_wait_group<kStages - 1>();
#pragma unroll
    for (int i = 0; i < kTileChunkRows; ++i) {
      uint4* to = reinterpret_cast<uint4*>(&tile.raw[i]);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) ptx::load_shared(to[v], ring + offset + place(i, v));
    }
  }
  // In the place of the oldest tile; `wanted`: there is one more of the warp's.
  __device__ __forceinline__ void start_next(const UnmaskParams& p, int num_tiles, bool wanted) {
    if (wanted && (index + 1) * kTileColumns <= p.vocab_size) {
      copy();
    } else if (wanted) {
      copy_first((p.vocab_size + kChunk - 1) / kChunk - Tile<T>::chunk(index, 0));
    }
    ptx::copies_commit();
    offset = (offset + kStageBytes) % kBytes;
    from += kScanWarps * kTileVectors;
    const int64_t gap =
        int64_t(p.logits_stride) / kChunk * kVectors - int64_t(num_tiles) * kTileVectors;
    for (index += kScanWarps; index >= num_tiles; index -= num_tiles) from += gap;
  }

 private:
  // In bytes.
  __device__ __forceinline__ static constexpr int place(int i, int v) {
    return (v * kTileChunkRows + i) * kWarp * int(sizeof(uint4));
  }
  __device__ __forceinline__ void copy() const {
#pragma unroll
    for (int i = 0; i < kTileChunkRows; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        ptx::copy_16(ring + offset + place(i, v), from + i * kWarp * kVectors + v, policy);
      }
    }
  }
  // Of a row's last tile, as far as there is any: the row ends `left` chunks from the lane's first.
  __device__ __forceinline__ void copy_first(int left) const {
#pragma unroll 1
    for (int i = 0; i < kTileChunkRows; ++i) {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) {
        ptx::copy_16(ring + offset + place(i, v), from + i * kWarp * kVectors + v,
                     i * kWarp < left);
      }
    }
  }
};

// Raises small logits to kLowest, as all that is not of the row; returns the thread's largest.
template <class T, bool kVector>
__device__ __forceinline__ float finish_load(const LogitsRow<T, kVector>& row, int tile,
                                             Tile<T>& data) {
  if ((tile + 1) * kTileColumns > row.vocab_size) {
#pragma unroll
    for (int i = 0; i < kTileChunkRows; ++i) {
      const int chunk = data.chunk(tile, i);
      if (chunk >= row.num_chunks()) fill_lowest(data.raw[i]);
      // The columns between the vocabulary and the end of its last chunk hold anything.
      if (kVector && chunk == row.num_chunks() - 1) {
        float values[kChunk];
        row.unpack_from(data.raw[i], chunk, values);
        pack(values, data.raw[i]);
      }
    }
  }
  return raise_and_max(data);
}

enum class RowKind { padding, greedy, sampled };

// What a warp knows of a sampled row it works on.
struct SampledRow {
  uint64_t key;  // of its noise
  float scale;   // 1 / temperature
  bool draws;    // from all columns: no top-k comes first
  float best;    // noisy logit that the warp has found in the row's tiles so far
};

__device__ __forceinline__ RowKind enter_row(const UnmaskParams& p, int row, SampledRow& sampled) {
  const int slot = p.logit_slots[row];
  if (slot < 0) return RowKind::padding;
  const Sampling sampling(p, slot);
  if (!sampling.sampled) return RowKind::greedy;
  __syncwarp();  // the row before is done
  if (threadIdx.x % kWarp == 0) {
    const bool draws = sampling.top_k == 0;
    const uint64_t key = draws ? noise_key_of(p, row, slot) : 0;
    sampled = {key, sampling.scale, draws, -INFINITY};
  }
  __syncwarp();
  return RowKind::sampled;
}

// Which of the lane's logits equal `max`: the first in column order, counted through the lane's chunks.
// None: the tile's end.
__device__ __forceinline__ int first_equal(const Tile<__nv_bfloat16>& tile, float max) {
  constexpr int kPairs = kTileChunkRows * kChunk / 2;
  static_assert(kPairs == 16);
  const __nv_bfloat162 wanted = __float2bfloat162_rn(max);
  uint32_t found = 0;  // bit i: the lower half of pair i, bit 16 + i: its upper half
#pragma unroll
  for (int i = 0; i < kTileChunkRows; ++i) {
    const uint4& bits = tile.raw[i].bits;
    const uint32_t pairs[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      found |= __heq2_mask(as_pair(pairs[k]), wanted) & 0x10001u << (4 * i + k);
    }
  }
  const uint32_t low = found | 1u << kPairs, high = found >> kPairs | 1u << kPairs;
  return min(2 * (__ffs(low) - 1), 2 * (__ffs(high) - 1) + 1);
}
__device__ __forceinline__ int first_equal(const Tile<float>& tile, float max) {
  int first = kTileChunkRows * kChunk;
#pragma unroll
  for (int i = kTileChunkRows - 1; i >= 0; --i) {
    float x[kChunk];
    unpack(tile.raw[i], x);
#pragma unroll
    for (int j = kChunk - 1; j >= 0; --j) {
      if (x[j] == max) first = i * kChunk + j;
    }
  }
  return first;
}

// The lowest column of the tile that holds its largest logit, `max`. By a warp; complete in every lane.
template <class T>
__device__ __forceinline__ int32_t find_column(const Tile<T>& tile, int index, float max) {
  const int first = first_equal(tile, max);
  const int32_t column = tile.chunk(index, first / kChunk) * kChunk + first % kChunk;
  return warp_min(first < kTileChunkRows * kChunk ? column : INT32_MAX);
}

// Over the warp, as reduce_lanes does; the sums are complete in lane 0.
__device__ __forceinline__ void reduce_both(float& a, float& b) {
  const bool upper = threadIdx.x % kWarp >= kWarp / 2;  // half the lanes go on with b
  float own = upper ? b : a;
  own += __shfl_xor_sync(0xffffffffu, upper ? a : b, kWarp / 2);
  a = reduce_lanes<kWarp / 2>(own, Sum());
  b = __shfl_xor_sync(0xffffffffu, a, kWarp / 2);
}

template <class T>
__device__ __forceinline__ void add_greedy(const Tile<T>& tile, RowSums::Head& sums) {
  const float reference = reference_of(sums.max, kLog2E);
#pragma unroll
  for (int i = 0; i < kTileChunkRows; ++i) {
    float x[kChunk];
    unpack(tile.raw[i], x);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float exponent = exponent_of(x[j], kLog2E, reference), weight = exp2_fast(exponent);
      sums.sum += weight;
      sums.weighted += weight * exponent;
    }
  }
  reduce_both(sums.sum, sums.weighted);
}

// Also the sums at temperature 1, and the best column under noise unless a top-k comes first. The loop
// over chunks is not unrolled, to save registers and instructions.
template <class T>
__device__ __forceinline__ void add_sampled(const Tile<T>& tile, int index, SampledRow& row,
                                            RowSums& sums) {
  const bool draws = row.draws;
  const float rate = row.scale * kLog2E;
  const float reference = reference_of(sums.head.max, rate);
  const float plain_reference = reference_of(sums.head.max, kLog2E);
  Draw draw(row.scale, row.key, reference, row.best);
#pragma unroll 1
  for (int i = 0; i < kTileChunkRows; ++i) {
    float x[kChunk], weight[kChunk];
    RawChunk<T> raw = tile.raw[0];
#pragma unroll
    for (int k = 1; k < kTileChunkRows; ++k) {
      if (i == k) raw = tile.raw[k];
    }
    unpack(raw, x);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float exponent = exponent_of(x[j], rate, reference);
      weight[j] = exp2_fast(exponent);
      sums.head.sum += weight[j];
      sums.head.weighted += weight[j] * exponent;
      sums.tail.sum += exp2_fast(exponent_of(x[j], kLog2E, plain_reference));
    }
    if (draws) draw.add(x, weight, tile.chunk(index, i) * kChunk);
  }
  sums.head.sum = reduce_lanes(sums.head.sum, Sum());
  sums.head.weighted = reduce_lanes(sums.head.weighted, Sum());
  sums.tail.sum = reduce_lanes(sums.tail.sum, Sum());
  if (!draws) return;
  __syncwarp();                                        // all have read it
  if (threadIdx.x % kWarp == 0) row.best = draw.best;  // the same in all lanes
  __syncwarp();
  draw.reduce_lanes();
  sums.tail.noisy = draw.noisy;
  sums.tail.sampled = draw.column;
}

template <class T, bool kVector>
struct ScanShared {
  alignas(16) unsigned char rings[kVector ? kScanWarps : 1][Feed<T>::kBytes];
  SampledRow sampled[kScanWarps];
};

// The tiles of a warp, one after the other: how they come.
template <class T, bool kVector>
struct Tiles;
template <class T>
struct Tiles<T, true> {
  Feed<T> feed;

  __device__ __forceinline__ Tiles(const UnmaskParams& p, Place first, int num_tiles, int count,
                                   void* shared)
      : feed(LogitsRow<T, true>(p, first.row), first.index, shared) {
    for (int i = 0; i < Feed<T>::kStages; ++i) feed.start_next(p, num_tiles, i < count);
  }
  __device__ __forceinline__ void take(const LogitsRow<T, true>&, int, Tile<T>& tile) const {
    feed.take(tile);
  }
  // When the tile taken is all in registers; `left`: of the warp, with that one.
  __device__ __forceinline__ void start_next(const UnmaskParams& p, int num_tiles, int left) {
    feed.start_next(p, num_tiles, left > Feed<T>::kStages);
  }
};
template <class T>
struct Tiles<T, false> {
  __device__ __forceinline__ Tiles(const UnmaskParams&, Place, int, int, void*) {}
  __device__ __forceinline__ void take(const LogitsRow<T, false>& row, int index,
                                       Tile<T>& tile) const {
    tile.load(row, index);
  }
  __device__ __forceinline__ void start_next(const UnmaskParams&, int, int) {}
};

// A CTA works on a range of all tiles; its warps take turns.
template <class T, bool kVector>
__global__ void __maxnreg__(kScanRegisters<T>)
    scan_kernel(const __grid_constant__ UnmaskParams p, const __grid_constant__ Workspace workspace,
                int num_tiles) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<ScanShared<T, kVector>*>(shared_bytes);
  // Not before the wait: what the next kernel reads is then complete, but for the workspace.
  wait_until_previous_is_done();
  let_next_kernel_start();
  const int warp = threadIdx.x / kWarp;
  const Ranges ranges(num_real_rows(p) * num_tiles, gridDim.x);
  const uint32_t first = ranges.begin(blockIdx.x) + warp, end = ranges.begin(blockIdx.x + 1);
  if (first >= end) return;
  Place place{int(first / num_tiles), int(first % num_tiles)};
  int left = (end - first + kScanWarps - 1) / kScanWarps;  // with the one at hand
  Tiles<T, kVector> tiles(p, place, num_tiles, left, shared.rings[kVector ? warp : 0]);
  RowKind kind = RowKind::padding;
  float best = 0;  // of the row so far: later tiles with no more hold no argmax
  for (bool enters = true; left > 0; --left, enters = place.advance(num_tiles)) {
    const LogitsRow<T, kVector> row(p, place.row);
    if (enters) {
      kind = enter_row(p, place.row, shared.sampled[warp]);
      best = -INFINITY;
    }
    Tile<T> tile;
    tiles.take(row, place.index, tile);
    RowSums::Head head{warp_max(finish_load(row, place.index, tile)), 0, 0, INT32_MAX};
    tiles.start_next(p, num_tiles, left);
    RowSums* record = workspace.tiles + (place.row * num_tiles + place.index);
    if (kind == RowKind::greedy) {
      if (head.max > best) head.argmax = find_column(tile, place.index, head.max);
      best = fmaxf(best, head.max);
      add_greedy(tile, head);
      if (threadIdx.x % kWarp == 0) publish(head, &record->head);
    } else if (kind == RowKind::sampled) {
      RowSums sums{head, {0, -INFINITY, INT32_MAX, head.max}};
      add_sampled(tile, place.index, shared.sampled[warp], sums);
      if (threadIdx.x % kWarp == 0) {
        publish(sums.head, &record->head);
        publish(sums.tail, &record->tail);
      }
    }
  }
}

template <class T, bool kVector>
void launch_scan_kernel(const UnmaskParams& params, const Workspace& workspace, int num_tiles,
                        cudaStream_t stream) {
  const int grid = scan_ctas(params.num_logit_rows, params.vocab_size);
  const int shared_bytes = sizeof(ScanShared<T, kVector>);
  OPTIMUS_CUDA_CHECK(cudaFuncSetAttribute(
      scan_kernel<T, kVector>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  launch(scan_kernel<T, kVector>, {dim3(grid), dim3(kScanThreads), 1, size_t(shared_bytes)}, stream,
         params, workspace, num_tiles);
}

}  // namespace

void launch_scan(const UnmaskParams& params, const Workspace& workspace, bool vector,
                 cudaStream_t stream) {
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto launch_kernel = vector ? launch_scan_kernel<T, true> : launch_scan_kernel<T, false>;
    launch_kernel(params, workspace, num_tiles(params.vocab_size), stream);
  });
}

}  // namespace optimus::cuda::unmasking
