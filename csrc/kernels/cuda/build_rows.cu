// Expands the plan of a step into rows, on the device. See BuildRowsParams for the rules.
//
// One cluster of CTAs (one CTA before sm_90). Every CTA counts the rows of all sequences and sums
// them up for itself, a thread a sequence; after the cluster's barrier, since writing moves the
// statuses that counting reads, the CTAs share the writing: a warp a decode sequence, a thread a
// prefill row or padding entry.
#include <cooperative_groups.h>

#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/decode_state.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 1024;  // and the most sequences of a step
constexpr int kWarps = kThreads / kWarp;
constexpr int kCluster = 8;

// A sequence's plan, and what counting found.
struct Seq {
  int32_t slot, chunk_length, block_start, prefill_len;
  int32_t num_present;  // positions of the current block with KV during this step
  bool refresh;
  bool feeds_previous;  // the previous block has rows
  bool decodes;         // has decode rows
};

struct Shared {
  Seq seqs[kThreads];
  int32_t first_row[kThreads + 1];
  int32_t first_logit_row[kThreads + 1];
  int2 warp_sums[kWarps];
};

__device__ __forceinline__ uint8_t* window_status(const DecodeState& state, int slot) {
  return state.window_status + int64_t(slot) * 2 * state.block_length;
}

// Where a thread or warp stands among those that share the writing.
struct Share {
  int cta, num_ctas;
  __device__ int thread() const { return cta * kThreads + threadIdx.x; }
  __device__ int num_threads() const { return num_ctas * kThreads; }
};
__device__ __forceinline__ Share this_share() { return {int(blockIdx.x), int(gridDim.x)}; }

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

__device__ void write_row(const BuildRowsParams& p, int row, int slot, int32_t token,
                          int32_t position, int32_t kv_limit) {
  if (row >= p.max_rows) return;
  const int32_t* pages = p.state.page_table + int64_t(slot) * p.state.page_table_stride;
  p.rows.token_ids[row] = token;
  p.rows.positions[row] = position;
  p.rows.kv_limits[row] = kv_limit;
  p.rows.kv_slots[row] = pages[position / p.page_size] * p.page_size + position % p.page_size;
}

__device__ void write_logit_row(const BuildRowsParams& p, int logit_row, int row, int slot,
                                int32_t offset) {
  if (logit_row >= p.max_rows) return;
  p.rows.logit_rows[logit_row] = row;
  p.rows.logit_slots[logit_row] = slot;
  p.rows.logit_offsets[logit_row] = offset;
}

// ---------------------------------------------------------------------------------------- counting

// Rows and logits rows of a sequence. By one thread; reads 8 statuses at a time.
__device__ int2 count_rows(const BuildRowsParams& p, int index, Seq& seq) {
  seq.slot = p.slots[index];
  seq.chunk_length = p.chunk_lengths[index];
  seq.prefill_len = p.prefill_lens[index];
  seq.refresh = p.refresh[index];
  seq.feeds_previous = false;
  seq.block_start = p.state.block_start[seq.slot];
  seq.decodes = false;
  if (seq.prefill_len > 0) return make_int2(seq.prefill_len, 0);
  const bool ended = p.state.ended[seq.slot];  // looked at last: the statuses come meanwhile
  seq.decodes = !ended;
  if (p.mode == RowMode::ar) return ended ? make_int2(0, 0) : make_int2(1, 1);
  const int length = p.state.block_length;
  const uint8_t* status = window_status(p.state, seq.slot);
  const int chunk_length = seq.chunk_length;
  int num_fresh_before = 0, num_fresh = 0, num_masks = 0, num_present = 0;
  auto visit = [&](int i, uint8_t s) {
    if (i < length) {
      num_fresh_before += s == kFresh;
      return;
    }
    bool is_row =
        p.mode == RowMode::block || s == kFresh || (is_masked(s) && num_masks < chunk_length);
    num_fresh += s == kFresh || s == kCached;
    if (p.mode == RowMode::chunk && s == kCached) --num_fresh;
    num_masks += is_masked(s);
    if (is_row || s != kAbsent) num_present = i - length + 1;
  };
  if (length % 4 == 0 && reinterpret_cast<uintptr_t>(status) % 8 == 0) {
    const uint2* words = reinterpret_cast<const uint2*>(status);
#pragma unroll 4
    for (int i = 0; i < 2 * length; i += 8) {
      uint2 eight = words[i / 8];
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(i + j, eight.x >> (8 * j) & 0xff);
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(i + 4 + j, eight.y >> (8 * j) & 0xff);
    }
  } else {
    for (int i = 0; i < 2 * length; ++i) visit(i, status[i]);
  }
  if (ended) return make_int2(0, 0);
  seq.num_present = num_present;
  seq.feeds_previous = num_fresh_before > 0;
  int before = num_fresh_before > 0 && seq.refresh ? length : num_fresh_before;
  int masks = p.mode == RowMode::block ? num_masks : min(num_masks, max(chunk_length, 0));
  return make_int2(before + num_fresh + masks, masks);
}

