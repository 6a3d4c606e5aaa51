// First kernel of unmask: reads the logits once. A warp reduces one tile of one row, which it holds
// in registers: the maximum first, then the sums relative to it, so nothing is rescaled. Warps do
// not wait for each other, so loads and arithmetic of different tiles overlap.
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {
namespace {

constexpr int kWarps = 8;  // per CTA

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

// Raises small values to kLowest in place; returns the largest.
__device__ __forceinline__ float raise_and_max(RawChunk<__nv_bfloat16>& raw) {
  const uint32_t lowest = lowest_pair();
  raw.bits.x = max_pair(raw.bits.x, lowest);
  raw.bits.y = max_pair(raw.bits.y, lowest);
  raw.bits.z = max_pair(raw.bits.z, lowest);
  raw.bits.w = max_pair(raw.bits.w, lowest);
  float low, high;
  widen(max_pair(max_pair(raw.bits.x, raw.bits.y), max_pair(raw.bits.z, raw.bits.w)), low, high);
  return fmaxf(low, high);
}
__device__ __forceinline__ float raise_and_max(RawChunk<float>& raw) {
  float values[kChunk], largest = kLowest;
  unpack(raw, values);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    values[j] = fmaxf(values[j], kLowest);
    largest = fmaxf(largest, values[j]);
  }
  pack(values, raw);
  return largest;
}

template <class T>
struct Tile {
  RawChunk<T> raw[kScanChunks];
  int first, end;  // chunks of the row

  __device__ __forceinline__ int chunk(int i) const {
    return first + i * kWarp + threadIdx.x % kWarp;
  }

  template <bool kVector>
  __device__ __forceinline__ void load(const LogitsRow<T, kVector>& row, int tile) {
    first = tile * kTileChunks;
    end = min(first + kTileChunks, row.num_chunks());
#pragma unroll
    for (int i = 0; i < kScanChunks; ++i) {
      if (chunk(i) < end) raw[i] = row.load(chunk(i));
    }
  }

  // Raises small logits to kLowest, as all that is not of the tile; returns the thread's largest.
  template <bool kVector>
  __device__ __forceinline__ float finish_load(const LogitsRow<T, kVector>& row) {
    float largest = kLowest;
#pragma unroll
    for (int i = 0; i < kScanChunks; ++i) {
      if (chunk(i) >= end) fill_lowest(raw[i]);
      // The columns between the vocabulary and the end of its last chunk hold anything.
      if (kVector && row.vocab_size % kChunk != 0 && chunk(i) == row.num_chunks() - 1) {
        float values[kChunk];
        row.unpack_from(raw[i], chunk(i), values);
        pack(values, raw[i]);
      }
      largest = fmaxf(largest, raise_and_max(raw[i]));
    }
    return largest;
  }

  // The thread's lowest column that holds `value`, among the first `vocab_size`.
  __device__ __forceinline__ int32_t find(float value) const {
#pragma unroll
    for (int i = 0; i < kScanChunks; ++i) {
      if (chunk(i) >= end) break;
      float x[kChunk];
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (x[j] == value) return chunk(i) * kChunk + j;
      }
    }
    return INT32_MAX;
  }
};

template <class T>
__device__ __forceinline__ void add_greedy(const Tile<T>& tile, RowSums& sums) {
#pragma unroll
  for (int i = 0; i < kScanChunks; ++i) {
    float x[kChunk];
    unpack(tile.raw[i], x);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      float distance = x[j] - sums.max;
      float weight = exp2_fast(distance * kLog2E);
      sums.sum += weight;
      sums.weighted += weight * distance;
    }
  }
}

// Also the sums at temperature 1, and the best token under noise unless a filter comes first. Noise
// is expensive: it is drawn in full only where it could lift a token over the warp's best.
template <class T>
__device__ __forceinline__ void add_sampled(const Tile<T>& tile, const Sampling& sampling,
                                            uint64_t key, int vocab_size, RowSums& sums) {
  const float rate = sampling.scale * kLog2E;
  sums.noisy = noisy_logit(__fmul_rn(sums.max, sampling.scale), key, sums.argmax);
  sums.sampled = sums.argmax;
  float best = sums.noisy;  // of the warp
#pragma unroll
  for (int i = 0; i < kScanChunks; ++i) {
    float x[kChunk];
    unpack(tile.raw[i], x);
    const int32_t first = tile.chunk(i) * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      float distance = x[j] - sums.max;
      float weight = exp2_fast(distance * rate);
      sums.sum += weight;
      sums.weighted += weight * distance;
      sums.plain_sum += exp2_fast(distance * kLog2E);
    }
    if (sampling.filtered) continue;
    float one_minus_u[kChunk];  // apart from the tests, which depend on each other
#pragma unroll
    for (int j = 0; j < kChunk; ++j) one_minus_u[j] = distance_from_one(key, first + j);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float scaled = __fmul_rn(x[j], sampling.scale);
      const bool inside = tile.chunk(i) < tile.end && first + j < vocab_size;
      const bool candidate = inside && could_reach(scaled, one_minus_u[j], best);
      if (!__any_sync(0xffffffffu, candidate)) continue;
      if (candidate) {
        float noisy = noisy_logit(scaled, key, first + j);
        if (is_better(noisy, first + j, sums.noisy, sums.sampled)) {
          sums.noisy = noisy;
          sums.sampled = first + j;
        }
      }
      best = warp_max(sums.noisy);
    }
  }
}

// Sums over the warp.
__device__ __forceinline__ void combine(RowSums& sums, bool sampled) {
  sums.sum = reduce_lanes(sums.sum, Sum());
  sums.weighted = reduce_lanes(sums.weighted, Sum());
  if (!sampled) {
    sums.plain_sum = sums.sum;
    return;
  }
  sums.plain_sum = reduce_lanes(sums.plain_sum, Sum());
  const float best = warp_max(sums.noisy);
  sums.sampled = warp_min(sums.noisy == best ? sums.sampled : INT32_MAX);
  sums.noisy = best;
}

// A warp a tile, of all rows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kWarps* kWarp)
    scan_kernel(UnmaskParams p, RowSums* tiles, int num_tiles) {
  wait_for_previous_kernel();
  const int item = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int row = item / num_tiles;
  if (row >= num_real_rows(p)) return;
  const LogitsRow<T, kVector> logits(p, row);
  Tile<T> tile;
  tile.load(logits, item % num_tiles);
  const int slot = p.logit_slots[row];  // on its way together with the logits
  if (slot < 0) return;                 // padding
  const Sampling sampling = sampling_of(p, slot);
  const float lane_max = tile.finish_load(logits);
  RowSums sums{warp_max(lane_max), 0, 0, 0, -INFINITY, 0, INT32_MAX, 0};
  sums.argmax = warp_min(lane_max == sums.max ? tile.find(sums.max) : INT32_MAX);
  if (sampling.sampled) {
    add_sampled(tile, sampling, noise_key_of(p, row, slot), p.vocab_size, sums);
  } else {
    add_greedy(tile, sums);
  }
  combine(sums, sampling.sampled);
  if (threadIdx.x % kWarp == 0) tiles[item] = sums;
}

}  // namespace

void launch_scan(const UnmaskParams& params, RowSums* tiles, bool vector, cudaStream_t stream) {
  const int num = num_tiles(params.vocab_size);
  const dim3 grid(ceil_div(int64_t(params.num_logit_rows) * num, kWarps));
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? scan_kernel<T, true> : scan_kernel<T, false>, {grid, dim3(kWarps * kWarp)},
           stream, params, tiles, num);
  });
}

}  // namespace optimus::cuda::unmasking
