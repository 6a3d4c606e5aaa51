// The end of a piece: merges the warps that hold copies of the same rows, in fixed order, and writes the
// rows: normalised to the output when the piece is whole, else as they are to its partial slot.
#pragma once

#include "kernels/cuda/block_attention_merge.cuh"
#include "kernels/cuda/block_attention_warp.cuh"

namespace optimus::cuda::attention {

// Where a piece goes.
struct PieceOutput {
  bool whole, two_heads;
  int packed_count;
  size_t first_row;  // of its partial slot

  __device__ PieceOutput(const AttentionArgs& args, const Piece& piece)
      : whole(piece.whole()),
        two_heads(piece.two_heads),
        packed_count(piece.item.packed_count),
        first_row(partial_row(args, blockIdx.x, piece.at.tile == 0)) {}
};

template <int kHeadDim>
struct Output {
  float* sums;      // [warp][16][head_dim], 8-float group g of row r at g ^ (r % 8)
  float2* max_sum;  // [warp][16]
  int warp;

  __device__ CutPieces& cut_pieces() const {
    using Layout = SharedLayout<kHeadDim>;
    return *reinterpret_cast<CutPieces*>(reinterpret_cast<char*>(max_sum) + Layout::kMaxSum +
                                         Layout::kBarriers);
  }

  // Where the warp's Q comes to.
  __device__ uint32_t staging() const {
    return kQueriesApart ? ptx::shared_address(sums) + SharedLayout<kHeadDim>::kSums +
                               warp * 16 * kHeadDim * 2
                         : ptx::shared_address(sums + warp * 16 * kHeadDim);
  }

  template <int kRowWarps>
  __device__ __forceinline__ void finish(const AttentionArgs& args, WarpState<kHeadDim>& state,
                                         const PieceOutput& piece, const Queries& rows, int warp,
                                         int lane) {
    state.finish_sums();
    if constexpr (kRowWarps == kConsumerWarps) {
      if (piece.whole) {
        store_rows(args, state, rows, lane);
      } else {
        store_partial(args, state, piece, warp * 16, lane);
      }
    } else if (kRowWarps == kTeamWarps && piece.two_heads) {
      store_rows(args, state, rows, lane);
    } else {
      store_sums(args, state, warp, lane);
      meet_copies(piece);
      merge_copies<kRowWarps>(args, piece, rows, warp, lane);
      meet_copies(piece);
    }
  }

 private:
  __device__ __forceinline__ void meet_copies(const PieceOutput& piece) const {
    if (!piece.two_heads) {
      meet();
    } else {
      meet_team(warp < kTeamWarps);
    }
  }

  // Through shared memory, so that whole rows are written in 16-byte pieces.
  __device__ __forceinline__ void store_rows(const AttentionArgs& args,
                                             const WarpState<kHeadDim>& state, const Queries& rows,
                                             int lane) {
    constexpr int kChunks = kHeadDim / 8;  // of 16 bytes per row
    constexpr int kRowsPerPass = 32 / kChunks;
    char* to = reinterpret_cast<char*>(sums + warp * 16 * kHeadDim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = lane / 4 + half * 8;
      float factor = 1.0f / state.sum[half];
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<uint32_t*>(to + row * kHeadDim * 2 + (i ^ (row % 8)) * 16 +
                                     lane % 4 * 4) =
            ptx::pack_bf16(state.out[i][2 * half] * factor, state.out[i][2 * half + 1] * factor);
      }
    }
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16; first += kRowsPerPass) {
      int row = first + lane / kChunks, chunk = lane % kChunks;
      uint4 values =
          *reinterpret_cast<const uint4*>(to + row * kHeadDim * 2 + (chunk ^ (row % 8)) * 16);
      int head = __shfl_sync(~0u, rows.head, row);
      if (head >= 0) {
        *reinterpret_cast<uint4*>(args.out + static_cast<size_t>(head) * kHeadDim + chunk * 8) =
            values;
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void store_partial(const AttentionArgs& args,
                                                const WarpState<kHeadDim>& state,
                                                const PieceOutput& piece, int first_packed,
                                                int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int packed = first_packed + lane / 4 + half * 8;
      if (packed >= piece.packed_count) continue;
      size_t row = piece.first_row + packed;
      if (lane % 4 == 0) {
        args.ws.partial_ml[row] = {state.max[half] * args.scale_log2, state.sum[half]};
      }
      float* to = args.ws.partial_out + row * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<float2*>(to + i * 8) = {state.out[i][2 * half],
                                                  state.out[i][2 * half + 1]};
      }
    }
  }

