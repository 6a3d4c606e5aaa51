// Gathers rows of the embedding table: a pure copy, 16 bytes a thread.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 256;

// Word: the unit of copying. Grid: (parts of a row, rows).
template <class Word>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const Word* table, const int32_t* token_ids, Word* out, int words_per_row) {
  wait_for_previous_kernel();
  int word = blockIdx.x * kThreads + threadIdx.x;
  if (word >= words_per_row) return;
  int64_t row = blockIdx.y;
  out[row * words_per_row + word] = table[int64_t(token_ids[row]) * words_per_row + word];
}

template <class Word>
void run(const EmbeddingParams& params, size_t row_bytes, cudaStream_t stream) {
  int words = static_cast<int>(row_bytes / sizeof(Word));
  constexpr int kMaxGridRows = 65535;
  for (int first = 0; first < params.rows; first += kMaxGridRows) {
    int rows = std::min(kMaxGridRows, params.rows - first);
    launch(embedding_kernel<Word>, {dim3(ceil_div(words, kThreads), rows), dim3(kThreads)}, stream,
           static_cast<const Word*>(params.table), params.token_ids + first,
           static_cast<Word*>(params.out) + static_cast<size_t>(first) * words, words);
  }
}

}  // namespace

void embedding(const EmbeddingParams& params, cudaStream_t stream) {
  OPTIMUS_CHECK(params.rows >= 0 && params.hidden >= 1,
                "[embedding] need rows >= 0 and hidden >= 1, got rows ", params.rows, ", hidden ",
                params.hidden);
  OPTIMUS_CHECK(!params.packed, "[embedding] packed tables exist only on the CPU, got packed");
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.table != nullptr && params.token_ids != nullptr && params.out != nullptr,
                "[embedding] null pointer for table, token_ids or out");
  size_t row_bytes = params.hidden * dtype_size(params.dtype);
  if (row_bytes % sizeof(uint4) == 0 && is_aligned(params.table) && is_aligned(params.out)) {
    run<uint4>(params, row_bytes, stream);
  } else {
    run<uint16_t>(params, row_bytes, stream);
  }
}

}  // namespace optimus::cuda
