// The only place that chooses between the CPU twin and the CUDA kernel of an op.
#include "kernels/ops.h"

#include "core/check.h"
#include "kernels/cpu/kernels.h"
#if defined(OPTIMUS_WITH_CUDA)
#include "kernels/cuda/kernels.h"
#endif

namespace optimus {

#if defined(OPTIMUS_WITH_CUDA)
#define OPTIMUS_DISPATCH(op, Params)                                 \
  void op(const Params& params, const Execution& execution) {        \
    if (execution.device == Device::cuda) {                          \
      cuda::op(params, static_cast<cudaStream_t>(execution.stream)); \
    } else {                                                         \
      cpu::op(params, *execution.threads);                           \
    }                                                                \
  }
#else
#define OPTIMUS_DISPATCH(op, Params)                                                            \
  void op(const Params& params, const Execution& execution) {                                   \
    OPTIMUS_CHECK(execution.device == Device::cpu, "[" #op "] this build has no CUDA backend"); \
    cpu::op(params, *execution.threads);                                                        \
  }
#endif

OPTIMUS_DISPATCH(embedding, EmbeddingParams)
OPTIMUS_DISPATCH(rms_norm, RmsNormParams)
OPTIMUS_DISPATCH(silu_mul, SiluMulParams)
OPTIMUS_DISPATCH(gemm, GemmParams)
OPTIMUS_DISPATCH(qk_norm_rope_kv_write, QkNormRopeKvWriteParams)
OPTIMUS_DISPATCH(block_attention, BlockAttentionParams)
OPTIMUS_DISPATCH(block_attention_schedule, BlockAttentionParams)
OPTIMUS_DISPATCH(kv_copy, KvCopyParams)
OPTIMUS_DISPATCH(open_windows, OpenWindowsParams)
OPTIMUS_DISPATCH(build_rows, BuildRowsParams)
OPTIMUS_DISPATCH(unmask, UnmaskParams)

size_t block_attention_workspace_bytes(const BlockAttentionParams& params,
                                       const Execution& execution) {
#if defined(OPTIMUS_WITH_CUDA)
  if (execution.device == Device::cuda) return cuda::block_attention_workspace_bytes(params);
#endif
  OPTIMUS_CHECK(execution.device == Device::cpu,
                "[block_attention] this build has no CUDA backend, got num_seqs ", params.num_seqs);
  return 0;
}

void plan_gemms(const std::vector<GemmParams>& products, const std::function<void()>& chain,
                const Execution& execution) {
#if defined(OPTIMUS_WITH_CUDA)
  if (execution.device == Device::cuda) {
    cuda::plan_gemms(products, chain, static_cast<cudaStream_t>(execution.stream));
  }
#else
  static_cast<void>(products);
  static_cast<void>(chain);
  static_cast<void>(execution);
#endif
}

bool gemm_takes_silu(const GemmParams& params, const Execution& execution) {
#if defined(OPTIMUS_WITH_CUDA)
  return execution.device == Device::cuda && cuda::gemm_takes_silu(params);
#else
  static_cast<void>(params);
  static_cast<void>(execution);
  return false;
#endif
}

size_t unmask_workspace_bytes(int num_logit_rows, int vocab_size) {
#if defined(OPTIMUS_WITH_CUDA)
  return cuda::unmask_workspace_bytes(num_logit_rows, vocab_size);
#else
  static_cast<void>(num_logit_rows);
  static_cast<void>(vocab_size);
  return 0;
#endif
}

}  // namespace optimus
