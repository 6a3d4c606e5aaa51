// Second kernel of unmask, a CTA a row: adds the tiles up and writes the row's candidate. A row
// that samples from a top-k or top-p set is read again here, to find the set's floor: the smallest
// scaled logit that is let through. Two ways lead to the same floor:
//   short: the k-th largest of the threads' own maxima bounds the k largest logits from below; the
//          few logits above that bound are collected and sorted.
//   long:  bisection over the bits of the floor, one read of the row (from L2) a bit; for a set
//          that is too large for the list.
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kListSize = 1024;
constexpr int kTopP = 256;  // logits that the short way bounds when there is no top-k

struct Shared {
  RowSums sums;
  float values[kListSize];  // threads' maxima, then the list, descending
  int32_t columns[kListSize];
  int list_count;
  float bound;
  float floor;
  bool found;
  double weights[kListSize];  // of the list, relative to the row's largest logit
  double warp_double[kWarps];
  int32_t warp_int[kWarps];
};

// A float's order as an integer's.
__device__ __forceinline__ uint32_t key_of(float value) {
  uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The row's scaled logits, each visited by one thread of the CTA.
template <class T, bool kVector>
struct ScaledRow {
  LogitsRow<T, kVector> row;
  float scale;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    constexpr int kBatch = 4;  // loads in flight
    const int chunks = row.num_chunks();
    for (int first = threadIdx.x; first < chunks; first += kBatch * kThreads) {
      RawChunk<T> raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kThreads < chunks) raw[i] = row.load(first + i * kThreads);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int chunk = first + i * kThreads;
        if (chunk >= chunks) break;
        float x[kChunk];
        row.unpack_from(raw[i], chunk, x);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (chunk * kChunk + j < row.vocab_size)
            visit(chunk * kChunk + j, __fmul_rn(x[j], scale));
        }
      }
    }
  }
};

// Sorts `count` entries, descending by value, then ascending by column. `columns` may be null.
__device__ void sort_descending(float* values, int32_t* columns, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kThreads) {
    values[i] = -INFINITY;
    if (columns != nullptr) columns[i] = INT32_MAX;
  }
  __syncthreads();
  for (int span = 2; span <= size; span *= 2) {
    for (int distance = span / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        int j = i ^ distance;
        if (j < i) continue;
        float a = values[i], b = values[j];
        int32_t column_a = columns != nullptr ? columns[i] : 0;
        int32_t column_b = columns != nullptr ? columns[j] : 0;
        bool descending = (i & span) == 0;
        bool in_order = a > b || (a == b && column_a <= column_b);
        if (in_order == descending || (a == b && column_a == column_b)) continue;
        values[i] = b;
        values[j] = a;
        if (columns != nullptr) {
          columns[i] = column_b;
          columns[j] = column_a;
        }
      }
      __syncthreads();
    }
  }
}

// The floor from the sorted list, or false if the set reaches behind the list. By one thread.
__device__ bool floor_from_list(const Shared& shared, const Sampling& sampling, float& floor) {
  const int keep = sampling.top_k > 0 ? sampling.top_k : shared.list_count;
  floor = shared.values[keep - 1];
  if (sampling.top_p >= 1.0f) return true;
  double total = shared.sums.sum;
  if (sampling.top_k > 0) {
    total = 0;
    for (int i = 0; i < keep; ++i) total += shared.weights[i];
  }
  double mass = 0;
  for (int i = 0; i < keep; ++i) {
    mass += shared.weights[i];
    if (mass >= double(sampling.top_p) * total) {
      floor = shared.values[i];
      return true;
    }
  }
  return sampling.top_k > 0;
}

