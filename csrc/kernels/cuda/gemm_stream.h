// The streaming gemm (gemm_stream_kernel.cuh): what it takes, in which ways, and its launch.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"

namespace optimus::cuda {

constexpr int kStreamGemmMaxRows = 192;

// One way to run it. The rows of x are padded to tile_rows. The grid is `ctas` CTAs, of which `splits`
// share the k of a tile (then ctas = splits * tiles) or which take tiles in turn.
struct StreamGemm {
  int tile_n, tile_rows, splits, ctas;
  int num_slots, num_x_slots;  // stages of the weight and of x in shared memory
  int num_early_copies,
      num_copies;  // of the weight under way at a time: before its turn, after
};

// Whether it runs on the current device and takes these shapes, types and pointers.
bool stream_gemm_takes(const GemmParams&);
// The ways worth timing for what it takes; otherwise empty.
std::vector<StreamGemm> stream_gemm_candidates(const GemmParams&);
// Any rows up to tile_rows; shapes as the way was made for.
void stream_gemm(const GemmParams&, const StreamGemm&, cudaStream_t);
std::string describe(const StreamGemm&);

}  // namespace optimus::cuda
