// The last part of unmask: the unmasking strategy of a slot, its commits and its window. By one CTA.
#pragma once

#include "kernels/cuda/decode_state.cuh"
#include "kernels/cuda/unmask.cuh"

namespace optimus::cuda::unmasking {

// Rows [begin, begin + count) of one slot.
struct Segment {
  int slot, begin, count;
};

// The rows of `row`'s slot around it. By a warp; complete in every lane.
__device__ __forceinline__ Segment segment_around(const UnmaskParams& p, int row, int slot,
                                                  int num_rows) {
  const int lane = threadIdx.x % kWarp;
  int begin = row, end = row + 1;
  bool more_before = true, more_behind = true;
  while (more_before || more_behind) {
    const int to_before = begin - 1 - lane, to_behind = end + lane;
    const int slot_before = more_before && to_before >= 0 ? __ldcg(p.logit_slots + to_before) : -1;
    const int slot_behind =
        more_behind && to_behind < num_rows ? __ldcg(p.logit_slots + to_behind) : -1;
    const uint32_t before = ~__ballot_sync(0xffffffffu, slot_before == slot);
    const uint32_t behind = ~__ballot_sync(0xffffffffu, slot_behind == slot);
    more_before = before == 0;
    more_behind = behind == 0;
    begin -= more_before ? kWarp : __ffs(before) - 1;
    end += more_behind ? kWarp : __ffs(behind) - 1;
  }
  return {slot, begin, min(end - begin, p.state.block_length)};
}

// The slot's rules and counters. What steps change comes from the L2 cache, here and below: the kernel
// may be at it before it has waited for anything.
struct Rules {
  int quota, denoise_step, block_start, first_output, end_position;
  UnmaskingStrategy strategy;
  float threshold, entropy_bound;

  __device__ Rules(const DecodeState& state, const Segment& rows)
      : denoise_step(__ldcg(state.denoise_step + rows.slot)),
        block_start(__ldcg(state.block_start + rows.slot)),
        first_output(__ldcg(state.first_output + rows.slot)),
        end_position(__ldcg(state.end_position + rows.slot)),
        strategy(static_cast<UnmaskingStrategy>(__ldcg(state.unmasking_strategy + rows.slot))),
        threshold(__ldcg(state.confidence_threshold + rows.slot)),
        entropy_bound(__ldcg(state.entropy_bound + rows.slot)) {
    const int length = state.block_length, steps = __ldcg(state.denoising_steps + rows.slot);
    quota = length / steps + (denoise_step < length % steps ? 1 : 0);
    quota = min(max(quota, 1), rows.count);
  }
};

struct DecideShared {
  float confidence[kMaxBlockLength];  // of the slot's rows
  float entropy[kMaxBlockLength];
  float ordered[kMaxBlockLength];   // entropies, ascending
  int32_t tokens[kMaxBlockLength];  // of the slot's rows
  int32_t offsets[kMaxBlockLength];
  int32_t window_tokens[kMaxBlockLength];  // of the current block
  uint8_t status[2 * kMaxBlockLength];     // the window
  int32_t stop_tokens[kMaxStopTokens];
  int32_t num_known;  // positions of the current block before its first mask
  bool committed[kMaxBlockLength];
  int32_t num_committed;
};

// Over the CTA; every thread gets the sum.
template <class Predicate>
__device__ int count_if(int first, int last, const Predicate& predicate) {
  int count = 0;
#pragma unroll 1
  for (int i = first; i < last; i += kThreads) {
    const int own = i + threadIdx.x;
    count += __syncthreads_count(own < last && predicate(own));
  }
  return count;
}

// What the slot's window holds, and where its rows are in it. Ends without a barrier.
__device__ void load_window(const UnmaskParams& p, const Segment& rows, DecideShared& shared) {
  const int length = p.state.block_length;
  const int64_t window = int64_t(rows.slot) * 2 * length;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * length; i += kThreads) {
    shared.status[i] = __ldcg(p.state.window_status + window + i);
    if (i >= length) shared.window_tokens[i - length] = __ldcg(p.state.window_tokens + window + i);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.offsets[i] = __ldcg(p.logit_offsets + rows.begin + i);
    shared.ordered[i] = INFINITY;
    if (p.out.slots != nullptr) p.out.slots[rows.begin + i] = rows.slot;
    if (p.out.offsets != nullptr) p.out.offsets[rows.begin + i] = shared.offsets[i];
  }
  if (threadIdx.x == 0) shared.num_known = length;
  if (threadIdx.x < kMaxStopTokens) {
    shared.stop_tokens[threadIdx.x] =
        __ldcg(p.state.stop_token_ids + int64_t(rows.slot) * kMaxStopTokens + threadIdx.x);
  }
}