// Exclusive sums over the sequences, into shared memory.
__device__ void sum_up(int2 count, Shared& shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int2 sum = count;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    int rows = __shfl_up_sync(0xffffffffu, sum.x, offset);
    int logit_rows = __shfl_up_sync(0xffffffffu, sum.y, offset);
    if (lane >= offset) sum.x += rows, sum.y += logit_rows;
  }
  if (lane == kWarp - 1) shared.warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    sum.x += shared.warp_sums[w].x;
    sum.y += shared.warp_sums[w].y;
  }
  shared.first_row[threadIdx.x + 1] = sum.x;
  shared.first_logit_row[threadIdx.x + 1] = sum.y;
  if (threadIdx.x == 0) shared.first_row[0] = shared.first_logit_row[0] = 0;
  __syncthreads();
}

// ----------------------------------------------------------------------------------------- writing

__device__ __forceinline__ int rank_of(uint32_t votes) {
  return __popc(votes & ((1u << threadIdx.x % kWarp) - 1));
}

// By a warp. Positions are visited 32 at a time; ballots give each row its place.
__device__ int write_previous_block(const BuildRowsParams& p, const Seq& seq, int row) {
  const int length = p.state.block_length, lane = threadIdx.x % kWarp, slot = seq.slot;
  const int32_t start = seq.block_start;
  const int32_t* tokens = p.state.window_tokens + int64_t(slot) * 2 * length;
  uint8_t* status = window_status(p.state, slot);
  for (int first = 0; first < length; first += kWarp) {
    int i = first + lane;
    bool is_row = i < length && (seq.refresh || status[i] == kFresh);
    uint32_t votes = __ballot_sync(0xffffffffu, is_row);
    if (is_row) {
      write_row(p, row + rank_of(votes), slot, tokens[i], start - length + i, start);
      status[i] = kCached;
    }
    row += __popc(votes);
  }
  return row;
}

__device__ void write_current_block(const BuildRowsParams& p, const Seq& seq, int row,
                                    int logit_row) {
  const int length = p.state.block_length, lane = threadIdx.x % kWarp, slot = seq.slot;
  const int32_t start = seq.block_start;
  const int32_t* tokens = p.state.window_tokens + (int64_t(slot) * 2 + 1) * length;
  uint8_t* status = window_status(p.state, slot) + length;
  int masks_before = 0;
  for (int first = 0; first < length; first += kWarp) {
    int i = first + lane;
    uint8_t s = i < length ? status[i] : uint8_t(kCached);
    bool masked = is_masked(s);
    uint32_t mask_votes = __ballot_sync(0xffffffffu, masked);
    int mask_rank = masks_before + rank_of(mask_votes);
    bool is_row = i < length && (p.mode == RowMode::block || s == kFresh ||
                                 (masked && mask_rank < seq.chunk_length));
    uint32_t row_votes = __ballot_sync(0xffffffffu, is_row);
    if (is_row) {
      int at = row + rank_of(row_votes);
      write_row(p, at, slot, masked ? p.mask_token_id : tokens[i], start + i,
                start + seq.num_present);
      if (masked) {
        status[i] = kPresent;
        write_logit_row(p, logit_row + mask_rank, at, slot, i);
      } else if (p.mode == RowMode::chunk) {
        status[i] = kCached;
      }
    }
    row += __popc(row_votes);
    masks_before += __popc(mask_votes);
  }
}

// A warp: the rows of a decode sequence, and any sequence's page table.
__device__ void write_sequence(const BuildRowsParams& p, int index, const Shared& shared) {
  const Seq& seq = shared.seqs[index];
  const int lane = threadIdx.x % kWarp, stride = p.state.page_table_stride;
  const int32_t* pages = p.state.page_table + int64_t(seq.slot) * stride;
#pragma unroll 4
  for (int i = lane; i < stride; i += kWarp) {
    p.rows.page_table[int64_t(index) * stride + i] = pages[i];
  }
  if (!seq.decodes) return;
  int row = shared.first_row[index], logit_row = shared.first_logit_row[index];
  if (p.mode != RowMode::ar) {
    if (seq.feeds_previous) row = write_previous_block(p, seq, row);
    write_current_block(p, seq, row, logit_row);
  } else if (lane == 0) {
    // A window of two positions, B = 1: the last known token comes first.
    const int32_t* tokens = p.state.window_tokens + int64_t(seq.slot) * 2 * p.state.block_length;
    write_row(p, row, seq.slot, tokens[0], seq.block_start - 1, seq.block_start);
    write_logit_row(p, logit_row, row, seq.slot, 0);
    window_status(p.state, seq.slot)[0] = kCached;
  }
}

