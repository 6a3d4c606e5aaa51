// A captured graph of CUDA work, replayed and timed: the host is out of the picture.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "core/cuda_check.h"

namespace optimus::bench {

class Stream {
 public:
  Stream() { OPTIMUS_CUDA_CHECK(cudaStreamCreate(&stream_)); }
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Captures `body`, replays it for at least `seconds`, returns the median microseconds of the last
// `replays`.
inline double replay_us(cudaStream_t stream, const std::function<void()>& body, int replays,
                        double seconds = 0) {
  constexpr int kWarmUps = 2;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  OPTIMUS_CUDA_CHECK(cudaEventCreate(&begin));
  OPTIMUS_CUDA_CHECK(cudaEventCreate(&end));
  OPTIMUS_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  OPTIMUS_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  OPTIMUS_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<double> times;
  double total_us = 0;
  for (int i = 0; i < replays + kWarmUps || total_us < seconds * 1e6; ++i) {
    OPTIMUS_CUDA_CHECK(cudaEventRecord(begin, stream));
    OPTIMUS_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    OPTIMUS_CUDA_CHECK(cudaEventRecord(end, stream));
    OPTIMUS_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    OPTIMUS_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms * 1e3);
    total_us += times.back();
  }
  OPTIMUS_CUDA_CHECK(cudaGraphExecDestroy(executable));
  OPTIMUS_CUDA_CHECK(cudaGraphDestroy(graph));
  OPTIMUS_CUDA_CHECK(cudaEventDestroy(begin));
  OPTIMUS_CUDA_CHECK(cudaEventDestroy(end));
  times.erase(times.begin(), times.end() - replays);
  std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
  return times[replays / 2];
}

}  // namespace optimus::bench