  __device__ __forceinline__ void store_sums(const AttentionArgs& args,
                                             const WarpState<kHeadDim>& state, int warp, int lane) {
    const int row = warp * 16 + lane / 4;  // and 8 rows further, where the groups lie the same way
    if (lane % 4 == 0) {
      max_sum[row] = {state.max[0] * args.scale_log2, state.sum[0]};
      max_sum[row + 8] = {state.max[1] * args.scale_log2, state.sum[1]};
    }
    float* const to = sums + row * kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float* const at = to + (i ^ lane / 4) * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kHeadDim / 64; ++j) {
          const float(&pair)[4] = state.out[j * 8 + i];
          *reinterpret_cast<float2*>(at + half * 8 * kHeadDim + j * 64) = {pair[2 * half],
                                                                           pair[2 * half + 1]};
        }
      }
    }
  }

  // The copies of a row, in all warps or in the team's, divide the rows of its 16-row group among them.
  template <int kRowWarps>
  __device__ __forceinline__ void merge_copies(const AttentionArgs& args, const PieceOutput& piece,
                                               const Queries& rows, int warp, int lane) {
    constexpr int kCopies = kConsumerWarps / kRowWarps;
    constexpr int kLanesPerRow = kHeadDim / 4;
    constexpr int kRowsPerPass = 32 / kLanesPerRow;
    const int first_warp = piece.two_heads ? warp / kTeamWarps * kTeamWarps : 0;
    const int copies = piece.two_heads ? kTeamWarps / kRowWarps : kCopies;
    const int rows_each = piece.two_heads ? 16 * kRowWarps / kTeamWarps : 16 / kCopies;
    int row_warp = warp % kRowWarps, copy = (warp - first_warp) / kRowWarps;
    int column = lane % kLanesPerRow * 4;
#pragma unroll 1  // code that runs once costs what it takes to fetch
    for (int first = 0; first < rows_each; first += kRowsPerPass) {
      int row = copy * rows_each + first + lane / kLanesPerRow;
      int head = __shfl_sync(~0u, rows.head, row);
      float4 total;
      float2 ms = merge_row<kRowWarps>(first_warp + row_warp, copies, row, column, total);
      int packed = row_warp * 16 + row;
      if (packed >= piece.packed_count) continue;
      if (piece.whole) {
        float factor = 1.0f / ms.y;
        *reinterpret_cast<uint2*>(args.out + static_cast<size_t>(head) * kHeadDim + column) = {
            ptx::pack_bf16(total.x * factor, total.y * factor),
            ptx::pack_bf16(total.z * factor, total.w * factor)};
      } else {
        size_t to = piece.first_row + packed;
        if (column == 0) args.ws.partial_ml[to] = ms;
        *reinterpret_cast<float4*>(args.ws.partial_out + to * kHeadDim + column) = total;
      }
    }
  }

  // Four columns of a row from all its copies, the first of which is warp `first`'s; returns their
  // (max, sum).
  template <int kRowWarps>
  __device__ __forceinline__ float2 merge_row(int first, int copies, int row, int column,
                                              float4& total) {
    constexpr int kCopies = kConsumerWarps / kRowWarps;
    float2 parts[kCopies];
    float max = -INFINITY, sum = 0;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      if (c >= copies) break;
      parts[c] = max_sum[(c * kRowWarps + first) * 16 + row];
      max = fmaxf(max, parts[c].x);
    }
    float base = max == -INFINITY ? 0.0f : max;
    total = {0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      if (c >= copies) break;
      float factor = ptx::exp2_approx(parts[c].x - base);
      float4 part =
          *reinterpret_cast<const float4*>(sums + ((c * kRowWarps + first) * 16 + row) * kHeadDim +
                                           ((column / 8) ^ (row % 8)) * 8 + column % 8);
      sum += factor * parts[c].y;
      total.x += factor * part.x;
      total.y += factor * part.y;
      total.z += factor * part.z;
      total.w += factor * part.w;
    }
    return {max, sum};
  }
};

}  // namespace optimus::cuda::attention
