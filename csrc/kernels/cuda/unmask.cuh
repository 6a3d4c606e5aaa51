// What the kernels of unmask share: which rows are real, how a row of logits is read and what it adds
// up to.
//
// A row's columns are cut into tiles of kTileColumns, whatever else is in the batch: every sum has a
// fixed order.
#pragma once

#include "core/launch.cuh"
#include "kernels/cuda/equal_parts.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/noise.h"

namespace optimus::cuda::unmasking {

constexpr int kScanWarps = 16;  // per CTA of the scan
constexpr int kWarps = 8;       // per CTA of finish
// A CTA of each fits on an SM, so that those of finish are there when the scan ends. Not with fp32: it
// would spill.
template <class T>
constexpr int kScanRegisters = sizeof(T) == 2 ? 80 : 128;
template <class T>
constexpr int kFinishRegisters = sizeof(T) == 2 ? 96 : 128;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileChunkRows = 4;  // chunks per lane: a warp reduces a tile
constexpr int kTileChunks = kWarp * kTileChunkRows;
constexpr int kTileColumns = kTileChunks * kChunk;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Smaller logits (-inf too) count as this one: no weight, and no infinities in the sums. A power of
// two, so that its exponent is exact: a tile of nothing else has weights of 1, not of infinity.
constexpr float kLowest = -0x1p66f;

// What a tile, and then a row, adds up to; x = logit, m = largest logit, and e(x, rate) the exponent
// of the weight 2^e of x: about (x - m) * rate, see exponent_of.
struct RowSums {
  struct alignas(16) Head {
    float max;       // m
    float sum;       // of 2^e(x, rate), rate = log2(e) / temperature (greedy: as if 1)
    float weighted;  // of 2^e(x, rate) * e(x, rate)
    int32_t
        argmax;  // the lowest column of m; of greedy rows, and a tile's only if it may be theirs
  } head;
  // Only of rows that are sampled:
  struct alignas(16) Tail {
    float sum;  // of 2^e(x, log2(e))
    // The best column under noise and its noisy logit. A tile says so only if it may be the row's, and
    // only if the row draws from all columns (no top-k).
    float noisy;
    int32_t sampled;
    float max;  // m, once more
  } tail;
};
static_assert(sizeof(RowSums) == 32);

// All zero between two calls.
struct Workspace {
  RowSums* tiles;  // [num_logit_rows, num_tiles]
  // [num_logit_rows] at the first row of a slot that samples from a top-k or top-p set: how many of its
  // rows are finished.
  uint32_t* arrived;
};

inline int num_tiles(int vocab_size) { return ceil_div(vocab_size, kTileColumns); }
inline int scan_ctas(int num_logit_rows, int vocab_size) {
  return std::min<int64_t>(int64_t(num_logit_rows) * num_tiles(vocab_size),
                           device_properties().num_sms);
}

// What each CTA of the scan works on: of the tiles of all rows, in order.
using Ranges = EqualParts<uint32_t>;

// Of the tiles [first, end), the one that the scan comes to last, or nearly: the last in the range that
// `first` is in, since that range ends with it and the next one begins behind it.
__device__ __forceinline__ uint32_t last_in_time(const Ranges& ranges, uint32_t first,
                                                 uint32_t end) {
  return min(end, ranges.begin(ranges.owner(first) + 1)) - 1;
}

// How half of a tile's RowSums goes from the scan to finish, which looks for it while the scan runs:
// in one piece, so that nothing has to be ordered. It is there when its sum is not 0. The weight of the
// largest logit is 1, but rounding leaves nothing of it where exponents are relative to 2^30 and more.
template <class Half>
__device__ __forceinline__ void publish(Half half, Half* at) {
  static_assert(sizeof(Half) == 16);
  if (half.sum == 0.0f) half.sum = 1.0f;
  const auto* bits = reinterpret_cast<const uint64_t*>(&half);
  asm volatile(
      "{ .reg .b128 both; mov.b128 both, {%1, %2}; st.relaxed.gpu.global.b128 [%0], both; }" ::"l"(
          at),
      "l"(bits[0]), "l"(bits[1])
      : "memory");
}
template <class Half>
__device__ __forceinline__ void look_at(const Half* at, Half& half) {
  static_assert(sizeof(Half) == 16);
  auto* bits = reinterpret_cast<uint64_t*>(&half);
  asm volatile(
      "{ .reg .b128 both; ld.relaxed.gpu.global.b128 both, [%2]; mov.b128 {%0, %1}, both; }"
      : "=l"(bits[0]), "=l"(bits[1])
      : "l"(at)
      : "memory");
}
template <class Half>
__device__ __forceinline__ bool is_there(const Half& half) {
  return half.sum != 0.0f;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What e(x, rate) is relative to: one rounded product for all x, and then a fused multiply-add each.
// Rounded up, so that no exponent is above 0, whatever the magnitude of `max`.
__device__ __forceinline__ float reference_of(float max, float rate) {
  return __fmul_ru(max, rate);
}
__device__ __forceinline__ float exponent_of(float x, float rate, float reference) {
  return __fmaf_rn(x, rate, -reference);
}

// A float's order as an integer's.
__device__ __forceinline__ uint32_t key_of(float value) {
  uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// The same for a signed integer; its own inverse.
__device__ __forceinline__ int32_t signed_key_of(int32_t bits) {
  return bits ^ (bits >> 31 & INT32_MAX);
}
__device__ __forceinline__ float warp_max(float value) {
  const int32_t key = signed_key_of(__float_as_int(value));
  return __int_as_float(signed_key_of(__reduce_max_sync(0xffffffffu, key)));
}
__device__ __forceinline__ int32_t warp_min(int32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}

// Better than `best`, or as good at a lower column: the maximum that a scan in order finds.
__device__ __forceinline__ bool is_better(float value, int32_t column, float best,
                                          int32_t best_column) {
  return value > best || (value == best && column < best_column);
}

// How many of `count` keys come before key i by `sign` times the key, the lower index first among
// equals.
__device__ __forceinline__ int rank_of(const float* keys, float sign, int i, int count) {
  const float own = sign * keys[i];
  int rank = 0;
#pragma unroll 8
  for (int j = 0; j < count; ++j) {
    const float other = sign * keys[j];
    rank += other < own || (other == own && j < i);
  }
  return rank;
}

__device__ __forceinline__ int num_real_rows(const UnmaskParams& p) {
  if (p.num_logit_rows_device == nullptr) return p.num_logit_rows;
  return min(__ldcg(p.num_logit_rows_device), p.num_logit_rows);
}
struct Sampling {
  float scale = 1.0f;    // 1 / temperature, or 1
  bool sampled = false;  // temperature > 0
  int top_k = 0;         // 0 = off
  float top_p = 1.0f;    // 1 = off

  __device__ Sampling(const UnmaskParams& p, int slot) {
    const float temperature = __ldcg(p.state.temperature + slot);
    const int k = __ldcg(p.state.top_k + slot);
    const float mass = __ldcg(p.state.top_p + slot);  // all three on their way at once
    if (!(temperature > 0.0f)) return;
    scale = 1.0f / temperature;
    sampled = true;
    if (k > 0 && k < p.vocab_size) top_k = k;
    top_p = mass;
  }
  __device__ float rate() const { return scale * kLog2E; }
  // From a top-k or top-p set.
  __device__ bool filtered() const { return top_k > 0 || top_p < 1.0f; }
};

__device__ __forceinline__ uint64_t noise_key_of(const UnmaskParams& p, int row, int slot) {
  return noise_key(p.state.seed[slot], p.state.block_start[slot] + p.logit_offsets[row],
                   p.state.denoise_step[slot]);
}

// As the CPU twin rounds it: product and sum apart.
__device__ __forceinline__ float noisy_logit(float scaled, uint64_t key, int32_t column) {
  return __fadd_rn(scaled, gumbel_noise(key, column));
}

// A warp's search for the best column under noise. Noise is expensive: it is drawn in full only where
// it may lift a column to the best so far. Of a column's noise g = -log(-log(u)) <= -log(1 - u) only u
// comes first. The column reaches if 1 - u <= exp(x * scale - best): its weight times `lift`, which is
// the same for all columns.
struct Draw {
  const float scale, reference;  // of the weights
  const uint64_t key;
  float best;  // of the warp
  float lift;
  float noisy = -INFINITY;  // of the lane
  int32_t column = INT32_MAX;

  // Nothing below `least` is of interest.
  __device__ __forceinline__ Draw(float scale_, uint64_t key_, float reference_, float least)
      : scale(scale_), reference(reference_), key(key_) {
    raise(least);
  }

  // Of the columns from `first` on; a weight of -infinity leaves one out. All lanes call it.
  __device__ __forceinline__ void add(const float (&x)[kChunk], const float (&weight)[kChunk],
                                      int32_t first) {
    float u[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) u[j] = one_plus_u(first + j);
    uint32_t tried = 0;
    for (;;) {
      int chosen = -1;  // the first that reaches, not yet tried
      float value = 0;
#pragma unroll
      for (int j = kChunk - 1; j >= 0; --j) {
        if (fmaf(weight[j], lift, u[j]) < kAlmostTwo || (tried >> j & 1) != 0) continue;
        chosen = j;
        value = x[j];
      }
      if (!__any_sync(0xffffffffu, chosen >= 0)) return;
      if (chosen >= 0) {
        tried |= 1u << chosen;
        keep_better(noisy_logit(__fmul_rn(value, scale), key, first + chosen), first + chosen);
      }
      raise(fmaxf(best, warp_max(noisy)));
    }
  }
  __device__ __forceinline__ void keep_better(float other, int32_t other_column) {
    if (!is_better(other, other_column, noisy, column)) return;
    noisy = other;
    column = other_column;
  }
  // Over the warp; complete in every lane.
  __device__ __forceinline__ void reduce_lanes() {
    const float largest = warp_max(noisy);
    column = warp_min(noisy == largest ? column : INT32_MAX);
    noisy = largest;
  }

 private:
  // 1 - u <= t, or almost, if one_plus_u + t >= kAlmostTwo: whatever rounding does.
  static constexpr float kAlmostTwo = 2.0f - 0x1p-21f;
  // 1 + u, less half of a step of u.
  __device__ __forceinline__ float one_plus_u(int32_t of) const {
    const uint32_t bits = mix64(key ^ static_cast<uint32_t>(of)) >> 41;
    return __uint_as_float(0x3f800000u | bits);
  }
  // Lifts a little more than it must, for what is lost in rounding.
  __device__ __forceinline__ void raise(float new_best) {
    best = new_best;
    const float slack = 0.01f + fabsf(reference) * 0x1p-21f;
    lift = exp2_fast(fmaf(best, -kLog2E, reference) + slack);
  }
};

// A row of logits in chunks; logits_stride is never 0 here. kVector: rows are 16-byte aligned and padded to whole chunks.
template <class T, bool kVector>
struct LogitsRow {
  const T* data;
  int vocab_size;

  __device__ LogitsRow(const UnmaskParams& p, int row) : vocab_size(p.vocab_size) {
    data = static_cast<const T*>(p.logits) + int64_t(row) * p.logits_stride;
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
  // One logit, from the L2 cache: the kernel before may still run. Of the first column if `column` is
  // none: not a number, everywhere.
  __device__ __forceinline__ float at(int32_t column) const {
    return float(__ldcg(data + (column < vocab_size ? column : 0)));
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

// A warp's registers hold a tile: lane l has the chunks l, l + 32, ... of it.
template <class T>
struct Tile {
  RawChunk<T> raw[kTileChunkRows];

  __device__ __forceinline__ static int chunk(int tile, int i) {
    return tile * kTileChunks + i * kWarp + threadIdx.x % kWarp;
  }
  template <bool kVector>
  __device__ __forceinline__ void load(const LogitsRow<T, kVector>& row, int tile) {
#pragma unroll
    for (int i = 0; i < kTileChunkRows; ++i) {
      raw[i] = {};  // or the compiler would keep what was there before
      if (chunk(tile, i) < row.num_chunks()) raw[i] = row.load(chunk(tile, i));
    }
  }
};

// `vector`: rows are 16-byte aligned and padded to whole chunks.
void launch_scan(const UnmaskParams& params, const Workspace& workspace, bool vector,
                 cudaStream_t stream);
void launch_finish(const UnmaskParams& params, const Workspace& workspace, bool vector,
                   cudaStream_t stream);

}  // namespace optimus::cuda::unmasking
