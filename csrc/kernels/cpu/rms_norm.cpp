// RMS norm, with the residual addition in front of it or a gather of rows.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus::cpu {
namespace {

constexpr int64_t kMinElementsPerThread = 16 * 1024;

void check(const RmsNormParams& params) {
  OPTIMUS_CHECK(params.rows >= 0 && params.hidden >= 1,
                "[rms_norm] need rows >= 0 and hidden >= 1, got rows ", params.rows, ", hidden ",
                params.hidden);
  OPTIMUS_CHECK(params.eps >= 0, "[rms_norm] eps must be >= 0, got ", params.eps);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.x != nullptr && params.weight != nullptr && params.out != nullptr,
                "[rms_norm] null pointer for x, weight or out");
  if (params.row_idx == nullptr) return;
  OPTIMUS_CHECK(params.out != params.x, "[rms_norm] out must not alias x when row_idx is given");
  for (int i = 0; i < params.rows; ++i) {
    OPTIMUS_CHECK(params.row_idx[i] >= 0, "[rms_norm] row_idx[", i, "] must be >= 0, got ",
                  params.row_idx[i]);
  }
}

template <class T>
void run_rows(const RmsNormParams& params, int64_t begin, int64_t end) {
  const size_t hidden = params.hidden;
  const T* x = static_cast<const T*>(params.x);
  T* residual = static_cast<T*>(params.residual);
  for (int64_t i = begin; i < end; ++i) {
    size_t input_row = params.row_idx != nullptr ? params.row_idx[i] : i;
    simd_kernels<T>().rms_norm(x + input_row * hidden,
                               residual != nullptr ? residual + input_row * hidden : nullptr,
                               static_cast<const T*>(params.weight),
                               static_cast<T*>(params.out) + i * hidden, params.hidden, params.eps);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params, ThreadPool& threads) {
  check(params);
  dispatch_dtype(params.dtype, [&](auto zero) {
    threads.parallel_for(
        params.rows, 1 + kMinElementsPerThread / params.hidden,
        [&](int64_t begin, int64_t end) { run_rows<decltype(zero)>(params, begin, end); });
  });
}

}  // namespace optimus::cpu
