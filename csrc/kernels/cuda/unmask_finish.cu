// Second kernel of unmask: a warp a row adds the tiles up and writes the row's candidate, or a whole
// CTA where the row samples from a top-k or top-p set. The CTA that finishes the last row of a slot
// decides for the slot.
#include "kernels/cuda/unmask.cuh"
#include "kernels/cuda/unmask_decide.cuh"
#include "kernels/cuda/unmask_filter.cuh"

namespace optimus::cuda::unmasking {
namespace {

constexpr int kCtasPerSm = 2;  // more would spill registers

// What is left to do for a row, for the whole CTA.
enum class Left : uint8_t { nothing, filter, decide };

struct Shared {
  Left left[kWarps];
  RowSums sums[kWarps];  // of a row to be filtered
  Segment slot_rows[kWarps];
  union {
    FilterShared filter;
    DecideShared decide;
  };
};

struct Peak {
  float max;
  int tile;  // the lowest that reaches it
};
// By a warp; complete in every lane.
__device__ Peak find_peak(const RowSums* tiles, int num_tiles) {
  Peak peak{kLowest, 0};
#pragma unroll 8
  for (int t = threadIdx.x % kWarp; t < num_tiles; t += kWarp) {
    const float max = tiles[t].max;
    if (max > peak.max || t < kWarp) peak = {max, t};
  }
  const float max = warp_max(peak.max);
  return {max, warp_min(peak.max == max ? peak.tile : INT32_MAX)};
}

// By a warp; complete in every lane.
__device__ RowSums add_tiles(const RowSums* tiles, int num_tiles, float max, float rate) {
  RowSums sums{max, 0, 0, 0, -INFINITY, INT32_MAX, {}};
  const float reference = reference_of(max, rate), plain_reference = reference_of(max, kLog2E);
#pragma unroll 4
  for (int t = threadIdx.x % kWarp; t < num_tiles; t += kWarp) {
    const RowSums tile = tiles[t];
    const float shift = reference_of(tile.max, rate) - reference;
    const float factor = exp2_fast(shift);
    sums.sum += tile.sum * factor;
    sums.weighted += (tile.weighted + tile.sum * shift) * factor;
    sums.plain_sum += tile.plain_sum * exp2_fast(reference_of(tile.max, kLog2E) - plain_reference);
    if (is_better(tile.noisy, tile.sampled, sums.noisy, sums.sampled)) {
      sums.noisy = tile.noisy;
      sums.sampled = tile.sampled;
    }
  }
  sums.sum = reduce_lanes(sums.sum, Sum());
  sums.weighted = reduce_lanes(sums.weighted, Sum());
  sums.plain_sum = reduce_lanes(sums.plain_sum, Sum());
  const float noisy = warp_max(sums.noisy);
  sums.sampled = warp_min(sums.noisy == noisy ? sums.sampled : INT32_MAX);
  sums.noisy = noisy;
  return sums;
}

// The lowest column of the tile that holds `value`. By a warp; complete in every lane.
template <class T, bool kVector>
__device__ int32_t find_column(const LogitsRow<T, kVector>& row, const Tile<T>& tile, int index,
                               float value) {
  int32_t column = INT32_MAX;
#pragma unroll
  for (int i = kTileChunkRows - 1; i >= 0; --i) {
    const int chunk = tile.chunk(index, i);
    if (chunk >= row.num_chunks()) continue;
    float x[kChunk];
    row.unpack_from(tile.raw[i], chunk, x);
#pragma unroll
    for (int j = kChunk - 1; j >= 0; --j) {
      if (x[j] == value) column = chunk * kChunk + j;
    }
  }
  return warp_min(column);
}

// By one thread: the row's candidate, of logit `logit`.
__device__ void write_candidate(const UnmaskParams& p, int row, const RowSums& sums, float rate,
                                int32_t token, float logit) {
  // The exponents that the sums saw: a confidence never exceeds 1.
  const float exponent = exponent_of(logit, rate, reference_of(sums.max, rate));
  const float plain_exponent = exponent_of(logit, kLog2E, reference_of(sums.max, kLog2E));
  p.out.token_ids[row] = token;
  p.out.logprob[row] = kLn2 * plain_exponent - logf(sums.plain_sum);
  p.out.confidence[row] = exp2_fast(exponent) / sums.sum;
  p.out.entropy[row] = logf(sums.sum) - kLn2 * sums.weighted / sums.sum;
}

// By the thread that wrote a candidate: whether it is the last of its slot. Then the others' are
// visible.
__device__ Left arrive(const Workspace& workspace, const Segment& slot_rows) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(workspace.arrived + slot_rows.begin)
               : "memory");
  return before + 1 == uint32_t(slot_rows.count) ? Left::decide : Left::nothing;
}

