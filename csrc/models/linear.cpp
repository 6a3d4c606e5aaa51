#include "models/linear.h"

#include <cstring>

#include "core/check.h"

namespace optimus {

Linear::Linear(int n, int k, DType dtype)
    : n_(n),
      k_(k),
      dtype_(dtype),
      row_major_(dtype == DType::bfloat16 && bf16_gemm_available()),
      staging_(size_t(n) * k * dtype_size(dtype)) {}

void Linear::load_rows(int row_begin, int num_rows, const void* data) {
  OPTIMUS_INVARIANT(staging_.size() > 0, "[linear] weights were loaded already");
  size_t row_bytes = size_t(k_) * dtype_size(dtype_);
  std::memcpy(staging_.data() + row_begin * row_bytes, data, num_rows * row_bytes);
}

void Linear::finish_loading() {
  if (row_major_) {
    weight_ = std::move(staging_);
  } else {
    weight_ = Buffer<char>(packed_gemm_weight_size(n_, k_) * dtype_size(dtype_));
    pack_gemm_weight(staging_.data(), weight_.data(), n_, k_, dtype_);
  }
  staging_ = Buffer<char>();
}

void Linear::run(const void* x, void* out, int rows, const Execution& execution) const {
  if (row_major_) {
    bf16_gemm(x, weight_.data(), out, rows, n_, k_, *execution.threads);
  } else {
    gemm({x, weight_.data(), out, rows, n_, k_, dtype_, dtype_}, execution);
  }
}

}  // namespace optimus
