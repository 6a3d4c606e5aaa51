// Second kernel of unmask: a warp a row adds the tiles up and writes the row's candidate. A row that
// samples from a top-k or top-p set is read again by a whole CTA, to find the set's floor: the
// smallest scaled logit that is let through. Two ways lead to the same floor:
//   short: the k-th largest of the tiles' maxima bounds the k largest logits from below; the few
//          logits above that bound are collected, from the few tiles that hold any, and sorted.
//   long:  descent through the digits of the floor, one read of the row (from L2) a digit; for a
//          set that is too large for the list.
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kListSize = 1024;
constexpr int kTopP = 64;  // logits that the short way bounds at first when there is no top-k

constexpr int kDigits = 16;  // a digit of a key is 4 bits, and a warp sums up a digit
static_assert(kDigits == kWarps);

struct List {
  float values[kListSize];  // the tiles' maxima, then the list, descending
  int32_t columns[kListSize];
  double weights[kListSize];  // relative to the row's largest logit
};

struct Shared {
  RowSums sums[kWarps];  // of the rows at hand
  bool filtered[kWarps];
  int list_count;
  float bound;
  float floor;
  bool found;
  double digit_sums[kDigits];
  union {
    List list;
    float histogram[kDigits][kThreads];  // of each thread
  };
};

// The row's scaled logits, each visited by one thread of the CTA.
template <class T, bool kVector>
struct ScaledRow {
  LogitsRow<T, kVector> row;
  float scale;
  const RowSums* sums;   // of the row
  const RowSums* tiles;  // of the row's tiles
  int num_tiles;

  // visit(chunk, raw chunk)
  template <class Visit>
  __device__ __forceinline__ void for_each_chunk(const Visit& visit) const {
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
        if (first + i * kThreads < chunks) visit(first + i * kThreads, raw[i]);
      }
    }
  }

  template <class Visit>
  __device__ __forceinline__ void visit_chunk(int chunk, const RawChunk<T>& raw, float bound,
                                              const Visit& visit) const {
    float x[kChunk];
    row.unpack_from(raw, chunk, x);
    float largest = x[0];
#pragma unroll
    for (int j = 1; j < kChunk; ++j) largest = fmaxf(largest, x[j]);
    if (__fmul_rn(largest, scale) < bound) return;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float scaled = __fmul_rn(x[j], scale);
      if (scaled >= bound && x[j] >= kLowest) visit(chunk * kChunk + j, scaled);
    }
  }
  // visit(column, scaled logit) for those that are at least `bound`; -infinity is below all bounds.
  template <class Visit>
  __device__ __forceinline__ void for_each_from(float bound, const Visit& visit) const {
    for_each_chunk(
        [&](int chunk, const RawChunk<T>& raw) { visit_chunk(chunk, raw, bound, visit); });
  }
  // The same for the columns of one tile, each visited by a lane of the calling warp.
  template <class Visit>
  __device__ __forceinline__ void for_each_of_tile(int tile, float bound,
                                                   const Visit& visit) const {
    const int end = min((tile + 1) * kTileChunks, row.num_chunks());
    for (int chunk = tile * kTileChunks + threadIdx.x % kWarp; chunk < end; chunk += kWarp) {
      visit_chunk(chunk, row.load(chunk), bound, visit);
    }
  }
  __device__ __forceinline__ float tile_max(int tile) const {
    return __fmul_rn(tiles[tile].max, scale);
  }
  __device__ __forceinline__ float max() const { return __fmul_rn(sums->max, scale); }
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
__device__ bool floor_from_list(const Shared& shared, const Sampling& sampling, double total,
                                float& floor) {
  const int keep = sampling.top_k > 0 ? sampling.top_k : shared.list_count;
  floor = shared.list.values[keep - 1];
  if (sampling.top_p >= 1.0f) return true;
  if (sampling.top_k > 0) {
    total = 0;
    for (int i = 0; i < keep; ++i) total += shared.list.weights[i];
  }
  double mass = 0;
  for (int i = 0; i < keep; ++i) {
    mass += shared.list.weights[i];
    if (mass >= double(sampling.top_p) * total) {
      floor = shared.list.values[i];
      return true;
    }
  }
  return sampling.top_k > 0;
}

// Collects at least the `bounded` largest logits; false if that is not enough, or not possible.
template <class Row>
__device__ bool find_floor_short(const Row& row, const Sampling& sampling, int bounded,
                                 Shared& shared) {
  if (row.num_tiles > kListSize || bounded > row.num_tiles) return false;
  for (int tile = threadIdx.x; tile < row.num_tiles; tile += kThreads) {
    shared.list.values[tile] = row.tile_max(tile);
  }
  sort_descending(shared.list.values, nullptr, row.num_tiles);
  if (threadIdx.x == 0) {
    shared.bound = shared.list.values[bounded - 1];
    shared.list_count = 0;
  }
  __syncthreads();
  const float bound = shared.bound;
  for (int tile = threadIdx.x / kWarp; tile < row.num_tiles; tile += kWarps) {
    if (row.tile_max(tile) < bound) continue;
    row.for_each_of_tile(tile, bound, [&](int32_t column, float x) {
      int at = atomicAdd(&shared.list_count, 1);
      if (at >= kListSize) return;
      shared.list.values[at] = x;
      shared.list.columns[at] = column;
    });
  }
  __syncthreads();
  if (shared.list_count > kListSize) return false;
  sort_descending(shared.list.values, shared.list.columns, shared.list_count);
  const float max = row.max();
  for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
    shared.list.weights[i] = exp(double(shared.list.values[i]) - max);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.found = floor_from_list(shared, sampling, row.sums->sum, shared.floor);
  }
  __syncthreads();
  return shared.found;
}

