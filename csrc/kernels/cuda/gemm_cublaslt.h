// gemm through cuBLASLt: its algorithms for a shape, and the call. Not for concurrent use.
#pragma once

#include <vector>

#include "kernels/cuda/kernels.h"

namespace optimus::cuda {

constexpr uint32_t kGemmAlignment = 16;  // of all pointers and rows, in bytes

// One of the library's algorithms, opaque.
struct CublasLtGemm {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int index;  // among the heuristic's proposals
};

// What the library's heuristic proposes, best first; at least one. Throws without the library.
std::vector<CublasLtGemm> cublaslt_gemm_candidates(const GemmParams&);
// False when the algorithm, chosen for other rows, does not take these.
bool cublaslt_gemm(const GemmParams&, const CublasLtGemm&, cudaStream_t);

}  // namespace optimus::cuda