template <class Row>
__device__ bool find_floor_short(const Row& row, const Sampling& sampling, Shared& shared) {
  const int bounded = sampling.top_k > 0 ? sampling.top_k : kTopP;
  if (bounded > kThreads / 2) return false;  // the bound would be loose
  float own_max = -INFINITY;
  row.for_each([&](int32_t, float x) { own_max = fmaxf(own_max, x); });
  shared.values[threadIdx.x] = own_max;
  sort_descending(shared.values, nullptr, kThreads);
  if (threadIdx.x == 0) {
    shared.bound = shared.values[bounded - 1];
    shared.list_count = 0;
  }
  __syncthreads();
  const float bound = shared.bound;
  row.for_each([&](int32_t column, float x) {
    if (x < bound) return;
    int at = atomicAdd(&shared.list_count, 1);
    if (at >= kListSize) return;
    shared.values[at] = x;
    shared.columns[at] = column;
  });
  __syncthreads();
  // Fewer threads than `bounded` may have seen a logit: then the bound is -infinity, the list whole.
  if (shared.list_count > kListSize || shared.list_count < bounded) return false;
  sort_descending(shared.values, shared.columns, shared.list_count);
  const float max = __fmul_rn(shared.sums.max, sampling.scale);
  for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
    shared.weights[i] = exp(double(shared.values[i]) - max);
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.found = floor_from_list(shared, sampling, shared.floor);
  __syncthreads();
  return shared.found;
}

// The largest key for which `reaches(key)` holds; it holds for 0 and is decreasing.
template <class Reaches>
__device__ uint32_t bisect(const Reaches& reaches) {
  uint32_t key = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (reaches(key | bit)) key |= bit;
  }
  return key;
}

template <class Row>
__device__ float find_floor_long(const Row& row, const Sampling& sampling, Shared& shared) {
  const float max = __fmul_rn(shared.sums.max, sampling.scale);
  auto count_from = [&](uint32_t key) {
    int32_t count = 0;
    row.for_each([&](int32_t, float x) { count += key_of(x) >= key; });
    __syncthreads();
    return reduce_block(count, shared.warp_int, Sum());
  };
  auto mass_from = [&](uint32_t key) {
    float mass = 0;
    row.for_each([&](int32_t, float x) {
      if (key_of(x) >= key) mass += exp2_fast((x - max) * kLog2E);
    });
    __syncthreads();
    return reduce_block(double(mass), shared.warp_double, Sum());
  };
  uint32_t floor = 0;
  double total = shared.sums.sum;
  if (sampling.top_k > 0) {
    floor = bisect([&](uint32_t key) { return count_from(key) >= sampling.top_k; });
    if (sampling.top_p >= 1.0f) return value_of(floor);
    // Of the logits equal to the floor, as many as are among the k largest.
    int above = count_from(floor + 1);
    total = mass_from(floor + 1) +
            (sampling.top_k - above) * double(exp2_fast((value_of(floor) - max) * kLog2E));
  }
  const double target = double(sampling.top_p) * total;
  uint32_t nucleus = bisect([&](uint32_t key) { return mass_from(key) >= target; });
  nucleus = nucleus > floor ? nucleus : floor;
  return nucleus == 0 ? -INFINITY : value_of(nucleus);
}

// The noisy maximum over the CTA; every thread gets the column.
__device__ int32_t best_column(float noisy, int32_t column, Shared& shared) {
  auto keep_better = [&](float other, int32_t other_column) {
    if (!is_better(other, other_column, noisy, column)) return;
    noisy = other;
    column = other_column;
  };
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    keep_better(__shfl_xor_sync(0xffffffffu, noisy, offset),
                __shfl_xor_sync(0xffffffffu, column, offset));
  }
  __syncthreads();  // the list is read no more
  if (threadIdx.x % kWarp == 0) {
    shared.values[threadIdx.x / kWarp] = noisy;
    shared.columns[threadIdx.x / kWarp] = column;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) keep_better(shared.values[warp], shared.columns[warp]);
  return column;
}

template <class Row>
__device__ int32_t sample_filtered(const Row& row, const Sampling& sampling, uint64_t key,
                                   Shared& shared) {
  float best = -INFINITY;
  int32_t column = INT32_MAX;
  auto visit = [&](int32_t candidate, float scaled) {
    float noisy = noisy_logit(scaled, key, candidate);
    if (!is_better(noisy, candidate, best, column)) return;
    best = noisy;
    column = candidate;
  };
  if (find_floor_short(row, sampling, shared)) {
    for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
      if (shared.values[i] >= shared.floor) visit(shared.columns[i], shared.values[i]);
    }
  } else {
    const float floor = find_floor_long(row, sampling, shared);
    row.for_each([&](int32_t candidate, float x) {
      if (x >= floor) visit(candidate, x);
    });
  }
  return best_column(best, column, shared);
}

