// Where an operation runs. Passed explicitly to every op; there is no ambient device or stream.
#pragma once

#include "core/device.h"
#include "core/parallel.h"

namespace optimus {

struct Execution {
  Device device = Device::cpu;
  ThreadPool* threads = nullptr;  // cpu
  void* stream = nullptr;         // cuda: a cudaStream_t
};

}  // namespace optimus
