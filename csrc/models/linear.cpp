#include "models/linear.h"

#include <utility>

#include "core/check.h"

namespace optimus {

Linear::Linear(int n, int k, DType dtype, Device device)
    : n_(n),
      k_(k),
      dtype_(dtype),
      device_(device),
      row_major_(device == Device::cuda || (dtype == DType::bfloat16 && bf16_gemm_pays())) {
  Buffer<char>& loaded = device == Device::cuda ? weight_ : staging_;
  loaded = Buffer<char>(size_t(n) * k * dtype_size(dtype), device);
}

Linear Linear::gate_up(int intermediate, int k, DType dtype, Device device) {
  Linear linear(2 * intermediate, k, dtype, device);
  linear.in_turn_ = device == Device::cuda && intermediate % kGatesInTurn == 0;
  return linear;
}

void Linear::load_rows(int row_begin, int num_rows, const void* data) {
  Buffer<char>& loaded = device_ == Device::cuda ? weight_ : staging_;
  OPTIMUS_INVARIANT(loaded.size() > 0, "[linear] weights were loaded already");
  const size_t row_bytes = size_t(k_) * dtype_size(dtype_);
  if (in_turn_) {
    OPTIMUS_INVARIANT(num_rows == n_ / 2 && row_begin % num_rows == 0,
                      "[linear] gates and ups are loaded whole, got rows ", row_begin, " + ",
                      num_rows);
    const size_t group = kGatesInTurn * row_bytes;
    copy_memory_strided(loaded.data() + (row_begin > 0 ? group : 0), 2 * group, data, group, group,
                        num_rows / kGatesInTurn, device_);
    return;
  }
  loaded.copy_in(row_begin * row_bytes, static_cast<const char*>(data), num_rows * row_bytes);
}

void Linear::finish_loading() {
  if (device_ == Device::cuda) return;
  if (row_major_) {
    weight_ = std::move(staging_);
  } else {
    weight_ = Buffer<char>(packed_gemm_weight_size(n_, k_) * dtype_size(dtype_));
    pack_gemm_weight(staging_.data(), weight_.data(), n_, k_, dtype_);
  }
  staging_ = Buffer<char>();
}

GemmParams Linear::params(const void* x, void* out, int rows, Buffer<char>& workspace,
                          bool silu) const {
  return {
      x,   weight_.data(), out, rows, n_, k_, dtype_, dtype_, workspace.data(), workspace.size(),
      silu};
}

bool Linear::gives_silu(const void* x, void* out, int rows, Buffer<char>& workspace,
                        const Execution& execution) const {
  return in_turn_ && gemm_takes_silu(params(x, out, rows, workspace), execution);
}

void Linear::run(const void* x, void* out, int rows, Buffer<char>& workspace,
                 const Execution& execution, bool silu) const {
  if (device_ == Device::cpu && row_major_) {
    bf16_gemm(x, weight_.data(), out, rows, n_, k_, *execution.threads);
  } else {
    gemm(params(x, out, rows, workspace, silu), execution);
  }
}

}  // namespace optimus
