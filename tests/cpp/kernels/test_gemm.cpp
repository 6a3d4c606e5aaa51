// gemm and pack_gemm_weight: values, packing, and bitwise independence of a row from its batch.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

struct Problem {
  Problem(Rng& rng, int rows, int n, int k, DType dtype)
      : rows(rows),
        n(n),
        k(k),
        x(random_tensor(rng, dtype, static_cast<size_t>(rows) * k)),
        weight(random_tensor(rng, dtype, static_cast<size_t>(n) * k)),
        packed(dtype, packed_gemm_weight_size(n, k)) {
    pack_gemm_weight(weight.data(), packed.data(), n, k, dtype);
  }

  // Rows [first, first + count) of x, alone.
  Tensor run(int first, int count, DType out_dtype, ThreadPool& pool) const {
    Tensor out(out_dtype, static_cast<size_t>(count) * n);
    const char* start = static_cast<const char*>(x.data()) + first * k * dtype_size(x.dtype());
    cpu::gemm({start, packed.data(), out.data(), count, n, k, x.dtype(), out_dtype}, pool);
    return out;
  }

  std::vector<double> reference() const {
    std::vector<double> out;
    for (int m = 0; m < rows; ++m) {
      for (int c = 0; c < n; ++c) {
        double sum = 0;
        for (int i = 0; i < k; ++i) sum += double{x.get(m * k + i)} * weight.get(c * k + i);
        out.push_back(sum);
      }
    }
    return out;
  }

  int rows, n, k;
  Tensor x, weight, packed;
};

TEST(Gemm, MatchesPlainLoops) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(6);
    ThreadPool pool(2);
    int shapes[][3] = {{1, 1, 1},   {3, 5, 7},    {8, 32, 16},  {9, 33, 17},   {13, 31, 100},
                       {70, 95, 3}, {1, 384, 96}, {66, 64, 65}, {131, 40, 64}, {2, 70, 1000}};
    for (auto& shape : shapes) {
      SCOPED_TRACE(::testing::Message() << shape[0] << " x " << shape[1] << " x " << shape[2]);
      Problem problem(rng, shape[0], shape[1], shape[2], dtype);
      auto expected = problem.reference();
      expect_close(problem.run(0, shape[0], dtype, pool), expected);
      expect_close(problem.run(0, shape[0], DType::float32, pool), expected);
      expect_close(problem.run(0, shape[0], DType::bfloat16, pool), expected);
    }
  });
}

TEST(Gemm, RowsDoNotDependOnTheirBatch) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(7);
    ThreadPool one(1), two(2), three(3);
    Problem problem(rng, 77, 101, 384, dtype);
    Tensor all = problem.run(0, 77, dtype, two);
    expect_same_bits(problem.run(0, 77, dtype, one), 0, all, 0, all.size());
    expect_same_bits(problem.run(0, 77, dtype, three), 0, all, 0, all.size());
    for (int count = 1; count <= 20; ++count) {
      int first = random_int(rng, 0, 77 - count);
      Tensor some = problem.run(first, count, dtype, two);
      expect_same_bits(some, 0, all, static_cast<size_t>(first) * 101, some.size());
    }
    for (int row = 0; row < 77; ++row) {
      expect_same_bits(problem.run(row, 1, dtype, one), 0, all, row * 101, 101);
    }
  });
}

TEST(Gemm, RowsDoNotDependOnTheirGroupWhenKIsLarge) {
  Rng rng(8);
  ThreadPool pool(2);
  Problem problem(rng, 9, 33, 20000, DType::float32);  // few rows fit the scratch at once
  Tensor all = problem.run(0, 9, DType::float32, pool);
  for (int row = 0; row < 9; ++row) {
    expect_same_bits(problem.run(row, 1, DType::float32, pool), 0, all, row * 33, 33);
  }
}

TEST(Gemm, AvxInstructionSetsAgreeBitForBit) {
  if (cpu::best_isa() != cpu::Isa::avx512) GTEST_SKIP() << "needs AVX-512";
  Rng rng(9);
  ThreadPool pool(2);
  Problem problem(rng, 19, 50, 123, DType::float32);
  Tensor wide = problem.run(0, 19, DType::float32, pool);
  cpu::set_active_isa(cpu::Isa::avx2);
  Tensor narrow = problem.run(0, 19, DType::float32, pool);
  cpu::set_active_isa(cpu::best_isa());
  expect_same_bits(wide, 0, narrow, 0, wide.size());
}

TEST(PackGemmWeight, LaysOutZeroPaddedPanels) {
  Rng rng(10);
  int n = 45, k = 7;
  Tensor weight = random_tensor(rng, DType::float32, n * k);
  Tensor packed(DType::float32, packed_gemm_weight_size(n, k));
  ASSERT_EQ(packed.size(), 2u * 7 * kGemmPanel);
  pack_gemm_weight(weight.data(), packed.data(), n, k, DType::float32);
  for (int c = 0; c < 2 * kGemmPanel; ++c) {
    for (int i = 0; i < k; ++i) {
      float expected = c < n ? weight.get(c * k + i) : 0.0f;
      EXPECT_EQ(packed.get((c / kGemmPanel * k + i) * kGemmPanel + c % kGemmPanel), expected);
    }
  }
  EXPECT_TRUE(packed.guards_intact());
}

TEST(Gemm, RejectsBadArguments) {
  ThreadPool pool(1);
  Tensor x(DType::float32, 64);
  GemmParams params{x.data(), x.data(), x.data(), 1, 0, 4, DType::float32, DType::float32};
  expect_invalid([&] { cpu::gemm(params, pool); }, "[gemm] need rows >= 0, n >= 1, k >= 1");
  params.n = 4;
  params.k = 1 << 20;
  expect_invalid([&] { cpu::gemm(params, pool); }, "[gemm] k must be below");
  params.k = 4;
  params.packed_weight = nullptr;
  expect_invalid([&] { cpu::gemm(params, pool); }, "[gemm] null pointer");
  params.rows = 0;
  cpu::gemm(params, pool);  // nothing to do
  expect_invalid([&] { pack_gemm_weight(x.data(), x.data(), 0, 4, DType::float32); }, "got 0, 4");
}

}  // namespace
}  // namespace optimus
