// From logits to commits: scan (all logits once), finish (a candidate per row), and here decide: the
// unmasking strategy of each slot, its commits and its window. See UnmaskParams for the rules.
#include "kernels/cuda/unmask.cuh"

#include "core/check.h"
#include "kernels/cuda/decode_state.cuh"

namespace optimus::cuda {
namespace unmasking {
namespace {

constexpr int kThreads = 128;

// Rows [begin, begin + count) of one slot.
struct Segment {
  int slot, begin, count;
};

// The slot's rules, read at once in the beginning.
struct Rules {
  int steps, denoise_step;
  UnmaskingStrategy strategy;
  float threshold, entropy_bound;

  __device__ Rules(const DecodeState& state, int slot)
      : steps(state.denoising_steps[slot]),
        denoise_step(state.denoise_step[slot]),
        strategy(static_cast<UnmaskingStrategy>(state.unmasking_strategy[slot])),
        threshold(state.confidence_threshold[slot]),
        entropy_bound(state.entropy_bound[slot]) {}
};

struct Shared {
  float confidence[kMaxBlockLength];  // of the slot's rows
  float entropy[kMaxBlockLength];
  float ordered[kMaxBlockLength];   // entropies, ascending
  int32_t tokens[kMaxBlockLength];  // of the slot's rows
  int32_t offsets[kMaxBlockLength];
  uint8_t status[2 * kMaxBlockLength];  // the window
  bool committed[kMaxBlockLength];
  int32_t end;
  int32_t num_committed;
  int32_t warp_counts[kThreads / kWarp];
};

// Over the CTA; every thread gets the sum.
template <class Predicate>
__device__ int count_if(int first, int last, Shared& shared, const Predicate& predicate) {
  int32_t count = 0;
  for (int i = first + threadIdx.x; i < last; i += kThreads) count += predicate(i);
  count = reduce_block(count, shared.warp_counts, Sum());
  __syncthreads();
  return count;
}

__device__ int count_rows(const UnmaskParams& p, int slot, int begin, Shared& shared) {
  const int most = min(begin + p.state.block_length, p.num_logit_rows);
  if (threadIdx.x == 0) shared.end = most;
  __syncthreads();
  for (int i = begin + 1 + threadIdx.x; i < most; i += kThreads) {
    if (slot_of_row(p, i) != slot) atomicMin(&shared.end, i);
  }
  __syncthreads();
  return shared.end - begin;
}

// What the slot's window and its rows hold. Row i and position i are a thread's, before they are
// anyone's.
__device__ void load(const UnmaskParams& p, const Segment& rows, Shared& shared) {
  const int length = p.state.block_length;
  const uint8_t* status = p.state.window_status + int64_t(rows.slot) * 2 * length;
  for (int i = threadIdx.x; i < 2 * length; i += kThreads) shared.status[i] = status[i];
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.confidence[i] = p.out.confidence[rows.begin + i];
    shared.entropy[i] = p.out.entropy[rows.begin + i];
    shared.tokens[i] = p.out.token_ids[rows.begin + i];
    shared.offsets[i] = p.logit_offsets[rows.begin + i];
    shared.ordered[i] = INFINITY;
  }
  __syncthreads();
}

// How many rows come before row i by `keys` times `sign`, the lower position first among equals.
__device__ int rank_of(const float* keys, float sign, int i, int count) {
  const float own = sign * keys[i];
  int rank = 0;
  for (int j = 0; j < count; ++j) {
    const float other = sign * keys[j];
    rank += other < own || (other == own && j < i);
  }
  return rank;
}

// Commits rows by ascending entropy while the running sum stays within the bound, at least one.
__device__ void commit_entropy_bounded(const Segment& rows, const Rules& rules, Shared& shared) {
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
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.committed[i] = rank_of(shared.entropy, 1.0f, i, rows.count) < shared.num_committed;
  }
}

// The `quota` most confident rows, or with `dynamic` all above the threshold if those are as many.
__device__ void commit_confident(const Segment& rows, const Rules& rules, int quota,
                                 Shared& shared) {
  auto is_above = [&](int i) { return shared.confidence[i] > rules.threshold; };
  const bool enough =
      rules.strategy == kLowConfidenceDynamic && count_if(0, rows.count, shared, is_above) >= quota;
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    shared.committed[i] =
        enough ? is_above(i) : rank_of(shared.confidence, -1.0f, i, rows.count) < quota;
  }
}

__device__ void apply_strategy(const UnmaskParams& p, const Segment& rows, const Rules& rules,
                               Shared& shared) {
  const int length = p.state.block_length;
  int quota = length / rules.steps + (rules.denoise_step < length % rules.steps ? 1 : 0);
  quota = min(max(quota, 1), rows.count);
  if (rules.strategy == kSequential) {
    for (int i = threadIdx.x; i < rows.count; i += kThreads) shared.committed[i] = i < quota;
  } else if (rules.strategy == kEntropyBounded) {
    commit_entropy_bounded(rows, rules, shared);
  } else {
    commit_confident(rows, rules, quota, shared);
  }
  __syncthreads();
}

