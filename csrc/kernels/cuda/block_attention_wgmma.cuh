// Warpgroup products for items of more than 32 packed rows: four consumer warps, 64 packed rows, Q and
// the probabilities from registers, K and V straight from the ring's slots. sm_90a alone.
//
// A warp's registers hold the same elements as with mma.sync, so the softmax and the end of a piece
// are shared with it.
#pragma once

#include "kernels/cuda/block_attention_warp.cuh"
#include "kernels/cuda/wgmma.cuh"

#if defined(OPTIMUS_WGMMA)

namespace optimus::cuda::attention {

// ------------------------------------------------------------------------------------------- products

// scores = q k^T, issued and committed. An operand of the warp is moved to where wgmma reads it once,
// not once for each product of a tile.
template <int kHeadDim>
__device__ __forceinline__ void issue_scores(const WarpState<kHeadDim>& state,
                                             float (&scores)[kTileKeys / 8][4], uint32_t k) {
  const uint32_t low = ptx::of_warp(lower_operand(k, 16));
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int bytes = step / 4 * (kTileKeys * 128) + step % 4 * 32;
    wgmma<false>(scores, state.q[step], low + bytes / 16, step > 0);
  }
  wgmma_commit();
}

// out += p v, issued and committed. `p` must stay as it is until the product is done.
template <int kHeadDim>
__device__ __forceinline__ void issue_values(WarpState<kHeadDim>& state,
                                             const uint32_t (&p)[kTileKeys / 16][4], uint32_t v) {
  const uint32_t low = ptx::of_warp(lower_operand(v, kTileKeys * 128));
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    wgmma<true>(state.out, p[step], low + step * 16 * 128 / 16, true);
  }
  wgmma_commit();
}

// As advance_softmax(), but state.max follows the running maximum only when that has grown by more
// than kSlack: probabilities up to 2^kSlack cost no accuracy, and most tiles need not wait for the
// row's other threads. Returns, the same in all threads of the warp, whether the output has to follow:
// then by rescale() with `factors`. A row that need not move has the factor 1, so its result does not
// depend on the other rows of the warp.
template <int kHeadDim, int kGroups>
__device__ __forceinline__ bool advance_tall_softmax(WarpState<kHeadDim>& state,
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
  moved = __any_sync(~0u, moved);
  if (moved) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = state.max[half];
      float row = largest[half];
      row = fmaxf(row, __shfl_xor_sync(~0u, row, 1));
      row = fmaxf(row, __shfl_xor_sync(~0u, row, 2));
      if (row * scale_log2 > old * scale_log2 + kSlack) state.max[half] = row;
      factors[half] =
          old == -INFINITY ? 0.0f : ptx::exp2_approx((old - state.max[half]) * scale_log2);
      state.sum[half] *= factors[half];
    }
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
  return moved;
}

// Two barriers by name: the race checker does not follow one whose number is computed.
__device__ __forceinline__ void meet_warpgroup() {
  if (threadIdx.x < 128) {
    ptx::named_barrier(kWarpgroupBarrier, 128);
  } else {
    ptx::named_barrier(kWarpgroupBarrier + 1, 128);
  }
}

// Replaces the rows of V from `keys_left` on, which may hold anything, by zeros: a product with a
// zero probability would let NaN through. Called by a whole warpgroup; both may do it to one slot.
template <int kHeadDim>
__device__ __forceinline__ void clear_values(uint32_t v, int keys_left) {
  constexpr int kChunks = kHeadDim / 8;
  for (int i = keys_left * kChunks + threadIdx.x % 128; i < kTileKeys * kChunks; i += 128) {
    int row = i / kChunks, chunk = i % kChunks;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                     v + chunk / 8 * (kTileKeys * 128) + row * 128 + chunk % 8 * 16),
                 "r"(0)
                 : "memory");
  }
  ptx::fence_proxy_async();
  meet_warpgroup();
}

}  // namespace optimus::cuda::attention

#endif
