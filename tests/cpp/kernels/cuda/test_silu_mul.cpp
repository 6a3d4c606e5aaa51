// silu_mul on the GPU against the CPU twin.
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

using CudaSiluMul = GpuTest;

TEST_F(CudaSiluMul, MatchesTheCpuTwin) {
  Rng rng(121);
  for_each_dtype([&](DType dtype) {
    for (int intermediate : {1, 9, 64, 100, 768, 9728}) {
      for (int rows : {0, 1, 33}) {
        Tensor gate_up = random_tensor(rng, dtype, size_t(rows) * 2 * intermediate, 5);
        Tensor out(dtype, size_t(rows) * intermediate);
        DeviceTensor device_in(gate_up), device_out(out);
        cpu::silu_mul({gate_up.data(), out.data(), rows, intermediate, dtype}, pool);
        cuda::silu_mul({device_in.data(), device_out.data(), rows, intermediate, dtype}, nullptr);
        expect_near_twin(device_out.read(), out);
      }
    }
  });
}

TEST_F(CudaSiluMul, GatesInTurn) {
  Rng rng(122);
  for_each_dtype([&](DType dtype) {
    for (int intermediate : {8, 72, 3072}) {
      const int rows = 17;
      Tensor gate_up = random_tensor(rng, dtype, size_t(rows) * 2 * intermediate, 5);
      Tensor out(dtype, size_t(rows) * intermediate);
      DeviceTensor device_in(gate_up), device_out(out);
      cpu::silu_mul({gate_up.data(), out.data(), rows, intermediate, dtype, true}, pool);
      cuda::silu_mul({device_in.data(), device_out.data(), rows, intermediate, dtype, true},
                     nullptr);
      expect_near_twin(device_out.read(), out);
    }
  });
}

TEST_F(CudaSiluMul, LargeGates) {
  Tensor gate_up(DType::float32, 16), out(DType::float32, 8);
  const float gates[] = {-1e4f, -100, -88, -20, 0, 20, 100, 1e4f};
  for (int i = 0; i < 8; ++i) {
    gate_up.set(i, gates[i]);
    gate_up.set(8 + i, 2.0f);
  }
  DeviceTensor device_in(gate_up), device_out(out);
  cuda::silu_mul({device_in.data(), device_out.data(), 1, 8, DType::float32}, nullptr);
  Tensor result = device_out.read();
  for (int i = 0; i < 8; ++i) {
    double expected = gates[i] / (1 + std::exp(-double(gates[i]))) * 2;
    EXPECT_NEAR(result.get(i), expected, 1e-5 * std::abs(expected) + 1e-30) << "gate " << gates[i];
  }
}

}  // namespace
}  // namespace optimus
