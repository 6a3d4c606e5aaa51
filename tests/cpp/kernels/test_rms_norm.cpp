// rms_norm: plain, with residual, with a gather of rows, in place.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

constexpr float kEps = 1e-6f;

void append_norm(const std::vector<double>& x, const Tensor& weight, std::vector<double>& out) {
  double squares = 0;
  for (double value : x) squares += value * value;
  double scale = 1 / std::sqrt(squares / x.size() + kEps);
  for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] * scale * weight.get(i));
}

std::vector<double> row_of(const Tensor& x, int row, int hidden) {
  std::vector<double> values(hidden);
  for (int i = 0; i < hidden; ++i) values[i] = x.get(static_cast<size_t>(row) * hidden + i);
  return values;
}

TEST(RmsNorm, MatchesPlainLoops) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(2);
    ThreadPool pool(2);
    for (int hidden : {1, 15, 16, 64, 100, 384}) {
      for (int rows : {0, 1, 5, 130}) {
        Tensor x = random_tensor(rng, dtype, rows * hidden, 3);
        Tensor weight = random_tensor(rng, dtype, hidden);
        Tensor out(dtype, rows * hidden);
        RmsNormParams params{x.data(), nullptr, nullptr, weight.data(), out.data(),
                             rows,     hidden,  kEps,    dtype};
        cpu::rms_norm(params, pool);
        std::vector<double> expected;
        for (int r = 0; r < rows; ++r) append_norm(row_of(x, r, hidden), weight, expected);
        expect_close(out, expected);

        params.out = x.data();  // in place
        cpu::rms_norm(params, pool);
        expect_same_bits(x, 0, out, 0, rows * hidden);
      }
    }
  });
}

TEST(RmsNorm, AddsToResidual) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(3);
    ThreadPool pool(2);
    for (int hidden : {16, 77, 384}) {
      int rows = 60;
      Tensor x = random_tensor(rng, dtype, rows * hidden),
             weight = random_tensor(rng, dtype, hidden);
      Tensor residual = random_tensor(rng, dtype, rows * hidden), out(dtype, rows * hidden);
      Tensor before = residual;
      cpu::rms_norm({x.data(), residual.data(), nullptr, weight.data(), out.data(), rows, hidden,
                     kEps, dtype},
                    pool);
      std::vector<double> sums, expected;
      for (size_t i = 0; i < residual.size(); ++i) {
        sums.push_back(static_cast<double>(before.get(i)) + x.get(i));
      }
      expect_close(residual, sums);
      // What is normed is the residual as stored, after rounding.
      for (int r = 0; r < rows; ++r) append_norm(row_of(residual, r, hidden), weight, expected);
      expect_close(out, expected);
    }
  });
}

TEST(RmsNorm, GathersRows) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(4);
    ThreadPool pool(2);
    int hidden = 384, inputs = 90, rows = 71;
    Tensor x = random_tensor(rng, dtype, inputs * hidden),
           weight = random_tensor(rng, dtype, hidden);
    Tensor out(dtype, rows * hidden);
    auto row_idx = random_permutation(rng, inputs);
    cpu::rms_norm(
        {x.data(), nullptr, row_idx.data(), weight.data(), out.data(), rows, hidden, kEps, dtype},
        pool);
    std::vector<double> expected;
    for (int r = 0; r < rows; ++r) append_norm(row_of(x, row_idx[r], hidden), weight, expected);
    expect_close(out, expected);

    // With a residual of zeros the same rows come out, and only they are added to.
    Tensor residual(dtype, inputs * hidden), again(dtype, rows * hidden);
    for (size_t i = 0; i < residual.size(); ++i) residual.set(i, 0.0f);
    cpu::rms_norm({x.data(), residual.data(), row_idx.data(), weight.data(), again.data(), rows,
                   hidden, kEps, dtype},
                  pool);
    expect_close(again, expected);
    for (int r = 0; r < inputs; ++r) {
      auto sum = row_of(residual, row_idx[r], hidden), row = row_of(x, row_idx[r], hidden);
      EXPECT_EQ(sum, r < rows ? row : std::vector<double>(hidden, 0.0));
    }
  });
}

TEST(RmsNorm, RejectsBadArguments) {
  ThreadPool pool(1);
  Tensor x(DType::float32, 8), weight(DType::float32, 4), out(DType::float32, 8);
  int32_t idx[2] = {0, -1};
  RmsNormParams params{x.data(), nullptr, idx,  weight.data(), out.data(),
                       2,        4,       kEps, DType::float32};
  expect_invalid([&] { cpu::rms_norm(params, pool); },
                 "[rms_norm] row_idx[1] must be >= 0, got -1");
  params.out = x.data();
  expect_invalid([&] { cpu::rms_norm(params, pool); }, "out must not alias x");
  params.eps = -1;
  expect_invalid([&] { cpu::rms_norm(params, pool); }, "eps must be >= 0, got -1");
}

}  // namespace
}  // namespace optimus
