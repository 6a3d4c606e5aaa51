// First kernel of unmask: reads the logits once. A CTA reduces one tile of one row, which it holds
// in registers: the maximum first, then the sums relative to it, so nothing is rescaled.
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {
namespace {

constexpr int kWarps = kScanThreads / kWarp;

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
    return first + i * kScanThreads + threadIdx.x;
  }

  // Returns the largest logit of the thread.
  template <bool kVector>
  __device__ __forceinline__ float load(const LogitsRow<T, kVector>& row, int tile, int num_tiles) {
    const int chunks = row.num_chunks(), per_tile = (chunks + num_tiles - 1) / num_tiles;
    first = tile * per_tile;
    end = min(first + per_tile, chunks);
#pragma unroll
    for (int i = 0; i < kScanChunks; ++i) {
      if (chunk(i) < end) {
        raw[i] = row.load(chunk(i));
      } else {
        fill_lowest(raw[i]);
      }
    }
    float largest = kLowest;
#pragma unroll
    for (int i = 0; i < kScanChunks; ++i) {
      // The columns between the vocabulary and the end of its last chunk hold anything.
      if (kVector && chunk(i) == chunks - 1 && row.vocab_size % kChunk != 0) {
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
// is expensive: it is drawn only where it could lift a token over the noisy argmax.
template <class T>
__device__ __forceinline__ void add_sampled(const Tile<T>& tile, const Sampling& sampling,
                                            uint64_t key, int vocab_size, RowSums& sums) {
  const float rate = sampling.scale * kLog2E;
  sums.noisy = -INFINITY;
  sums.sampled = INT32_MAX;
  const float bar = noisy_logit(__fmul_rn(sums.max, sampling.scale), key, sums.argmax) - kMaxNoise;
#pragma unroll
  for (int i = 0; i < kScanChunks; ++i) {
    float x[kChunk];
    unpack(tile.raw[i], x);
    const int32_t first = tile.chunk(i) * kChunk;
    const bool inside = tile.chunk(i) < tile.end;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      float distance = x[j] - sums.max;
      float weight = exp2_fast(distance * rate);
      sums.sum += weight;
      sums.weighted += weight * distance;
      sums.plain_sum += exp2_fast(distance * kLog2E);
      float scaled = __fmul_rn(x[j], sampling.scale);
      if (sampling.filtered || !inside || first + j >= vocab_size || scaled < bar) continue;
      float noisy = noisy_logit(scaled, key, first + j);
      if (is_better(noisy, first + j, sums.noisy, sums.sampled)) {
        sums.noisy = noisy;
        sums.sampled = first + j;
      }
    }
  }
}

// Sums over the CTA's threads; complete in thread 0.
__device__ __forceinline__ void combine(RowSums& sums, bool sampled, RowSums* shared) {
  sums.sum = reduce_lanes(sums.sum, Sum());
  sums.weighted = reduce_lanes(sums.weighted, Sum());
  if (sampled) {
    sums.plain_sum = reduce_lanes(sums.plain_sum, Sum());
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      float noisy = __shfl_xor_sync(0xffffffffu, sums.noisy, offset);
      int32_t column = __shfl_xor_sync(0xffffffffu, sums.sampled, offset);
      if (is_better(noisy, column, sums.noisy, sums.sampled)) {
        sums.noisy = noisy;
        sums.sampled = column;
      }
    }
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    const RowSums& other = shared[warp];
    sums.sum += other.sum;
    sums.weighted += other.weighted;
    sums.plain_sum += other.plain_sum;
    if (is_better(other.noisy, other.sampled, sums.noisy, sums.sampled)) {
      sums.noisy = other.noisy;
      sums.sampled = other.sampled;
    }
  }
}

// Grid: (tiles, rows).
template <class T, bool kVector>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(UnmaskParams p, RowSums* tiles) {
  __shared__ float warp_max[kWarps];
  __shared__ int32_t argmax;
  __shared__ RowSums warp_sums[kWarps];
  wait_for_previous_kernel();
  const int row = blockIdx.y;
  const int slot = slot_of_row(p, row);
  if (slot < 0) return;
  const Sampling sampling = sampling_of(p, slot);
  if (threadIdx.x == 0) argmax = INT32_MAX;

  Tile<T> tile;
  const float thread_max =
      tile.load(LogitsRow<T, kVector>(p, row), blockIdx.x, static_cast<int>(gridDim.x));
  RowSums sums{reduce_block(thread_max, warp_max, Max()), 0, 0, 0, -INFINITY, 0, INT32_MAX, 0};
  if (thread_max == sums.max) atomicMin(&argmax, tile.find(sums.max));
  if (sampling.sampled) {
    __syncthreads();
    sums.argmax = argmax;
    add_sampled(tile, sampling, noise_key_of(p, row, slot), p.vocab_size, sums);
  } else {
    add_greedy(tile, sums);
  }
  combine(sums, sampling.sampled, warp_sums);
  if (threadIdx.x > 0) return;
  sums.argmax = argmax;
  if (!sampling.sampled) sums.plain_sum = sums.sum;
  tiles[size_t(row) * gridDim.x + blockIdx.x] = sums;
}

}  // namespace

void launch_scan(const UnmaskParams& params, RowSums* tiles, bool vector, cudaStream_t stream) {
  LaunchShape shape{dim3(num_tiles(params.vocab_size), params.num_logit_rows), dim3(kScanThreads)};
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? scan_kernel<T, true> : scan_kernel<T, false>, shape, stream, params, tiles);
  });
}

}  // namespace optimus::cuda::unmasking
