// Rows that sample from a top-k or top-p set, by a whole CTA, which reads the row again, from L2:
//   top-k: the k-th largest of the tiles' maxima bounds the k largest logits from below; the few
//          logits above that bound are collected, from the few tiles that hold any, and sorted. For a
//          larger k, descent through the digits of the k-th largest, one read of the row a digit.
//   top-p: no set is made. The best column under noise of all columns is also that of the set if it is
//          in the set: if the weights of the columns above it do not reach the set's share, one read
//          of the tiles that hold any. If they do, the best of the columns above it comes next.
#pragma once

#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {

constexpr int kListSize = 1024;
constexpr int kDigits = 16;  // a digit of a key is 4 bits

struct List {
  float values[kListSize];  // the tiles' maxima, then the list, descending
  int32_t columns[kListSize];
  double weights[kListSize];  // relative to the row's largest logit
};

struct FilterShared {
  int list_count;
  float bound;
  float floor;
  double warp_sums[kWarps];
  int digit_counts[kDigits];
  float warp_values[kWarps];
  int32_t warp_columns[kWarps];
  union {
    List list;
    int32_t histogram[kDigits][kThreads];  // of each thread
  };
};

// A row with what is known of it. Each of its logits is visited by one thread of the CTA.
template <class T, bool kVector>
struct FilteredRow {
  LogitsRow<T, kVector> logits;
  Sampling sampling;
  uint64_t key;  // of its noise
  RowSums sums;
  const RowSums* tiles;  // of the row's tiles
  int num_tiles;

  __device__ __forceinline__ float scaled(float x) const { return __fmul_rn(x, sampling.scale); }
  // As the row's sums count it.
  __device__ __forceinline__ float weight(float x) const {
    const float rate = sampling.rate();
    return exp2_fast(exponent_of(x, rate, reference_of(sums.head.max, rate)));
  }
  __device__ __forceinline__ Draw draw() const {
    return Draw(sampling.scale, key, reference_of(sums.head.max, sampling.rate()), -INFINITY);
  }

  // visit(column, x) for chunks that begin at a column, of the tiles that reach `bound`: by warps. What
  // is not of the row holds -infinity.
  template <class Visit>
  __device__ __forceinline__ void for_each_chunk(float bound, const Visit& visit) const {
    for (int index = threadIdx.x / kWarp; index < num_tiles; index += kWarps) {
      if (tiles[index].head.max < bound) continue;
      Tile<T> tile;
      tile.load(logits, index);
      // Not unrolled, to save registers and instructions: the chunks move up.
#pragma unroll 1
      for (int i = 0; i < kTileChunkRows; ++i) {
        const int chunk = tile.chunk(index, i);
        float x[kChunk];
        logits.unpack_from(tile.raw[0], chunk, x);
        visit(chunk * kChunk, x);
#pragma unroll
        for (int k = 1; k < kTileChunkRows; ++k) tile.raw[k - 1] = tile.raw[k];
      }
    }
  }
  // visit(column, x) for the logits that are at least `bound`; -infinity is below all bounds.
  template <class Visit>
  __device__ __forceinline__ void for_each_from(float bound, const Visit& visit) const {
    for_each_chunk(bound, [&](int32_t first, const float(&x)[kChunk]) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (x[j] >= bound && x[j] >= kLowest) visit(first + j, x[j]);
      }
    });
  }
};

// Sorts the list's first `count` values and columns, descending by value, equal ones in any order.
__device__ void sort_descending(List& list, int count) {
  constexpr int kOwn = kListSize / kThreads;
  float values[kOwn];
  int32_t columns[kOwn], ranks[kOwn];
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const int i = threadIdx.x + k * kThreads;
    if (i >= count) continue;
    values[k] = list.values[i];
    columns[k] = list.columns[i];
    ranks[k] = rank_of(list.values, -1.0f, i, count);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (threadIdx.x + k * kThreads >= count) continue;
    list.values[ranks[k]] = values[k];
    list.columns[ranks[k]] = columns[k];
  }
  __syncthreads();
}

// The smallest logit of the list's set, scaled: the top_k largest, or fewer of them with a top-p. By
// one thread.
__device__ float floor_of_list(const List& list, const Sampling& sampling) {
  if (sampling.top_p < 1.0f) {
    double total = 0, mass = 0;
    for (int i = 0; i < sampling.top_k; ++i) total += list.weights[i];
    for (int i = 0; i < sampling.top_k; ++i) {
      mass += list.weights[i];
      if (mass >= double(sampling.top_p) * total) return list.values[i];
    }
  }
  return list.values[sampling.top_k - 1];
}

// Collects the top_k largest logits and more; false if they are too many. Then `list` is sorted and
// `floor` the set's smallest.
template <class Row>
__device__ bool list_top_k(const Row& row, FilterShared& shared) {
  const int top_k = row.sampling.top_k;
  List& list = shared.list;
  if (row.num_tiles > kListSize || top_k > row.num_tiles) return false;
  for (int tile = threadIdx.x; tile < row.num_tiles; tile += kThreads) {
    list.values[tile] = row.tiles[tile].head.max;
  }
  if (threadIdx.x == 0) shared.list_count = 0;
  __syncthreads();
  for (int tile = threadIdx.x; tile < row.num_tiles; tile += kThreads) {
    if (rank_of(list.values, -1.0f, tile, row.num_tiles) != top_k - 1) continue;
    shared.bound = list.values[tile];
  }
  __syncthreads();
  row.for_each_from(shared.bound, [&](int32_t column, float x) {
    const int at = atomicAdd(&shared.list_count, 1);
    if (at >= kListSize) return;
    list.values[at] = row.scaled(x);
    list.columns[at] = column;
  });
  __syncthreads();
  if (shared.list_count > kListSize) return false;
  sort_descending(list, shared.list_count);
  const float max = row.scaled(row.sums.head.max);
  for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
    list.weights[i] = exp(double(list.values[i]) - max);
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.floor = floor_of_list(list, row.sampling);
  __syncthreads();
  return true;
}

