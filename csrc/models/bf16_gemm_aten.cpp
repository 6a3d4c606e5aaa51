// bf16 GEMM through ATen (oneDNN), which picks AMX, AVX512-BF16 or AVX-512 for the machine.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include "kernels/cpu/simd.h"
#include "models/linear.h"

namespace optimus {
namespace {

// Our threads split the rows; ATen must not start a second team inside each of them.
class SingleThreadedAten {
 public:
  SingleThreadedAten() : before_(at::get_num_threads()) {
    if (before_ != 1) at::set_num_threads(1);
  }
  ~SingleThreadedAten() {
    if (before_ != 1) at::set_num_threads(before_);
  }

 private:
  int before_;
};

constexpr int kMinRowsPerThread = 16;  // below that, splitting rows costs more than it gains

}  // namespace

// With AVX2 alone steps of 1 to 500 rows took 2.7 to 5.1 times as long as with our GEMM, which widens.
bool bf16_gemm_pays() { return cpu::best_isa() != cpu::Isa::avx2; }

void bf16_gemm(const void* x, const void* weight, void* out, int rows, int n, int k,
               ThreadPool& threads) {
  threads.parallel_for(rows, kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    SingleThreadedAten single_threaded;
    c10::InferenceMode inference;
    auto tensor = [](const void* data, int64_t num_rows, int64_t num_cols) {
      return at::from_blob(const_cast<void*>(data), {num_rows, num_cols}, at::kBFloat16);
    };
    const auto* x_rows = static_cast<const bfloat16*>(x) + begin * k;
    auto* out_rows = static_cast<bfloat16*>(out) + begin * n;
    at::Tensor result = tensor(out_rows, end - begin, n);
    at::mm_out(result, tensor(x_rows, end - begin, k), tensor(weight, n, k).t());
  });
}

}  // namespace optimus
