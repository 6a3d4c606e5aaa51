// How far the fp32 sums of the CPU kernels are from exact ones: the root mean square of the error
// over many random elements, in units of fp32's 2^-24 of the typical element. The bounds lie
// between what sums cut into stretches reach and what one long chain of additions does.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

double rms(const std::vector<double>& values) {
  double squares = 0;
  for (double value : values) squares += value * value;
  return std::sqrt(squares / static_cast<double>(values.size()));
}

double rms_error(const Tensor& actual, const std::vector<double>& expected) {
  std::vector<double> errors;
  for (size_t i = 0; i < expected.size(); ++i) errors.push_back(actual.get(i) - expected[i]);
  return rms(errors) / rms(expected) * 0x1p24;
}

template <class Body>
void for_each_isa(const Body& body) {
  for_each_isa_and_dtype([&](DType dtype) {
    if (dtype == DType::float32) body();
  });
}

double gemm_error(Rng& rng, int rows, int n, int k) {
  ThreadPool pool(2);
  Tensor x = random_tensor(rng, DType::float32, static_cast<size_t>(rows) * k);
  Tensor weight = random_tensor(rng, DType::float32, static_cast<size_t>(n) * k);
  Tensor packed(DType::float32, packed_gemm_weight_size(n, k));
  Tensor out(DType::float32, static_cast<size_t>(rows) * n);
  pack_gemm_weight(weight.data(), packed.data(), n, k, DType::float32);
  cpu::gemm({x.data(), packed.data(), out.data(), rows, n, k, DType::float32, DType::float32},
            pool);
  std::vector<double> expected;
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < n; ++c) {
      double sum = 0;
      for (int i = 0; i < k; ++i) sum += double{x.get(row * k + i)} * weight.get(c * k + i);
      expected.push_back(sum);
    }
  }
  return rms_error(out, expected);
}

// One sequence on one page, one head, every query sees every key. `spread` is the standard
// deviation of the scores.
double attention_error(Rng& rng, int rows, int head_dim, int num_keys, float spread) {
  ThreadPool pool(2);
  const size_t entries = static_cast<size_t>(num_keys) * head_dim;
  Tensor q = random_tensor(rng, DType::float32, static_cast<size_t>(rows) * head_dim, spread);
  Tensor k = random_tensor(rng, DType::float32, entries);
  Tensor v = random_tensor(rng, DType::float32, entries);
  Tensor out(DType::float32, q.size());
  const int32_t cu_seqlens[2] = {0, rows}, page = 0;
  const std::vector<int32_t> limits(rows, num_keys);
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  cpu::block_attention({q.data(), k.data(), v.data(), cu_seqlens, limits.data(), &page, out.data(),
                        1, 1, 1, head_dim, num_keys, 1, scale, DType::float32},
                       pool);
  std::vector<double> expected;
  for (int row = 0; row < rows; ++row) {
    std::vector<double> values(head_dim);
    double total = 0;
    for (int key = 0; key < num_keys; ++key) {
      double score = 0;
      for (int d = 0; d < head_dim; ++d) {
        score += double{q.get(row * head_dim + d)} * k.get(key * head_dim + d);
      }
      const double weight = std::exp(score * scale);
      total += weight;
      for (int d = 0; d < head_dim; ++d) values[d] += weight * v.get(key * head_dim + d);
    }
    for (double value : values) expected.push_back(value / total);
  }
  return rms_error(out, expected);
}

TEST(Rounding, OfGemmHardlyGrowsWithTheNumberOfTerms) {
  struct {
    int k;
    double bound;  // one chain: 2.6, 3.3, 5.9, 9.5, 19, 33
  } cases[] = {{64, 1.9}, {100, 2.4}, {384, 4}, {1024, 5}, {4096, 6}, {12288, 7}};
  for_each_isa([&] {
    Rng rng(21);
    for (const auto& c : cases) EXPECT_LE(gemm_error(rng, 24, 96, c.k), c.bound) << "k = " << c.k;
  });
}

TEST(Rounding, OfAttentionScoresHardlyGrowsWithTheHead) {
  struct {
    int head_dim;
    double bound;  // one chain: 10, 11, 14, 20
  } cases[] = {{64, 8}, {80, 8}, {128, 8}, {256, 8}};
  for_each_isa([&] {
    Rng rng(22);
    for (const auto& c : cases) {
      EXPECT_LE(attention_error(rng, 600, c.head_dim, 100, 4), c.bound)
          << "head_dim = " << c.head_dim;
    }
  });
}

TEST(Rounding, OfAttentionHardlyGrowsWithTheNumberOfKeys) {
  struct {
    int num_keys;
    double bound;  // one chain: 5.1, 9.6, 18
  } cases[] = {{256, 3.5}, {1000, 4}, {4096, 5.5}};
  for_each_isa([&] {
    Rng rng(23);
    for (const auto& c : cases) {
      EXPECT_LE(attention_error(rng, 40, 64, c.num_keys, 0.01f), c.bound)
          << "num_keys = " << c.num_keys;
    }
  });
}

}  // namespace
}  // namespace optimus
