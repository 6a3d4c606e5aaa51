// CUDA twins of the ops in kernels/ops.h: the same names, params and results up to rounding. All
// pointers are to memory the GPU can read (index arrays and pointer tables too), and nothing is
// allocated, synchronised or read back, so that every op can be captured in a CUDA graph. What the
// CPU twin checks in the data (ids, slots, limits) is the caller's duty here; shapes are checked.
//
// Kernels start while those before them run (core/launch.cuh). What they read before they wait for them:
//   weights           (rms_norm, qk_norm_rope_kv_write, gemm_stream), which nothing in the stream writes;
//   a step's schedule (block_attention) and the rows it was made of (qk_norm_rope_kv_write too), and the
//                     keys and values of steps before: the schedule's kernel lets no successor start
//                     before it has waited for all of them and is done;
//   the decode state  (unmask's second kernel), the rows and the logits: its first kernel writes none of
//                     them, and lets the second start only after its own wait. So the second may also
//                     write: what the first does not read, and a slot's state once all the first has to
//                     say of the slot's rows is there, which the second looks for without waiting.
//
// Between two runs of a kernel in a step its code leaves the SM's caches, it seems, and all SMs fetch it
// anew at the same time: the softmax of attention's first tile takes 1,100, 2,600 and 5,800 cycles with
// 32, 64 and 128 SMs of an H200 at work, 670 where no other kernel runs between. So what a launch runs
// once is short: loops that are not unrolled, no divisions, one copy of what has two uses.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace optimus::cuda {

void embedding(const EmbeddingParams&, cudaStream_t);
void rms_norm(const RmsNormParams&, cudaStream_t);
void silu_mul(const SiluMulParams&, cudaStream_t);
void qk_norm_rope_kv_write(const QkNormRopeKvWriteParams&, cudaStream_t);
void kv_copy(const KvCopyParams&, cudaStream_t);
void open_windows(const OpenWindowsParams&, cudaStream_t);
void build_rows(const BuildRowsParams&, cudaStream_t);
void unmask(const UnmaskParams&, cudaStream_t);
size_t unmask_workspace_bytes(int num_logit_rows, int vocab_size);
void gemm(const GemmParams&, cudaStream_t);
bool gemm_takes_silu(const GemmParams&);
// Whose kernels gemm may take: the library's, or for up to 192 rows in bf16 the streaming kernel (with
// silu the latter alone).
enum class GemmKernels : uint8_t { any, library, stream };
// At start-up, outside of graph capture: see plan_gemms in kernels/ops.h. The kernel of a product serves
// the other rows of its bucket too: multiples of 8 up to 256, of 64 up to 1024, then of 512. With
// `kernels` other than any, products are planned anew. Unplanned calls take the library heuristic's
// first proposal. All calls need the workspace that planning had.
void plan_gemms(const std::vector<GemmParams>& products, const std::function<void()>& chain,
                cudaStream_t, GemmKernels kernels = GemmKernels::any);
// The kernel that gemm takes for these, in words.
std::string describe_gemm(const GemmParams&);
void block_attention(const BlockAttentionParams&, cudaStream_t);
void block_attention_schedule(const BlockAttentionParams&, cudaStream_t);
size_t block_attention_workspace_bytes(const BlockAttentionParams&);

}  // namespace optimus::cuda
