// The only place that chooses between the CPU twin and the CUDA kernel of an op.
#include "kernels/ops.h"

#include "core/check.h"
#include "kernels/cpu/kernels.h"

namespace optimus {

#define OPTIMUS_DISPATCH(op, Params)                                                            \
  void op(const Params& params, const Execution& execution) {                                   \
    OPTIMUS_CHECK(execution.device == Device::cpu, "[" #op "] this build has no CUDA backend"); \
    cpu::op(params, *execution.threads);                                                        \
  }

OPTIMUS_DISPATCH(embedding, EmbeddingParams)
OPTIMUS_DISPATCH(rms_norm, RmsNormParams)
OPTIMUS_DISPATCH(silu_mul, SiluMulParams)
OPTIMUS_DISPATCH(gemm, GemmParams)
OPTIMUS_DISPATCH(qk_norm_rope_kv_write, QkNormRopeKvWriteParams)
OPTIMUS_DISPATCH(block_attention, BlockAttentionParams)
OPTIMUS_DISPATCH(kv_copy, KvCopyParams)
OPTIMUS_DISPATCH(build_rows, BuildRowsParams)
OPTIMUS_DISPATCH(unmask, UnmaskParams)

}  // namespace optimus
