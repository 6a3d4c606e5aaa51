// kv_copy: the copied pages change, no other.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

TEST(KvCopy, CopiesPagesOfEveryLayer) {
  Rng rng(11);
  ThreadPool pool(2);
  int num_layers = 3, num_pages = 10;
  size_t page_elements = 3 * 16 * 64;
  std::vector<Tensor> k, v;
  std::vector<void*> k_pages, v_pages;
  for (int layer = 0; layer < num_layers; ++layer) {
    k.push_back(random_tensor(rng, DType::float32, num_pages * page_elements));
    v.push_back(random_tensor(rng, DType::float32, num_pages * page_elements));
  }
  for (int layer = 0; layer < num_layers; ++layer) {
    k_pages.push_back(k[layer].data());
    v_pages.push_back(v[layer].data());
  }
  auto old_k = k, old_v = v;
  std::vector<int32_t> src = {7, 0, 7}, dst = {2, 9, 4};
  cpu::kv_copy({k_pages.data(), v_pages.data(), src.data(), dst.data(), num_layers, 3,
                page_elements * sizeof(float)},
               pool);
  for (int layer = 0; layer < num_layers; ++layer) {
    for (int page = 0; page < num_pages; ++page) {
      auto copy = std::find(dst.begin(), dst.end(), page) - dst.begin();
      int from = copy < 3 ? src[copy] : page;
      size_t at = page * page_elements, from_at = from * page_elements;
      expect_same_bits(k[layer], at, old_k[layer], from_at, page_elements);
      expect_same_bits(v[layer], at, old_v[layer], from_at, page_elements);
    }
    EXPECT_TRUE(k[layer].guards_intact() && v[layer].guards_intact());
  }
}

TEST(KvCopy, RejectsBadArguments) {
  ThreadPool pool(1);
  void* pages[1] = {nullptr};
  int32_t src = 3, dst = 3;
  KvCopyParams params{pages, pages, &src, &dst, 1, 1, 64};
  expect_invalid([&] { cpu::kv_copy(params, pool); }, "[kv_copy] copy 0");
  dst = -1;
  expect_invalid([&] { cpu::kv_copy(params, pool); }, "got 3 to -1");
  params.page_bytes = 0;
  expect_invalid([&] { cpu::kv_copy(params, pool); }, "page_bytes >= 1");
  params.page_bytes = 64;
  params.num_copies = 0;
  cpu::kv_copy(params, pool);
}

}  // namespace
}  // namespace optimus
