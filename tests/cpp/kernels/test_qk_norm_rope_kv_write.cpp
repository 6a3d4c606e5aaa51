// qk_norm_rope_kv_write: q, the written K and V entries, and that no other entry changes.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

struct Shape {
  int rows, num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  bool normed;
};

constexpr float kEps = 1e-6f;
constexpr int kNumPages = 9;

std::vector<double> reference_head(const Tensor& qkv, size_t at, const Tensor* weight,
                                   const std::vector<float>& inv_freq, int position, int head_dim) {
  std::vector<double> head(head_dim);
  double squares = 0;
  for (int d = 0; d < head_dim; ++d) {
    head[d] = qkv.get(at + d);
    squares += head[d] * head[d];
  }
  if (weight != nullptr) {
    double scale = 1 / std::sqrt(squares / head_dim + kEps);
    for (int d = 0; d < head_dim; ++d) head[d] *= scale * weight->get(d);
  }
  int half = static_cast<int>(inv_freq.size());
  for (int j = 0; j < half; ++j) {
    double angle = static_cast<float>(position) * inv_freq[j];
    double a = head[j], b = head[j + half];
    head[j] = a * std::cos(angle) - b * std::sin(angle);
    head[j + half] = b * std::cos(angle) + a * std::sin(angle);
  }
  return head;
}

void append(std::vector<double>& out, const std::vector<double>& values) {
  out.insert(out.end(), values.begin(), values.end());
}

// Copies the entry of every row out of the pages, and overwrites it with NaN.
Tensor take_entries(Tensor& pages, const Shape& shape, const std::vector<int32_t>& slots) {
  Tensor out(pages.dtype(), slots.size() * shape.num_kv_heads * shape.head_dim);
  size_t i = 0;
  for (int slot : slots) {
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      size_t page = slot / shape.page_size, entry = slot % shape.page_size;
      size_t at = ((page * shape.num_kv_heads + h) * shape.page_size + entry) * shape.head_dim;
      for (int d = 0; d < shape.head_dim; ++d) {
        out.set(i++, pages.get(at + d));
        pages.set(at + d, std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
  return out;
}

void expect_all_nan(const Tensor& tensor) {
  for (size_t i = 0; i < tensor.size(); ++i) ASSERT_TRUE(std::isnan(tensor.get(i))) << i;
  ASSERT_TRUE(tensor.guards_intact());
}

void run_and_compare(Rng& rng, const Shape& shape, DType dtype) {
  ThreadPool pool(2);
  const int rows = shape.rows, num_kv = shape.num_kv_heads, head_dim = shape.head_dim;
  const int width = (shape.num_q_heads + 2 * num_kv) * head_dim;
  Tensor qkv = random_tensor(rng, dtype, rows * width, 2);
  Tensor q_weight = random_tensor(rng, dtype, head_dim);
  Tensor k_weight = random_tensor(rng, dtype, head_dim);
  std::vector<float> inv_freq;
  for (int j = 0; j < shape.rotary_dim / 2; ++j) {
    inv_freq.push_back(std::pow(1e4f, -2.0f * j / shape.rotary_dim));
  }
  std::vector<int32_t> positions(rows);
  for (auto& position : positions) position = random_int(rng, 0, 4000);
  auto slots = random_permutation(rng, kNumPages * shape.page_size);
  slots.resize(rows);
  Tensor q(dtype, rows * shape.num_q_heads * head_dim);
  Tensor k_pages(dtype, kNumPages * num_kv * shape.page_size * head_dim), v_pages = k_pages;
  cpu::qk_norm_rope_kv_write(
      {qkv.data(), shape.normed ? q_weight.data() : nullptr,
       shape.normed ? k_weight.data() : nullptr, inv_freq.data(), positions.data(), slots.data(),
       q.data(), k_pages.data(), v_pages.data(), rows, shape.num_q_heads, num_kv, head_dim,
       shape.rotary_dim, shape.page_size, kEps, dtype},
      pool);

  std::vector<double> expected_q, expected_k, expected_v;
  for (int r = 0; r < rows; ++r) {
    size_t at = static_cast<size_t>(r) * width;
    auto head = [&](const Tensor* weight) {
      auto values = reference_head(qkv, at, shape.normed ? weight : nullptr, inv_freq, positions[r],
                                   head_dim);
      at += head_dim;
      return values;
    };
    for (int h = 0; h < shape.num_q_heads; ++h) append(expected_q, head(&q_weight));
    for (int h = 0; h < num_kv; ++h) append(expected_k, head(&k_weight));
    for (int i = 0; i < num_kv * head_dim; ++i) expected_v.push_back(qkv.get(at + i));
  }
  expect_close(q, expected_q);
  expect_close(take_entries(k_pages, shape, slots), expected_k);
  expect_close(take_entries(v_pages, shape, slots), expected_v);
  expect_all_nan(k_pages);  // nothing else was written
  expect_all_nan(v_pages);
}

TEST(QkNormRopeKvWrite, MatchesPlainLoops) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(12);
    Shape shapes[] = {{0, 1, 1, 16, 16, 16, true},  {1, 6, 3, 64, 64, 16, true},
                      {37, 6, 3, 64, 64, 32, true}, {20, 4, 1, 128, 128, 8, true},
                      {9, 2, 2, 80, 40, 16, true},  {5, 3, 3, 96, 0, 4, false},
                      {7, 4, 2, 20, 10, 1, true},   {50, 8, 1, 64, 32, 16, false}};
    for (const auto& shape : shapes) run_and_compare(rng, shape, dtype);
  });
}

