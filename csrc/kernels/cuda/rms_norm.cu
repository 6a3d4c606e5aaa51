// RMS norm, with the residual addition in front of it or a gather of rows. One CTA a row: the row
// stays in registers between the sum of squares and the scaling, so memory is touched once.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kLoopThreads = 256;

template <class T>
struct Args {
  const T* x;
  T* residual;
  const int32_t* row_idx;
  const T* weight;
  T* out;
  int hidden;
  float inverse_hidden, eps;
};

// kChunks: chunks of 8 elements per thread, all in registers. hidden is a multiple of 8, <= 16384.
template <class T, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(Args<T> args) {
  __shared__ float shared[kWarp];
  RawChunk<T> raw[kChunks], raw_residual[kChunks], raw_weight[kChunks];
  let_next_kernel_start();
  // The weight is the farthest away: nobody has read it since the step before.
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    int column = (i * blockDim.x + threadIdx.x) * kChunk;
    if (column < args.hidden) raw_weight[i] = load_chunk(args.weight + column);
  }
  wait_until_previous_is_done();
  const size_t out_row = size_t(blockIdx.x) * args.hidden;
  const size_t in_row =
      args.row_idx != nullptr ? size_t(args.row_idx[blockIdx.x]) * args.hidden : out_row;

#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    int column = (i * blockDim.x + threadIdx.x) * kChunk;
    if (column >= args.hidden) continue;
    raw[i] = load_chunk(args.x + in_row + column);
    if (args.residual != nullptr) raw_residual[i] = load_chunk(args.residual + in_row + column);
  }
  float value[kChunks][kChunk];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    int column = (i * blockDim.x + threadIdx.x) * kChunk;
    if (column >= args.hidden) continue;
    unpack(raw[i], value[i]);
    if (args.residual != nullptr) {
      float residual[kChunk];
      unpack(raw_residual[i], residual);
      // What is normed is the sum as stored.
#pragma unroll
      for (int j = 0; j < kChunk; ++j) value[i][j] = round_to(value[i][j] + residual[j], args.x);
      store_chunk(args.residual + in_row + column, value[i]);
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) squares += value[i][j] * value[i][j];
  }
  const float scale = rsqrtf(sum_block(squares, shared) * args.inverse_hidden + args.eps);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    int column = (i * blockDim.x + threadIdx.x) * kChunk;
    if (column >= args.hidden) continue;
    float weight[kChunk];
    unpack(raw_weight[i], weight);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) weight[j] *= value[i][j] * scale;
    store_chunk(args.out + out_row + column, weight);
  }
}

// Any other hidden size, element by element.
template <class T>
__global__ void __launch_bounds__(kLoopThreads) rms_norm_loop_kernel(Args<T> args) {
  __shared__ float shared[kWarp];
  wait_for_previous_kernel();
  const size_t out_row = size_t(blockIdx.x) * args.hidden;
  const size_t in_row =
      args.row_idx != nullptr ? size_t(args.row_idx[blockIdx.x]) * args.hidden : out_row;
  const T* source = args.residual != nullptr ? args.residual : args.x;
  float squares = 0;
  for (int column = threadIdx.x; column < args.hidden; column += kLoopThreads) {
    float value = load_element(args.x + in_row + column);
    if (args.residual != nullptr) {
      value = round_to(value + load_element(args.residual + in_row + column), args.x);
      store_element(args.residual + in_row + column, value);
    }
    squares += value * value;
  }
  const float scale = rsqrtf(sum_block(squares, shared) * args.inverse_hidden + args.eps);
  // A thread reads back what it wrote itself.
  for (int column = threadIdx.x; column < args.hidden; column += kLoopThreads) {
    float value = load_element(source + in_row + column) * scale;
    store_element(args.out + out_row + column, value * load_element(args.weight + column));
  }
}

template <class T>
void run(const RmsNormParams& params, cudaStream_t stream) {
  Args<T> args{static_cast<const T*>(params.x),
               static_cast<T*>(params.residual),
               params.row_idx,
               static_cast<const T*>(params.weight),
               static_cast<T*>(params.out),
               params.hidden,
               1.0f / static_cast<float>(params.hidden),
               params.eps};
  const int chunks = params.hidden / kChunk;
  bool fits = params.hidden % kChunk == 0 && is_aligned(args.x) && is_aligned(args.residual) &&
              is_aligned(args.weight) && is_aligned(args.out) && chunks <= 2 * kMaxThreads;
  if (!fits) {
    launch(rms_norm_loop_kernel<T>, {dim3(params.rows), dim3(kLoopThreads)}, stream, args);
    return;
  }
  auto start = [&](auto* kernel, int per_thread) {
    int threads = ceil_div(ceil_div(chunks, per_thread), kWarp) * kWarp;
    launch(kernel, {dim3(params.rows), dim3(threads)}, stream, args);
  };
  if (chunks <= 256) {
    start(rms_norm_kernel<T, 1>, 1);
  } else {
    start(rms_norm_kernel<T, 2>, 2);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  OPTIMUS_CHECK(params.rows >= 0 && params.hidden >= 1,
                "[rms_norm] need rows >= 0 and hidden >= 1, got rows ", params.rows, ", hidden ",
                params.hidden);
  OPTIMUS_CHECK(params.eps >= 0, "[rms_norm] eps must be >= 0, got ", params.eps);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.x != nullptr && params.weight != nullptr && params.out != nullptr,
                "[rms_norm] null pointer for x, weight or out");
  OPTIMUS_CHECK(params.row_idx == nullptr || params.out != params.x,
                "[rms_norm] out must not alias x when row_idx is given");
  dispatch_device_dtype(params.dtype, [&](auto zero) { run<decltype(zero)>(params, stream); });
}

}  // namespace optimus::cuda
