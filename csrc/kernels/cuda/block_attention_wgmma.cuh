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

// Replaces the rows of V from `keys_left` on, which may hold anything, by zeros: a product with a
// zero probability would let NaN through. Called by a whole warpgroup; both may do it to one slot.
// The race checker does not always follow a slot from its release by all warps to its next fill, and
// follows less without the flag that bench/gpu.sh passes: see the barrier behind tall pieces.
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
  meet_team(threadIdx.x < kTeamWarps * 32);
}

}  // namespace optimus::cuda::attention

#endif
