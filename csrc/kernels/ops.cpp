// The only place that chooses between the CPU twin and the CUDA kernel of an op.
#include "kernels/ops.h"

#include "core/check.h"
#include "kernels/cpu/kernels.h"
#if defined(OPTIMUS_WITH_CUDA)
#include "kernels/cuda/kernels.h"
#endif

namespace optimus {

#define OPTIMUS_DISPATCH_CPU(op, Params, why)                                \
  void op(const Params& params, const Execution& execution) {                \
    OPTIMUS_CHECK(execution.device == Device::cpu, "[" #op "] has no " why); \
    cpu::op(params, *execution.threads);                                     \
  }

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
#define OPTIMUS_DISPATCH(op, Params) \
  OPTIMUS_DISPATCH_CPU(op, Params, "CUDA kernel: this build has no CUDA backend")
#endif

OPTIMUS_DISPATCH(embedding, EmbeddingParams)
OPTIMUS_DISPATCH_CPU(rms_norm, RmsNormParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(silu_mul, SiluMulParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(gemm, GemmParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(qk_norm_rope_kv_write, QkNormRopeKvWriteParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(block_attention, BlockAttentionParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(kv_copy, KvCopyParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(build_rows, BuildRowsParams, "CUDA kernel yet")
OPTIMUS_DISPATCH_CPU(unmask, UnmaskParams, "CUDA kernel yet")

}  // namespace optimus
