// Gathers rows of the embedding table.
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace optimus::cpu {
namespace {

constexpr int64_t kMinBytesPerThread = 64 * 1024;

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
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(out + i * row_bytes, table + params.token_ids[i] * row_bytes, row_bytes);
        }
      });
}

}  // namespace optimus::cpu
