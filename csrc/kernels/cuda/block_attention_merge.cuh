// What was cut across shares: every part's CTA writes its sums to the workspace, and they are merged at
// the end of the share, in the order of their keys, so that the result does not depend on timing. Few
// rows are merged by the CTA that arrives last, and the others leave their SMs to the next kernel,
// which has weights to read meanwhile. Many rows are shared: every CTA waits for the others.
//
// CTAs do not wait for ever, since nothing promises that all of them run at once (kernels of other
// streams may hold SMs): one that has waited too long leaves its rows to the CTA that arrives last.
#pragma once

#include "kernels/cuda/block_attention_share.cuh"

namespace optimus::cuda::attention {

constexpr int kMostRowsOfLast = 128;  // rows times parts

// A cut piece of this share, as its CTA merges it.
struct CutPiece {
  Merge merge;
  uint32_t
      all_arrived;  // what the merge's arrivals come to in this layer; 0: there is no such piece
  int packed_count;
  int first_packed;  // of the item's packed rows, counted from row 0 of q
  int head;
  bool is_last;       // to arrive
  bool merges_own;    // the rows that are its own, or
  bool merges_other;  // the rows of another at hand
};

// In shared memory: what began in an earlier share, and what goes on into a later one.
struct CutPieces {
  CutPiece cut[2];

  // By one thread: what is known of a piece before it is worked on.
  __device__ void note(const AttentionArgs& args, const Piece& piece) {
    CutPiece& noted = cut[piece.at.tile == 0];
    noted.packed_count = piece.item.packed_count;
    noted.first_packed = piece.item.row_begin * args.group + piece.item.packed_begin;
    noted.head = piece.head;
  }
};

static_assert(sizeof(CutPieces) <= kCutPiecesBytes);

__device__ __forceinline__ void meet() {
  ptx::named_barrier(kConsumerBarrier, kConsumerWarps * 32);
}

// By all consumers once they have written a part.
__device__ __forceinline__ void arrive(const AttentionArgs& args, CutPiece& cut) {
  meet();
  if (threadIdx.x > 0) return;
  __threadfence();
  // Counted on from layer to layer: all parts of one have arrived before the next begins.
  const uint32_t parts = cut.merge.num_parts;
  const uint32_t before = atomicAdd(&args.ws.arrivals[cut.merge.first_share], 1);
  cut.all_arrived = (before / parts + 1) * parts;
  cut.is_last = before + 1 == cut.all_arrived;
  __threadfence();
}

// The word by which part `part` leaves its rows to the last: it holds all_arrived then.
__device__ __forceinline__ uint32_t* left_rows(const AttentionArgs& args, const CutPiece& cut,
                                               int part) {
  return &args.ws.left_rows[(cut.merge.first_share + part) * 2 + (part == 0 ? 1 : 0)];
}
__device__ __forceinline__ bool take_left_rows(uint32_t* left, const CutPiece& cut) {
  return atomicCAS(left, cut.all_arrived, 0) == cut.all_arrived;
}

// By one thread: whether the CTA merges its rows, all parts being there.
__device__ __forceinline__ bool wait_for_parts(const AttentionArgs& args, const CutPiece& cut,
                                               int part) {
  const uint32_t* arrivals = &args.ws.arrivals[cut.merge.first_share];
  const auto complete = [&] {
    return static_cast<int32_t>(ptx::load_acquire(arrivals) - cut.all_arrived) >= 0;
  };
  const long long begin = clock64();
  while (!complete()) {
    if (clock64() - begin < args.merge_wait_cycles) continue;
    uint32_t* left = left_rows(args, cut, part);
    atomicExch(left, cut.all_arrived);
    __threadfence();
    // The last may have looked just before.
    return complete() && take_left_rows(left, cut);
  }
  return true;
}

// Rows packed, packed + step, ... of the piece, kRows of them, eight columns each; kParts of each row
// are loaded together, for there is little else to wait for. Where there are fewer rows or parts, one
// that there is is loaded again, for nothing: that is less code than not to.
template <int kHeadDim, int kRows, int kParts>
__device__ __forceinline__ void merge_rows(const AttentionArgs& args, const CutPiece& cut,
                                           int packed, int step, int column) {
  const int partial_rows = args.ws.partial_rows, last_part = cut.merge.num_parts - 1;
  float total[kRows][8] = {}, max[kRows], sum[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) max[i] = -INFINITY;
  for (int first = 0; first <= last_part; first += kParts) {
    float2 ml[kRows][kParts];
    float4 part[kRows][kParts][2];
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      // As partial_row() has it.
      const int from = min(first + j, last_part);
      const int slot = cut.merge.first_share * 2 + (from == 0 ? 1 : 2 * from);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = packed + i * step < cut.packed_count ? packed + i * step : packed;
        const int at = slot * partial_rows + row;
        const float* sums = args.ws.partial_out + at * kHeadDim + column;
        // Past the L1, which may hold the sums of the layer before.
        ml[i][j] = __ldcg(args.ws.partial_ml + at);
        part[i][j][0] = __ldcg(reinterpret_cast<const float4*>(sums));
        part[i][j][1] = __ldcg(reinterpret_cast<const float4*>(sums) + 1);
        if (first + j > last_part) ml[i][j].x = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float old_max = max[i];
#pragma unroll
      for (int j = 0; j < kParts; ++j) max[i] = fmaxf(max[i], ml[i][j].x);
      const float base = max[i] == -INFINITY ? 0.0f : max[i];  // all keys lie past the row's limit
      float factor = ptx::exp2_approx(old_max - base);
      sum[i] *= factor;
#pragma unroll
      for (int k = 0; k < 8; ++k) total[i][k] *= factor;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        factor = ptx::exp2_approx(ml[i][j].x - base);
        sum[i] += factor * ml[i][j].y;
        const float4 low = part[i][j][0], high = part[i][j][1];
        const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 8; ++k) total[i][k] += factor * values[k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (packed + i * step >= cut.packed_count) continue;
    const float factor = 1.0f / sum[i];
    uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      pairs[k] = ptx::pack_bf16(total[i][2 * k] * factor, total[i][2 * k + 1] * factor);
    }
    const int at = cut.first_packed + packed + i * step;
    const int row = row_of(args, at);
    const size_t head =
        static_cast<size_t>(row) * args.num_q_heads + (cut.head - row) * args.group + at;
    *reinterpret_cast<uint4*>(args.out + head * kHeadDim + column) = {pairs[0], pairs[1], pairs[2],
                                                                      pairs[3]};
  }
}