TEST(QkNormRopeKvWrite, PaddingRowsWriteNoKeysAndValues) {
  Rng rng(13);
  ThreadPool pool(1);
  const int head_dim = 16;
  Tensor qkv = random_tensor(rng, DType::float32, 2 * 3 * head_dim);
  Tensor q(DType::float32, 2 * head_dim), k(DType::float32, 8 * head_dim), v = k;
  std::vector<float> inv_freq(head_dim / 2, 0.5f);
  std::vector<int32_t> positions = {3, 0}, slots = {5, -1};
  cpu::qk_norm_rope_kv_write(
      {qkv.data(), nullptr, nullptr, inv_freq.data(), positions.data(), slots.data(), q.data(),
       k.data(), v.data(), 2, 1, 1, head_dim, head_dim, 4, kEps, DType::float32},
      pool);
  for (size_t i = 0; i < q.size(); ++i) EXPECT_FALSE(std::isnan(q.get(i)));
  for (const Tensor* pages : {&k, &v}) {
    EXPECT_TRUE(pages->guards_intact());
    for (size_t i = 0; i < pages->size(); ++i) {
      EXPECT_EQ(std::isnan(pages->get(i)), i / head_dim != 5) << "element " << i;
    }
  }
}

TEST(QkNormRopeKvWrite, RejectsBadArguments) {
  ThreadPool pool(1);
  Tensor data(DType::float32, 256);
  int32_t position = -1, slot = 0;
  float inv_freq[8] = {};
  QkNormRopeKvWriteParams params{
      data.data(),   nullptr, nullptr, inv_freq, &position, &slot, data.data(), data.data(),
      data.data(),   1,       1,       1,        16,        16,    4,           kEps,
      DType::float32};
  auto run = [&] { cpu::qk_norm_rope_kv_write(params, pool); };
  expect_invalid(run, "row 0 needs a position >= 0, got -1");
  params.rotary_dim = 18;
  expect_invalid(run, "rotary_dim must be even and in 0..head_dim (16), got 18");
  params.rotary_dim = 7;
  expect_invalid(run, "got 7");
  params.head_dim = 4096;
  expect_invalid(run, "head_dim must be in 1..512, got 4096");
  params.head_dim = 16;
  params.rotary_dim = 16;
  params.inv_freq = nullptr;
  expect_invalid(run, "[qk_norm_rope_kv_write] null pointer");
}

}  // namespace
}  // namespace optimus
