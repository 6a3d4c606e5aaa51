// Device helpers of the CUDA benchmarks: random bf16 fill, and the plain read that sets the floor of
// every memory-bound kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace optimus::bench {

// `count` bf16 values, uniform in [-1, 1].
void fill_random_bf16(void* data, size_t count, uint32_t seed, cudaStream_t);

// Reads `bytes` (a multiple of 16) with `ctas_per_sm` CTAs of 512 threads on each SM; `sink` gets a
// word nobody looks at.
void read_plainly(const void* data, size_t bytes, int ctas_per_sm, uint32_t* sink, cudaStream_t);

}  // namespace optimus::bench