// By a warp. The result is lane 0's. Loads do not wait for each other where they need not.
template <class T, bool kVector>
__device__ __forceinline__ Left finish_row(const UnmaskParams& p, const Workspace& workspace,
                                           int num_tiles, int row, int num_rows, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const RowSums* tiles = workspace.tiles + size_t(row) * num_tiles;
  const int slot = p.logit_slots[row];
  const Neighbours neighbours(p, row - 1 - lane, row + 1 + lane, num_rows);
  const Peak peak = find_peak(tiles, num_tiles);
  if (slot < 0) return Left::nothing;
  const LogitsRow<T, kVector> logits(p, row);
  Tile<T> tile;  // of the argmax
  tile.load(logits, peak.tile);
  const Sampling sampling(p, slot);
  const Segment slot_rows = segment_around(p, row, slot, num_rows, neighbours);
  const RowSums sums = add_tiles(tiles, num_tiles, peak.max, sampling.rate());
  int32_t token = find_column(logits, tile, peak.tile, peak.max);
  if (lane != 0) return Left::nothing;
  shared.slot_rows[warp] = slot_rows;
  shared.sums[warp] = sums;
  if (sampling.filtered()) return Left::filter;
  float logit = sums.max;
  if (sampling.sampled) {
    token = sums.sampled;
    logit = logits.at(token);
  }
  write_candidate(p, row, sums, sampling.rate(), token < p.vocab_size ? token : 0, logit);
  return arrive(workspace, slot_rows);
}

// By the CTA, of a row that finish_row left. Thread 0's result counts.
template <class T, bool kVector>
__device__ __noinline__ Left filter_row(const UnmaskParams& p, const Workspace& workspace,
                                        int num_tiles, int row, int warp, Shared& shared) {
  const Segment slot_rows = shared.slot_rows[warp];
  const Sampling sampling(p, slot_rows.slot);
  const FilteredRow<T, kVector> filtered{LogitsRow<T, kVector>(p, row),
                                         sampling,
                                         noise_key_of(p, row, slot_rows.slot),
                                         shared.sums[warp],
                                         workspace.tiles + size_t(row) * num_tiles,
                                         num_tiles};
  const int32_t token = sample_filtered(filtered, shared.filter);
  if (threadIdx.x > 0) return Left::nothing;
  write_candidate(p, row, filtered.sums, sampling.rate(), token < p.vocab_size ? token : 0,
                  filtered.logits.at(token));
  return arrive(workspace, slot_rows);
}

// Rows b, b + gridDim.x, ... belong to CTA b, a warp each; then the CTA turns to what they left.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    finish_kernel(const __grid_constant__ UnmaskParams p,
                  const __grid_constant__ Workspace workspace, int num_tiles) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int warp = threadIdx.x / kWarp, num_rows = num_real_rows(p);
  for (int first = blockIdx.x; first < num_rows; first += gridDim.x * kWarps) {
    const int own_row = first + warp * gridDim.x;
    Left left = Left::nothing;
    if (own_row < num_rows) {
      left = finish_row<T, kVector>(p, workspace, num_tiles, own_row, num_rows, shared);
    }
    if (threadIdx.x % kWarp == 0) shared.left[warp] = left;
    if (!__syncthreads_or(left != Left::nothing)) continue;
    for (int i = 0; i < kWarps; ++i) {
      if (shared.left[i] == Left::filter) {
        left = filter_row<T, kVector>(p, workspace, num_tiles, first + i * gridDim.x, i, shared);
        __syncthreads();  // all have read it
        if (threadIdx.x == 0) shared.left[i] = left;
        __syncthreads();
      }
      if (shared.left[i] == Left::decide) {
        decide(p, shared.slot_rows[i], shared.decide);
        __syncthreads();
      }
    }
    __syncthreads();  // all have read `left`
  }
}

}  // namespace

void launch_finish(const UnmaskParams& params, const Workspace& workspace, bool vector,
                   cudaStream_t stream) {
  const int grid = std::min(params.num_logit_rows, kCtasPerSm * device_properties().num_sms);
  LaunchShape shape{dim3(grid), dim3(kThreads)};
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? finish_kernel<T, true> : finish_kernel<T, false>, shape, stream, params,
           workspace, num_tiles(params.vocab_size));
  });
}

}  // namespace optimus::cuda::unmasking
