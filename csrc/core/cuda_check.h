// Turns CUDA runtime errors into exceptions that carry the call. Only in CUDA builds.
//
//   OPTIMUS_CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream));
//
// Asynchronous errors of earlier work surface at a later call: its text is then not the culprit's.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "core/check.h"

namespace optimus {

inline void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(concat("CUDA error ", cudaGetErrorName(error), " (",
                                  cudaGetErrorString(error), ") from ", call, " at ", file, ":",
                                  line));
}

}  // namespace optimus

#define OPTIMUS_CUDA_CHECK(call) ::optimus::check_cuda((call), #call, __FILE__, __LINE__)