// The largest key such that the weights of all logits from there on reach `target`; 0 if even the
// sum of all does not. `above` becomes the weight of the larger keys. One read of the row for each
// digit; every thread sums up for itself, so that the order of sums is fixed.
template <class Row, class Weight>
__device__ uint32_t descend(const Row& row, const Weight& weight, double target, double& above,
                            Shared& shared) {
  uint32_t prefix = 0;
  above = 0;
  target = fmax(target, 1e-30);  // of the largest logit, if nothing else
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int digit = 0; digit < kDigits; ++digit) shared.histogram[digit][threadIdx.x] = 0;
    // Nothing below the prefix's first key counts; the keys above its last are in `above`.
    const float bound = prefix == 0 ? -INFINITY : value_of(prefix);
    row.for_each_from(bound, [&](int32_t, float x) {
      const uint32_t key = key_of(x);
      if (shift < 28 && (key ^ prefix) >> (shift + 4) != 0) return;
      shared.histogram[key >> shift & (kDigits - 1)][threadIdx.x] += weight(x);
    });
    __syncthreads();
    const int digit = threadIdx.x / kWarp;
    double sum = 0;
    for (int i = threadIdx.x % kWarp; i < kThreads; i += kWarp) sum += shared.histogram[digit][i];
    sum = reduce_lanes(sum, Sum());
    if (threadIdx.x % kWarp == 0) shared.digit_sums[digit] = sum;
    __syncthreads();
    int choice = kDigits - 1;
    while (choice > 0 && above + shared.digit_sums[choice] < target) {
      above += shared.digit_sums[choice--];
    }
    prefix |= static_cast<uint32_t>(choice) << shift;
    __syncthreads();
  }
  return prefix;
}

template <class Row, class Mass>
__device__ double mass_above(const Row& row, const Mass& mass, float floor, Shared& shared) {
  float own = 0;
  row.for_each_from(floor, [&](int32_t, float x) { own += x > floor ? mass(x) : 0.0f; });
  const double sum = reduce_block(double(own), shared.digit_sums, Sum());
  __syncthreads();
  return sum;
}

template <class Row>
__device__ float find_floor_long(const Row& row, const Sampling& sampling, Shared& shared) {
  const float max = row.max();
  auto mass = [max](float x) { return exp2_fast((x - max) * kLog2E); };
  uint32_t floor = 0;
  double total = row.sums->sum, above = 0;
  if (sampling.top_k > 0) {
    floor = descend(row, [](float) { return 1.0f; }, sampling.top_k, above, shared);
    if (sampling.top_p >= 1.0f) return value_of(floor);
    // Of the logits equal to the floor, as many as are among the k largest.
    total = (sampling.top_k - above) * double(mass(value_of(floor)));
    total += mass_above(row, mass, value_of(floor), shared);
  }
  const uint32_t nucleus = descend(row, mass, double(sampling.top_p) * total, above, shared);
  const uint32_t key = nucleus > floor ? nucleus : floor;
  return key == 0 ? -INFINITY : value_of(key);
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
    shared.list.values[threadIdx.x / kWarp] = noisy;
    shared.list.columns[threadIdx.x / kWarp] = column;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp)
    keep_better(shared.list.values[warp], shared.list.columns[warp]);
  return column;
}

template <class Row>
__device__ int32_t sample_filtered(const Row& row, const Sampling& sampling, uint64_t key,
                                   Shared& shared) {
  float best = -INFINITY;
  int32_t column = INT32_MAX;
  auto visit = [&](int32_t candidate, float scaled) {
    if (!could_reach(scaled, distance_from_one(key, candidate), best)) return;
    float noisy = noisy_logit(scaled, key, candidate);
    if (!is_better(noisy, candidate, best, column)) return;
    best = noisy;
    column = candidate;
  };
  // Without a top-k, try a few logits first, and then as many as a list holds of a usual row.
  const int few = sampling.top_k > 0 ? sampling.top_k : min(kTopP, row.num_tiles);
  if (find_floor_short(row, sampling, few, shared) ||
      (sampling.top_k == 0 && find_floor_short(row, sampling, row.num_tiles, shared))) {
    for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
      if (shared.list.values[i] >= shared.floor)
        visit(shared.list.columns[i], shared.list.values[i]);
    }
  } else {
    const float floor = find_floor_long(row, sampling, shared);
    row.for_each_from(floor, visit);
  }
  return best_column(best, column, shared);
}

