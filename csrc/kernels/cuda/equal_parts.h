// A line of places in equal parts, for kernels whose CTAs share work so; on the host too.
#pragma once

#include <cuda_runtime_api.h>

namespace optimus::cuda {

// Part c is [begin(c), begin(c + 1)): the first few parts are longer by one. Int: of places.
template <class Int>
struct EqualParts {
  Int least, longer;  // length of a part; how many are longer by one

  __host__ __device__ EqualParts(Int length, Int num_parts)
      : least(length / num_parts), longer(length % num_parts) {}
  __host__ __device__ Int begin(Int part) const {
    return part * least + (part < longer ? part : longer);
  }
  // Of a place in the line.
  __host__ __device__ Int owner(Int place) const {
    const Int in_longer = longer * (least + 1);
    return place < in_longer ? place / (least + 1) : longer + (place - in_longer) / least;
  }
};

}  // namespace optimus::cuda
