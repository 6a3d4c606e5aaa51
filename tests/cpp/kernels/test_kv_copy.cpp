// kv_copy: the copied pages change, no other; also between two pools.
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

TEST(KvCopy, CopiesToAnotherPool) {
  Rng rng(12);
  ThreadPool pool(1);
  size_t page_elements = 48;
  Tensor k = random_tensor(rng, DType::float32, 3 * page_elements);
  Tensor v = random_tensor(rng, DType::float32, 3 * page_elements);
  Tensor other_k(DType::float32, 4 * page_elements), other_v = other_k;
  void *k_pages = k.data(), *v_pages = v.data();
  void *other_k_pages = other_k.data(), *other_v_pages = other_v.data();
  std::vector<int32_t> src = {2, 1}, dst = {0, 1};  // page 1 to page 1: of another pool
  KvCopyParams params{&k_pages, &v_pages, src.data(), dst.data(), 1, 2, page_elements * 4};
  params.dst_k_pages = &other_k_pages;
  expect_invalid([&] { cpu::kv_copy(params, pool); }, "must both be given");
  params.dst_v_pages = &other_v_pages;
  cpu::kv_copy(params, pool);
  for (int i = 0; i < 2; ++i) {
    size_t to = dst[i] * page_elements, from = src[i] * page_elements;
    expect_same_bits(other_k, to, k, from, page_elements);
    expect_same_bits(other_v, to, v, from, page_elements);
  }
  for (size_t i = 2 * page_elements; i < other_k.size(); ++i) {
    EXPECT_TRUE(std::isnan(other_k.get(i)) && std::isnan(other_v.get(i)));
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
