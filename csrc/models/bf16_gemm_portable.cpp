// The torch-free build has no bf16 library GEMM: Linear packs bf16 weights for our own.
#include <stdexcept>

#include "models/linear.h"

namespace optimus {

bool bf16_gemm_pays() { return false; }

void bf16_gemm(const void*, const void*, void*, int, int, int, ThreadPool&) {
  throw std::logic_error("[bf16_gemm] not part of the torch-free build");
}

}  // namespace optimus