// One warp: a row's tiles. Complete in every lane.
__device__ RowSums add_tiles(const RowSums* tiles, int num_tiles, float scale) {
  const int lane = threadIdx.x % kWarp;
  RowSums total{kLowest, 0, 0, 0, -INFINITY, INT32_MAX, INT32_MAX, 0};
  for (int t = lane; t < num_tiles; t += kWarp) total.max = fmaxf(total.max, tiles[t].max);
  total.max = reduce_lanes(total.max, Max());
  for (int t = lane; t < num_tiles; t += kWarp) {
    const RowSums tile = tiles[t];
    const float distance = tile.max - total.max;
    const float factor = exp2_fast(distance * scale * kLog2E);
    total.sum += tile.sum * factor;
    total.weighted += (tile.weighted + tile.sum * distance) * factor;
    total.plain_sum += tile.plain_sum * exp2_fast(distance * kLog2E);
    if (tile.max == total.max) total.argmax = min(total.argmax, tile.argmax);
    if (is_better(tile.noisy, tile.sampled, total.noisy, total.sampled)) {
      total.noisy = tile.noisy;
      total.sampled = tile.sampled;
    }
  }
  total.sum = reduce_lanes(total.sum, Sum());
  total.weighted = reduce_lanes(total.weighted, Sum());
  total.plain_sum = reduce_lanes(total.plain_sum, Sum());
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    total.argmax = min(total.argmax, __shfl_xor_sync(0xffffffffu, total.argmax, offset));
    float noisy = __shfl_xor_sync(0xffffffffu, total.noisy, offset);
    int32_t sampled = __shfl_xor_sync(0xffffffffu, total.sampled, offset);
    if (is_better(noisy, sampled, total.noisy, total.sampled)) {
      total.noisy = noisy;
      total.sampled = sampled;
    }
  }
  return total;
}

__device__ void write_candidate(const UnmaskParams& p, int row, const RowSums& sums, float scale,
                                int32_t token, float logit) {
  p.out.token_ids[row] = token;
  p.out.logprob[row] = logit - sums.max - logf(sums.plain_sum);
  // Rounded products, as the floor and the noise saw them: a confidence never exceeds 1.
  float distance = __fmul_rn(logit, scale) - __fmul_rn(sums.max, scale);
  p.out.confidence[row] = expf(distance) / sums.sum;
  p.out.entropy[row] = logf(sums.sum) - sums.weighted * scale / sums.sum;
}

// Grid: rows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(UnmaskParams p, const RowSums* tiles, int num_tiles) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int row = blockIdx.x;
  const int slot = slot_of_row(p, row);
  if (slot < 0) return;
  const Sampling sampling = sampling_of(p, slot);
  if (!sampling.filtered && threadIdx.x >= kWarp) return;
  const LogitsRow<T, kVector> logits(p, row);
  if (threadIdx.x < kWarp) {
    RowSums sums = add_tiles(tiles + size_t(row) * num_tiles, num_tiles, sampling.scale);
    if (threadIdx.x == 0) shared.sums = sums;
  }
  int32_t token = 0;
  if (sampling.filtered) {
    __syncthreads();
    token = sample_filtered(ScaledRow<T, kVector>{logits, sampling.scale}, sampling,
                            noise_key_of(p, row, slot), shared);
  }
  if (threadIdx.x > 0) return;
  if (!sampling.filtered) token = sampling.sampled ? shared.sums.sampled : shared.sums.argmax;
  if (token < 0 || token >= p.vocab_size) token = 0;  // not a number, everywhere
  write_candidate(p, row, shared.sums, sampling.scale, token, load_element(logits.data + token));
}

}  // namespace

void launch_finish(const UnmaskParams& params, const RowSums* tiles, bool vector,
                   cudaStream_t stream) {
  LaunchShape shape{dim3(params.num_logit_rows), dim3(kThreads)};
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? finish_kernel<T, true> : finish_kernel<T, false>, shape, stream, params, tiles,
           num_tiles(params.vocab_size));
  });
}

}  // namespace optimus::cuda::unmasking