// The last sequence that starts at or before `row`, empty ones excluded.
__device__ int find_sequence(const Shared& shared, int num_seqs, int row) {
  int low = 0, high = num_seqs;  // first_row[low] <= row < first_row[high]
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (shared.first_row[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ void write_prefill(const BuildRowsParams& p, const Share& share, const Shared& shared) {
  const int num_rows = shared.first_row[p.num_seqs], length = p.state.block_length;
  for (int row = share.thread(); row < num_rows; row += share.num_threads()) {
    int seq = find_sequence(shared, p.num_seqs, row);
    if (shared.seqs[seq].prefill_len == 0) continue;
    int i = row - shared.first_row[seq];
    int32_t position = p.prefill_starts[seq] + i;
    int32_t kv_limit = p.prefill_causal ? position + 1 : (position / length + 1) * length;
    write_row(p, row, shared.seqs[seq].slot, p.prefill_tokens[p.prefill_offsets[seq] + i], position,
              kv_limit);
  }
}

__device__ void write_padding(const BuildRowsParams& p, const Share& share, int num_rows,
                              int num_logit_rows) {
  for (int i = share.thread(); i < p.pad_rows_to; i += share.num_threads()) {
    if (i >= num_rows) {
      p.rows.token_ids[i] = 0;
      p.rows.positions[i] = 0;
      p.rows.kv_limits[i] = 1;
      p.rows.kv_slots[i] = -1;
    }
    if (i >= num_logit_rows) {
      p.rows.logit_rows[i] = 0;
      p.rows.logit_slots[i] = -1;
      p.rows.logit_offsets[i] = 0;
    }
  }
  const int64_t stride = p.state.page_table_stride, end = stride * max(p.pad_seqs_to, p.num_seqs);
  for (int64_t i = stride * p.num_seqs + share.thread(); i < end; i += share.num_threads()) {
    p.rows.page_table[i] = 0;
  }
}

// In one write: a fence between two would cost a way to the host and back.
__device__ void tell_host(uint64_t* counts, int num_rows, int num_logit_rows) {
  const uint64_t both = uint64_t(num_logit_rows) << 32 | uint32_t(num_rows);
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(counts), "l"(both) : "memory");
}

__global__ void __launch_bounds__(kThreads, 1) build_rows_kernel(BuildRowsParams p) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const Share share = this_share();
  const int thread = threadIdx.x;
  sum_up(thread < p.num_seqs ? count_rows(p, thread, shared.seqs[thread]) : make_int2(0, 0),
         shared);
  const int num_rows = shared.first_row[p.num_seqs];
  const int num_logit_rows = shared.first_logit_row[p.num_seqs];
  if (share.cta == 0) {
    if (thread == 0) {
      p.rows.counts[0] = num_rows;
      p.rows.counts[1] = num_logit_rows;
      p.rows.cu_seqlens_q[0] = 0;
      if (p.host_counts != nullptr) tell_host(p.host_counts, num_rows, num_logit_rows);
    }
    for (int seq = thread; seq < max(p.num_seqs, p.pad_seqs_to); seq += kThreads) {
      p.rows.cu_seqlens_q[seq + 1] = seq < p.num_seqs ? shared.first_row[seq + 1] : num_rows;
    }
  }
  cluster_barrier();
  for (int seq = share.thread() / kWarp; seq < p.num_seqs; seq += share.num_ctas * kWarps) {
    write_sequence(p, seq, shared);
  }
  write_prefill(p, share, shared);
  write_padding(p, share, num_rows, num_logit_rows);
}

}  // namespace

void build_rows(const BuildRowsParams& p, cudaStream_t stream) {
  OPTIMUS_CHECK(p.num_seqs >= 0 && p.num_seqs <= kThreads, "[build_rows] num_seqs must be in 0..",
                kThreads, ", got ", p.num_seqs);
  OPTIMUS_CHECK(p.state.block_length >= 1 && p.state.block_length <= kMaxBlockLength,
                "[build_rows] block_length must be in 1..", kMaxBlockLength, ", got ",
                p.state.block_length);
  OPTIMUS_CHECK(p.pad_rows_to >= 0 && p.pad_rows_to <= p.max_rows,
                "[build_rows] pad_rows_to must be in 0..", p.max_rows, " (max_rows), got ",
                p.pad_rows_to);
  LaunchShape shape{dim3(1), dim3(kThreads)};
  if (device_properties().code >= 90) {
    // A small step fits into one CTA; a large one has a warp for every few sequences.
    int work = std::max(p.num_seqs * kWarp, p.pad_rows_to);
    while (shape.cluster < kCluster && shape.cluster * kThreads < work) shape.cluster *= 2;
    shape.grid = dim3(shape.cluster);
  }
  launch(build_rows_kernel, shape, stream, p);
}

}  // namespace optimus::cuda
