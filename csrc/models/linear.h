// A weight matrix [n, k] in the layout its GEMM wants, and y = x W^T.
//
// On CUDA the weight is row-major and goes to the device as it is loaded. On the CPU:
// fp32 runs our packed GEMM: ATen's result for a row changes with the number of rows in the call
// (measured: below 8 rows), and a request's tokens must not depend on its batch. bf16 runs ATen's
// (oneDNN), which uses the machine's bf16 instructions; without torch, or where the machine has AVX2
// alone, it falls back to our GEMM.
#pragma once

#include <string>

#include "core/buffer.h"
#include "core/execution.h"
#include "kernels/ops.h"

namespace optimus {

class Linear {
 public:
  Linear() = default;
  Linear(int n, int k, DType dtype, Device device);
  // Of 2 * intermediate rows, loaded as [gate | up]; on CUDA gates and ups come in turn in the weight
  // and in the products (see SiluMulParams).
  static Linear gate_up(int intermediate, int k, DType dtype, Device device);

  // Copies rows [row_begin, row_begin + num_rows) from `data`, row-major [num_rows, k] in `dtype()`.
  void load_rows(int row_begin, int num_rows, const void* data);
  // Called once every row is loaded: moves to the final layout and drops the staging copy.
  void finish_loading();

  // The weight in its final layout: packed as pack_gemm_weight does, or row-major [n, k].
  const void* weight() const { return weight_.data(); }
  bool is_packed() const { return !row_major_; }

  // x [rows, k] -> out [rows, n], or with `silu`, where gives_silu(), the activation [rows, n / 2].
  // `workspace` (CUDA): kGemmWorkspaceBytes.
  void run(const void* x, void* out, int rows, Buffer<char>& workspace, const Execution& execution,
           bool silu = false) const;
  bool is_in_turn() const { return in_turn_; }
  bool gives_silu(const void* x, void* out, int rows, Buffer<char>& workspace,
                  const Execution& execution) const;
  // What run() hands to the kernels.
  GemmParams params(const void* x, void* out, int rows, Buffer<char>& workspace,
                    bool silu = false) const;
  size_t bytes() const { return staging_.size() + weight_.size(); }

 private:
  int n_ = 0, k_ = 0;
  DType dtype_ = DType::float32;
  Device device_ = Device::cpu;
  bool row_major_ = false, in_turn_ = false;
  Buffer<char> staging_;  // [n, k] row-major while loading; CPU only
  Buffer<char> weight_;   // row-major or packed
};

// Provided by exactly one of bf16_gemm_aten.cpp and bf16_gemm_portable.cpp.
// Whether bf16_gemm is there, and faster than our GEMM on this machine.
bool bf16_gemm_pays();
// out [rows, n] = x [rows, k] * weight [n, k]^T, bf16 with fp32 accumulation.
void bf16_gemm(const void* x, const void* weight, void* out, int rows, int n, int k,
               ThreadPool& threads);

}  // namespace optimus
