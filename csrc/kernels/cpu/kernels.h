// CPU twins of every op in kernels/ops.h: readable, deterministic, the oracle of the CUDA kernels.
#pragma once

#include "kernels/ops.h"

namespace optimus::cpu {

void embedding(const EmbeddingParams&, ThreadPool&);
void rms_norm(const RmsNormParams&, ThreadPool&);
void silu_mul(const SiluMulParams&, ThreadPool&);
void gemm(const GemmParams&, ThreadPool&);
void qk_norm_rope_kv_write(const QkNormRopeKvWriteParams&, ThreadPool&);
void block_attention(const BlockAttentionParams&, ThreadPool&);
void block_attention_schedule(const BlockAttentionParams&, ThreadPool&);
void kv_copy(const KvCopyParams&, ThreadPool&);
void open_windows(const OpenWindowsParams&, ThreadPool&);
void build_rows(const BuildRowsParams&, ThreadPool&);
void unmask(const UnmaskParams&, ThreadPool&);
// The second half of unmask, for candidates that are already there: strategy, commits, windows.
void commit_candidates(const UnmaskParams&);

}  // namespace optimus::cpu
