// From logits to commits, in two kernels: scan (all logits once) and finish (a candidate per row, and
// for each slot its strategy, its commits and its window). See UnmaskParams for the rules.
#include "kernels/cuda/unmask.cuh"

#include "core/check.h"

namespace optimus::cuda {

size_t unmask_workspace_bytes(int num_logit_rows, int vocab_size) {
  const size_t tiles = size_t(num_logit_rows) * unmasking::num_tiles(vocab_size);
  return sizeof(unmasking::RowSums) * tiles + sizeof(uint32_t) * num_logit_rows;
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
  UnmaskParams params = p;
  if (p.logits_stride == 0) params.logits_stride = p.vocab_size;
  const bool vector = params.logits_stride % kChunk == 0 && is_aligned(p.logits);
  auto* tiles = static_cast<unmasking::RowSums*>(p.workspace);
  const size_t num_tiles = size_t(p.num_logit_rows) * unmasking::num_tiles(p.vocab_size);
  const unmasking::Workspace workspace{tiles, reinterpret_cast<uint32_t*>(tiles + num_tiles)};
  unmasking::launch_scan(params, workspace, vector, stream);
  unmasking::launch_finish(params, workspace, vector, stream);
}

}  // namespace optimus::cuda
