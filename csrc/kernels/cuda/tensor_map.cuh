// Tensor maps for bulk copies: a row-major bf16 matrix, of which a box of 64 columns lands in shared
// memory as rows of 128 bytes in the 128-byte swizzle, which ldmatrix and wgmma read without conflicts.
#pragma once

#include <cuda.h>

#include "core/cuda_check.h"

namespace optimus::cuda {

constexpr int kBoxColumns = 64;

// Rows and columns outside of the matrix are read as zeros. A box's rows are read as they are: promoted
// to 256 bytes, of which the other half belongs to the next box, they cost an H200 3 to 6% of its
// bandwidth.
inline CUtensorMap make_tensor_map(const char* op, const void* data, uint64_t rows, int columns,
                                   int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // Of the driver, to which nothing here is linked.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    OPTIMUS_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                        cudaEnableDefault, &found));
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), rows};
  cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * 2};
  cuuint32_t box[2] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  cuuint32_t element_strides[2] = {1, 1};
  CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
             box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  OPTIMUS_CHECK(status == CUDA_SUCCESS, "[", op, "] cuTensorMapEncodeTiled failed with ",
                static_cast<int>(status), " (the data must be 16-byte aligned)");
  return map;
}

}  // namespace optimus::cuda