// Writes the commits into the window; a block without masks becomes the previous block.
__device__ void update_window(const UnmaskParams& p, const Segment& rows, const Rules& rules,
                              Shared& shared) {
  const DecodeState& state = p.state;
  const int length = state.block_length;
  int32_t* tokens = state.window_tokens + int64_t(rows.slot) * 2 * length;
  uint8_t* status = state.window_status + int64_t(rows.slot) * 2 * length;
  for (int i = threadIdx.x; i < rows.count; i += kThreads) {
    const bool committed = shared.committed[i];
    p.out.committed[rows.begin + i] = committed;
    if (!committed) continue;
    const int at = length + shared.offsets[i];
    tokens[at] = shared.tokens[i];
    shared.status[at] = kFresh;
  }
  __syncthreads();
  auto masked = [&](int i) { return is_masked(shared.status[i]); };
  auto fresh = [&](int i) { return shared.status[i] == kFresh; };
  int num_masked = count_if(length, 2 * length, shared, masked);
  const bool slides = num_masked == 0;
  int num_fresh = count_if(slides ? length : 0, 2 * length, shared, fresh);
  // Position i of both blocks belongs to one thread.
  for (int i = threadIdx.x; i < length; i += kThreads) {
    if (slides) {
      tokens[i] = tokens[length + i];
      tokens[length + i] = -1;
    }
    status[i] = shared.status[slides ? length + i : i];
    status[length + i] = slides ? uint8_t(kAbsent) : shared.status[length + i];
  }
  if (slides) num_masked = length;
  if (threadIdx.x > 0) return;
  if (slides) state.block_start[rows.slot] += length;
  state.denoise_step[rows.slot] = slides ? 0 : rules.denoise_step + 1;
  p.num_fresh[rows.slot] = num_fresh;
  p.num_masked[rows.slot] = num_masked;
}

// Grid: rows; the CTA of a slot's first row works for the slot.
__global__ void __launch_bounds__(kThreads) decide_kernel(UnmaskParams p) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const int row = blockIdx.x;
  const int slot = slot_of_row(p, row);
  if (slot < 0 || (row > 0 && p.logit_slots[row - 1] == slot)) return;
  const Rules rules(p.state, slot);
  const Segment rows{slot, row, count_rows(p, slot, row, shared)};
  load(p, rows, shared);
  apply_strategy(p, rows, rules, shared);
  update_window(p, rows, rules, shared);
}

}  // namespace

void launch_decide(const UnmaskParams& params, cudaStream_t stream) {
  launch(decide_kernel, {dim3(params.num_logit_rows), dim3(kThreads)}, stream, params);
}

}  // namespace unmasking

size_t unmask_workspace_bytes(int num_logit_rows, int vocab_size) {
  return sizeof(unmasking::RowSums) * num_logit_rows * unmasking::num_tiles(vocab_size);
}

void unmask(const UnmaskParams& p, cudaStream_t stream) {
  constexpr int kMaxRows = 65535;
  OPTIMUS_CHECK(p.vocab_size > 0, "[unmask] vocab_size must be positive, got ", p.vocab_size);
  OPTIMUS_CHECK(p.logits_stride == 0 || p.logits_stride >= p.vocab_size,
                "[unmask] logits_stride must be 0 or at least vocab_size ", p.vocab_size, ", got ",
                p.logits_stride);
  OPTIMUS_CHECK(p.num_logit_rows >= 0 && p.num_logit_rows <= kMaxRows,
                "[unmask] num_logit_rows must be in 0..", kMaxRows, ", got ", p.num_logit_rows);
  OPTIMUS_CHECK(p.state.block_length >= 1 && p.state.block_length <= kMaxBlockLength,
                "[unmask] block_length must be in 1..", kMaxBlockLength, ", got ",
                p.state.block_length);
  if (p.num_logit_rows == 0) return;
  const size_t needed = unmask_workspace_bytes(p.num_logit_rows, p.vocab_size);
  OPTIMUS_CHECK(p.workspace != nullptr && p.workspace_bytes >= needed,
                "[unmask] workspace must hold ", needed, " bytes, got ",
                p.workspace == nullptr ? 0 : p.workspace_bytes);
  const int stride = p.logits_stride > 0 ? p.logits_stride : p.vocab_size;
  const bool vector = stride % kChunk == 0 && is_aligned(p.logits);
  auto* tiles = static_cast<unmasking::RowSums*>(p.workspace);
  unmasking::launch_scan(p, tiles, vector, stream);
  unmasking::launch_finish(p, tiles, vector, stream);
  unmasking::launch_decide(p, stream);
}

}  // namespace optimus::cuda
