// Copies whole KV pages inside one pool, for every layer: copy-on-write of shared pages.
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace optimus::cpu {
namespace {

constexpr int64_t kMinBytesPerThread = 64 * 1024;

void check(const KvCopyParams& params) {
  OPTIMUS_CHECK(params.num_layers >= 0 && params.num_copies >= 0 && params.page_bytes >= 1,
                "[kv_copy] need num_layers >= 0, num_copies >= 0, page_bytes >= 1, got ",
                params.num_layers, ", ", params.num_copies, ", ", params.page_bytes);
  if (params.num_layers == 0 || params.num_copies == 0) return;
  OPTIMUS_CHECK(params.k_pages != nullptr && params.v_pages != nullptr &&
                    params.src_pages != nullptr && params.dst_pages != nullptr,
                "[kv_copy] null pointer for k_pages, v_pages, src_pages or dst_pages");
  for (int i = 0; i < params.num_copies; ++i) {
    int src = params.src_pages[i], dst = params.dst_pages[i];
    OPTIMUS_CHECK(src >= 0 && dst >= 0 && src != dst, "[kv_copy] copy ", i,
                  " needs two different pages >= 0, got ", src, " to ", dst);
  }
}

}  // namespace

void kv_copy(const KvCopyParams& params, ThreadPool& threads) {
  check(params);
  // Items are (layer, copy); each moves one K and one V page.
  int64_t items = static_cast<int64_t>(params.num_layers) * params.num_copies;
  int64_t grain = 1 + kMinBytesPerThread / static_cast<int64_t>(2 * params.page_bytes);
  threads.parallel_for(items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t layer = i / params.num_copies, copy = i % params.num_copies;
      size_t src = params.src_pages[copy] * params.page_bytes;
      size_t dst = params.dst_pages[copy] * params.page_bytes;
      for (void* pages : {params.k_pages[layer], params.v_pages[layer]}) {
        char* base = static_cast<char*>(pages);
        std::memcpy(base + dst, base + src, params.page_bytes);
      }
    }
  });
}

}  // namespace optimus::cpu
