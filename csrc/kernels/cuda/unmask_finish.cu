// Second kernel of unmask: candidates and decisions. The CTA of a slot's first row does all of the slot,
// a warp a row, so that nobody waits for other CTAs; but where the slot samples from a top-k or top-p
// set, each row has a CTA, and the one that finishes last decides.
//
// It is short, a chain of latencies: it reads the decode state while the scan still runs, and the sums
// of tiles as they come, for the end of a kernel and the start of the next cost a microsecond more.
#include "kernels/cuda/unmask.cuh"
#include "kernels/cuda/unmask_decide.cuh"
#include "kernels/cuda/unmask_filter.cuh"

namespace optimus::cuda::unmasking {
namespace {

// Tiles that a lane reads at once: all of a vocabulary of 160 K.
constexpr int kTilesAtOnce = 5;

struct Shared {
  bool decides;  // the last of the slot's rows is done
  union {
    FilterShared filter;
    DecideShared decide;
  };
};

// Makes the sums relative to a larger logit, or to the same: only then the argmax stays.
__device__ __forceinline__ void move_reference(float max, float rate, RowSums::Head& sums) {
  // Finite: times no sum at all it is nothing.
  const float shift = fmaxf(reference_of(sums.max, rate) - reference_of(max, rate), kLowest);
  const float factor = exp2_fast(shift);
  sums.weighted = (sums.weighted + sums.sum * shift) * factor;
  sums.sum *= factor;
  if (sums.max < max) sums.argmax = INT32_MAX;
  sums.max = max;
}

// The lane's next tiles' heads or tails; those of none stay. kAwaits: as soon as all of them are there;
// else the scan is done, and they are kept in the L1 cache for those who read them again.
template <bool kAwaits, class Half>
__device__ __forceinline__ void read_tiles(const RowSums* tiles, Half RowSums::*half, int first,
                                           int num_tiles, Half (&halves)[kTilesAtOnce]) {
  const auto is_missing = [&](int k) {
    return first + k * kWarp < num_tiles && !is_there(halves[k]);
  };
  bool more;
  do {
    more = false;
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) {
      const Half* at = &(tiles[first + k * kWarp].*half);
      if (!is_missing(k)) continue;
      kAwaits ? look_at(at, halves[k]) : void(halves[k] = *at);
    }
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) more |= kAwaits && is_missing(k);
  } while (more);
}

// Adds the tiles' sums to `sums`, lane by lane: relative to the largest of the lane's tiles.
template <bool kAwaits>
__device__ __forceinline__ void add_lane_tiles(const RowSums* tiles, int num_tiles, float rate,
                                               RowSums& sums) {
#pragma unroll 1
  for (int first = threadIdx.x % kWarp; first < num_tiles; first += kTilesAtOnce * kWarp) {
    RowSums::Head heads[kTilesAtOnce];
    float max = sums.head.max;
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) heads[k] = {kLowest, 0, 0, INT32_MAX};
    read_tiles<kAwaits>(tiles, &RowSums::head, first, num_tiles, heads);
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) max = fmaxf(max, heads[k].max);
    move_reference(max, rate, sums.head);
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) {
      move_reference(max, rate, heads[k]);
      sums.head.sum += heads[k].sum;
      sums.head.weighted += heads[k].weighted;
      sums.head.argmax = min(sums.head.argmax, heads[k].argmax);
    }
  }
}

// Of the tiles of a sampled row, relative to the row's largest logit: the plain sum, and the best
// column under noise. Lane by lane.
template <bool kAwaits>
__device__ __forceinline__ void add_lane_tails(const RowSums* tiles, int num_tiles, RowSums& sums) {
  const float reference = reference_of(sums.head.max, kLog2E);
#pragma unroll 1
  for (int first = threadIdx.x % kWarp; first < num_tiles; first += kTilesAtOnce * kWarp) {
    RowSums::Tail tails[kTilesAtOnce];
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) tails[k] = {0, -INFINITY, INT32_MAX, kLowest};
    read_tiles<kAwaits>(tiles, &RowSums::tail, first, num_tiles, tails);
#pragma unroll
    for (int k = 0; k < kTilesAtOnce; ++k) {
      const RowSums::Tail& tail = tails[k];
      sums.tail.sum += tail.sum * exp2_fast(reference_of(tail.max, kLog2E) - reference);
      if (is_better(tail.noisy, tail.sampled, sums.tail.noisy, sums.tail.sampled)) {
        sums.tail.noisy = tail.noisy;
        sums.tail.sampled = tail.sampled;
      }
    }
  }
}

