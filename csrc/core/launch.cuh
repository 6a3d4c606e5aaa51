// How every kernel here is launched: by programmatic dependent launch where the GPU has it.
//
// A dependent kernel's CTAs become resident while the kernel before it runs, as soon as all CTAs of
// that one allow it and where there is room. By default a kernel begins with
// wait_for_previous_kernel(): it allows the successor to start and then waits until the predecessor is
// complete and its memory visible. Each kernel waits so, in one CTA at least, whatever started early: a
// complete predecessor means that everything before it is complete, and the stream order of memory
// holds.
//
// What a kernel reads before the wait must not be the work of kernels that may still run: of any
// before it, as far back as those that allow their successor to start before their own wait. What that
// is here: kernels/cuda/kernels.h.
//
// Kernels of libraries are launched plainly and wait for everything.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "core/cuda_check.h"

namespace optimus::cuda {

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_until_previous_is_done() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
  let_next_kernel_start();
  wait_until_previous_is_done();
}

struct DeviceProperties {
  // `code`: the compute capability, times ten, that the code loaded there was compiled for: what it
  // was compiled without, such as the waits above, must not be asked of it on any GPU.
  int major = 0, code = 0, num_sms = 0;
};

template <class = void>
__global__ void code_probe() {}

// Of the current device; cached, since a step asks once per kernel.
inline const DeviceProperties& device_properties() {
  constexpr int kMaxDevices = 64;
  static thread_local DeviceProperties cache[kMaxDevices];
  int device = 0;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  DeviceProperties& properties = cache[device % kMaxDevices];
  if (properties.num_sms == 0) {
    OPTIMUS_CUDA_CHECK(
        cudaDeviceGetAttribute(&properties.major, cudaDevAttrComputeCapabilityMajor, device));
    cudaFuncAttributes attributes;
    OPTIMUS_CUDA_CHECK(cudaFuncGetAttributes(&attributes, code_probe<>));
    properties.code = attributes.ptxVersion;
    OPTIMUS_CUDA_CHECK(
        cudaDeviceGetAttribute(&properties.num_sms, cudaDevAttrMultiProcessorCount, device));
  }
  return properties;
}

struct LaunchShape {
  dim3 grid, block;
  int cluster = 1;          // CTAs per cluster along x; needs code of compute capability 9
  size_t shared_bytes = 0;  // dynamic
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
            Args&&... args) {
  cudaLaunchAttribute attributes[3];
  int count = 0;
  if (device_properties().code >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    // Kernels that run side by side on an SM have to agree on how much of it is shared memory.
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
    if (shape.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim.x = shape.cluster;
      attributes[count].val.clusterDim.y = 1;
      attributes[count++].val.clusterDim.z = 1;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  OPTIMUS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...));
}

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace optimus::cuda
