// Gathers rows of the embedding table, or columns of the panels of a tied head.
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace optimus::cpu {
namespace {

constexpr int64_t kMinBytesPerThread = 64 * 1024;

// Element i of token t is packed[t / kGemmPanel][i][t % kGemmPanel].
template <class T>
void gather_packed(const EmbeddingParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const size_t token = params.token_ids[row];
    const T* column = static_cast<const T*>(params.table) +
                      token / kGemmPanel * kGemmPanel * params.hidden + token % kGemmPanel;
    T* out = static_cast<T*>(params.out) + row * params.hidden;
    for (int i = 0; i < params.hidden; ++i) out[i] = column[size_t(i) * kGemmPanel];
  }
}

}  // namespace

void embedding(const EmbeddingParams& params, ThreadPool& threads) {
  OPTIMUS_CHECK(params.rows >= 0 && params.hidden >= 1,
                "[embedding] need rows >= 0 and hidden >= 1, got rows ", params.rows, ", hidden ",
                params.hidden);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.table != nullptr && params.token_ids != nullptr && params.out != nullptr,
                "[embedding] null pointer for table, token_ids or out");
  for (int i = 0; i < params.rows; ++i) {
    OPTIMUS_CHECK(params.token_ids[i] >= 0, "[embedding] token_ids[", i, "] must be >= 0, got ",
                  params.token_ids[i]);
  }
  const size_t row_bytes = params.hidden * dtype_size(params.dtype);
  const char* table = static_cast<const char*>(params.table);
  char* out = static_cast<char*>(params.out);
  threads.parallel_for(
      params.rows, 1 + kMinBytesPerThread / row_bytes, [&](int64_t begin, int64_t end) {
        if (params.packed) {
          dispatch_dtype(params.dtype, [&](auto element) {
            gather_packed<decltype(element)>(params, begin, end);
          });
          return;
        }
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(out + i * row_bytes, table + params.token_ids[i] * row_bytes, row_bytes);
        }
      });
}

}  // namespace optimus::cpu
