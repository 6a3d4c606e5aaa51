// silu(gate) * up, the activation between the two halves of the MLP: one chunk a thread.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 256;

static_assert(kGatesInTurn == kChunk);

// Grid: (parts of a row, rows). kWidth: elements a thread, kChunk or 1.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const T* gate_up, T* out, int intermediate, bool in_turn) {
  wait_for_previous_kernel();
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
  if (column >= intermediate) return;
  const size_t row = blockIdx.y;
  const int in_group = column % kGatesInTurn;
  const T* gate_at =
      gate_up + row * 2 * intermediate + (in_turn ? 2 * (column - in_group) + in_group : column);
  const T* up_at = gate_at + (in_turn ? kGatesInTurn : intermediate);
  T* out_at = out + row * intermediate + column;
  if constexpr (kWidth == 1) {
    store_element(out_at, silu(load_element(gate_at)) * load_element(up_at));
  } else {
    RawChunk<T> raw_gate = load_chunk(gate_at), raw_up = load_chunk(up_at);
    float gate[kChunk], up[kChunk];
    unpack(raw_gate, gate);
    unpack(raw_up, up);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) up[j] *= silu(gate[j]);
    store_chunk(out_at, up);
  }
}

template <class T, int kWidth>
void run(const SiluMulParams& params, cudaStream_t stream) {
  constexpr int kMaxGridRows = 65535;
  const size_t width = params.intermediate;
  for (int first = 0; first < params.rows; first += kMaxGridRows) {
    int rows = std::min(kMaxGridRows, params.rows - first);
    dim3 grid(ceil_div(params.intermediate, kThreads * kWidth), rows);
    launch(silu_mul_kernel<T, kWidth>, {grid, dim3(kThreads)}, stream,
           static_cast<const T*>(params.gate_up) + first * 2 * width,
           static_cast<T*>(params.out) + first * width, params.intermediate, params.in_turn);
  }
}

}  // namespace

void silu_mul(const SiluMulParams& params, cudaStream_t stream) {
  OPTIMUS_CHECK(params.rows >= 0 && params.intermediate >= 1,
                "[silu_mul] need rows >= 0 and intermediate >= 1, got rows ", params.rows,
                ", intermediate ", params.intermediate);
  OPTIMUS_CHECK(!params.in_turn || params.intermediate % kGatesInTurn == 0,
                "[silu_mul] gates in turn come by ", kGatesInTurn, ", got intermediate ",
                params.intermediate);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.gate_up != nullptr && params.out != nullptr,
                "[silu_mul] null pointer for gate_up or out");
  dispatch_device_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (params.intermediate % kChunk == 0 && is_aligned(params.gate_up) && is_aligned(params.out)) {
      run<T, kChunk>(params, stream);
    } else {
      run<T, 1>(params, stream);
    }
  });
}

}  // namespace optimus::cuda