// What the row's tiles add up to, by a warp; complete in every lane.
template <bool kAwaits>
__device__ __forceinline__ RowSums add_tiles(const RowSums* tiles, int num_tiles,
                                             const Sampling& sampling) {
  RowSums sums{{kLowest, 0, 0, INT32_MAX}, {0, -INFINITY, INT32_MAX, kLowest}};
  RowSums::Head& head = sums.head;
  add_lane_tiles<kAwaits>(tiles, num_tiles, sampling.rate(), sums);
  move_reference(warp_max(head.max), sampling.rate(), head);
  head.sum = reduce_lanes(head.sum, Sum());
  head.weighted = reduce_lanes(head.weighted, Sum());
  head.argmax = warp_min(head.argmax);
  sums.tail.sum = head.sum;
  if (!sampling.sampled) return sums;
  sums.tail.sum = 0;
  add_lane_tails<kAwaits>(tiles, num_tiles, sums);
  sums.tail.sum = reduce_lanes(sums.tail.sum, Sum());
  const float noisy = warp_max(sums.tail.noisy);
  sums.tail.sampled = warp_min(sums.tail.noisy == noisy ? sums.tail.sampled : INT32_MAX);
  sums.tail.noisy = noisy;
  return sums;
}

// For the next call, which may have other things at these places.
__device__ __forceinline__ void clear_tiles(RowSums* tiles, int num_tiles, int first, int step) {
#pragma unroll 1
  for (int index = first; index < num_tiles; index += step) tiles[index] = {};
}

struct Candidate {
  int32_t token;
  float confidence, entropy;
};

// By one thread: writes the row's candidate. The logit is the row's largest, or any where the token is
// none: not a number, everywhere.
__device__ __forceinline__ Candidate write_candidate(const UnmaskParams& p, int row,
                                                     const RowSums& sums, float rate, int32_t token,
                                                     float logit) {
  // The exponents that the sums saw: a confidence never exceeds 1.
  const float exponent = exponent_of(logit, rate, reference_of(sums.head.max, rate));
  const float plain_exponent = exponent_of(logit, kLog2E, reference_of(sums.head.max, kLog2E));
  const Candidate candidate{token < p.vocab_size ? token : 0, exp2_fast(exponent) / sums.head.sum,
                            logf(sums.head.sum) - kLn2 * sums.head.weighted / sums.head.sum};
  p.out.token_ids[row] = candidate.token;
  p.out.logprob[row] = kLn2 * plain_exponent - logf(sums.tail.sum);
  p.out.confidence[row] = candidate.confidence;
  p.out.entropy[row] = candidate.entropy;
  return candidate;
}

// By the thread that wrote a candidate: whether it is the last of its slot. Then the others' are
// visible.
__device__ bool arrive(const Workspace& workspace, const Segment& slot_rows) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(workspace.arrived + slot_rows.begin)
               : "memory");
  const bool is_last = before + 1 == uint32_t(slot_rows.count);
  if (is_last) workspace.arrived[slot_rows.begin] = 0;
  return is_last;
}

