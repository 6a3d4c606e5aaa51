// One consumer warp's arithmetic: 16 packed rows, an online softmax, mma.sync products.
#pragma once

#include "kernels/cuda/block_attention_share.cuh"

namespace optimus::cuda::attention {

// Where a warp's 16 packed rows are: lane l knows row l % 16.
struct Queries {
  int head;   // the row's head of q and of the output (row * num_q_heads + head); -1: no such row
  int limit;  // its kv_limit
};

__device__ __forceinline__ Queries find_queries(const AttentionArgs& args, const Item& item,
                                                int kv_head, int first_packed, int lane) {
  Queries queries = {-1, item.last_limit};
  int packed = first_packed + lane % 16;
  if (packed < item.packed_count) {
    packed += item.packed_begin;
    int row = row_of(args, packed);
    queries.head = (item.row_begin + row) * args.num_q_heads + kv_head * args.group + packed -
                   row * args.group;
    queries.limit = __ldcg(&args.kv_limits[item.row_begin + row]);
  }
  return queries;
}

// Starts copying the rows to `staging`, 16 * head_dim * 2 bytes of shared memory of the warp's own.
// state.take() waits for them.
template <int kHeadDim>
__device__ __forceinline__ void copy_queries(const AttentionArgs& args, const Queries& queries,
                                             uint32_t staging, int lane) {
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes per row
  constexpr int kRowsPerCopy = 32 / kChunks;
#pragma unroll 2
  for (int first = 0; first < 16; first += kRowsPerCopy) {
    int row = first + lane / kChunks, chunk = lane % kChunks;
    int head = __shfl_sync(~0u, queries.head, row);
    ptx::copy_16(staging + row * kHeadDim * 2 + (chunk ^ (row % 8)) * 16,
                 args.q + static_cast<size_t>(max(head, 0)) * kHeadDim + chunk * 8, head >= 0);
  }
}

// One warp's 16 packed rows of a piece: the thread has rows lane / 4 and lane / 4 + 8, and of each
// 8-wide group of columns the two at 2 * (lane % 4) (the mma fragment layout).
template <int kHeadDim>
struct WarpState {
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  // Of raw scores: the largest, or one not far below it; what the sums are relative to. `sum`
  // is this thread's part until finish_sums().
  float max[2], sum[2];
  int limits[2];

  // Takes over what copy_queries() has put on its way.
  __device__ __forceinline__ void take(const Queries& queries, uint32_t staging, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      limits[half] = __shfl_sync(~0u, queries.limit, lane / 4 + half * 8);
      max[half] = -INFINITY;
      sum[half] = 0;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
    }
    ptx::copies_wait();
    __syncwarp();
    int row = lane % 16;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      int chunk = 2 * step + lane / 16;
      ptx::load_matrix_x4(q[step], staging + row * kHeadDim * 2 + (chunk ^ (row % 8)) * 16);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
  }
};

// scores[16 x kKeys] = q k^T for the keys [first_row, first_row + kKeys) of the tile at `k`.
template <int kHeadDim, int kKeys>
__device__ __forceinline__ void score(const WarpState<kHeadDim>& state,
                                      float (&scores)[kKeys / 8][4], uint32_t k, int first_row,
                                      int lane) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = 0;
  }
  int row = first_row + lane % 8 + lane / 16 * 8;
  uint32_t base = k + row * 128;
  int chunk_bit = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    int chunk = step % 4 * 2 + chunk_bit;
    uint32_t address = base + step / 4 * (kTileKeys * 128) + (chunk ^ (row % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      uint32_t b[4];
      ptx::load_matrix_x4(b, address + i * 16 * 128);
      ptx::mma_16x8x16(scores[2 * i], state.q[step], b[0], b[1]);
      ptx::mma_16x8x16(scores[2 * i + 1], state.q[step], b[2], b[3]);
    }
  }
}

template <int kHeadDim, int kKeys>
__device__ __forceinline__ void mask(const WarpState<kHeadDim>& state,
                                     float (&scores)[kKeys / 8][4], int first_key, int lane) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int key = first_key + i * 8 + lane % 4 * 2 + j % 2;
      if (key >= state.limits[j / 2]) scores[i][j] = -INFINITY;
    }
  }
}