// Candidates that come from other CTAs, so not from the L1 cache. Ends without a barrier.
__device__ void load_candidates(const UnmaskParams& p, const Segment& rows, DecideShared& shared) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.confidence[i] = __ldcg(p.out.confidence + rows.begin + i);
    shared.entropy[i] = __ldcg(p.out.entropy + rows.begin + i);
    shared.tokens[i] = __ldcg(p.out.token_ids + rows.begin + i);
  }
}

// Commits rows by ascending entropy while the running sum stays within the bound, at least one.
__device__ void commit_entropy_bounded(const Segment& rows, const Rules& rules,
                                       DecideShared& shared) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.ordered[rank_of(shared.entropy, 1.0f, i, rows.count)] = shared.entropy[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = shared.ordered[0];
    int count = 1;
    for (; count < rows.count; ++count) {
      total += shared.ordered[count];
      if (total > rules.entropy_bound) break;
    }
    shared.num_committed = count;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.committed[i] = rank_of(shared.entropy, 1.0f, i, rows.count) < shared.num_committed;
  }
}

// The `quota` most confident rows, or with `dynamic` all above the threshold if those are as many.
__device__ void commit_confident(const Segment& rows, const Rules& rules, DecideShared& shared) {
  auto is_above = [&](int i) { return shared.confidence[i] > rules.threshold; };
  const bool enough =
      rules.strategy == kLowConfidenceDynamic && count_if(0, rows.count, is_above) >= rules.quota;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.committed[i] =
        enough ? is_above(i) : rank_of(shared.confidence, -1.0f, i, rows.count) < rules.quota;
  }
}

__device__ void apply_strategy(const Segment& rows, const Rules& rules, DecideShared& shared) {
  if (rules.strategy == kSequential) {
    for (int i = threadIdx.x; i < rows.count; i += kThreads) shared.committed[i] = i < rules.quota;
  } else if (rules.strategy == kEntropyBounded) {
    commit_entropy_bounded(rows, rules, shared);
  } else {
    commit_confident(rows, rules, shared);
  }
  __syncthreads();
}

// Whether the slot's tokens up to its first mask are all that it may have, or hold a stop token.
__device__ bool has_ended(const Rules& rules, const DecideShared& shared) {
  const auto is_last = [&](int i) {
    const int position = rules.block_start + i;
    if (position < rules.first_output) return false;
    bool is_last = position + 1 >= rules.end_position;
#pragma unroll
    for (int k = 0; k < kMaxStopTokens; ++k) {
      is_last |= shared.window_tokens[i] == shared.stop_tokens[k];
    }
    return is_last;
  };
  return count_if(0, shared.num_known, is_last) > 0;
}

// Writes the commits into the window; a block without masks becomes the previous block.
__device__ void update_window(const UnmaskParams& p, const Segment& rows, const Rules& rules,
                              DecideShared& shared) {
  const DecodeState& state = p.state;
  const int length = state.block_length;
  int32_t* tokens = state.window_tokens + int64_t(rows.slot) * 2 * length;
  uint8_t* status = state.window_status + int64_t(rows.slot) * 2 * length;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    const bool committed = shared.committed[i];
    p.out.committed[rows.begin + i] = committed;
    if (!committed) continue;
    shared.window_tokens[shared.offsets[i]] = shared.tokens[i];
    shared.status[length + shared.offsets[i]] = kFresh;
  }
  __syncthreads();
  auto masked = [&](int i) {
    const bool masked = is_masked(shared.status[i]);
    if (masked) atomicMin(&shared.num_known, i - length);
    return masked;
  };
  auto fresh = [&](int i) { return shared.status[i] == kFresh; };
  int num_masked = count_if(length, 2 * length, masked);
  const bool ended = has_ended(rules, shared);
  const bool slides = num_masked == 0;
  int num_fresh = count_if(slides ? length : 0, 2 * length, fresh);
#pragma unroll 1
  for (int i = threadIdx.x; i < length; i += kThreads) {
    if (slides) tokens[i] = shared.window_tokens[i];
    tokens[length + i] = slides ? -1 : shared.window_tokens[i];
    status[i] = shared.status[slides ? length + i : i];
    status[length + i] = slides ? uint8_t(kAbsent) : shared.status[length + i];
  }
  if (slides) num_masked = length;
  if (threadIdx.x > 0) return;
  if (slides) state.block_start[rows.slot] = rules.block_start + length;
  state.denoise_step[rows.slot] = slides ? 0 : rules.denoise_step + 1;
  state.ended[rows.slot] = ended;
  p.num_fresh[rows.slot] = num_fresh;
  p.num_masked[rows.slot] = num_masked;
}

// Of the finished rows of a slot, when all of `shared` is loaded. It is free for other use after the
// next __syncthreads().
__device__ void decide(const UnmaskParams& p, const Segment& rows, const Rules& rules,
                       DecideShared& shared) {
  __syncthreads();
  apply_strategy(rows, rules, shared);
  update_window(p, rows, rules, shared);
}

}  // namespace optimus::cuda::unmasking