// By the CTA of a row.
template <class T, bool kVector>
__device__ __noinline__ void finish_filtered_row(const UnmaskParams& p, const Workspace& workspace,
                                                 int num_tiles, int row, Segment slot_rows,
                                                 Sampling sampling, Shared& shared) {
  RowSums* tiles = workspace.tiles + size_t(row) * num_tiles;
  wait_until_previous_is_done();
  const uint64_t key = noise_key_of(p, row, slot_rows.slot);
  const FilteredRow<T, kVector> filtered{LogitsRow<T, kVector>(p, row),
                                         sampling,
                                         key,
                                         add_tiles<false>(tiles, num_tiles, sampling),
                                         tiles,
                                         num_tiles};
  const int32_t token = sample_filtered(filtered, shared.filter);
  if (threadIdx.x == 0) {
    write_candidate(p, row, filtered.sums, sampling.rate(), token, filtered.logits.at(token));
    shared.decides = arrive(workspace, slot_rows);
  }
  __syncthreads();
  clear_tiles(tiles, num_tiles, threadIdx.x, kThreads);
  if (!shared.decides) return;
  load_window(p, slot_rows, shared.decide);
  load_candidates(p, slot_rows, shared.decide);
  decide(p, slot_rows, Rules(p.state, slot_rows), shared.decide);
}

__device__ __forceinline__ void await_tile(const RowSums* tile) {
  RowSums::Head head;
  do {
    look_at(&tile->head, head);
  } while (!is_there(head));
}

// By the CTA of a slot's first row, if each row's tiles say it all.
template <class T, bool kVector>
__device__ __forceinline__ void finish_slot(const UnmaskParams& p, const Workspace& workspace,
                                            int num_tiles, const Segment& rows,
                                            const Sampling& sampling, const Ranges& ranges,
                                            DecideShared& shared) {
  const Rules rules(p.state, rows);
  load_window(p, rows, shared);
  for (int i = threadIdx.x / kWarp; i < rows.count; i += kWarps) {
    const int row = rows.begin + i;
    RowSums* tiles = workspace.tiles + size_t(row) * num_tiles;
    const uint32_t first = row * num_tiles;
    await_tile(workspace.tiles + last_in_time(ranges, first, first + num_tiles));
    const RowSums sums = add_tiles<true>(tiles, num_tiles, sampling);
    if (threadIdx.x % kWarp == 0) {
      const int32_t token = sampling.sampled ? sums.tail.sampled : sums.head.argmax;
      const float logit =
          sampling.sampled ? LogitsRow<T, kVector>(p, row).at(token) : sums.head.max;
      const Candidate candidate = write_candidate(p, row, sums, sampling.rate(), token, logit);
      shared.tokens[i] = candidate.token;
      shared.confidence[i] = candidate.confidence;
      shared.entropy[i] = candidate.entropy;
    }
    clear_tiles(tiles, num_tiles, threadIdx.x % kWarp, kWarp);
  }
  decide(p, rows, rules, shared);
}

// CTA b is row b's.
template <class T, bool kVector>
__global__ void __maxnreg__(kFinishRegisters<T>)
    finish_kernel(const __grid_constant__ UnmaskParams p,
                  const __grid_constant__ Workspace workspace, int num_tiles, int num_scan_ctas) {
  __shared__ Shared shared;
  let_next_kernel_start();
  const int row = blockIdx.x, num_rows = num_real_rows(p);
  const int slot = row < num_rows ? __ldcg(p.logit_slots + row) : -1;
  if (slot >= 0) {
    const Sampling sampling(p, slot);
    const Segment rows = segment_around(p, row, slot, num_rows);
    if (sampling.filtered()) {
      finish_filtered_row<T, kVector>(p, workspace, num_tiles, row, rows, sampling, shared);
    } else if (rows.begin == row) {
      finish_slot<T, kVector>(p, workspace, num_tiles, rows, sampling,
                              Ranges(num_rows * num_tiles, num_scan_ctas), shared.decide);
    }
  }
  // This kernel must not be complete before the scan is, whatever it has seen of it; all others make room for the next CTAs.
  if (row == 0) wait_until_previous_is_done();
}

}  // namespace

void launch_finish(const UnmaskParams& params, const Workspace& workspace, bool vector,
                   cudaStream_t stream) {
  LaunchShape shape{dim3(params.num_logit_rows), dim3(kThreads)};
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(vector ? finish_kernel<T, true> : finish_kernel<T, false>, shape, stream, params,
           workspace, num_tiles(params.vocab_size),
           scan_ctas(params.num_logit_rows, params.vocab_size));
  });
}

}  // namespace optimus::cuda::unmasking
