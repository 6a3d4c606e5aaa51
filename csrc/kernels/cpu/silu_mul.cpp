// silu(gate) * up, the activation between the two halves of the MLP.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus::cpu {
namespace {

constexpr int64_t kMinElementsPerThread = 8 * 1024;

}  // namespace

void silu_mul(const SiluMulParams& params, ThreadPool& threads) {
  OPTIMUS_CHECK(params.rows >= 0 && params.intermediate >= 1,
                "[silu_mul] need rows >= 0 and intermediate >= 1, got rows ", params.rows,
                ", intermediate ", params.intermediate);
  OPTIMUS_CHECK(!params.in_turn || params.intermediate % kGatesInTurn == 0,
                "[silu_mul] gates in turn come by ", kGatesInTurn, ", got intermediate ",
                params.intermediate);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.gate_up != nullptr && params.out != nullptr,
                "[silu_mul] null pointer for gate_up or out");
  const size_t width = params.intermediate;
  dispatch_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* gate_up = static_cast<const T*>(params.gate_up);
    T* out = static_cast<T*>(params.out);
    threads.parallel_for(params.rows, 1 + kMinElementsPerThread / params.intermediate,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i) {
                             const T* gate = gate_up + i * 2 * width;
                             const size_t group = params.in_turn ? kGatesInTurn : width;
                             for (size_t at = 0; at < width; at += group) {
                               simd_kernels<T>().silu_mul(gate + 2 * at, gate + 2 * at + group,
                                                          out + i * width + at,
                                                          static_cast<int>(group));
                             }
                           }
                         });
  });
}

}  // namespace optimus::cpu
