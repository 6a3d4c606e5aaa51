// Launching with programmatic dependent launch, and CUDA errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include "core/check.h"

namespace optimus::cuda::attention {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(concat("[block_attention] ", what, ": ", cudaGetErrorString(status)));
  }
}

// A property of the current device; a cheap driver query.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether the code loaded for `kernel` was compiled for sm_90 or later (a binary for sm_80 translated
// for a newer GPU was not), and so has bulk copies and dependent launch in it.
template <class Kernel>
bool is_sm90_code(Kernel* kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

// From sm_90 on, the kernel may start while its predecessor in the stream drains: every kernel
// launched here begins with ptx::wait_for_dependencies().
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), int grid, int block, size_t shared_bytes,
                      void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = is_sm90_code(kernel) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace optimus::cuda::attention
