// Copies whole KV pages, for every layer: copy-on-write of shared pages, preemption.
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
  OPTIMUS_CHECK((params.dst_k_pages == nullptr) == (params.dst_v_pages == nullptr),
                "[kv_copy] dst_k_pages and dst_v_pages must both be given or both be null");
  const bool same_pool = params.dst_k_pages == nullptr;
  for (int i = 0; i < params.num_copies; ++i) {
    int src = params.src_pages[i], dst = params.dst_pages[i];
    OPTIMUS_CHECK(src >= 0 && dst >= 0 && !(same_pool && src == dst), "[kv_copy] copy ", i,
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
      auto copy_page = [&](void* const* from, void* const* to) {
        std::memcpy(static_cast<char*>(to[layer]) + dst,
                    static_cast<const char*>(from[layer]) + src, params.page_bytes);
      };
      bool same_pool = params.dst_k_pages == nullptr;
      copy_page(params.k_pages, same_pool ? params.k_pages : params.dst_k_pages);
      copy_page(params.v_pages, same_pool ? params.v_pages : params.dst_v_pages);
    }
  });
}

}  // namespace optimus::cpu