// By a warp; complete in every lane.
__device__ RowSums add_tiles(const RowSums* tiles, int num_tiles, float scale) {
  const int lane = threadIdx.x % kWarp;
  RowSums sums{kLowest, 0, 0, 0, -INFINITY, INT32_MAX, INT32_MAX, 0};
#pragma unroll 4
  for (int t = lane; t < num_tiles; t += kWarp) sums.max = fmaxf(sums.max, tiles[t].max);
  sums.max = warp_max(sums.max);
#pragma unroll 4
  for (int t = lane; t < num_tiles; t += kWarp) {
    const RowSums tile = tiles[t];
    const float distance = tile.max - sums.max;
    const float factor = exp2_fast(distance * scale * kLog2E);
    sums.sum += tile.sum * factor;
    sums.weighted += (tile.weighted + tile.sum * distance) * factor;
    sums.plain_sum += tile.plain_sum * exp2_fast(distance * kLog2E);
    if (tile.max == sums.max) sums.argmax = min(sums.argmax, tile.argmax);
    if (is_better(tile.noisy, tile.sampled, sums.noisy, sums.sampled)) {
      sums.noisy = tile.noisy;
      sums.sampled = tile.sampled;
    }
  }
  sums.sum = reduce_lanes(sums.sum, Sum());
  sums.weighted = reduce_lanes(sums.weighted, Sum());
  sums.plain_sum = reduce_lanes(sums.plain_sum, Sum());
  sums.argmax = warp_min(sums.argmax);
  const float noisy = warp_max(sums.noisy);
  sums.sampled = warp_min(sums.noisy == noisy ? sums.sampled : INT32_MAX);
  sums.noisy = noisy;
  return sums;
}

template <class Logits>
__device__ void write_candidate(const UnmaskParams& p, const Logits& logits, int row,
                                const RowSums& sums, float scale, int32_t token) {
  if (token < 0 || token >= p.vocab_size) token = 0;  // not a number, everywhere
  const float logit = token == sums.argmax ? sums.max : load_element(logits.data + token);
  p.out.token_ids[row] = token;
  p.out.logprob[row] = logit - sums.max - logf(sums.plain_sum);
  // Rounded products, as the floor and the noise saw them: a confidence never exceeds 1.
  float distance = __fmul_rn(logit, scale) - __fmul_rn(sums.max, scale);
  p.out.confidence[row] = expf(distance) / sums.sum;
  p.out.entropy[row] = logf(sums.sum) - sums.weighted * scale / sums.sum;
}

// Rows b, b + gridDim.x, ... belong to CTA b, a warp each; then the CTA turns to the filtered ones.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(UnmaskParams p, const RowSums* tiles, int num_tiles) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarp, num_rows = num_real_rows(p);
  for (int first = blockIdx.x; first < num_rows; first += gridDim.x * kWarps) {
    const int own_row = first + warp * gridDim.x;
    const int own_slot = own_row < num_rows ? p.logit_slots[own_row] : -1;
    bool filtered = false;
    if (own_slot >= 0) {
      const Sampling sampling = sampling_of(p, own_slot);
      filtered = sampling.filtered;
      RowSums sums = add_tiles(tiles + size_t(own_row) * num_tiles, num_tiles, sampling.scale);
      if (threadIdx.x % kWarp == 0) {
        shared.sums[warp] = sums;
        if (!filtered) {
          write_candidate(p, LogitsRow<T, kVector>(p, own_row), own_row, sums, sampling.scale,
                          sampling.sampled ? sums.sampled : sums.argmax);
        }
      }
    }
    if (threadIdx.x % kWarp == 0) shared.filtered[warp] = filtered;
    if (!__syncthreads_or(filtered)) continue;
    for (int i = 0; i < kWarps; ++i) {
      if (!shared.filtered[i]) continue;
      const int row = first + i * gridDim.x, slot = p.logit_slots[row];
      const Sampling sampling = sampling_of(p, slot);
      const LogitsRow<T, kVector> logits(p, row);
      int32_t token =
          sample_filtered(ScaledRow<T, kVector>{logits, sampling.scale, &shared.sums[i],
                                                tiles + size_t(row) * num_tiles, num_tiles},
                          sampling, noise_key_of(p, row, slot), shared);
      if (threadIdx.x == 0) {
        write_candidate(p, logits, row, shared.sums[i], sampling.scale, token);
      }
      __syncthreads();
    }
    __syncthreads();  // all have read `filtered`
  }
}

}  // namespace

void launch_finish(const UnmaskParams& params, const RowSums* tiles, bool vector,
                   cudaStream_t stream) {
  const int grid = std::min(params.num_logit_rows, device_properties().num_sms);
  LaunchShape shape{dim3(grid), dim3(kThreads)};
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? finish_kernel<T, true> : finish_kernel<T, false>, shape, stream, params, tiles,
           num_tiles(params.vocab_size));
  });
}

}  // namespace optimus::cuda::unmasking
