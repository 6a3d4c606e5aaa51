// Starts decode windows: a CTA a window, a thread a position. See OpenWindowsParams.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/kernels.h"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) open_windows_kernel(OpenWindowsParams p) {
  wait_for_previous_kernel();
  const int length = p.state.block_length, slot = p.slots[blockIdx.x];
  const int first = p.mode == RowMode::ar ? 0 : length;
  const int num_fresh = p.num_fresh[blockIdx.x];
  int32_t* tokens = p.state.window_tokens + int64_t(slot) * 2 * length;
  uint8_t* status = p.state.window_status + int64_t(slot) * 2 * length;
  for (int i = threadIdx.x; i < 2 * length; i += kThreads) {
    const int known = i - first;
    const bool is_fresh = known >= 0 && known < num_fresh;
    tokens[i] = is_fresh ? p.tokens[int64_t(blockIdx.x) * length + known] : -1;
    status[i] = is_fresh ? kFresh : i < length ? kCached : kAbsent;
  }
  if (threadIdx.x > 0) return;
  p.state.block_start[slot] = p.block_starts[blockIdx.x];
  p.state.denoise_step[slot] = 0;
  p.state.ended[slot] = 0;
}

}  // namespace

void open_windows(const OpenWindowsParams& p, cudaStream_t stream) {
  OPTIMUS_CHECK(p.num_openings >= 0, "[open_windows] num_openings must be >= 0, got ",
                p.num_openings);
  OPTIMUS_CHECK(p.state.block_length >= 1 && p.state.block_length <= kMaxBlockLength,
                "[open_windows] block_length must be in 1..", kMaxBlockLength, ", got ",
                p.state.block_length);
  if (p.num_openings == 0) return;
  launch(open_windows_kernel, {dim3(p.num_openings), dim3(kThreads)}, stream, p);
}

}  // namespace optimus::cuda