// Every step-th row of the piece.
template <int kHeadDim>
__device__ __forceinline__ void merge_every(const AttentionArgs& args, const CutPiece& cut,
                                            int first_row, int step) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  constexpr int kRowsAtOnce = kConsumerWarps * 32 / kLanesPerRow;
  const int packed = first_row + threadIdx.x / kLanesPerRow * step;
  const int column = threadIdx.x % kLanesPerRow * 8, stride = kRowsAtOnce * step;
  if (packed >= cut.packed_count) return;
  if (cut.packed_count <= stride) {
    merge_rows<kHeadDim, 1, 4>(args, cut, packed, stride, column);
  } else if (cut.packed_count <= 2 * stride) {
    merge_rows<kHeadDim, 2, 4>(args, cut, packed, stride, column);
  } else {
    for (int at = packed; at < cut.packed_count; at += 4 * stride) {
      merge_rows<kHeadDim, 4, 2>(args, cut, at, stride, column);
    }
  }
}

// By all consumers at the end of the share.
template <int kHeadDim>
__device__ __forceinline__ void merge_cut_piece(const AttentionArgs& args, CutPiece& cut) {
  if (cut.packed_count * cut.merge.num_parts <= kMostRowsOfLast) {
    if (cut.is_last) merge_every<kHeadDim>(args, cut, 0, 1);
    return;
  }
  const int parts = min(cut.merge.num_parts, cut.packed_count);  // that have rows
  const int part = blockIdx.x - cut.merge.first_share;
  if (threadIdx.x == 0) {
    cut.merges_own = part < parts && (cut.is_last || wait_for_parts(args, cut, part));
    cut.merges_other = false;
  }
  meet();
  const bool is_left = cut.is_last && threadIdx.x < parts && threadIdx.x != part &&
                       __ldcg(left_rows(args, cut, threadIdx.x)) == cut.all_arrived;
  if (cut.merges_own) merge_every<kHeadDim>(args, cut, part, cut.merge.num_parts);
  if (!cut.is_last) return;
  if (is_left) cut.merges_other = true;
  meet();
  if (!cut.merges_other) return;
  for (int other = 0; other < parts; ++other) {
    meet();
    if (threadIdx.x == 0) {
      cut.merges_other = other != part && take_left_rows(left_rows(args, cut, other), cut);
    }
    meet();
    if (cut.merges_other) merge_every<kHeadDim>(args, cut, other, cut.merge.num_parts);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void merge_cut_pieces(const AttentionArgs& args, CutPieces& pieces) {
  meet();  // thread 0 has written them
  // What goes on into the next share has been there since that share's begin; the share before ends
  // about now.
#pragma unroll 1
  for (int i = 1; i >= 0; --i) {
    CutPiece& cut = pieces.cut[i];
    if (cut.all_arrived > 0) merge_cut_piece<kHeadDim>(args, cut);
  }
}

}  // namespace optimus::cuda::attention
