// What the three kernels of unmask share: which rows are real, and how a row of logits is read.
//
// A row's columns are cut into tiles of kTileColumns, whatever else is in the batch: every sum has a
// fixed order.
#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/noise.h"

namespace optimus::cuda::unmasking {

constexpr int kScanChunks = 4;  // per lane: a warp reduces a tile
constexpr int kTileChunks = kWarp * kScanChunks;
constexpr int kTileColumns = kTileChunks * kChunk;
constexpr float kLog2E = 1.4426950408889634f;
// Smaller logits (-inf too) count as this one: no weight, and no infinities in the sums.
constexpr float kLowest = -1e20f;

// What a tile, and then a row, adds up to; x = logit, m = largest logit.
struct alignas(16) RowSums {
  float max;        // m
  float sum;        // of exp((x - m) * scale)
  float weighted;   // of exp((x - m) * scale) * (x - m)
  float plain_sum;  // of exp(x - m)
  float noisy;      // largest x * scale + noise, of `sampled`
  int32_t argmax;   // the lowest column that reaches m
  int32_t sampled;
  int32_t unused;
};
static_assert(sizeof(RowSums) == 32);

inline int num_tiles(int vocab_size) { return ceil_div(vocab_size, kTileColumns); }

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A float's order as an integer's.
__device__ __forceinline__ uint32_t key_of(float value) {
  uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ float warp_max(float value) {
  return value_of(__reduce_max_sync(0xffffffffu, key_of(value)));
}
__device__ __forceinline__ int32_t warp_min(int32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}

// Better than `best`, or as good at a lower column: the maximum that a scan in order finds.
__device__ __forceinline__ bool is_better(float value, int32_t column, float best,
                                          int32_t best_column) {
  return value > best || (value == best && column < best_column);
}

__device__ __forceinline__ int num_real_rows(const UnmaskParams& p) {
  if (p.num_logit_rows_device == nullptr) return p.num_logit_rows;
  return min(*p.num_logit_rows_device, p.num_logit_rows);
}
// Slot of a logits row, or -1 for padding and rows behind the real ones.
__device__ __forceinline__ int slot_of_row(const UnmaskParams& p, int row) {
  return row < num_real_rows(p) ? p.logit_slots[row] : -1;
}

struct Sampling {
  float scale;    // 1 / temperature, or 1
  bool sampled;   // temperature > 0
  bool filtered;  // sampled, from a top-k or top-p set
  int top_k;      // 0 = off
  float top_p;    // 1 = off
};
__device__ __forceinline__ Sampling sampling_of(const UnmaskParams& p, int slot) {
  Sampling s{1.0f, false, false, 0, 1.0f};
  const float temperature = p.state.temperature[slot];
  if (!(temperature > 0.0f)) return s;
  s.scale = 1.0f / temperature;
  s.sampled = true;
  const int top_k = p.state.top_k[slot];
  if (top_k > 0 && top_k < p.vocab_size) s.top_k = top_k;
  s.top_p = p.state.top_p[slot];
  s.filtered = s.top_k > 0 || s.top_p < 1.0f;
  return s;
}

__device__ __forceinline__ uint64_t noise_key_of(const UnmaskParams& p, int row, int slot) {
  return noise_key(p.state.seed[slot], p.state.block_start[slot] + p.logit_offsets[row],
                   p.state.denoise_step[slot]);
}

// As the CPU twin rounds it: product and sum apart. A call, since it is long and used in loops that
// are unrolled for their registers.
static __device__ __noinline__ float noisy_logit(float scaled, uint64_t key, int32_t column) {
  return __fadd_rn(scaled, gumbel_noise(key, column));
}
// 1 - u of a token's noise, exactly.
__device__ __forceinline__ float distance_from_one(uint64_t key, int32_t column) {
  const uint32_t bits = mix64(key ^ static_cast<uint32_t>(column)) >> 41;
  return (static_cast<float>(0x7fffffu - bits) + 0.5f) * 0x1p-23f;
}
// Whether noise could lift `scaled` to `best`. -log(-log(u)) reaches d only if 1 - u <= exp(-d): one
// fast exponential, with a margin for its error, spares most tokens both logarithms.
__device__ __forceinline__ bool could_reach(float scaled, float one_minus_u, float best) {
  return one_minus_u <= 1.001f * exp2_fast((scaled - best) * kLog2E);
}

// A row of logits in chunks. kVector: rows are 16-byte aligned and padded to whole chunks.
template <class T, bool kVector>
struct LogitsRow {
  const T* data;
  int vocab_size;

  __device__ LogitsRow(const UnmaskParams& p, int row) : vocab_size(p.vocab_size) {
    const int stride = p.logits_stride > 0 ? p.logits_stride : p.vocab_size;
    data = static_cast<const T*>(p.logits) + size_t(row) * stride;
  }
  __device__ int num_chunks() const { return (vocab_size + kChunk - 1) / kChunk; }

  __device__ RawChunk<T> load(int chunk) const {
    if constexpr (kVector) {
      return load_chunk(data + chunk * kChunk);
    } else {
      float values[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        int column = chunk * kChunk + j;
        values[j] = column < vocab_size ? load_element(data + column) : kLowest;
      }
      RawChunk<T> raw;
      pack(values, raw);
      return raw;
    }
  }
  // The chunk's logits, none below kLowest; columns behind the vocabulary hold -infinity.
  __device__ void unpack_from(const RawChunk<T>& raw, int chunk, float (&out)[kChunk]) const {
    unpack(raw, out);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      out[j] = chunk * kChunk + j < vocab_size ? fmaxf(out[j], kLowest) : -INFINITY;
    }
  }
};

// `vector`: rows are 16-byte aligned and padded to whole chunks.
void launch_scan(const UnmaskParams& params, RowSums* tiles, bool vector, cudaStream_t stream);
void launch_finish(const UnmaskParams& params, const RowSums* tiles, bool vector,
                   cudaStream_t stream);
void launch_decide(const UnmaskParams& params, cudaStream_t stream);

}  // namespace optimus::cuda::unmasking
