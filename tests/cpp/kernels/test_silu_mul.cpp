// silu_mul, over ordinary and extreme gates.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

TEST(SiluMul, MatchesPlainLoops) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(5);
    ThreadPool pool(2);
    for (int width : {1, 16, 33, 1024}) {
      for (int rows : {0, 1, 50}) {
        Tensor gate_up = random_tensor(rng, dtype, rows * 2 * width, 4);
        Tensor out(dtype, rows * width);
        cpu::silu_mul({gate_up.data(), out.data(), rows, width, dtype}, pool);
        std::vector<double> expected;
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < width; ++i) {
            double gate = gate_up.get(r * 2 * width + i);
            double up = gate_up.get(r * 2 * width + width + i);
            expected.push_back(gate / (1 + std::exp(-gate)) * up);
          }
        }
        expect_close(out, expected);
      }
    }
  });
}

TEST(SiluMul, StaysFiniteAtTheExtremes) {
  for_each_isa_and_dtype([](DType dtype) {
    ThreadPool pool(1);
    std::vector<float> gates = {0, -0.0f, 1e-30f, -87, -88, -89, -1e4f, -3e38f, 88, 1e4f, 3e38f};
    int width = static_cast<int>(gates.size());
    Tensor gate_up(dtype, 2 * width), out(dtype, width);
    for (int i = 0; i < width; ++i) {
      gate_up.set(i, gates[i]);
      gate_up.set(width + i, 1);
    }
    cpu::silu_mul({gate_up.data(), out.data(), 1, width, dtype}, pool);
    for (int i = 0; i < width; ++i) {
      double gate = gate_up.get(i);
      double expected = gate < -87 ? 0 : gate / (1 + std::exp(-gate));
      EXPECT_NEAR(out.get(i), expected, 1e-2 * std::abs(expected) + 3) << gates[i];
      EXPECT_TRUE(std::isfinite(out.get(i))) << gates[i];
    }
  });
}

TEST(SiluMul, PropagatesNan) {
  for_each_isa_and_dtype([](DType dtype) {
    ThreadPool pool(1);
    Tensor gate_up(dtype, 64), out(dtype, 32);  // all NaN
    for (int i = 0; i < 32; ++i) out.set(i, 0);
    cpu::silu_mul({gate_up.data(), out.data(), 1, 32, dtype}, pool);
    for (int i = 0; i < 32; ++i) EXPECT_TRUE(std::isnan(out.get(i)));
  });
}

TEST(SiluMul, RejectsBadArguments) {
  ThreadPool pool(1);
  Tensor out(DType::float32, 8);
  SiluMulParams params{nullptr, out.data(), 1, 8, DType::float32};
  expect_invalid([&] { cpu::silu_mul(params, pool); }, "[silu_mul] null pointer");
  params.intermediate = 0;
  expect_invalid([&] { cpu::silu_mul(params, pool); }, "intermediate 0");
}

TEST(SiluMul, GatesInTurn) {
  Rng rng(9);
  ThreadPool pool(2);
  const int rows = 3, width = 24;
  Tensor apart = random_tensor(rng, DType::float32, rows * 2 * width, 3);
  Tensor in_turn(DType::float32, rows * 2 * width), out(DType::float32, rows * width),
      expected(DType::float32, rows * width);
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < width; ++c) {
      const int at = row * 2 * width + c / kGatesInTurn * 2 * kGatesInTurn + c % kGatesInTurn;
      in_turn.set(at, apart.get(row * 2 * width + c));
      in_turn.set(at + kGatesInTurn, apart.get(row * 2 * width + width + c));
    }
  }
  cpu::silu_mul({apart.data(), expected.data(), rows, width, DType::float32}, pool);
  cpu::silu_mul({in_turn.data(), out.data(), rows, width, DType::float32, true}, pool);
  expect_same_bits(out, 0, expected, 0, rows * width);
  SiluMulParams params{in_turn.data(), out.data(), 1, 12, DType::float32, true};
  expect_invalid([&] { cpu::silu_mul(params, pool); }, "got intermediate 12");
}

}  // namespace
}  // namespace optimus