// Scores become probabilities relative to state.max, and state.sum follows. state.max follows the running
// maximum only when that has grown by more than kSlack: probabilities up to 2^kSlack cost no accuracy,
// and most tiles neither wait for the row's other threads nor rescale what there is. Returns, the same
// in all threads of the warp, whether the output has to follow: then by rescale() with `factors`. A row
// that need not move has the factor 1, so its result does not depend on the other rows of the warp;
// before a row's first key there is nothing to rescale.
template <int kHeadDim, int kGroups>
__device__ __forceinline__ bool advance_softmax(WarpState<kHeadDim>& state,
                                                float (&scores)[kGroups][4], float scale_log2,
                                                float (&factors)[2]) {
  constexpr float kSlack = 8;
  // Eight chains side by side, since within one each step waits for the one before.
  float chains[2][4], largest[2];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      chains[i % 2][j] = i < 2 ? scores[i][j] : fmaxf(chains[i % 2][j], scores[i][j]);
    }
  }
  bool moved = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = fmaxf(fmaxf(chains[0][2 * half], chains[0][2 * half + 1]),
                          fmaxf(chains[1][2 * half], chains[1][2 * half + 1]));
    moved |= largest[half] * scale_log2 > state.max[half] * scale_log2 + kSlack;
  }
  bool rescales = false;
  if (__any_sync(~0u, moved)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = state.max[half];
      float row = largest[half];
      row = fmaxf(row, __shfl_xor_sync(~0u, row, 1));
      row = fmaxf(row, __shfl_xor_sync(~0u, row, 2));
      if (row * scale_log2 > old * scale_log2 + kSlack) state.max[half] = row;
      rescales |= old != -INFINITY && state.max[half] != old;
      factors[half] =
          old == -INFINITY ? 0.0f : ptx::exp2_approx((old - state.max[half]) * scale_log2);
      state.sum[half] *= factors[half];
    }
    rescales = __any_sync(~0u, rescales);
  }
  float base[2], sums[4] = {state.sum[0], 0, state.sum[1], 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    base[half] = state.max[half] == -INFINITY ? 0.0f : state.max[half] * scale_log2;
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i][j] = ptx::exp2_approx(scores[i][j] * scale_log2 - base[j / 2]);
      sums[j] += scores[i][j];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) state.sum[half] = sums[2 * half] + sums[2 * half + 1];
  return rescales;
}

template <int kHeadDim>
__device__ __forceinline__ void rescale(WarpState<kHeadDim>& state, const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state.out[i][j] *= factors[j / 2];
  }
}

// Probabilities as the left operand of the product with V: 16 keys per step.
__device__ __forceinline__ void pack_step(uint32_t (&a)[4], const float (&low)[4],
                                          const float (&high)[4]) {
  a[0] = ptx::pack_bf16(low[0], low[1]);
  a[1] = ptx::pack_bf16(low[2], low[3]);
  a[2] = ptx::pack_bf16(high[0], high[1]);
  a[3] = ptx::pack_bf16(high[2], high[3]);
}

// out += p v. `keys_left`, counted from first_row: rows of V from there on may hold anything, even
// NaN, which a zero probability would not cancel; they are replaced by zeros.
template <int kHeadDim, int kKeys, bool kMasked>
__device__ __forceinline__ void accumulate(WarpState<kHeadDim>& state,
                                           const float (&p)[kKeys / 8][4], uint32_t v,
                                           int first_row, int keys_left, int lane) {
  int row = first_row + lane % 8 + lane / 8 % 2 * 8;
  uint32_t base = v + row * 128;
  int chunk_bit = lane / 16;
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t a[4];
    pack_step(a, p[2 * step], p[2 * step + 1]);
    uint32_t keep[2] = {~0u, ~0u};
    if (kMasked) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int key = step * 16 + half * 8 + lane % 4 * 2;
        keep[half] = (key < keys_left ? 0xffffu : 0) | (key + 1 < keys_left ? 0xffff0000u : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      int chunk = i % 4 * 2 + chunk_bit;
      uint32_t b[4];
      ptx::load_matrix_transposed_x4(
          b, base + step * 16 * 128 + i / 4 * (kTileKeys * 128) + (chunk ^ (row % 8)) * 16);
      if (kMasked) {
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] &= keep[j % 2];
      }
      ptx::mma_16x8x16(state.out[2 * i], a, b[0], b[1]);
      ptx::mma_16x8x16(state.out[2 * i + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace optimus::cuda::attention