// The k-th largest logit, k = top_k; `above` becomes how many are larger. One read of the row for each
// digit of its key.
template <class Row>
__device__ float find_kth(const Row& row, int& above, FilterShared& shared) {
  uint32_t prefix = 0;
  above = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    for (int digit = 0; digit < kDigits; ++digit) shared.histogram[digit][threadIdx.x] = 0;
    // Nothing below the prefix's first key counts; the keys above its last are in `above`.
    const float bound = prefix == 0 ? -INFINITY : value_of(prefix);
    row.for_each_from(bound, [&](int32_t, float x) {
      const uint32_t key = key_of(x);
      if (shift < 28 && (key ^ prefix) >> (shift + 4) != 0) return;
      ++shared.histogram[key >> shift & (kDigits - 1)][threadIdx.x];
    });
    __syncthreads();
    for (int digit = threadIdx.x / kWarp; digit < kDigits; digit += kWarps) {
      int count = 0;
      for (int i = threadIdx.x % kWarp; i < kThreads; i += kWarp) {
        count += shared.histogram[digit][i];
      }
      count = reduce_lanes(count, Sum());
      if (threadIdx.x % kWarp == 0) shared.digit_counts[digit] = count;
    }
    __syncthreads();
    int choice = kDigits - 1;
    while (choice > 0 && above + shared.digit_counts[choice] < row.sampling.top_k) {
      above += shared.digit_counts[choice--];
    }
    prefix |= static_cast<uint32_t>(choice) << shift;
    __syncthreads();
  }
  return value_of(prefix);
}

// The weights of the logits above `x`. Every thread sums up for itself, so the order is fixed.
template <class Row>
__device__ double mass_above(const Row& row, float x, FilterShared& shared) {
  float own = 0;
  row.for_each_from(x, [&](int32_t, float other) {
    if (other > x) own += row.weight(other);
  });
  const double sum = sum_block(double(own), shared.warp_sums);
  __syncthreads();
  return sum;
}

// The best column of all warps' draws; every thread gets it.
__device__ int32_t best_column(Draw& draw, FilterShared& shared) {
  draw.reduce_lanes();
  if (threadIdx.x % kWarp == 0) {
    shared.warp_values[threadIdx.x / kWarp] = draw.noisy;
    shared.warp_columns[threadIdx.x / kWarp] = draw.column;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    draw.keep_better(shared.warp_values[warp], shared.warp_columns[warp]);
  }
  __syncthreads();
  return draw.column;
}

// Draws from the columns whose logits are at least `floor`, or above it.
template <class Row>
__device__ int32_t draw_from(const Row& row, float floor, bool above, FilterShared& shared) {
  Draw draw = row.draw();
  row.for_each_chunk(floor, [&](int32_t first, const float(&x)[kChunk]) {
    float weight[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const bool allowed = x[j] > floor || (x[j] == floor && !above);
      weight[j] = allowed ? row.weight(x[j]) : -INFINITY;
    }
    draw.add(x, weight, first);
  });
  return best_column(draw, shared);
}

// Draws from the list, down to its floor.
template <class Row>
__device__ int32_t draw_from_list(const Row& row, FilterShared& shared) {
  Draw draw = row.draw();
  for (int i = threadIdx.x; i < shared.list_count; i += kThreads) {
    const float scaled = shared.list.values[i];
    const int32_t column = shared.list.columns[i];
    if (scaled >= shared.floor) draw.keep_better(noisy_logit(scaled, row.key, column), column);
  }
  return best_column(draw, shared);
}

// The token of the top-p set whose weights are to reach `target`, from the best of a larger set.
template <class Row>
__device__ int32_t descend_to_nucleus(const Row& row, int32_t column, double target,
                                      FilterShared& shared) {
  target = fmax(target, 1e-30);  // of the largest logit, if nothing else
  for (;;) {
    if (column >= row.logits.vocab_size) return column;  // not a number
    const float x = fmaxf(row.logits.at(column), kLowest);
    if (mass_above(row, x, shared) < target) return column;
    column = draw_from(row, x, /*above=*/true, shared);
  }
}

// Every thread gets the token. `shared` is free for other use after the next __syncthreads().
template <class Row>
__device__ int32_t sample_filtered(const Row& row, FilterShared& shared) {
  const Sampling& sampling = row.sampling;
  if (sampling.top_k == 0) {
    const double target = double(sampling.top_p) * row.sums.head.sum;
    return descend_to_nucleus(row, row.sums.tail.sampled, target, shared);
  }
  if (list_top_k(row, shared)) return draw_from_list(row, shared);
  int above = 0;
  const float kth = find_kth(row, above, shared);
  const int32_t column = draw_from(row, kth, /*above=*/false, shared);
  if (sampling.top_p >= 1.0f) return column;
  // Of the logits equal to the k-th, as many as are among the k largest.
  double total = double(sampling.top_k - above) * row.weight(kth);
  total += mass_above(row, kth, shared);
  return descend_to_nucleus(row, column, sampling.top_p * total, shared);
}

}  // namespace optimus::cuda::unmasking
