// Copies whole KV pages, for every layer. A CTA moves one part of one page of one pool; the pools
// may be page-locked host memory, which the GPU reads and writes in the same 16-byte words.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;

struct Pools {
  void* const* k;
  void* const* v;
};

// Grid: (parts of a page, copies, layers x {K, V}).
template <class Word>
__global__ void __launch_bounds__(kThreads)
    kv_copy_kernel(Pools from, Pools to, const int32_t* src_pages, const int32_t* dst_pages,
                   int64_t words_per_page) {
  wait_for_previous_kernel();
  const int layer = blockIdx.z / 2;
  const bool is_v = blockIdx.z % 2 == 1;
  const Word* src = static_cast<const Word*>((is_v ? from.v : from.k)[layer]) +
                    src_pages[blockIdx.y] * words_per_page;
  Word* dst =
      static_cast<Word*>((is_v ? to.v : to.k)[layer]) + dst_pages[blockIdx.y] * words_per_page;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kWordsPerThread + threadIdx.x;
  Word words[kWordsPerThread];
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    if (first + i * kThreads < words_per_page) words[i] = src[first + i * kThreads];
  }
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    if (first + i * kThreads < words_per_page) dst[first + i * kThreads] = words[i];
  }
}

template <class Word>
void run(const KvCopyParams& params, cudaStream_t stream) {
  const int64_t words = params.page_bytes / sizeof(Word);
  const bool same_pool = params.dst_k_pages == nullptr;
  Pools from{params.k_pages, params.v_pages};
  Pools to = same_pool ? from : Pools{params.dst_k_pages, params.dst_v_pages};
  constexpr int kMaxGridCopies = 65535;
  for (int first = 0; first < params.num_copies; first += kMaxGridCopies) {
    dim3 grid(ceil_div(words, kThreads * kWordsPerThread),
              std::min(kMaxGridCopies, params.num_copies - first), 2 * params.num_layers);
    launch(kv_copy_kernel<Word>, {grid, dim3(kThreads)}, stream, from, to, params.src_pages + first,
           params.dst_pages + first, words);
  }
}

}  // namespace

void kv_copy(const KvCopyParams& params, cudaStream_t stream) {
  OPTIMUS_CHECK(params.num_layers >= 0 && params.num_copies >= 0 && params.page_bytes >= 1,
                "[kv_copy] need num_layers >= 0, num_copies >= 0, page_bytes >= 1, got ",
                params.num_layers, ", ", params.num_copies, ", ", params.page_bytes);
  if (params.num_layers == 0 || params.num_copies == 0) return;
  OPTIMUS_CHECK(params.k_pages != nullptr && params.v_pages != nullptr &&
                    params.src_pages != nullptr && params.dst_pages != nullptr,
                "[kv_copy] null pointer for k_pages, v_pages, src_pages or dst_pages");
  OPTIMUS_CHECK((params.dst_k_pages == nullptr) == (params.dst_v_pages == nullptr),
                "[kv_copy] dst_k_pages and dst_v_pages must both be given or both be null");
  // The pools' own alignment is on the device; allocations are 256-byte aligned.
  if (params.page_bytes % sizeof(uint4) == 0) {
    run<uint4>(params, stream);
  } else {
    run<unsigned char>(params, stream);
  }
}

}  // namespace optimus::cuda
